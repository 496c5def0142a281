"""One tiny model for all tests of this folder; none of them changes it."""

import pytest
from squares import WORDS

from lit_modules.falcon_eye import Prompt, TinyVLM


@pytest.fixture(scope="session")
def backbone():
    return TinyVLM(seed=1).build([*WORDS, *Prompt().texts()] * 3)
