"""Encoders against PyTorch's own layers with the same weights, and what they do with padding and missing modalities."""

import math

import pytest
import torch
from clips import MODALITIES, clips, one
from torch import nn

from leanlight.contracts import UserError
from leanlight.contracts.emotion import Modality
from lit_modules.tical import Encoders, Encoding
from lit_modules.tical.encoders import Attention, Block, positioned

KINDS = ("transformer", "lstm")


def copied(ours, theirs):
    """PyTorch's layer of attention with the weights of ours."""
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.read.weight)
        theirs.in_proj_bias.copy_(ours.read.bias.normal_())
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias.normal_())
    return theirs


def padded(count=5, longest=7):
    torch.manual_seed(0)
    length = torch.tensor([1, 7, 3, 5, 2])
    return torch.randn(count, longest, 8, dtype=torch.double), torch.arange(longest) < length[:, None]


def test_attention_is_that_of_pytorch():
    source, mask = padded()
    query = torch.randn(5, 3, 8, dtype=torch.double)
    ours = Attention(8, 2).double()
    theirs = copied(ours, nn.MultiheadAttention(8, 2, batch_first=True).double())
    expected = theirs(query, source, source, key_padding_mask=~mask)[0]
    torch.testing.assert_close(ours(query, source, mask), expected, rtol=1e-12, atol=1e-13)
    each = torch.rand(5, 3, 7) < 0.7
    each[..., 0] = True
    expected = theirs(query, source, source, attn_mask=~each.repeat_interleave(2, 0))[0]
    torch.testing.assert_close(ours(query, source, each), expected, rtol=1e-12, atol=1e-13)


def test_attention_with_dropout_is_that_without_it_but_for_what_is_dropped():
    source, mask = padded()
    mask[2] = False
    ours = Attention(8, 2, dropout=1e-12).double()
    assert ours.training
    torch.testing.assert_close(ours(source, source, mask), ours.eval()(source, source, mask), rtol=1e-10, atol=1e-11)
    ours.dropout = 0.5
    value = ours(source, source, mask)
    torch.manual_seed(0)
    mean = torch.stack([ours.train()(source, source, mask) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, value, rtol=0.0, atol=0.1)
    assert not torch.equal(ours(source, source, mask), value)


def test_who_may_see_nothing_sees_the_first_step():
    source, mask = padded()
    ours = Attention(8, 2).double()
    mask[2] = False
    whole = mask.clone()
    whole[2, 0] = True
    assert torch.equal(ours(source, source, mask), ours(source, source, whole))


def test_a_block_is_pytorchs_layer_that_normalises_first():
    x, mask = padded()
    ours = Block(8, 2).double()
    theirs = nn.TransformerEncoderLayer(8, 2, 32, 0.0, norm_first=True, batch_first=True).double()
    copied(ours.attention, theirs.self_attn)
    for own, other in [
        (ours.norm_attention, theirs.norm1), (ours.norm_hidden, theirs.norm2),
        (ours.expand, theirs.linear1), (ours.contract, theirs.linear2),
    ]:  # fmt: skip
        nn.init.normal_(own.bias)
        other.load_state_dict(own.state_dict())
    expected = theirs(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, mask), expected, rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(x)
    (ours(x, mask) * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.attention.read.weight.grad, theirs.self_attn.in_proj_weight.grad)


def test_positions_are_sines_and_cosines():
    placed = positioned(torch.ones(1, 4, 6, dtype=torch.double))[0]
    for step in range(4):
        for pair in range(3):
            angle = step / 10_000 ** (pair / 2)
            assert placed[step, pair].item() == pytest.approx(math.sqrt(6) + math.sin(angle), abs=1e-6)
            assert placed[step, pair + 3].item() == pytest.approx(math.sqrt(6) + math.cos(angle), abs=1e-6)


def built(kind="transformer", modalities=MODALITIES):
    torch.manual_seed(1)
    encoders = Encoders(modalities, Encoding(8, layers=2, heads=2, sequence=kind)).double().eval()
    nn.init.normal_(encoders.missing)
    return encoders


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_change_nothing(kind):
    encoders, batch = built(kind), clips(missing=0.3)
    encoded = encoders(*batch)
    dirty = {n: torch.where(m[..., None] if n in batch[1] else m, batch[0][n], 7.0) for n, m in encoded.mask.items()}
    for name, vector in encoders(dirty, *batch[1:]).hidden.items():
        assert torch.equal(vector, encoded.hidden[name])
    for i in range(12):
        for name, vector in encoders(*one(batch, i)).hidden.items():
            torch.testing.assert_close(vector[0], encoded.hidden[name][i], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_vector_stands_for_a_missing_modality_and_for_nothing_else(kind):
    encoders, batch = built(kind), clips()
    encoded = encoders(*batch)
    present = {name: there.clone() for name, there in batch[2].items()}
    present["text"][4] = False
    without = encoders(batch[0], batch[1], present)
    assert torch.equal(without.hidden["text"][4], encoders.missing[0])
    assert not without.mask["text"][4].any()
    others = torch.arange(12) != 4
    torch.testing.assert_close(without.hidden["text"][others], encoded.hidden["text"][others])
    assert torch.equal(without.hidden["keys"], encoded.hidden["keys"])
    nn.init.normal_(encoders.missing)
    for name, vector in encoders(*batch).hidden.items():
        assert torch.equal(vector, encoded.hidden[name])


def test_a_missing_modality_gives_its_vector_a_finite_gradient():
    encoders = built()
    encoded = encoders(*clips(missing=0.5))
    sum(x.square().sum() for x in encoded.hidden.values()).backward()
    assert (encoders.missing.grad != 0).all()
    assert all(p.grad.isfinite().all() for p in encoders.parameters())


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Encoding(heads=3), "heads"),
        (lambda: Encoding(dropout=1.0), "dropout"),
        (lambda: Encoding(kernel=4), "kernel"),
        (lambda: Encoding(sequence="gru"), "sequence"),
        (lambda: Encoding(dim=0), "dim"),
        (lambda: Encoders({}, Encoding()), "modalities"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(make, argument):
    with pytest.raises(UserError, match=f"^{argument}: expected [^\n]*$"):
        make()


def test_a_vector_encoder_is_three_linear_layers_with_relu():
    encoders = Encoders({"a": Modality(4)}, Encoding(8)).eval()
    x = torch.randn(3, 4)
    y = x
    for layer in encoders.encoders[0].layers:
        if isinstance(layer, nn.Linear):
            y = (y @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(encoders({"a": x}, {}, {"a": torch.ones(3, dtype=torch.bool)}).hidden["a"], y)
