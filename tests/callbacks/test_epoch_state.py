"""The guard around private names of Lightning."""

from types import SimpleNamespace

import lightning
import pytest

from callbacks.common import lightning_internals
from callbacks.epoch_state import capture_epoch
from leanlight.contracts import UserError


def test_a_lightning_that_lacks_a_private_name_is_named_in_one_line():
    with pytest.raises(UserError, match="_logger_connector") as error:
        capture_epoch(SimpleNamespace(), None)
    assert lightning.__version__ in str(error.value)
    assert "\n" not in str(error.value)


def test_a_private_name_that_cannot_be_imported_is_named():
    with pytest.raises(UserError, match=r"^resuming uses internals .*'_Gone'"), lightning_internals("resuming"):
        from lightning.pytorch import _Gone  # noqa: F401
