"""Federations by messages of Flower, without processes and sockets: what the callback alone does, bit for bit."""

import pytest
import torch

pytest.importorskip("flwr")

from flower_grid import CallGrid
from flwr.app import ArrayRecord

from leanlight.contracts import UserError
from leanlight.experiment import LeanlightCLI
from leanlight.flower import FederationStrategy, client_app
from leanlight.flower.member import member, rounds_of
from leanlight.flower.server import find_nodes
from leanlight.invocation import expand

# Smaller than the smallest configs, which train the same way.
MLP = "{class_path: lit_modules.nn.MLP, init_args: {in_channels: 1, num_classes: 10, hidden: [8], image_size: 8}}"
SFEDCA = ["--config=sfedca/digits_small", "--model.local.epochs=1", "--model.network.init_args.time_steps=2"]
PLAIN = ["--config=sfedca/digits_small", "--model.local.epochs=1", f"--model.network={MLP}"]
SCAFFOLD = [*PLAIN, "--model.objective=lit_modules.federated.Scaffold"]
SFEDHIFI = ["--config=sfedhifi/digits_small", "--model.local.epochs=1"]


def callbacks(**server):
    given = {"selector": selector("RandomClients"), "probe": 0, "every_n_epochs": 0, **server}
    return f"--trainer.callbacks={[{'class_path': 'callbacks.FederatedRounds', 'init_args': given}]}"


def selector(name, package="federated"):
    return {"class_path": f"lit_modules.{package}.{name}"}


def built(folder, *words, rounds=2):
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0", "--export_artifact.enabled=false"]
    place = f"--trainer.default_root_dir={folder}"
    return LeanlightCLI(expand(["fit", *words, f"--trainer.max_epochs={rounds}", place, *quiet]))


def alone(folder, *words, **options):
    cli = built(folder / "alone", *words, **options)
    cli.start()
    return cli


def on_flower(folder, *words, nodes=3, lose=None, **options):
    cli = built(folder / "flower", *words, **options)
    grid = CallGrid(client_app(cli.config_text()), nodes, **({"lose": lose} if lose else {}))
    FederationStrategy(cli.model, rounds_of(cli), cli.start).start(grid, ArrayRecord(), timeout=5.0)
    return cli, grid


def assert_same(one, other):
    theirs = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=0, msg=name)
    assert rounds_of(one).history == rounds_of(other).history  # chosen clients, scores, costs


@pytest.mark.parametrize(
    ("words", "server"),
    [
        (SFEDCA, {"selector": selector("CreditSelection", "sfedca"), "participants": 2, "candidates": 4}),
        (PLAIN, {"selector": selector("PowerOfChoice"), "participants": 2, "candidates": 4}),
        (PLAIN, {"participants": 4, "stragglers": 0.5, "dropout": 0.3}),
        (SCAFFOLD, {"participants": 8}),
        (SCAFFOLD, {"selector": selector("LargestUpdate"), "participants": 4, "candidates": 12}),
        (SFEDHIFI, {"participants": 3}),
    ],
    ids=["credit", "scored before", "random, some absent", "scaffold", "scaffold, scored after", "sfedhifi"],
)
def test_nodes_train_what_the_callback_trains_bit_for_bit(tmp_path, words, server):
    rounds = 3 if words is SCAFFOLD else 2
    one = alone(tmp_path, *words, callbacks(**server), rounds=rounds)
    other, _ = on_flower(tmp_path, *words, callbacks(**server), rounds=rounds)
    assert_same(one, other)


def test_scores_come_first_and_weights_of_the_chosen_alone_after(tmp_path):
    server = {"selector": selector("CreditSelection", "sfedca"), "participants": 2, "candidates": 4}
    cli, grid = on_flower(tmp_path, *SFEDCA, callbacks(**server), rounds=1)
    first, second = grid.calls("train"), grid.calls("query.weights")
    assert [call.kind for call in grid.seen if "client" in call.config] == ["train"] * 4 + ["query.weights"] * 2
    assert all(set(call.reply) == {"report"} for call in first)
    assert sorted(call.config["client"] for call in second) == rounds_of(cli).round.chosen
    reports = [call.reply["report"] for call in first]
    assert {report["client"]: report["score"] for report in reports} == rounds_of(cli).round.scores


def test_control_variates_stay_with_the_nodes(tmp_path):
    cli, grid = on_flower(tmp_path, *SCAFFOLD, callbacks(participants=8))
    controls = {name: record for context in grid.contexts.values() for name, record in context.state.items()}
    assert set(controls) == {f"control-{client}" for entry in rounds_of(cli).history for client in entry["chosen"]}
    # c is the mean of the c_k over all clients, when every client began with 0.
    for name, server in cli.model.controls.server.items():
        total = sum(record.to_torch_state_dict()[name].double() for record in controls.values())
        torch.testing.assert_close(server.double(), total / len(cli.datamodule.client_sizes), rtol=1e-4, atol=1e-6)


def test_a_client_whose_answer_is_lost_counts_as_dropped_out(tmp_path):
    def lose(kind, config):
        return kind == "train" and config["client"] % 2 == 0

    cli, grid = on_flower(tmp_path, *PLAIN, callbacks(participants=6), lose=lose, rounds=1)
    asked = {call.config["client"] for call in grid.calls("train")}
    assert rounds_of(cli).round.chosen == sorted(client for client in asked if client % 2)
    assert rounds_of(cli).round.dropped == sorted(client for client in asked if client % 2 == 0)


def test_a_chosen_client_that_does_not_send_its_weights_is_left_out(tmp_path):
    server = {"selector": selector("LargestUpdate"), "participants": 3, "candidates": 4}
    lost = []

    def lose(kind, config):
        if kind == "query.weights" and not lost:
            lost.append(config["client"])
            return True
        return False

    cli, _ = on_flower(tmp_path, *PLAIN, callbacks(**server), lose=lose, rounds=1)
    assert len(rounds_of(cli).round.chosen) == 2
    assert lost[0] not in rounds_of(cli).round.chosen


def test_each_client_is_asked_on_its_node(tmp_path):
    _, grid = on_flower(tmp_path, *PLAIN, callbacks(participants=12), nodes=5, rounds=1)
    assert len(grid.calls("query.clients")) == 5
    assert {call.config["client"] % 5 == call.part for call in grid.calls("train")} == {True}
    assert len({call.part for call in grid.calls("train")}) > 1


def test_nodes_without_a_partition_or_too_few_are_named(tmp_path):
    app = client_app("")
    grid = CallGrid(app, 2)
    next(iter(grid.contexts.values())).node_config = {}
    with pytest.raises(UserError, match="partition-id"):
        find_nodes(grid, 1.0)
    grid = CallGrid(app, 3)
    grid.contexts.popitem()
    with pytest.raises(UserError, match="2 of 3 nodes came within"):
        find_nodes(grid, 0.1)


def test_what_is_no_federation_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config: expected a federation.*sfedca/digits_small; got ImageClassifier"):
        rounds_of(built(tmp_path, "--config=classifier/digits_small"))


@pytest.fixture(autouse=True)
def _fresh_member():
    yield
    member.cache_clear()
