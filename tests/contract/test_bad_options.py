"""Every option of every command but those of Lightning refuses a wrong value in one line, and nothing is written."""

import re
import shlex
from functools import cache, partial
from importlib import import_module

import pytest

from leanlight.__main__ import main
from leanlight.cli import arguments
from leanlight.registry import commands

# A command line of each command on which nothing is wrong before an option is added; files as `folder` makes them.
WHOLE = {
    "run": ["classifier/pipelines/fashion_mnist_small"],
    "reproduce": ["classifier/tables/demo", "--dry-run"],
    "report": ["--all"],
    "benchmark": ["classifier"],
    "data list": [],
    "data prepare": ["digits"],
    "data check": ["digits"],
    "export": ["nowhere"],
    "push": ["nowhere", "me/x"],
    "pull": ["me/x"],
    "select": ["features.safetensors", "--rule=random", "--keep=0.5"],
    "methods": [],
    "play": ["nowhere"],
    "recommend": ["nowhere"],
    "audit": ["--data=samples.jsonl", "--judge=keyword"],
    "flower": ["sfedca/digits_small"],
    "sweep": ["sweeps/classifier_lr"],
    "dashboard": ["esvae"],
}
# Of options whose type is text or a file to read: words to put on the command line, each a wrong one.
WRONG = {
    "run pipeline": ["nowhere.yaml", "classifier/pipelines/fashion_mnist_smal", "binary", "empty.yaml", "clips"],
    "run --from": ["--from=techer"],
    "run --set": ["--set=student", "--set=student=1", "--set=studend.a=1"],
    "run --id": ["--id=../x", "--id='a b'"],
    "reproduce table": ["nowhere.yaml", "classifier/tables/demmo", "binary", "empty.yaml", "clips"],
    "reproduce --devices": ["--devices=all", "--devices=-1"],
    "reproduce --only": ["--only=convnett"],
    "reproduce --seed": ["--seed=77"],
    "report tables": ["nowhere.json", "binary", "empty.yaml", "clips"],
    "benchmark method": ["clasifier", "../classifier"],
    "benchmark --compare": ["--compare=nowhere.json", "--compare nowhere.json nowhere.json", "--compare binary binary"],
    "benchmark --commits": ["--commits=nowhere", "--commits nowhere nowhere", "--commits HEAD", "--commits '' ''"],
    "data prepare name": ["digitz"],
    "data prepare --root": ["shapes --root=binary", "shapes --root=binary/x"],
    "data prepare --path": ["emotion_folder --path=nowhere", "vtab --path=nowhere", "diginetica --path=nowhere"],
    "data prepare --images": ["digits --images=clips", "figstep --path=clips --images=nowhere"],
    "data prepare --encoder": [
        *("emotion_folder --path=clips --encoder=text", "emotion_folder --path=clips --encoder=smell=clips"),
        *("digits --encoder=text=clips", "emotion_folder --path=clips --encoder=text=nowhere"),
    ],
    "data prepare --device": ["emotion_folder --path=clips --encoder=text=encoder --device=abacus"],
    "data check name": ["digitz"],
    "data check --root": ["mnist --root=binary", "mnist --root=nowhere"],
    "data check --path": ["vtab --path=nowhere", "emotion_folder --path=nowhere", "diginetica --path=nowhere"],
    "data check --images": ["digits --images=clips", "figstep --path=clips --images=nowhere"],
    "export source": ["nowhere", "binary", "clips", "empty.yaml"],
    "push source": [f"{source} me/x" for source in ("nowhere", "binary", "clips", "empty.yaml")],
    "push repo": ["finished me", "finished me/x/y", "finished 'me/a b'"],
    "push --message": ["--message=", "--message=' '"],
    "pull repo": ["me", "me/x/y", "datasets/me/x", "'me/a b'"],
    "pull --revision": ["--revision=", "--revision='a b'", "--revision=../x"],
    "select features": [f"{source} --rule=random --keep=1" for source in ("nowhere", "binary", "clips", "empty.yaml")],
    "select --rule": ["--rule=randon", "--rule=nowhere.Rule", "--rule=pathlib.Path", "--rule=subprocess.Popen"],
    "select --set": ["--set=bins", "--set=bims=2", "--set={", "--set=[1]"],
    "select --config": ["--config=nowhere.yaml", "--config=binary", "binary --rule=random --config=keep.yaml"],
    "select --patches": ["--patches=drop_ratio=0.5", "--images=made --patches=drop_ratio=7"],
    "methods name": ["clasifier"],
    "play source": ["nowhere", "binary", "clips", "empty.yaml"],
    "recommend source": [f"{source} --session=1" for source in ("nowhere", "binary", "clips", "empty.yaml")],
    "recommend --session": ["--session=", "--session=1,,2"],
    "recommend --input": ["--input=nowhere.csv", "--output=made.csv --input=nowhere.csv"],
    "audit --data": ["--data=nowhere", "--data=binary", "--data=empty.yaml"],
    "audit --judge": ["--judge=keywort", "--judge=keyword", "--judge=file:nowhere", "--judge=http:nowhere"],
    "audit --images": ["--data=pictured.jsonl --images=nowhere", "--data=pictured.jsonl --images=binary"],
    "audit --format": ["--format=figstp"],
    "audit --columns": ["--columns=instruction", "--columns=instrution=question", "--columns=instruction=nowhere"],
    "audit --threshold": [f"--threshold={each}" for each in ("response=many", "respons=0.5", "response=1", "1")],
    "audit --fail-above": ["--fail-above=many", "--fail-above=-1", "--fail-above=nan", "--fail-above=answer=0.1"],
    "flower configs": ["sfedca/digits_smal", "nowhere.yaml"],
    "dashboard source": ["esvay", "nowhere", "binary", "empty.yaml", "clips"],
    "dashboard --runs-root": ["esvae --runs-root=nowhere"],
    "sweep file": ["sweeps/classifier_l", "nowhere.yaml", "binary", "empty.yaml", "clips"],
    "audit --compare": ["--compare=nowhere", "--data=a --compare nowhere nowhere"],
}
#: Any text names a package, or somebody and something at W&B; a category is looked up in a model, which
#: `tests/cli/test_recommend.py` has, a connection in Flower's own configuration.
FREE = ("--trust", "--category", "--superlink", "--entity", "--project")
FILES = {
    "binary": b"\x00\xff\xfe not a text",
    "empty.yaml": b"",
    "keep.yaml": b"keep: 7\n",
    "samples.jsonl": b'{"instruction": "a", "response": "b"}',
    "pictured.jsonl": b'{"instruction": "a", "image": "a.png"}',
    "clips/a.txt": b"words",
    "encoder/config.json": b"{}",
    "finished/summary.json": b'{"status": "finished"}',
}


class Seen(Exception):
    """The parser that a command has made."""


@cache
def parsers():
    """The parser of each command, by name; of `data`, of each of its own commands."""
    found = {}

    def see(parser, *_):
        raise Seen(parser)

    with pytest.MonkeyPatch.context() as patch:
        usual = arguments.Parser.parse_args
        patch.setattr(
            arguments.Parser, "parse_args", lambda p, *a: (usual if p.prog == "leanlight data" else see)(p, *a)
        )
        for name, command in commands().items():
            for inner in ("list", "prepare", "check") if name == "data" else ("",):
                if command.module != "leanlight.cli.train":
                    with pytest.raises(Seen) as seen:
                        import_module(command.module).main([inner])
                    found[f"{name} {inner}".strip()] = seen.value.args[0]
    return found


def wrong(name, action):
    """Command lines on which the option (or the argument without a name) has a wrong value."""
    option = action.option_strings[-1] if action.option_strings else action.dest
    whole = [*name.split(), *WHOLE[name]]
    flag = f"{option}=" if option.startswith("--") else option
    if action.nargs == 0:
        values = [f"{option}=3"] if option.startswith("--") else []
    elif action.choices:
        values = [f"{flag}nowhere"]
    elif isinstance(action.type, partial):
        values = [f"{flag}{value}" for value in ("many", "nan", "-7", "1e400", "")]
    elif action.type in (arguments.output_file, arguments.output_folder):
        values = [f"{flag}binary/inside", f"{flag}{'x' * 300}"]
    else:
        values = []
    values += WRONG.get(f"{name} {option}", [])
    assert values or option in FREE, f"{name} {option}: give WRONG a value that it refuses"
    for value in values:
        words = shlex.split(value)
        yield option, [*(whole if value.startswith("-") else name.split()), *words]


CASES = [
    pytest.param(option, line, id=" ".join(line)[:90])
    for name, parser in parsers().items()
    for action in parser._actions
    if action.dest != "help"
    for option, line in wrong(name, action)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(("option", "line"), CASES)
def test_a_wrong_value_of_an_option_is_one_line(option, line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LEANLIGHT_DATA", raising=False)
    before = sorted(folder.rglob("*"))
    code = main(line)
    error = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(error) == 1
    assert error[0].startswith("leanlight: error: ")
    given = {part for word in line[1:] for part in re.split(r"[=,]", word) if len(part) > 1 and option not in part}
    assert option.lstrip("-") in error[0] or any(part in error[0] for part in given), error[0]
    assert len(error[0]) < 400
    assert sorted(folder.rglob("*")) == before


def test_every_command_is_tried():
    assert WHOLE.keys() == parsers().keys()
    options = {
        f"{name} {each}" for name, p in parsers().items() for a in p._actions for each in (*a.option_strings, a.dest)
    }
    assert WRONG.keys() <= options
    assert len(CASES) > 150
