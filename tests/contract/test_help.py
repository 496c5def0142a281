"""Every argument that a user can set says what it is, and help is short."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest
from docstring_parser import parse

from leanlight.registry import METHODS

PACKAGES = [
    "callbacks",
    "datamodules",
    "lit_modules.nn",
    *sorted({info.module.rsplit(".", 1)[0] for info in METHODS.values()}),
]
PACKAGES += [f"lit_modules.{name}" for name in METHODS if f"lit_modules.{name}" not in PACKAGES]


def public_classes():
    for package in dict.fromkeys(PACKAGES):
        module = import_module(package)
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isclass(found):
                yield found


def documented(found):
    """Arguments that the docstrings of a class and of those it hands arguments on to explain."""
    texts = [
        text for base in inspect.getmro(found) for text in (base.__dict__.get("__doc__"), base.__init__.__doc__) if text
    ]
    return {p.arg_name for text in texts for p in parse(text).params if p.description}


@pytest.mark.parametrize("found", public_classes(), ids=lambda found: f"{found.__module__}.{found.__name__}")
def test_every_argument_of_a_public_class_has_a_help_text(found):
    signature = inspect.signature(found)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = {name for name, parameter in signature.parameters.items() if parameter.kind not in kinds}
    assert names - documented(found) == set()


def test_the_help_of_training_is_short_and_loads_nothing_heavy():
    code = (
        "import sys; from leanlight.__main__ import main; main(['fit', '--help']);"
        "print('HEAVY', sorted({'torch', 'lightning', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "HEAVY []"
    assert len(lines) < 150
    marks = ("\n  --config", "\n  --run.id", "\n  --nan_guard", "\n  --trainer.max_epochs")
    places = [done.stdout.index(mark) for mark in marks]  # what one sets first stands first
    assert places == sorted(places)
    for line in lines:
        if line.startswith("  --"):
            assert len(line.split(maxsplit=1)) == 2, f"no help text: {line}"


def test_the_help_of_a_class_explains_its_arguments_and_lists_no_subclasses():
    command = [sys.executable, "-m", "leanlight", "fit", "--model.help", "lit_modules.classifier.ImageClassifier"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "known subclasses" not in text
    assert len(text.splitlines()) < 100
    assert "label_smoothing" in text


@pytest.mark.parametrize("words", [["--help"], ["--list"]])
def test_help_of_selecting_and_its_list_load_nothing_heavy(words):
    code = (
        f"import sys; from leanlight.__main__ import main\ntry: main(['select', *{words}])\nexcept SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'lightning', 'wandb', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
