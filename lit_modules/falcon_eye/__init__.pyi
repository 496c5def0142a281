from .parsing import answer_values as answer_values
from .parsing import parse as parse
from .prompt import (
    CATEGORY_KEY as CATEGORY_KEY,
)
from .prompt import (
    EXPLANATION_KEY as EXPLANATION_KEY,
)
from .prompt import (
    JUDGMENT_KEYS as JUDGMENT_KEYS,
)
from .prompt import Prompt as Prompt
