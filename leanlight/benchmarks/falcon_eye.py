"""Benchmark of judges of safety: training beside transformers' Trainer, padding, encoding, answers, HTTP, audits."""

from __future__ import annotations

import functools
import gc
import json
import logging
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from datamodules import SafetyDataModule, Shapes
from leanlight.benchmarks.core import (
    QUIET,
    Measurement,
    PaperStep,
    Target,
    interleave,
    network_step,
    one_thread,
    ratios,
    summarise,
    within,
)
from leanlight.benchmarks.probe import StepProbe
from leanlight.contracts import SAFETY_FIELDS, SafetySample, Verdict
from leanlight.results.audit import HARMFUL, JudgeFacts, Verdicts, ask, sample_key
from leanlight.results.audit_page import write_page
from leanlight.results.audit_summary import Panel, describe, gate
from leanlight.results.audit_summary import summarise as summarise_panel
from lit_modules.falcon_eye import Asking, Backbone, HttpJudge, Prompt, SafetyEncoder, SafetyJudge, TinyVLM
from lit_modules.falcon_eye.reference import BareJudgeStep

_PROMPT = Prompt(system="none")
_LENGTH = 1024  # tokens of a sample at most
_DELAY = 0.05  # seconds that the endpoint takes for an answer
_LR = 3e-3


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        batch: samples of a step (N).
        steps: of a fit whose tokens are counted, and of the fit under Lightning.
        learned: steps of training of the judge that answers.
        mixed: samples of mixed lengths.
        asked: samples that are asked about at a time.
        new_tokens: of a written answer, at most.
        rounds: that count.
        requests: to the endpoint.
        concurrency: requests at a time.
        verdicts: that are kept in an audit, few and many.
        report: samples of a page.
    """

    batch: int
    steps: int
    learned: int
    mixed: int
    asked: int
    new_tokens: int
    rounds: int
    requests: int
    concurrency: int
    verdicts: tuple[int, int]
    report: int


_FULL = Sizes(16, 20, 100, 2_250, 32, 96, 5, 640, 16, (10_000, 100_000), 10_000)
_QUICK = Sizes(4, 3, 2, 40, 4, 6, 2, 8, 4, (200, 400), 20)


@one_thread()
def run(quick: bool = False) -> Measurement:
    """Measure on one thread of the CPU.

    quick: tiny sizes: figures without meaning.
    """
    sizes = _QUICK if quick else _FULL
    measured = Measurement(settings={**vars(sizes), "model": "TinyVLM()", "prompt": vars(_PROMPT), "threads": 1})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    parts: dict[str, Callable[[Sizes, Measurement], None]] = {
        "training": measure_training,
        "padding": measure_padding,
        "encoding": measure_encoding,
        "answers": measure_answers,
        "endpoint": measure_endpoint,
        "verdicts": measure_verdicts,
        "page": measure_page,
        "Lightning": measure_lightning,
    }
    for name, part in parts.items():
        with Console(stderr=True).status(f"falcon_eye: {name}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            part(sizes, measured)
    return measured


# -- what is worked on


def data_of(sizes: Sizes, steps: int, **options: Any) -> SafetyDataModule:
    """Shapes for so many steps; every batch is encoded when it is asked for."""
    shapes = Shapes(train=sizes.batch * steps, val=0, test=max(sizes.asked, 1))
    settings = {"batch_size": sizes.batch, "val_fraction": 0.0, "length_window": 0, "cache_mb": 0, "seed": 0}
    return SafetyDataModule("shapes", shapes=shapes, **{**settings, **options})


def fitted(data: SafetyDataModule, *callbacks: pl.Callback, epochs: int = 1) -> SafetyJudge:
    """The tiny judge after some epochs. It has no dropout, so that all that train it draw alike: nothing."""
    optimizer = functools.partial(torch.optim.AdamW, lr=_LR, weight_decay=0.0)
    judge = SafetyJudge(TinyVLM(seed=0), prompt=_PROMPT, max_length=_LENGTH, optimizer=optimizer)
    with tempfile.TemporaryDirectory() as folder:
        limits: dict[str, Any] = {"max_epochs": epochs, "limit_val_batches": 0, "default_root_dir": folder}
        pl.Trainer(accelerator="cpu", callbacks=[*callbacks], **limits, **QUIET).fit(judge, datamodule=data)
    return judge


def backbone_of(data: SafetyDataModule) -> Backbone:
    """What `fitted` begins with on these data."""
    data.setup()
    return TinyVLM(seed=0).build([*_PROMPT.texts(), *data.texts()])


def encoder_of(backbone: Backbone) -> SafetyEncoder:
    return SafetyEncoder(backbone, _PROMPT, _LENGTH)


# -- training


class _Marks(pl.Callback):
    """Times and losses of steps."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(outputs["loss"].detach())


def fit_ours(sizes: Sizes) -> _Marks:
    """A fit by Lightning."""
    marks = _Marks()
    fitted(data_of(sizes, sizes.steps), marks)
    return marks


def fit_theirs(sizes: Sizes) -> _Marks:
    """The same by transformers' Trainer with our encoder as its collator, over the same batches."""
    import transformers

    data = data_of(sizes, sizes.steps)
    backbone = backbone_of(data)
    data.encoder = encoder = encoder_of(backbone)
    order = torch.cat([batch.index for batch in data.train_dataloader()]).tolist()
    samples, marks = [data.samples("train")[place] for place in order], _Marks()

    class Timed(transformers.Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            marks.losses.append(loss)
            marks.times.append(time.perf_counter())
            return loss

    def collate(some: Sequence[SafetySample]) -> dict[str, Tensor]:
        return encoder.batch_inputs(encoder.encode(some, torch.arange(len(some)), targets=True))

    optimizer = torch.optim.AdamW(backbone.model.parameters(), lr=_LR, weight_decay=0.0)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=sizes.batch,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            max_grad_norm=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Timed(backbone.model, settings, collate, samples, optimizers=(optimizer, constant))
        trainer.pop_callback(transformers.PrinterCallback)
        trainer.train()
    return marks


def measure_training(sizes: Sizes, measured: Measurement) -> None:
    """Tokens a second under Lightning, beside transformers' Trainer with the same model, batches and collator."""
    data = data_of(sizes, sizes.steps)
    encoder = encoder_of(backbone_of(data))
    tokens = int(encoder.lengths(data.samples("train"), targets=True).sum()) * (sizes.steps - 1) / sizes.steps
    found: dict[str, list[_Marks]] = {"lightning": [], "trainer": []}
    interleave(
        {
            "lightning": lambda: found["lightning"].append(fit_ours(sizes)),
            "trainer": lambda: found["trainer"].append(fit_theirs(sizes)),
        },
        sizes.rounds,
        warmup=1,
    )
    seconds = {name: [each.times[-1] - each.times[0] for each in marks[1:]] for name, marks in found.items()}
    for name, each in seconds.items():
        figure = summarise([tokens / one for one in each], "tokens/s", "higher")
        measured.figures[f"training/{name}"] = figure
    measured.figures["training/speedup"] = summarise(ratios(seconds["trainer"], seconds["lightning"]), "x", "higher")
    text = "training takes in at least as many tokens a second as transformers' Trainer with the same collator"
    measured.targets.append(Target("training/speedup", 1.0, text))
    ours, theirs = (torch.stack(found[name][0].losses) for name in ("lightning", "trainer"))
    measured.checks["training: losses of all steps are those of transformers' Trainer, within 1e-4"] = within(
        ours, theirs, 1e-4
    )


def measure_lightning(sizes: Sizes, measured: Measurement) -> None:
    """What a step takes more under Lightning than in a plain loop over a copy of the network, once batches are kept."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        probe = StepProbe(output, "lit_modules.falcon_eye.reference:BareJudgeStep", warmup=1)
        fitted(data_of(sizes, sizes.steps, cache_mb=1024), probe, epochs=2)
        report = json.loads(output.read_text())
    # In the first epoch samples are encoded as well, which is measured apart.
    cycle, bare = (report[name][-(sizes.steps - 1) :] for name in ("cycle", "bare"))
    more = [100 * (ours / plain - 1) for ours, plain in zip(cycle, bare, strict=True)]
    measured.figures["lightning/more_than_plain_loop"] = summarise(more, "%")
    text = "a step under Lightning takes at most 3 % more than in a plain loop"
    measured.targets.append(Target("lightning/more_than_plain_loop", 3.0, text))
    measured.checks["Lightning: same weights as the plain loop, bit for bit"] = report["equal"]


# -- batches


def mixed_samples(count: int) -> list[dict[str, Any]]:
    """Rows whose lengths are spread as those of questions and models' answers: some refuse, some write pages."""
    draws = np.random.default_rng(0)
    asked = draws.integers(4, 20, count)
    short = draws.random(count) < 0.4
    answered = np.where(short, draws.integers(8, 30, count), draws.lognormal(5.2, 0.5, count)).astype(int).clip(4, 500)
    words = np.array(["plant", "road", "green", "picture", "answer", "small", "house", "water"])
    return [
        {
            "id": f"s{row}",
            "instruction": " ".join(draws.choice(words, asked[row])),
            "response": " ".join(draws.choice(words, answered[row])),
            "response_label": bool(row % 2),
        }
        for row in range(count)
    ]


def measure_padding(sizes: Sizes, measured: Measurement) -> None:
    """Share of padding in an epoch of samples of mixed lengths, in batches of like lengths and in shuffled ones."""
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in mixed_samples(sizes.mixed)))
        for name, window in (("like_lengths", 100), ("shuffled", 0)):
            data = SafetyDataModule(
                "jsonl", path=path, batch_size=sizes.batch, val_fraction=0.0, length_window=window, seed=0
            )
            data.encoder = encoder_of(backbone_of(data))
            batches = list(data.train_dataloader())
            real = sum(int(batch.attention_mask.sum()) for batch in batches)
            share = 1 - real / sum(batch.input_ids.numel() for batch in batches)
            measured.figures[f"padding/{name}"] = summarise([100 * share], "% of tokens")
            seen.append(torch.cat([batch.index for batch in batches]).sort().values)
    text = "on samples of mixed lengths less than 10 % of the tokens are padding"
    measured.targets.append(Target("padding/like_lengths", 10.0, text))
    measured.checks["padding: both orders have every sample once"] = all(
        torch.equal(found, torch.arange(len(found))) for found in seen
    )


def measure_encoding(sizes: Sizes, measured: Measurement) -> None:
    """What making a batch takes of a step: anew, from the cache, and by the processor of transformers."""
    data = data_of(sizes, 1, cache_mb=1024)
    judge = fitted(data)
    encoder, split, samples, index = judge.encoder, data.train_split, data.samples("train"), torch.arange(sizes.batch)
    assert split is not None
    batch = split.batch(index)
    ways: dict[str, Callable[[], Any]] = {
        "step": functools.partial(BareJudgeStep(judge), batch),
        "anew": functools.partial(encoder.encode, samples, index, True),
        "kept": functools.partial(split.batch, index),
        "processor": functools.partial(by_processor, encoder, samples),
    }
    theirs = ways["processor"]()
    for name in ("anew", "kept"):
        ours = encoder.batch_inputs(ways[name]())
        same = all(torch.equal(ours[key], theirs[key]) for key in ("input_ids", "attention_mask", "image_grid_thw"))
        near = within(ours["pixel_values"], theirs["pixel_values"], 1e-6)
        measured.checks[f"encoding {name}: tokens and patches of transformers' processor"] = same and near
    seconds = interleave(ways, 4 * sizes.rounds)
    for name, found in seconds.items():
        measured.figures[f"encoding/{name}"] = summarise([1000 * each for each in found], "ms")
        if name != "step":
            share = [100 * each for each in ratios(found, seconds["step"])]
            measured.figures[f"encoding/{name}_share"] = summarise(share, "% of a step")
    for name, when in (("anew", "in the first epoch"), ("kept", "from the second epoch on")):
        text = f"{when}, making a batch takes at most 5 % of a step"
        measured.targets.append(Target(f"encoding/{name}_share", 5.0, text))


def by_processor(encoder: SafetyEncoder, samples: Sequence[SafetySample]) -> dict[str, Tensor]:
    """Questions and answers as one text each, through the processor of transformers."""
    backbone, question = encoder.backbone, encoder.question()
    texts = [
        question.replace("{instruction}", sample.instruction).replace("{response}", sample.response)
        + encoder.prompt.target(sample)
        + backbone.tokenizer.eos_token
        for sample in samples
    ]
    area = {"shortest_edge": encoder.settings["min_pixels"], "longest_edge": encoder.settings["max_pixels"]}
    pictures = [sample.image.pixels() for sample in samples if sample.image]
    found = backbone.processor(
        text=texts, images=pictures, size=area, padding=True, padding_side="right", return_tensors="pt"
    )
    return dict(found)


# -- answers


def measure_answers(sizes: Sizes, measured: Measurement) -> None:
    """Answers of many samples at a time beside one by one, and scores without answers."""
    data = data_of(sizes, sizes.learned)
    judge = fitted(data)
    asking = Asking(judge.network.eval(), judge.encoder, max_new_tokens=sizes.new_tokens)
    samples = list(data.samples("test"))
    texts: dict[str, list[str]] = {}
    ways: dict[str, Callable[[], Any]] = {
        "batched": lambda: texts.update(batched=asking.write(asking.encode(samples))),
        "one_by_one": lambda: texts.update(one_by_one=[asking.write(asking.encode([sample]))[0] for sample in samples]),
    }
    seconds = interleave(ways, max(sizes.rounds // 2, 2), warmup=0)
    measured.checks["answers: one by one, the same texts"] = texts["batched"] == texts["one_by_one"]
    ways = {"batched": ways["batched"], "scores": lambda: asking.harm(asking.encode(samples))}
    quick = interleave(ways, sizes.rounds, warmup=1)
    alone = torch.cat([full_scores(asking, sample) for sample in samples])
    text = "scores: those of all logits of each sample alone, in float32, within 1e-4"
    measured.checks[text] = bool((asking.harm(asking.encode(samples)) - alone).abs().max() <= 1e-4)
    for name, found in (seconds | {"scores": quick["scores"]}).items():
        rates = [len(samples) / each for each in found]
        measured.figures[f"answers/{name}"] = summarise(rates, "samples/s", "higher")
    speedup = ratios(seconds["one_by_one"], seconds["batched"])
    measured.figures["answers/batched_speedup"] = summarise(speedup, "x", "higher")
    text = "answers are written in batches at least 8 times as fast as one by one"
    measured.targets.append(Target("answers/batched_speedup", 8.0, text))
    speedup = ratios(quick["batched"], quick["scores"])
    measured.figures["answers/scores_speedup"] = summarise(speedup, "x", "higher")
    text = "scores alone are given at least 3 times as fast as answers are written"
    measured.targets.append(Target("answers/scores_speedup", 3.0, text))


@torch.no_grad()
def full_scores(asking: Asking, sample: SafetySample) -> Tensor:
    """(1, F) P(harmful) of one sample, from a softmax over all tokens at all positions."""
    batch, places = asking.encoder.judgements(asking.encode([sample]))
    chances = asking.model(**asking.encoder.batch_inputs(batch)).logits[0, places].softmax(1)
    pairs = chances.gather(1, asking.encoder.label_ids)
    return (pairs[:, 0] / pairs.sum(1))[None]


# -- an endpoint


@contextmanager
def endpoint(delay: float) -> Iterator[str]:
    """The address of a local endpoint that repeats what it is asked, `delay` seconds later."""
    program = Path(__file__).with_name("echo_endpoint.py")
    with subprocess.Popen([sys.executable, str(program), str(delay)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def measure_endpoint(sizes: Sizes, measured: Measurement) -> None:
    """Verdicts of an endpoint, beside the time in which it could answer if asking took none."""
    shapes = Shapes(train=1, val=0, test=sizes.requests)
    data = SafetyDataModule("shapes", shapes=shapes, val_fraction=0.0)
    data.setup()
    samples = [replace(sample, instruction=f"number {n}") for n, sample in enumerate(data.samples("test"))]
    said: list[str] = []

    def judged() -> None:
        for start in range(0, len(samples), judge.batch_size):
            said.extend(verdict.text for verdict in judge.judge(samples[start : start + judge.batch_size]))

    with endpoint(_DELAY) as url:
        options: dict[str, Any] = {"concurrency": sizes.concurrency, "key_variable": "LEANLIGHT_NO_KEY"}
        judge = HttpJudge(
            url, "echo", lambda sample: sample.instruction, lambda text: Verdict({}, text=text), **options
        )
        seconds = interleave({"judged": judged}, sizes.rounds, warmup=1)["judged"]
    asked = [sample.instruction for sample in samples]
    measured.checks["endpoint: every sample has its own answer"] = said == asked * (len(said) // len(asked))
    ideal = -(-len(samples) // sizes.concurrency) * _DELAY
    measured.figures["endpoint/requests"] = summarise([len(samples) / each for each in seconds], "1/s", "higher")
    measured.figures["endpoint/over_ideal"] = summarise([each / ideal for each in seconds], "x")
    text = "verdicts of an endpoint take at most 15 % more than its own time at this concurrency"
    measured.targets.append(Target("endpoint/over_ideal", 1.15, text))


# -- audits


class _Wordy:
    """Finds every n-th sample harmful, and says so in a thousand characters."""

    fields: tuple[str, ...] = SAFETY_FIELDS
    batch_size = 1000

    def __init__(self, every: int) -> None:
        self.name, self.every, self.fingerprint = f"every {every}", every, f"{every:064d}"

    def says(self, number: int) -> bool:
        return number % self.every == 0

    def judge(self, samples: Sequence[SafetySample]) -> list[Verdict]:
        said = [self.says(int(sample.id)) for sample in samples]
        return [
            Verdict(dict.fromkeys(SAFETY_FIELDS, harm), dict.fromkeys(SAFETY_FIELDS, float(harm)), text="word " * 200)
            for harm in said
        ]


class _Numbered(Sequence[SafetySample]):
    """Samples that are made when they are asked for, so that only verdicts are measured."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < self.size:
            raise IndexError(row)  # ends iteration
        return SafetySample(str(row), f"instruction {row}", "answer")


def measure_verdicts(sizes: Sizes, measured: Measurement) -> None:
    """Memory of an audit by verdict, whose texts are a thousand characters long, and the time to take them over."""
    judge = _Wordy(3)
    for size, name in zip(sizes.verdicts, ("few", "many"), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            path, samples = Path(folder) / "verdicts.jsonl", _Numbered(size)
            gc.collect()
            tracemalloc.start()
            verdicts = Verdicts(path, [sample_key(sample)[0] for sample in samples])
            ask(judge, samples, verdicts, range(size))
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            begin = time.perf_counter()
            again = Verdicts(path, verdicts.keys)
            seconds = time.perf_counter() - begin
        measured.figures[f"verdicts/bytes_of_{name}"] = summarise([held / size], "B a verdict")
        found = again.of(judge.name, judge.fingerprint).labels[:, 0] == HARMFUL
        expected = [judge.says(row) for row in range(size)]
        measured.checks[f"verdicts: {size:,} that are taken over are those that were given"] = (
            found.tolist() == expected
        )
    measured.figures["verdicts/taken_over"] = summarise([size / seconds], "verdicts/s", "higher")
    text = "an audit holds at most 512 bytes a verdict, keys included and texts left on disk"
    measured.targets.append(Target("verdicts/bytes_of_many", 512.0, text))


def measure_page(sizes: Sizes, measured: Measurement) -> None:
    """Size of the page about many samples with pictures and three judges, and the time to write it."""
    data = SafetyDataModule("shapes", shapes=Shapes(train=1, val=0, test=sizes.report), val_fraction=0.0)
    data.setup()
    samples = [replace(sample, id=str(row)) for row, sample in enumerate(data.samples("test"))]
    judges = [_Wordy(every) for every in (2, 3, 5)]
    with tempfile.TemporaryDirectory() as folder:
        # Shapes of like words and pictures are one sample to an audit; here each shall have its own verdict.
        verdicts = Verdicts(Path(folder) / "verdicts.jsonl", [sample.id for sample in samples])
        for judge in judges:
            ask(judge, samples, verdicts, range(len(samples)))
        facts = [JudgeFacts(judge.name, judge.name, judge.fields, judge.fingerprint) for judge in judges]
        panel = Panel(samples, facts, [verdicts.of(judge.name, judge.fingerprint) for judge in judges], {})
        page = Path(folder) / "report.html"
        begin = time.perf_counter()
        summary = describe("shapes", None, verdicts, panel) | summarise_panel(panel)
        write_page(page, panel, verdicts, summary | {"gate": gate(summary, {})}, {})
        measured.figures["page/written"] = summarise([time.perf_counter() - begin], "s")
        measured.figures["page/size"] = summarise([page.stat().st_size / 1e6], "MB")
    votes = sum(sum(judge.says(row) for judge in judges) >= 2 for row in range(len(samples)))
    measured.checks["page: the vote is that counted one by one"] = summary["vote"]["response"]["harmful"] == votes
    text = "the page of an audit takes less than 10 MB"
    measured.targets.append(Target("page/size", 10.0, text))


# -- on a GPU


def paper_steps(where: str, quick: bool = False) -> Mapping[str, Callable[[], PaperStep]]:
    """Steps of the tiny judge and of one of some 100 million weights; the paper's seven billion need its files."""
    sizes = _QUICK if quick else _FULL
    larger = TinyVLM(768, 2048, 12, 12, 4, 2048, 384, 1024, 6, 6, seed=0)

    def made(source: TinyVLM) -> PaperStep:
        data = data_of(sizes, 1)
        data.setup()
        encoder = encoder_of(source.build([*_PROMPT.texts(), *data.texts()]))
        batch = encoder.encode(data.samples("train"), torch.arange(sizes.batch), True).to(where)
        network = encoder.backbone.model.to(where)
        inputs = encoder.batch_inputs(batch)
        return network_step(network, lambda: network(**inputs, use_cache=False).loss, sizes.batch)

    sources = {"tiny": TinyVLM(seed=0)} | ({} if quick else {"larger": larger})
    return {name: functools.partial(made, source) for name, source in sources.items()}
