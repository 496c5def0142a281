"""The training glue on Catch: target network, evaluation, conversion, the play command."""

import functools
import json
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau

from callbacks import EnergyMeter
from datamodules import GameDataModule
from leanlight.contracts import Episode, GameMeta, Transition, UserError
from lit_modules.dsqn import DQN, DSQN, Conversion, DeepQLearning, FixedPolicy
from lit_modules.dsqn.evaluation import GameEvaluation, disturbed_weights, summary

NETWORK = {"history": 1, "frame_size": 8, "convolutions": [[4, 3, 1]], "hidden": 16}
DATA = {
    "game": "catch",
    "history": 1,
    "replay_size": 500,
    "replay_start": 50,
    "slack": 200,
    "decisions_per_epoch": 40,
    "eval_episodes": 12,
    "test_episodes": 12,
}

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
QUIET["accelerator"] = "cpu"


def fit(tmp_path, steps=10, callbacks=(), data=None, **options):
    module = DeepQLearning(functools.partial(options.pop("kind", DQN), **NETWORK), **options)
    limits = {"max_steps": steps, "num_sanity_val_steps": 0, "callbacks": list(callbacks)}
    trainer = pl.Trainer(default_root_dir=tmp_path, **limits, **QUIET)
    pl.seed_everything(0, verbose=False)
    trainer.fit(module, datamodule=GameDataModule(**{**DATA, **(data or {})}))
    return module, trainer


class Watch(pl.Callback):
    """Whether the target network equals the online network as it was before each update."""

    def __init__(self):
        self.equal, self.before = [], None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = module.network.head.weight.clone()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.equal.append(torch.equal(module.target.head.weight, self.before))


def test_the_target_network_is_a_copy_that_is_renewed_now_and_then(tmp_path):
    watch = Watch()
    fit(tmp_path, steps=9, callbacks=[watch], target_period=4)
    assert watch.equal == [True, False, False, False, True, False, False, False, True]


@pytest.mark.parametrize("rule", ["dqn", "double", "convergent"])
def test_every_rule_trains(tmp_path, rule):
    _, trainer = fit(tmp_path, rule=rule, kind=DSQN)
    assert trainer.global_step == 10
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_the_loss_is_that_of_the_batch_written_out(tmp_path):
    module, _ = fit(tmp_path, steps=3)
    torch.manual_seed(1)
    state, next_state = (torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8) for _ in range(2))
    action, reward, terminal = torch.randint(3, (6,)), torch.randn(6), torch.tensor([True, False] * 3)
    batch = Transition(state, action, reward, next_state, terminal, torch.full((6,), 0.99))
    with torch.no_grad():
        value = module.network(state / 255.0).gather(1, action[:, None])[:, 0]
        future = module.target(next_state / 255.0).max(1).values
        expected = torch.nn.functional.smooth_l1_loss(value, reward + 0.99 * future * (~terminal))
        torch.testing.assert_close(module._loss(batch, value).mean(), expected)


def test_the_memory_is_removed_when_training_has_ended_and_kept_on_request(tmp_path):
    fit(tmp_path / "a", steps=2)
    assert not (tmp_path / "a" / "replay").exists()
    fit(tmp_path / "b", steps=2, data={"keep_replay": True})
    assert (tmp_path / "b" / "replay" / "frames.npy").is_file()


def test_a_network_for_other_frames_is_found_before_training(tmp_path):
    with pytest.raises(UserError, match="frame_size"):
        fit(tmp_path, data={"history": 2})


def test_data_that_are_no_games_are_refused(tmp_path):
    from datamodules import ImageDataModule

    trainer = pl.Trainer(max_steps=1, default_root_dir=tmp_path, logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"GameData\)"):
        trainer.fit(DeepQLearning(functools.partial(DQN, **NETWORK)), datamodule=ImageDataModule("digits"))


def test_a_checkpoint_rebuilds_the_agent_without_a_game(tmp_path):
    module, trainer = fit(tmp_path, kind=DSQN)
    trainer.save_checkpoint(tmp_path / "agent.ckpt")
    again = DeepQLearning.load_from_checkpoint(tmp_path / "agent.ckpt", weights_only=True)
    state = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(again.values(state), module.values(state))
    assert again.actions == ("LEFT", "NOOP", "RIGHT")


@pytest.fixture
def source(tmp_path):
    _, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    return tmp_path / "source.ckpt"


def measure(module, tmp_path, **data):
    trainer = pl.Trainer(default_root_dir=tmp_path, **QUIET)
    (figures,) = trainer.test(module, datamodule=GameDataModule(**{**DATA, **data}), verbose=False)
    return figures


def test_a_converted_agent_is_measured(source, tmp_path):
    figures = measure(Conversion(source, time_steps=200, states=200, input_noise=[0.1], weight_noise=[0.1]), tmp_path)
    assert figures["test/agreement_robust"] > 0.8
    assert {"test/score", "test/score_gaussian_0.1", "test/score_weight_0.1"} <= set(figures)
    for kind in ("gaussian", "weight"):
        assert figures[f"test/drop_{kind}"] == pytest.approx(figures["test/score"] - figures[f"test/score_{kind}_0.1"])


def test_energy_is_that_of_one_greedy_decision(source, tmp_path):
    agent = DeepQLearning.load_from_checkpoint(source, weights_only=True)
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[EnergyMeter(batches=9)], **QUIET)
    (figures,) = trainer.test(agent, datamodule=GameDataModule(**DATA), verbose=False)
    # Catch's pixels are 0 or 1, so its first layer adds; the others multiply once for every weight.
    assert figures["test/macs"] == 4 * 6 * 6 * 16 + 16 * 3
    assert 0 < figures["test/acs"] <= 2 * 9 * 4


def test_energy_of_a_converted_agent_leaves_the_dqn_out(source, tmp_path):
    conversion = Conversion(source, time_steps=3, states=200)
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[EnergyMeter(batches=9)], **QUIET)
    (figures,) = trainer.test(conversion, datamodule=GameDataModule(**DATA), verbose=False)
    assert figures["test/macs"] == 0  # binary pixels, then spikes: nothing multiplies
    assert figures["test/acs"] > 0
    assert 0 < figures["test/agreement_robust"] <= 1


def test_a_schedule_on_a_plateau_lowers_the_rate(tmp_path):
    never_better = {"threshold": 1e9, "threshold_mode": "abs", "mode": "max", "patience": 0}
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/score", factor=0.5, **never_better)
    _, trainer = fit(tmp_path, steps=20, lr_scheduler=plateau)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-5)  # two epochs, two evaluations


def test_the_source_of_a_conversion_stays_outside_and_draws_nothing(source, tmp_path):
    conversion = Conversion(source, time_steps=3, states=50)
    before = torch.get_rng_state()
    measure(conversion, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name.split(".")[0] for name in conversion.state_dict()} == {"network"}
    with pytest.raises(UserError, match=r"^source_checkpoint: expected one for states"):
        measure(Conversion(source), tmp_path, history=2)


def test_pictures_of_a_test_show_play_scores_curves_and_noise(tmp_path):
    module, trainer = fit(tmp_path, steps=20, input_noise=[0.1, 0.2])
    trainer.test(module, datamodule=GameDataModule(**DATA), verbose=False)
    items = module.media("test")
    assert set(items) == {"play", "scores", "evaluation", "q_values", "epsilon", "returns", "gaussian_noise"}
    curve = items["evaluation"]
    ((name, mean),) = curve.series.items()
    spread = module._history["score_std"]
    points = list(zip(mean, spread, strict=True))
    assert curve.bands[name] == ([m - s for m, s in points], [m + s for m, s in points])
    assert items["gaussian_noise"].x == [0.0, 0.1, 0.2]
    assert module.media("train") == {}


def test_curves_of_a_training_stay_whole_when_an_earlier_checkpoint_is_tested(tmp_path):
    module, _ = fit(tmp_path)
    module._history.load_state_dict({"frames": [1.0, 2.0]})
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    module._history.add(frames=3.0)
    module.on_load_checkpoint(checkpoint)
    assert module._history.values == {"frames": [1.0, 2.0, 3.0]}
    another = DeepQLearning(functools.partial(DQN, **NETWORK))
    another.on_load_checkpoint(checkpoint)
    assert another._history.values == {"frames": [1.0, 2.0]}


def test_a_missing_source_names_the_pipeline(tmp_path):
    with pytest.raises(UserError, match="leanlight run dsqn/pipelines"):
        measure(Conversion(tmp_path / "none.ckpt"), tmp_path)


def test_noise_leaves_the_weights_as_they_were():
    network = DQN(3, **NETWORK)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with disturbed_weights(network, 0.5):
        assert not torch.equal(network.head.weight, before["head.weight"])
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_scores_are_normalised_between_random_and_human():
    episodes = [Episode(score, 10, 9, 1.0, 0.1) for score in (10.0, 20.0)]
    game = GameMeta(name="g", source="", counts={}, fingerprint="", actions=("NOOP",), shape=(1, 8, 8))
    values = summary(episodes, replace(game, random_score=5.0, human_score=25.0))
    assert (values["score"], values["score_std"], values["score_max"]) == (15.0, 5.0, 20.0)
    assert values["human_normalised"] == 0.5
    assert "human_normalised" not in summary(episodes, game)


@pytest.mark.parametrize(
    ("clean", "lost"),
    # Random play scores 5. Of 16 episodes with deviation 4 the mean is known to 1, so up to 7 nothing is above chance.
    [(25.0, 0.75), (8.0, -2 / 3), (7.0, None), (1.0, None)],
)
def test_a_share_is_lost_of_what_is_above_random_play_beyond_doubt(clean, lost):
    game = GameMeta(name="g", source="", counts={"test": 16}, fingerprint="", actions=(), shape=(1, 8, 8))
    figures = {"score": clean, "score_std": 4.0, "score_gaussian_0.1": 15.0, "score_gaussian_0.2": 5.0}
    evaluation = GameEvaluation(input_noise=[0.1, 0.2])
    values = evaluation.noise_losses(figures, replace(game, random_score=5.0))
    assert values["drop_gaussian"] == clean - 10.0
    assert values.get("lost_gaussian") == (None if lost is None else pytest.approx(lost))
    assert evaluation.under_noise["gaussian"].noisy == {"gaussian": {0.1: 15.0, 0.2: 5.0}}
    assert set(evaluation.noise_losses(figures, game)) == {"drop_gaussian", "retention_gaussian"}


def test_the_constant_action_is_the_best_of_the_training_episodes(tmp_path):
    policy = FixedPolicy(episodes=25)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_epochs=1, limit_train_batches=1, num_sanity_val_steps=0, **QUIET
    )
    data = GameDataModule(**{**DATA, "eval_epsilon": 0.0})
    seeds, play = [], data.play
    data.play = lambda given, *more: seeds.append(tuple(given)) or play(given, *more)
    pl.seed_everything(3, verbose=False)
    trainer.fit(policy, datamodule=data)
    tried, evaluated = seeds[:3], {seed for batch in data.val_dataloader() for seed in batch.seed.tolist()}
    assert len(set(tried)) == 1
    assert len(set(tried[0])) == 25
    assert not set(tried[0]) & evaluated
    balls = []
    for seed in tried[0]:
        frame, _ = data.make_game(training=False).reset(seed=seed)
        balls.append(int(frame[0].argmax()))
    caught = [balls.count(column) for column in (0, 4, 7)]  # where the paddle ends that always does the same
    assert caught[policy.network.always] == max(caught)
    trainer.save_checkpoint(tmp_path / "floor.ckpt")
    again = FixedPolicy.load_from_checkpoint(tmp_path / "floor.ckpt", weights_only=True)
    assert again.values(torch.zeros(5, 1, 8, 8, dtype=torch.uint8)).argmax(1).tolist() == [policy.network.always] * 5


def test_random_actions_are_equally_likely_in_any_state(tmp_path):
    policy = FixedPolicy("random")
    assert measure(policy, tmp_path, test_episodes=300)["test/score"] == pytest.approx(-0.75, abs=0.2)
    actions = policy.values(torch.zeros(6000, 1, 8, 8, dtype=torch.uint8)).argmax(1)
    assert actions.bincount(minlength=3).tolist() == pytest.approx([2000] * 3, abs=150)


def test_play_prints_scores_and_writes_an_animation(leanlight, tmp_path):
    limits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--run.test=none", "--run.wandb=disabled"]
    leanlight("fit", "--config", "dsqn/catch_small", "--run.id=a", *limits, check=True)
    done = leanlight("play", "runs/dsqn/catch/a", "--episodes", 3, "--seed", 4)
    assert done.returncode == 0, done.stderr
    assert "mean score" in done.stdout
    from PIL import Image

    with Image.open(tmp_path / "runs/dsqn/catch/a/artifacts/play.gif") as picture:
        assert picture.n_frames == 8
    wrong = leanlight("play", "runs/dsqn/catch/a", "--episodes", 0)
    assert wrong.returncode == 2
    assert "--episodes" in wrong.stderr
    summary_file = json.loads((tmp_path / "runs/dsqn/catch/a/summary.json").read_text())
    assert summary_file["data"]["name"] == "catch"
