"""How an experiment's command line reads values."""

import lightning.pytorch as pl

import leanlight
from leanlight.contracts import UserError
from leanlight.messages import with_prefix
from leanlight.parser import LeanlightParser, _in_yaml, restrict


def test_a_whole_number_of_batches_stays_one_whatever_order_typing_has_kept():
    parser = LeanlightParser()
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    action = next(action for action in parser._actions if action.dest == "trainer.limit_val_batches")
    action._typehint = float | int | None
    assert repr(parser.parse_args(["--trainer.limit_val_batches=2"]).trainer.limit_val_batches) == "2.0"
    restrict(parser)
    read = [parser.parse_args([f"--trainer.limit_val_batches={text}"]) for text in ("2", "0.5", "null")]
    assert [repr(config.trainer.limit_val_batches) for config in read] == ["2", "0.5", "None"]
    clipped = [parser.parse_args([f"--trainer.gradient_clip_val={text}"]) for text in ("1", "1.0")]
    assert [repr(config.trainer.gradient_clip_val) for config in clipped] == ["1", "1.0"]


def test_null_empties_an_argument_of_an_inner_class(tmp_path):
    inner = "model.init_args.distiller.init_args."
    changes = {
        f"{inner}augment": None,
        f"{inner}inner_optimizer": {"lr": 0.5},
        "trainer.default_root_dir": str(tmp_path),
    }
    distiller = leanlight.build("at_bptt/fashion_mnist_small", changes).model.distiller
    assert (distiller.augment, distiller.outer_augment) == (None, "flip_rotate")
    assert distiller.inner_optimizer.lr == 0.5


def test_words_for_an_inner_class_are_yaml_again():
    shown = ["--a=None", "--b={'c': None, 'd': [True, 'None']}", "--e=['f', 1]", "--g=text", "--h='quoted'", "--i=1e-3"]
    given = ["--a=null", '--b={"c": null, "d": [true, "None"]}', '--e=["f", 1]', "--g=text", "--h='quoted'", "--i=1e-3"]
    assert [_in_yaml(word) for word in shown] == given


def test_an_argument_of_several_classes_is_found_by_the_value_that_was_refused():
    inner = {"augment": "dsa", "recipe": {"augment": "flop"}}
    resolved = {
        "model": {"init_args": {"distiller": {"init_args": inner}, "evaluation": {"recipe": {"augment": "dsa"}}}},
        "data": {"init_args": {"augment": None}},
    }
    for text, expected in (
        ("augment: expected flip, got 'flop'", "model.init_args.distiller.init_args.recipe.augment: "),
        ("augment: expected flip, got 'dsa'", "augment: "),  # two of them have it
    ):
        assert str(with_prefix(UserError(text), resolved)) == expected + text.partition(": ")[2]
