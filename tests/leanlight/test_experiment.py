"""How an experiment's command line reads values."""

from jsonargparse import ArgumentParser

from leanlight.experiment import _try_integers_first


def test_a_whole_number_of_batches_stays_one_whatever_order_typing_has_kept():
    parser = ArgumentParser()
    parser.add_argument("--batches", type=float | int | None)
    assert repr(parser.parse_args(["--batches=2"]).batches) == "2.0"
    _try_integers_first(parser)
    assert [repr(parser.parse_args([f"--batches={text}"]).batches) for text in ("2", "0.5", "null")] == [
        "2",
        "0.5",
        "None",
    ]
