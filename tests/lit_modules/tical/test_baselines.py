"""Baselines of fusion against naive networks with the same weights, clip by clip, and their export."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from clips import MODALITIES, VECTORS, clips, exported, one
from torch import nn

from leanlight.contracts import UserError
from lit_modules.tical import (
    MISA,
    AttentionFusion,
    Encoding,
    LateFusion,
    LearnsLabels,
    LowRankFusion,
    MulT,
    SelfMM,
    TensorFusion,
    Unimodal,
)
from lit_modules.tical.baselines import moment_discrepancy, overlap, relabelled
from lit_modules.tical.encoders import positioned

SMALL = Encoding(8, layers=1, heads=2)
MULT = {"dim": 8, "heads": 2, "levels": 2, "memory_levels": 1}
NETWORKS = {
    "unimodal": lambda m, c: Unimodal(m, c, list(m)[1], SMALL),
    "late": lambda m, c: LateFusion(m, c, SMALL),
    "attention": lambda m, c: AttentionFusion(m, c, SMALL),
    "tfn": lambda m, c: TensorFusion(m, c, SMALL, 3),
    "lmf": lambda m, c: LowRankFusion(m, c, SMALL, 3),
    "mult": lambda m, c: MulT(m, c, **MULT),
    "misa": lambda m, c: MISA(m, c, SMALL),
    "self_mm": lambda m, c: SelfMM(m, c, SMALL),
}


def built(name, modalities=MODALITIES, outputs=4):
    torch.manual_seed(1)
    network = NETWORKS[name](modalities, outputs).double().eval()
    nn.init.normal_(missing(network))
    return network


def missing(network):
    return network.missing if isinstance(network, MulT) else network.encoders.missing


def by_hand(layers, x):
    """Linear layers with ReLU between them."""
    linear = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)]
    for layer in linear[:-1]:
        x = (layer.weight @ x + layer.bias).clamp(min=0)
    return linear[-1].weight @ x + linear[-1].bias


def vectors(network, batch, i):
    return [x[0] for x in network.encoders(*one(batch, i)).hidden.values()]


def late(network, batch, i):
    return by_hand(network.head, torch.cat(vectors(network, batch, i)))


def attention(network, batch, i):
    found = vectors(network, batch, i)
    weight = by_hand(network.weigh, torch.cat(found))
    there = [bool(batch[2][name][i]) for name in MODALITIES]
    return by_hand(network.output, sum(w * x * t for w, x, t in zip(weight, found, there, strict=True)))


def with_one(x):
    return torch.cat((torch.ones(1, dtype=x.dtype), x))


def tfn(network, batch, i):
    found = [
        with_one(layer.weight @ x + layer.bias)
        for layer, x in zip(network.narrow, vectors(network, batch, i), strict=True)
    ]
    return by_hand(network.head, torch.einsum("a,b,c->abc", *found).flatten())


def lmf(network, batch, i):
    """With the whole tensor that the factors stand for."""
    tensor = torch.einsum("r,rao,rbo,rco->abco", network.weight[0], *network.factors)
    found = [with_one(x) for x in vectors(network, batch, i)]
    return torch.einsum("a,b,c,abco->o", *found, tensor) + network.bias


def torch_attention(block, query, source):
    theirs = nn.MultiheadAttention(query.shape[-1], block.attention.heads, batch_first=True).double()
    ours = block.attention
    theirs.load_state_dict(
        {"in_proj_weight": ours.read.weight, "in_proj_bias": ours.read.bias,
         "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias}
    )  # fmt: skip
    return theirs(query, source, source)[0]


def transformer(layers, x, source=None):
    """As published: the source is the same in every layer, normalised by the layer's own norm."""
    for block in layers.blocks:
        query = block.norm_attention(x)
        x = x + torch_attention(block, query, query if source is None else block.norm_attention(source))
        x = x + block.contract(block.expand(block.norm_hidden(x)).relu())
    return layers.norm(x)


def mult(network, batch, i):
    features, _, present = one(batch, i)
    steps = {}
    for m, (name, x) in enumerate(features.items()):
        x = x if x.dim() == 3 else x[:, None]
        x = x @ network.embed[m].weight[..., 0].T
        if not present[name][0]:  # one vector, in place of the first step
            x = network.missing[m].expand(1, 1, -1)
        steps[name] = positioned(x)
    last, pairs = [], iter(network.pairs)
    for m, target in enumerate(steps):
        found = [transformer(next(pairs), steps[target], steps[o]) for o in steps if o != target]
        last.append(transformer(network.memories[m], torch.cat(found, 2))[0, -1])
    joined = torch.cat(last)
    return network.output(joined + by_hand(network.residual, joined))


def misa(network, batch, i):
    there = [bool(batch[2][name][i]) for name in MODALITIES]
    x = [layer(v) for layer, v in zip(network.project, vectors(network, batch, i), strict=True)]
    own = [layer(v) for layer, v in zip(network.own, x, strict=True)]
    tokens = torch.stack([*own, *(network.shared(v) for v in x)])[None]
    block = network.fuse
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, norm_first=True, batch_first=True).double()
    theirs.load_state_dict(
        {"self_attn.in_proj_weight": block.attention.read.weight, "self_attn.in_proj_bias": block.attention.read.bias,
         "self_attn.out_proj.weight": block.attention.out.weight, "self_attn.out_proj.bias": block.attention.out.bias,
         "linear1.weight": block.expand.weight, "linear1.bias": block.expand.bias,
         "linear2.weight": block.contract.weight, "linear2.bias": block.contract.bias,
         "norm1.weight": block.norm_attention.weight, "norm1.bias": block.norm_attention.bias,
         "norm2.weight": block.norm_hidden.weight, "norm2.bias": block.norm_hidden.bias}
    )  # fmt: skip
    padding = ~torch.tensor([there + there]) if any(there) else None
    if padding is None:
        return None
    return by_hand(network.head, theirs(tokens, src_key_padding_mask=padding)[0].flatten())


NAIVE = {"late": late, "attention": attention, "tfn": tfn, "lmf": lmf, "mult": mult, "misa": misa, "self_mm": late}


@pytest.mark.parametrize("share", [0.0, 0.4], ids=["complete", "some missing"])
@pytest.mark.parametrize("name", NAIVE)
def test_a_batch_is_what_a_naive_network_gives_clip_by_clip(name, share):
    network, batch = built(name), clips(missing=share)
    answer = network(*batch)
    for i in range(12):
        expected = NAIVE[name](network, batch, i)
        if expected is not None:
            torch.testing.assert_close(answer.output[i], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("modalities", [MODALITIES, VECTORS], ids=["sequences", "vectors"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_a_clip_lacks_and_its_neighbours_do_not_count(name, modalities):
    network, batch = built(name, modalities), clips(modalities, missing=0.4)
    together = network(*batch)
    there = {n: batch[2][n].reshape(-1, *[1] * (x.dim() - 1)) for n, x in batch[0].items()}
    other = {n: torch.where(there[n], x, 5.0) for n, x in batch[0].items()}
    assert torch.equal(network(other, *batch[1:]).output, together.output)
    for i in range(12):
        torch.testing.assert_close(network(*one(batch, i)).output[0], together.output[i], rtol=1e-9, atol=1e-10)
    nn.init.normal_(missing(network))
    used = network.encoders.modalities if name == "unimodal" else list(modalities)
    complete = torch.stack([batch[2][n] for n in used]).all(0)
    changed = (network(*batch).output != together.output).any(1)
    assert changed[~complete].any()
    assert not changed[complete].any()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_learns_and_gradients_are_finite_where_clips_lack_modalities(name):
    network = built(name).train()
    answer = network(*clips(missing=0.4))
    target = torch.arange(12) % 4
    loss = answer.output.square().sum() + sum(answer.terms.values())
    if isinstance(network, LearnsLabels):
        network.prepare(12)
        network.labels.fill_(0.5)
        network.seen.fill_(True)
        loss = loss + sum(network.losses(answer, target, torch.arange(12), clips(missing=0.4)[2]).values())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in network.parameters())


@pytest.mark.parametrize("name", ["tfn", "lmf", "mult", "misa", "self_mm"])
def test_two_modalities_and_four_are_fused_too(name):
    four = {**MODALITIES, "fourth": VECTORS["left"]}
    for modalities in (dict(itertools.islice(four.items(), 2)), four):
        answer = built(name, modalities, 1)(*clips(modalities))
        assert answer.output.shape == (12, 1)
        assert list(answer.hidden) == list(modalities)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_in_half_precision_has_finite_gradients_and_single_precision_terms(name):
    network = built(name).float().train()
    batch = clips(dtype=torch.float32, missing=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        answer = network(*batch)
    assert all(term.dtype == torch.float32 for term in answer.terms.values())
    (answer.output.float().square().sum() + sum(answer.terms.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_one_modality_alone_sees_no_other():
    network = built("unimodal")
    answer = network(*clips())
    assert list(answer.hidden) == list(answer.unimodal) == ["keys"]
    other = clips(seed=5)
    other[0]["keys"] = clips()[0]["keys"]
    assert torch.equal(network(*other).output, answer.output)


def test_moments_are_scipys():
    torch.manual_seed(0)
    a, b = torch.rand(2, 9, 5, dtype=torch.double)
    for weight in (torch.ones(9).double(), torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0]).double()):
        kept = a[weight > 0].numpy()
        expected = np.linalg.norm(kept.mean(0) - b.numpy().mean(0))
        for k in range(2, 6):
            moments = [scipy.stats.moment(x, k, axis=0) for x in (kept, b.numpy())]
            expected += np.linalg.norm(moments[0] - moments[1])
        ours = moment_discrepancy(a, b, weight, torch.ones(9).double())
        assert ours.item() == pytest.approx(expected, rel=1e-12)


def test_equal_moments_and_single_clips_have_a_finite_gradient():
    a = torch.rand(1, 5, requires_grad=True)
    (moment_discrepancy(a, a, torch.ones(1), torch.ones(1)) + overlap(a, a, torch.ones(1))).backward()
    assert a.grad.isfinite().all()


def test_overlap_is_that_of_each_pair_of_columns():
    torch.manual_seed(0)
    a, b = torch.randn(2, 9, 4, dtype=torch.double)
    weight = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1]).double()
    x, y = (z[weight > 0].numpy() - z[weight > 0].numpy().mean(0) for z in (a, b))
    x, y = (z / (np.linalg.norm(z, axis=1, keepdims=True) + 1e-6) for z in (x, y))
    expected = np.mean([(x[:, i] @ y[:, j]) ** 2 for i in range(4) for j in range(4)])
    assert overlap(a, b, weight).item() == pytest.approx(expected, rel=1e-12)


def test_misas_terms_are_those_of_the_clips_that_have_the_modalities():
    network, batch = built("misa"), clips(missing=0.4)
    assert not network(*batch).terms
    encoded = network.encoders(*batch)
    there = torch.stack(list(batch[2].values())).double()
    x = [layer(v) for layer, v in zip(network.project, encoded.hidden.values(), strict=True)]
    own, shared = [layer(v) for layer, v in zip(network.own, x, strict=True)], [network.shared(v) for v in x]
    pairs = [(0, 1), (0, 2), (1, 2)]
    similarity = sum(moment_discrepancy(shared[m], shared[n], there[m], there[n]) for m, n in pairs) / 3
    difference = sum(overlap(own[m], shared[m], there[m]) for m in range(3))
    difference += sum(overlap(own[m], own[n], there[m] * there[n]) for m, n in pairs)
    restored = [layer(o + s) for layer, o, s in zip(network.restore, own, shared, strict=True)]
    error = sum((r - a)[w > 0].square().mean() for r, a, w in zip(restored, x, there, strict=True)) / 3
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    terms = network(*batch).terms
    torch.testing.assert_close(terms["similarity"], 0.3 * similarity)
    torch.testing.assert_close(terms["difference"], 0.1 * difference)
    torch.testing.assert_close(terms["reconstruction"], error)
    without = MISA(MODALITIES, 4, SMALL, difference=0.0).double()
    assert "difference" not in without(*batch).terms


class Published:
    """Self-MM's labels in a loop over clips and columns, by the published code."""

    def __init__(self, modalities, limit):
        self.modalities, self.limit = ["fused", *modalities], limit
        self.labels = {m: {} for m in self.modalities}
        self.features = {m: {} for m in self.modalities}

    def centre(self, m, column, sign):
        members = [
            self.features[m][c] for c, y in self.labels[m].items() if c in self.features[m] and sign * y[column] > 0
        ]
        return np.mean(members, 0) if members else None

    def gain(self, m, vector, column):
        centres = [self.centre(m, column, sign) for sign in (1, -1)]
        if any(c is None for c in centres):
            return None
        positive, negative = (np.linalg.norm(vector - c) for c in centres)
        return (negative - positive) / (positive + 1e-8)

    def remember(self, vectors, target, index, present, epoch):
        fresh = []
        for i, clip in enumerate(index):
            for m in self.modalities[1:]:
                if epoch == 0 or not present[m][i]:
                    continue
                for k, y in enumerate(target[i]):
                    own, fused = self.gain(m, vectors[m][i], k), self.gain("fused", vectors["fused"][i], k)
                    if own is not None and fused is not None:
                        new = 0.5 * own / (fused + 1e-8) * y + 0.5 * (y + own - fused)
                        fresh.append((m, clip, k, min(max(new, -self.limit), self.limit)))
        for i, clip in enumerate(index):
            for m in self.modalities:
                self.labels[m].setdefault(clip, target[i].copy())
                if m == "fused" or present[m][i]:
                    self.features[m][clip] = vectors[m][i]
        n = epoch + 1
        for m, clip, k, new in fresh:
            self.labels[m][clip][k] = (n - 1) / (n + 1) * self.labels[m][clip][k] + 2 / (n + 1) * new


@pytest.mark.parametrize("share", [0.0, 0.3], ids=["complete", "some missing"])
@pytest.mark.parametrize("kind", ["scores", "classes"])
def test_labels_of_modalities_are_those_of_a_loop_over_clips(kind, share):
    count, outputs = 20, 1 if kind == "scores" else 4
    network, batch = built("self_mm", outputs=outputs), clips(count=count, missing=share)
    network.prepare(count)
    generator = torch.Generator().manual_seed(2)
    if kind == "scores":
        target = torch.rand(count, generator=generator, dtype=torch.double) * 6 - 3
        given = target[:, None].numpy()
    else:
        target = torch.randint(4, (count,), generator=generator)
        given = np.where(np.arange(4) == target[:, None].numpy(), 1.0, -1.0)
    published = Published(MODALITIES, 3.0 if kind == "scores" else 1.0)
    for epoch in range(3):
        with torch.no_grad():
            for p in network.parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        answer = network(*batch)
        every = {"fused": answer.fused, **answer.hidden}
        for part in torch.randperm(count, generator=generator).split(8):
            present = {n: p[part] for n, p in batch[2].items()}
            told = type(answer)(
                answer.output[part], {n: h[part] for n, h in answer.hidden.items()}, fused=answer.fused[part]
            )
            network.remember(told, target[part], part, present, epoch)
            here = {n: x[part].detach().numpy() for n, x in every.items()}
            published.remember(here, given[part.numpy()], part.tolist(), present, epoch)
    for m, name in enumerate(["fused", *MODALITIES]):
        labels = np.array([published.labels[name][clip] for clip in range(count)])
        np.testing.assert_allclose(network.labels[m].numpy(), labels, rtol=1e-9, atol=1e-9)
        assert m == 0 or np.abs(labels - given).max() > 0.1
    index = torch.arange(count)
    terms = network.losses(answer, target, index, batch[2])
    for m, name in enumerate(MODALITIES, start=1):
        label, there = network.labels[m], batch[2][name]
        label = torch.where(network.seen[m][:, None], label, torch.tensor(given))
        losses = []
        for i in range(count):
            weight = np.tanh(np.abs(label[i].numpy() - given[i]).sum()) * float(there[i])
            output = answer.unimodal[name][i].float()
            if kind == "scores":
                losses.append(weight * abs(output[0] - label[i][0]).item())
            else:
                p = (label[i] + 1).clamp(min=1e-6)
                losses.append(-weight * (p / p.sum() * output.log_softmax(0)).sum().item())
        assert terms[f"self_{name}"].item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_in_the_first_epoch_labels_are_the_clips_own_and_modalities_weigh_nothing():
    network, batch = built("self_mm", outputs=1), clips()
    network.prepare(12)
    target, index = torch.linspace(-3, 3, 12).double(), torch.arange(12)
    answer = network(*batch)
    assert all(term == 0 for term in network.losses(answer, target, index, batch[2]).values())
    network.remember(answer, target, index, batch[2], 0)
    assert torch.equal(network.labels, target[:, None].expand(4, 12, 1))
    assert all(term == 0 for term in network.losses(answer, target, index, batch[2]).values())


def test_the_memory_is_state():
    network, batch = built("self_mm"), clips()
    network.prepare(12)
    network.remember(network(*batch), torch.arange(12) % 4, torch.arange(12), batch[2], 0)
    again = built("self_mm")
    again.prepare(12)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.features, network.features)
    assert again.seen.all()


def test_a_vector_as_near_to_its_class_as_the_fused_one_keeps_the_label():
    y, gain = torch.tensor([[1.5], [-2.0]]), torch.tensor([[0.4], [-0.7]])
    torch.testing.assert_close(relabelled(y, gain, gain, 3.0), y)
    assert relabelled(y, gain * 9, gain, 3.0).abs().max() == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lmf", "mult", "misa"])
def test_an_exported_network_takes_any_number_of_clips_and_steps(name):
    network = built(name)
    program = exported(network, MODALITIES)
    for count, share in ((7, 0.0), (9, 0.4)):
        batch = clips(count=count, seed=count, missing=share)
        torch.testing.assert_close(program(*batch)["output"], network(*batch).output)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Unimodal(MODALITIES, 4, "voice"), "modality"),
        (lambda: TensorFusion(MODALITIES, 4, factor=0), "factor"),
        (lambda: LowRankFusion(MODALITIES, 4, rank=0), "rank"),
        (lambda: MulT(MODALITIES, 4, heads=7), "heads"),
        (lambda: MulT(MODALITIES, 4, kernel=2), "kernel"),
        (lambda: MulT({"a": MODALITIES["text"]}, 4), "modalities"),
        (lambda: MulT(MODALITIES, 4, dropout=-0.1), "dropout"),
        (lambda: MISA({"a": MODALITIES["text"]}, 4), "modalities"),
        (lambda: MISA(MODALITIES, 4, similarity=-1.0), "similarity"),
        (lambda: SelfMM(MODALITIES, 1, limit=0.0), "limit"),
        (lambda: SelfMM(MODALITIES, 1, factor=-1.0), "factor"),
        (lambda: LateFusion(MODALITIES, 0), "num_outputs"),
        (lambda: AttentionFusion(MODALITIES, 0), "num_outputs"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(make, argument):
    with pytest.raises(UserError, match=f"^{argument}: expected [^\n]*$"):
        make()
