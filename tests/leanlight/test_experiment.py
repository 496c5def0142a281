"""How an experiment's command line reads values."""

import lightning.pytorch as pl

from leanlight.parser import LeanlightParser, restrict


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
