"""What a judge learns on pictures of shapes, where it is known what words alone and pictures alone can tell."""

import copy
import functools
import warnings

import lightning.pytorch as pl
import pytest
import torch

from datamodules import SafetyDataModule, Shapes
from leanlight.contracts import SAFETY_FIELDS
from lit_modules.falcon_eye import LoRATuning, Prompt, SafetyEncoder, SafetyJudge, TinyVLM

STEPS = 500

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # two judges are trained, whoever asks first
QUIET = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "limit_val_batches"), 0
)


def data_of(**shapes):
    return SafetyDataModule("shapes", shapes=Shapes(**{"val": 0, "test": 200} | shapes), val_fraction=0.0, seed=0)


def trainer_of(**limits):
    return pl.Trainer(accelerator="cpu", gradient_clip_val=1.0, **QUIET, **limits)


def figures_of(judge, data, **limits):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = trainer_of(**limits).test(judge, datamodule=data, verbose=False)
    return found


@functools.cache
def trained(modality):
    """A judge after four epochs on 2,000 shapes, and its test metrics."""
    # Its warm-up matters: at the full rate from the first step on, words are learned and pictures are not.
    cycle = functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.003, total_steps=STEPS)
    judge = SafetyJudge(
        TinyVLM(seed=0),
        prompt=Prompt(system="none", modality=modality),
        max_length=1024,
        optimizer=functools.partial(torch.optim.AdamW, lr=0.003, weight_decay=0.0),
        lr_scheduler=cycle,
        max_new_tokens=96,
    )
    data = data_of()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer_of(max_steps=STEPS).fit(judge, datamodule=data)
    return judge, figures_of(judge, data)


def test_training_makes_answers_that_can_be_read():
    rates = [f"test/{name}_parse_rate" for name in SAFETY_FIELDS]
    untrained = SafetyJudge(TinyVLM(seed=0), prompt=Prompt(system="none"), max_length=1024, max_new_tokens=96)
    before, after = figures_of(untrained, data_of(), limit_test_batches=1), trained("vqa")[1]
    assert max(before[rate] for rate in rates) < 0.05
    assert min(after[rate] for rate in rates) >= 0.95


def test_who_sees_the_picture_judges_it_and_the_answer_better_than_who_reads_alone():
    seeing, reading = trained("vqa")[1], trained("text_only")[1]
    assert seeing["test/image_accuracy"] >= reading["test/image_accuracy"] + 0.3
    assert seeing["test/response_accuracy"] >= reading["test/response_accuracy"] + 0.05
    assert (
        min(seeing["test/instruction_accuracy"], reading["test/instruction_accuracy"]) >= 0.9
    )  # words are enough for words


def test_with_pictures_of_other_samples_a_judge_of_pictures_guesses():
    judge, own = trained("vqa")
    others = figures_of(judge, data_of(shuffle_images=True))
    assert abs(others["test/image_accuracy"] - 0.5) <= 0.1
    assert own["test/image_accuracy"] >= others["test/image_accuracy"] + 0.3
    assert abs(others["test/instruction_accuracy"] - own["test/instruction_accuracy"]) <= 0.02


def test_low_rank_changes_learn_another_wording_and_leave_the_base_as_it_was():
    backbone = copy.deepcopy(trained("vqa")[0].backbone)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    data = data_of(templates="b", train=1280)
    data.setup()
    encoder = SafetyEncoder(backbone, Prompt(system="none"), max_length=1024)
    held = encoder.encode(data.samples("test")[:64], torch.arange(64), targets=True)
    torch.manual_seed(0)
    model = LoRATuning(rank=8, alpha=16, dropout=0.0, targets="attention+mlp").adapt(backbone.model)
    trains = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all("lora_" in name for name in trains)

    def held_loss():
        with torch.no_grad():
            return float(model(**encoder.batch_inputs(held)).loss)

    start, optimizer = held_loss(), torch.optim.AdamW(trains.values(), lr=0.003, weight_decay=0.0)
    for step in range(80):
        samples = data.samples("train")[16 * step : 16 * step + 16]
        optimizer.zero_grad()
        model(**encoder.batch_inputs(encoder.encode(samples, torch.arange(16), targets=True))).loss.backward()
        optimizer.step()
    assert held_loss() < 0.7 * start
    after = {name.replace(".base_layer", ""): each for name, each in model.base_model.model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
