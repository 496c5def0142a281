"""Spiking prompts against closed forms in float64, spikingjelly's plain neuron, and a threshold by brute force."""

import math

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

from leanlight.contracts import UserError
from lit_modules.spike_nvpt import DensePrompts, RandomBits, SpikingPrompts

STEPS = [1, 2, 4, 8]
SLOPES = {
    "sigmoid": lambda x, alpha: alpha * torch.sigmoid(alpha * x) * (1 - torch.sigmoid(alpha * x)),
    "atan": lambda x, alpha: alpha / 2 / (1 + (math.pi / 2 * alpha * x) ** 2),
}


def made(latents, **options):
    """Prompts whose latent currents are given, (K, L, D)."""
    layers, length, width = latents.shape
    prompts = SpikingPrompts(layers, width, 48, length, **options)
    with torch.no_grad():
        prompts.latents.copy_(latents)
    return prompts


def random_latents(*shape, low=-2.0, high=2.0):
    """Float32 currents that no sum of up to 8 brings to the threshold."""
    torch.manual_seed(0)
    latents = torch.empty(shape).uniform_(low, high)
    whole = latents.double().unsqueeze(-1) * torch.arange(1, 9)
    assert ((whole - whole.round()).abs() > 1e-5).all()
    return latents


def closed_rates(current, steps, reset):
    if reset == "soft":
        return (steps * current).floor().clamp(0, steps) / steps
    between = torch.where(current > 0, (1 / current.clamp(min=1e-9)).ceil(), torch.inf)
    return (steps / between.clamp(min=1)).floor() / steps


def closed_slopes(current, steps, reset, slope, alpha):
    """dr/dP without a path through the reset: potentials in float64, and how fast each grows with the current."""
    potential, growth, total = torch.zeros_like(current), torch.zeros_like(current), torch.zeros_like(current)
    for _ in range(steps):
        potential, growth = potential + current, growth + 1
        total += slope(potential - 1, alpha) * growth
        spikes = (potential >= 1).double()
        if reset == "soft":
            potential = potential - spikes
        else:
            potential, growth = potential * (1 - spikes), growth * (1 - spikes)
    return total / steps


# ---- SFL ----


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_rates_are_those_of_the_closed_forms(steps, reset):
    latents = random_latents(3, 5, 64)
    rates = made(latents, use_sdu=False, time_steps=steps, reset=reset)()
    torch.testing.assert_close(rates.double(), closed_rates(latents.double(), steps, reset), rtol=0, atol=1e-7)


def test_known_currents_give_known_rates():
    currents = torch.tensor([0.2, 0.3, 0.5, 0.9])[None, None]
    for reset, expected in (("soft", [0.125, 0.25, 0.5, 0.875]), ("hard", [0.125, 0.25, 0.5, 0.5])):
        assert made(currents, use_sdu=False, time_steps=8, reset=reset)().flatten().tolist() == expected


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("alpha", [2.0, 5.0])
def test_rates_and_gradients_equal_spikingjellys_plain_neuron(steps, reset, name, alpha):
    latents, upstream = random_latents(3, 5, 16), torch.rand(3, 5, 16)
    prompts = made(latents, use_sdu=False, time_steps=steps, reset=reset, surrogate=name, alpha=alpha)
    function = {"sigmoid": surrogate.Sigmoid, "atan": surrogate.ATan}[name](alpha=alpha)
    plain = neuron.IFNode(1.0, None if reset == "soft" else 0.0, function, detach_reset=True, step_mode="m")
    current = latents.double().requires_grad_()
    expected = plain(current.repeat(steps, 1, 1, 1)).mean(0)
    rates = prompts()
    torch.testing.assert_close(rates.double(), expected, rtol=0, atol=1e-7)
    (expected * upstream).sum().backward()
    (rates * upstream).sum().backward()
    torch.testing.assert_close(prompts.latents.grad.double(), current.grad, rtol=1e-5, atol=1e-6)


# ---- SFL and SDU ----


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("theta", [None, 0.5, 0.7])
def test_the_gradient_is_the_product_of_both_surrogates(steps, reset, name, theta):
    latents, upstream = random_latents(2, 3, 16), torch.rand(2, 3, 16)
    prompts = made(latents, time_steps=steps, reset=reset, surrogate=name, theta=theta, scale=0.3)
    (prompts() * upstream).sum().backward()
    current, slope = latents.double(), SLOPES[name]
    outer = slope(closed_rates(current, steps, reset) - (theta or 1 / steps), 2.0)
    expected = 0.3 * upstream * outer * closed_slopes(current, steps, reset, slope, 2.0)
    torch.testing.assert_close(prompts.latents.grad.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 10, 16])
@pytest.mark.parametrize("theta", [None, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0])
def test_with_a_constant_current_filter_and_discretisation_are_one_threshold(steps, theta):
    currents = torch.linspace(-1.0, 2.0, 3001, dtype=torch.float64) + 1e-5
    needed = math.ceil(round((theta or 1 / steps) * steps, 9))  # spikes, of T
    bits = made(currents.float()[None, None], time_steps=steps, theta=theta)().flatten()
    assert torch.equal(bits, (currents >= needed / steps).float())


@pytest.mark.parametrize("steps", range(1, 65))
def test_as_many_spikes_as_theta_asks_for_are_enough_whatever_their_number(steps):
    """θ and rates are rounded: 1 / 41 * 41 is below 1 in float32."""
    spikes = torch.arange(steps + 1)
    currents = ((spikes + 0.5) / steps).float()[None, None]
    for needed in {1, steps // 3 or 1, steps}:
        bits = made(currents, time_steps=steps, theta=needed / steps)().flatten()
        assert bits.tolist() == (spikes >= needed).float().tolist()


def test_a_current_that_meets_the_threshold_fires():
    currents = torch.arange(-4, 9) / 8
    rates = made(currents[None, None], use_sdu=False, time_steps=8)().flatten()
    assert rates.tolist() == currents.clamp(0, 1).tolist()


def test_without_the_filter_bits_are_a_threshold_at_zero_or_theta():
    latents = torch.tensor([-1.0, -1e-6, 0.0, 0.2, 0.5, 0.6])[None, None]
    assert made(latents, use_sfl=False)().flatten().tolist() == [0, 0, 1, 1, 1, 1]
    assert made(latents, use_sfl=False, theta=0.5)().flatten().tolist() == [0, 0, 0, 0, 1, 1]
    prompts, slope = made(latents, use_sfl=False, theta=0.5), SLOPES["sigmoid"]
    prompts().sum().backward()
    torch.testing.assert_close(prompts.latents.grad.double(), slope(latents.double() - 0.5, 2.0))


@pytest.mark.parametrize(
    ("use_sfl", "use_sdu", "expected"),
    [
        (True, True, lambda p: (p >= 0.25).float()),
        (True, False, lambda p: (4 * p).floor().clamp(0, 4) / 4),
        (False, True, lambda p: (p >= 0).float()),
        (False, False, lambda p: p),
    ],
)
def test_four_corners_of_the_two_switches(use_sfl, use_sdu, expected):
    latents = random_latents(2, 3, 64)
    prompts = made(latents, use_sfl=use_sfl, use_sdu=use_sdu, scale=2.0)
    assert torch.equal(prompts(), 2 * expected(latents))
    bits = prompts.bits()
    assert (bits is not None) == use_sdu
    if use_sdu:
        assert torch.equal(bits, prompts() > 0)
        assert torch.equal(prompts(), prompts.scales()[:, None, None] * bits)
        assert set(prompts().unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("name", SLOPES)
@pytest.mark.parametrize("use_sfl", [True, False])
def test_no_latent_near_the_thresholds_is_without_gradient(name, use_sfl):
    latents = torch.linspace(-0.5, 1.5, 401)[None, None]
    prompts = made(latents, use_sfl=use_sfl, surrogate=name)
    prompts().sum().backward()
    assert (prompts.latents.grad > 1e-3).all()


@pytest.mark.parametrize("use_sdu", [True, False])
def test_nothing_is_left_of_one_pass_in_the_next(use_sdu):
    prompts = made(random_latents(3, 4, 8), use_sdu=use_sdu)
    first = prompts().detach()
    state = {name: value.clone() for name, value in prompts.state_dict().items()}
    prompts.neuron(torch.full((2, 5, 1, 8), 0.9))  # of another shape, and below the threshold at its end
    assert torch.equal(prompts(), first)
    prompts.bits()
    assert torch.equal(prompts(), first)
    assert state.keys() == prompts.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in prompts.state_dict().items())


def test_under_autocast_bits_and_gradients_are_those_of_float32():
    """In bfloat16, currents next to k / T fall on it and sums miss the threshold."""
    latents = (torch.arange(8).repeat(64) / 8 + torch.linspace(-2e-3, 2e-3, 512))[None, None]
    results = []
    for enabled in (False, True):
        prompts = made(latents, time_steps=8)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            tokens = prompts()
            tokens.sum().backward()
        assert tokens.dtype == torch.float32
        results.append((tokens.detach(), prompts.latents.grad, prompts.bits()))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    half = made(latents.bfloat16().float(), time_steps=8)()
    assert not torch.equal(half, results[0][0])


@pytest.mark.parametrize(("mode", "numbers"), [("fixed", 0), ("learned", 1), ("learned_by_layer", 3)])
def test_the_value_of_a_bit_is_fixed_or_learned_once_or_by_layer(mode, numbers):
    prompts = made(random_latents(3, 4, 8), scale=0.5, scale_mode=mode)
    tokens = prompts()
    tokens.sum().backward()
    trained = [p for p in prompts.parameters() if p.requires_grad and p is not prompts.latents]
    assert sum(p.numel() for p in trained) == numbers
    assert prompts.scales().tolist() == [0.5, 0.5, 0.5]
    ones = prompts.bits().sum((1, 2)).float()
    if mode == "learned":
        assert prompts.scale.grad.item() == ones.sum()
    elif mode == "learned_by_layer":
        assert torch.equal(prompts.scale.grad.flatten(), ones)


# ---- leak, signs, what varies in time ----


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("reset", ["soft", "hard"])
@pytest.mark.parametrize("readout", ["rate", "last_spike"])
def test_leaky_neurons_and_their_last_spike_are_spikingjellys(steps, reset, readout):
    latents, upstream = random_latents(2, 3, 16), torch.rand(2, 3, 16)
    prompts = made(latents, use_sdu=False, time_steps=steps, reset=reset, leak=0.25, sfl_readout=readout)
    v_reset, function = None if reset == "soft" else 0.0, surrogate.Sigmoid(alpha=2.0)
    plain = neuron.LIFNode(4.0, False, 1.0, v_reset, function, detach_reset=True, step_mode="m")
    current = latents.double().requires_grad_()
    spikes = plain(current.repeat(steps, 1, 1, 1))
    expected = spikes.mean(0) if readout == "rate" else spikes[-1]
    rates = prompts()
    torch.testing.assert_close(rates.double(), expected, rtol=0, atol=1e-7)
    (expected * upstream).sum().backward()
    (rates * upstream).sum().backward()
    torch.testing.assert_close(prompts.latents.grad.double(), current.grad, rtol=1e-5, atol=1e-6)


def test_a_leak_raises_the_current_that_fires():
    """Settled at I / leak, potentials reach 1 from I = leak on; integrate and fire from any positive current on."""
    currents = torch.tensor([0.2, 0.24, 0.26, 0.3])[None, None]
    bits = made(currents, leak=0.25, time_steps=100, theta=0.01)().flatten()
    assert bits.tolist() == [0, 0, 1, 1]
    assert made(currents, time_steps=100, theta=0.01)().sum() == 4


@pytest.mark.parametrize(("options", "threshold"), [({}, 0.25), ({"theta": 0.75}, 0.75), ({"use_sfl": False}, 0.0)])
def test_three_levels_are_a_threshold_on_either_side(options, threshold):
    latents = random_latents(2, 3, 64)
    prompts = made(latents, levels=3, scale=2.0, **options)
    tokens = prompts()
    assert torch.equal(tokens, 2.0 * (latents.sign() * (latents.abs() >= threshold)))
    assert prompts.bits() is None
    tokens.sum().backward()
    two = made(latents, scale=2.0, **options)
    two().sum().backward()
    mirrored = made(-latents, scale=2.0, **options)
    mirrored().sum().backward()
    torch.testing.assert_close(prompts.latents.grad, two.latents.grad + mirrored.latents.grad)


def currents_of(prompts, passes=1):
    """What neurons are given in so many passes: (passes, T, K, L, D)."""
    seen = []
    handle = prompts.neuron.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    for _ in range(passes):
        prompts()
    handle.remove()
    return torch.stack(seen)


def test_noise_on_the_current_is_standard_normal_and_new_at_every_step():
    prompts = made(torch.full((4, 10, 96), 0.5), sigma=0.3)
    noise = (currents_of(prompts, 3) - prompts.latents) / 0.3
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise.abs() < 1).float().mean().item() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)
    between = torch.corrcoef(noise.flatten(0, 1).flatten(1)) - torch.eye(12)
    assert between.abs().max() < 0.08  # 5 standard deviations of the correlation of 3,840 pairs


def test_noise_is_that_of_the_runs_seed_and_the_pass_and_goes_on_after_a_resume(monkeypatch):
    latents, options = random_latents(2, 3, 16), {"sigma": 0.3, "use_sdu": False}
    one = made(latents, **options)
    first, second, third = currents_of(one, 3)
    assert not torch.equal(first, second)
    torch.manual_seed(5)  # another process has drawn other numbers
    other = made(latents, **options)
    assert torch.equal(currents_of(other, 2), torch.stack([first, second]))
    resumed = made(latents, **options)
    resumed.load_state_dict(other.state_dict())
    assert torch.equal(currents_of(resumed)[0], third)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert not torch.equal(currents_of(made(latents, **options))[0], first)


@pytest.mark.parametrize("use_sfl", [True, False])
def test_evaluation_and_bits_are_without_noise_and_do_not_count(use_sfl):
    latents = random_latents(2, 3, 64)
    noisy, still = made(latents, sigma=0.5, use_sfl=use_sfl), made(latents, use_sfl=use_sfl)
    assert not torch.equal(noisy(), still())
    state = {name: value.clone() for name, value in noisy.state_dict().items()}
    assert torch.equal(noisy.bits(), still.bits())
    assert torch.equal(noisy.eval()(), still())
    assert all(torch.equal(value, state[name]) for name, value in noisy.state_dict().items())


def test_noise_alone_is_that_of_prompts_without_neurons():
    prompts = made(torch.zeros(4, 10, 96), use_sfl=False, use_sdu=False, sigma=0.3, scale=2.0)
    assert prompts().std().item() == pytest.approx(0.6, abs=0.02)
    assert prompts.eval()().abs().max() == 0


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_potentials_go_on_over_the_steps_of_training(steps, reset):
    latents, upstream = random_latents(2, 3, 16), torch.rand(2, 3, 16)
    options = {"time_mode": "across_iterations", "time_steps": steps, "reset": reset, "use_sdu": False}
    prompts = made(latents, **options)
    v_reset, function = None if reset == "soft" else 0.0, surrogate.Sigmoid(alpha=2.0)
    plain = neuron.IFNode(1.0, v_reset, function, detach_reset=True, step_mode="m")
    current = latents.clone().requires_grad_()
    for number in range(6):
        if number == 3:  # a resume
            state = prompts.state_dict()
            prompts = made(torch.zeros_like(latents), **options)
            prompts.load_state_dict(state)
        coming = prompts.eval()()  # evaluation sees the next step, and does not take it
        rates = prompts.train()()
        expected = plain(current.repeat(steps, 1, 1, 1)).mean(0)
        assert torch.equal(coming, rates)
        torch.testing.assert_close(rates, expected, rtol=0, atol=1e-7)
        plain.v = plain.v.detach()
        for values, leaf in ((rates, prompts.latents), (expected, current)):
            leaf.grad = None
            (values * upstream).sum().backward()
        torch.testing.assert_close(prompts.latents.grad, current.grad, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            for leaf in (prompts.latents, current):
                leaf.sub_(0.3 * current.grad)


def test_only_what_varies_in_time_is_more_than_one_threshold():
    """Latents in one narrow cell: under a constant current their bits are equal."""
    latents = torch.full((1, 8, 64), 0.6)
    assert len(made(latents, theta=0.5)().unique()) == 1
    assert len(made(latents, theta=0.5, sigma=0.3)().unique()) == 2
    carried = made(latents, time_steps=1, time_mode="across_iterations")
    assert [carried().mean().item() for _ in range(5)] == [0, 1, 0, 1, 1]  # 0.6, 1.2, 0.8, 1.4, 1.0


def test_what_is_kept_is_no_more_than_the_switches_need():
    latents = random_latents(1, 2, 4)
    kept = {"latents", "scale"}
    assert made(latents).state_dict().keys() == kept
    assert made(latents, sigma=0.1).state_dict().keys() == kept | {"passes"}
    signed = made(latents, time_mode="across_iterations", levels=3)
    assert signed.state_dict().keys() == kept | {"potential"}
    signed()
    assert signed.potential.shape == (2, 1, 2, 4)


# ---- first values ----


def test_spiking_prompts_begin_with_three_eighths_of_ones():
    torch.manual_seed(0)
    prompts = SpikingPrompts(12, 384, 588, 10)
    assert prompts.latents.abs().max() <= 1
    assert prompts.bits().float().mean().item() == pytest.approx(0.375, abs=0.01)


def test_the_range_of_dense_prompts_would_never_fire():
    torch.manual_seed(0)
    dense = DensePrompts(2, 768, 3 * 16 * 16, 50)
    v = math.sqrt(6 / 1536)
    assert 0.999 * v < dense().max() <= v
    assert -v <= dense().min() < -0.999 * v
    assert dense.bits() is None
    assert SpikingPrompts(2, 768, 768, 50, init_range=v).bits().sum() == 0


def test_random_bits_have_their_density_and_no_parameter():
    torch.manual_seed(0)
    prompts = RandomBits(4, 384, 588, 10, density=0.2, scale=3.0)
    assert not list(prompts.parameters())
    assert prompts.bits().float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(prompts(), 3.0 * prompts.bits())
    assert prompts.scales().tolist() == [3.0] * 4
    other = RandomBits(4, 384, 588, 10)
    other.load_state_dict(prompts.state_dict())
    assert torch.equal(other.bits(), prompts.bits())


# ---- bad input ----


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        (SpikingPrompts, {"length": 0}, "length: expected an integer of at least 1, got 0"),
        (DensePrompts, {"length": 0}, "length: expected an integer of at least 1, got 0"),
        (RandomBits, {"length": -3}, "length: expected an integer of at least 1, got -3"),
        (SpikingPrompts, {"time_steps": 0}, "time_steps: expected an integer of at least 1, got 0"),
        (SpikingPrompts, {"theta": 0.0}, r"theta: expected a number in \(0, 1\], got 0.0"),
        (SpikingPrompts, {"theta": 1.1}, r"theta: expected a number in \(0, 1\], got 1.1"),
        (SpikingPrompts, {"theta": math.nan}, r"theta: expected a number in \(0, 1\], got nan"),
        (SpikingPrompts, {"reset": "none"}, "reset: expected one of soft, hard, got 'none'"),
        (SpikingPrompts, {"scale": 0.0}, "scale: expected a positive number, got 0.0"),
        (SpikingPrompts, {"scale_mode": "free"}, "scale_mode: expected one of fixed, learned, learned_by_layer"),
        (SpikingPrompts, {"init_range": -1.0}, "init_range: expected a positive number, got -1.0"),
        (SpikingPrompts, {"v_threshold": 0.0}, "v_threshold: expected a positive number, got 0.0"),
        (SpikingPrompts, {"alpha": 0.0}, "alpha: expected a positive number"),
        (SpikingPrompts, {"surrogate": "line"}, "surrogate: expected one of sigmoid, atan, got 'line'"),
        (SpikingPrompts, {"leak": 1.0}, r"leak: expected a number in \[0, 1\), got 1.0"),
        (SpikingPrompts, {"sigma": -0.1}, "sigma: expected a number of at least 0, got -0.1"),
        (
            SpikingPrompts,
            {"time_mode": "rolled"},
            "time_mode: expected one of unrolled, across_iterations, got 'rolled'",
        ),
        (SpikingPrompts, {"sfl_readout": "sum"}, "sfl_readout: expected one of rate, last_spike, got 'sum'"),
        (SpikingPrompts, {"levels": 4}, "levels: expected 2, or 3 with use_sdu, got 4"),
        (SpikingPrompts, {"levels": 3, "use_sdu": False}, "levels: expected 2, or 3 with use_sdu, got 3"),
        (DensePrompts, {"init_range": 0.0}, "init_range: expected a positive number, got 0.0"),
        (RandomBits, {"density": 1.5}, r"density: expected a number in \[0, 1\], got 1.5"),
        (RandomBits, {"scale": -1.0}, "scale: expected a positive number, got -1.0"),
    ],
)
def test_bad_input_is_one_line(kind, options, line):
    with pytest.raises(UserError, match=line) as error:
        kind(2, 8, 48, **options)
    assert "\n" not in str(error.value)
