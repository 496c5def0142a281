"""Fusion in stages: each stage by hand, both gates in numpy, missing modalities, and the export."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import MODALITIES, VECTORS, clips, exported, one
from torch import nn

from leanlight.contracts import UserError
from lit_modules.tical import Encoding, SoftStages, StagedAnswer, ThreeStages, mix
from lit_modules.tical.stages import Branches

SMALL = Encoding(8, layers=1, heads=2)


def built(cls=ThreeStages, modalities=MODALITIES, encoding=SMALL, **settings):
    torch.manual_seed(1)
    network = cls(modalities, 4, encoding, **settings).double().eval()
    nn.init.normal_(network.encoders.missing)
    return network


def test_branches_are_linear_layers_of_their_own():
    branches, x = Branches(3, 5, 2).double(), torch.randn(3, 7, 5, dtype=torch.double)
    for m, y in enumerate(branches(x)):
        torch.testing.assert_close(y, x[m] @ branches.weight[m] + branches.bias[m])


@pytest.mark.parametrize("modalities", [MODALITIES, VECTORS], ids=["sequences", "vectors"])
def test_a_modality_looks_at_the_steps_of_the_others_and_not_at_its_own(modalities):
    network = built(modalities=modalities)
    encoded = network.encoders(*clips(modalities))
    together = network.integration(encoded)
    ours, norm, place = network.integration.attention[0], network.integration.norms[0], network.integration.place
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    theirs.load_state_dict(
        {"in_proj_weight": ours.read.weight, "in_proj_bias": ours.read.bias,
         "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias}
    )  # fmt: skip
    for m, name in enumerate(modalities):
        others = [n for n in modalities if n != name]
        x = (encoded.hidden[name] + place[m])[:, None]
        source = torch.cat([encoded.steps[n] + place[list(modalities).index(n)] for n in others], 1)
        mask = torch.cat([encoded.mask[n] for n in others], 1)
        x = x + theirs(norm(x), norm(source), norm(source), key_padding_mask=~mask)[0]
        torch.testing.assert_close(together[:, m], network.integration.norm(x)[:, 0], rtol=1e-10, atol=1e-12)


def test_each_stage_is_read_from_what_the_paper_says():
    network, batch = built(), clips()
    answer = network(*batch)
    encoded = network.encoders(*batch)
    vectors = torch.cat(list(encoded.hidden.values()), 1)
    torch.testing.assert_close(answer.early, network.early.rest(network.early.first(vectors)))
    together = network.integration(encoded)
    fused = network.middle.first(together.flatten(1))
    torch.testing.assert_close(answer.middle, network.middle.rest(fused))
    assert torch.equal(answer.fused, fused)
    for m, name in enumerate(MODALITIES):
        own = together[:, m] @ network.deepen.weight[m] + network.deepen.bias[m]
        hidden = (own + fused @ network.context.weight.T).relu()
        branch = hidden @ network.late.weight[m] + network.late.bias[m]
        torch.testing.assert_close(answer.advanced[name], branch)
    torch.testing.assert_close(answer.late, torch.stack(list(answer.advanced.values())).mean(0))
    assert list(answer.hidden) == list(answer.advanced) == list(MODALITIES)


def test_stages_are_mixed_by_consistency():
    early, middle, late = torch.randn(3, 5, 4, dtype=torch.double)
    kappa = torch.tensor([0.0, 1.0, 0.5, 0.3, 0.9], dtype=torch.double)
    answer = StagedAnswer(output=early, early=early, middle=middle, late=late)
    for i, k in enumerate(kappa):
        expected = (k * early[i] + middle[i] + (1 - k) * late[i]) / 2
        torch.testing.assert_close(mix(answer, kappa)[i], expected)
    two = StagedAnswer(output=early, early=early, middle=middle)
    torch.testing.assert_close(mix(two, kappa)[3], (0.3 * early[3] + middle[3]) / 1.3)
    assert torch.equal(mix(StagedAnswer(output=early, early=early), kappa), early)
    same = StagedAnswer(output=early, early=early, middle=early, late=early)
    torch.testing.assert_close(mix(same, kappa), early)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_fewer_stages_are_the_first_ones(stages):
    network = built(stages=stages)
    answer = network(*clips())
    assert (answer.middle is not None, answer.late is not None) == (stages > 1, stages > 2)
    assert len(answer.advanced) == (3 if stages > 2 else 0)
    whole = built()
    whole.load_state_dict(network.state_dict(), strict=False)
    torch.testing.assert_close(whole(*clips()).early, answer.early)
    torch.testing.assert_close(answer.output, mix(answer, torch.full((12,), 0.5)))
    assert all(p.grad is not None for p in backward(network, answer))


def backward(network, answer):
    answer.output.square().sum().backward()
    return list(network.parameters())


NETWORKS = {
    **{f"{s} stages": lambda modalities=MODALITIES, s=s: built(modalities=modalities, stages=s) for s in (1, 2, 3)},
    **{f"{s} soft": lambda modalities=MODALITIES, s=s: built(SoftStages, modalities, stages=s) for s in (1, 2, 3)},
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_clip_is_answered_alone_as_among_others_with_or_without_all_modalities(make):
    network, batch = make(), clips(missing=0.4)
    together = network(*batch)
    for i in range(12):
        torch.testing.assert_close(network(*one(batch, i)).output[0], together.output[i], rtol=1e-9, atol=1e-10)
    other = {
        name: torch.where(batch[2][name].reshape(-1, *[1] * (x.dim() - 1)), x, 5.0) for name, x in batch[0].items()
    }
    assert torch.equal(network(other, *batch[1:]).output, together.output)
    nn.init.normal_(network.encoders.missing)
    changed = (network(*batch).output != together.output).any(1)
    complete = torch.stack(list(batch[2].values())).all(0)
    assert changed[~complete].any()
    assert not changed[complete].any()


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_gradients_are_finite_where_clips_lack_modalities(make):
    network = make().train()
    parameters = backward(network, network(*clips(missing=0.5)))
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)


def test_branches_of_missing_modalities_do_not_count():
    network, batch = built(), clips(missing=0.4)
    answer = network(*batch)
    for i in range(12):
        there = [n for n in MODALITIES if batch[2][n][i]] or list(MODALITIES)
        mean = torch.stack([answer.advanced[n][i] for n in there]).mean(0)
        torch.testing.assert_close(answer.late[i], mean)


def assessment(count=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.double)  # noqa: E731
    return SimpleNamespace(
        typicality={name: draw(count) for name in MODALITIES},
        consistency=draw(count),
        probabilities={name: draw(count, 4).softmax(1) for name in MODALITIES},
    )


def test_soft_gates_are_those_of_the_formula():
    network, batch, a = built(SoftStages), clips(missing=0.3), assessment()
    answer = network(*batch, a)
    encoded = network.encoders(*batch)
    together = network.integration(encoded).detach().numpy()
    logits = network.weigh(encoded.joined()).detach().numpy()
    for i in range(12):
        there = [m for m, n in enumerate(MODALITIES) if batch[2][n][i]] or [0, 1, 2]
        real = [m for m, n in enumerate(MODALITIES) if batch[2][n][i]]
        q = [a.probabilities[n][i].numpy() for n in MODALITIES]
        score = []
        for m in there:
            agreement = [q[m] @ q[n] for n in real if n != m]
            r = np.mean(agreement) if agreement else 1.0
            score.append(logits[i, m] + np.log(list(a.typicality.values())[m][i].item() * r + 1e-3))
        weight = np.exp(score) / np.exp(score).sum()
        f = sum(w * together[i, m] for w, m in zip(weight, there, strict=True))
        kappa = a.consistency[i].item()
        judged = network.judge(torch.tensor(np.concatenate([f, together[i].ravel(), [kappa]]))[None])[0]
        fused = kappa * f + (1 - kappa) * judged[0].detach().numpy()
        np.testing.assert_allclose(answer.fused[i].detach().numpy(), fused, rtol=1e-9)
        torch.testing.assert_close(answer.output[i], network.output(answer.fused[i]))
    for m, name in enumerate(MODALITIES):
        alone = encoded.hidden[name] @ network.unimodal.weight[m] + network.unimodal.bias[m]
        torch.testing.assert_close(answer.unimodal[name], alone)


def test_without_assessment_the_conflict_gate_is_open_and_the_judge_learns_nothing():
    network = built(SoftStages)
    answer = network(*clips())
    sure = SimpleNamespace(
        typicality={n: torch.ones(12).double() for n in MODALITIES},
        consistency=torch.ones(12).double(),
        probabilities={n: torch.eye(4).double()[[1] * 12] for n in MODALITIES},
    )
    torch.testing.assert_close(network(*clips(), sure).output, answer.output)
    parameters = backward(network, answer)
    assert all(
        p.grad is not None for p in parameters if p is not network.unimodal.weight and p is not network.unimodal.bias
    )
    assert all((p.grad == 0).all() for p in network.judge.parameters())


LSTM = Encoding(8, layers=2, heads=2, sequence="lstm")
EXPORTED = {
    "three stages": built,
    "three stages on vectors": lambda: built(modalities=VECTORS),
    "lstm": lambda: built(encoding=LSTM, stages=1),
    "soft": lambda: built(SoftStages),
}


@pytest.mark.parametrize(
    "make", [pytest.param(m, id=n, marks=() if "vectors" in n else pytest.mark.slow) for n, m in EXPORTED.items()]
)
def test_an_exported_network_takes_any_number_of_clips_and_steps(make):
    network = make()
    modalities = MODALITIES if "text" in network.encoders.modalities else VECTORS
    program = exported(network, modalities)
    for count, missing in ((7, 0.0), (1, 0.0), (9, 0.4)):
        batch = clips(modalities, max(count, 4), count, missing=missing)
        batch = batch if count > 1 else one(batch, 3)
        answer, theirs = network(*batch), program(*batch)
        torch.testing.assert_close(theirs["output"], answer.output)
        for name in modalities:
            torch.testing.assert_close(theirs[f"hidden {name}"], answer.hidden[name])


@pytest.mark.parametrize("settings", [{"stages": 4}, {"layers": 0}, {"num_outputs": 0}])
@pytest.mark.parametrize("cls", [ThreeStages, SoftStages])
def test_a_bad_setting_is_one_line_that_names_it(cls, settings):
    with pytest.raises(UserError, match=f"^{next(iter(settings))}: expected [^\n]*$"):
        cls(MODALITIES, **{"num_outputs": 4, **settings})
