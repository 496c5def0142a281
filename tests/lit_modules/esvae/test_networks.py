"""The networks against published sizes, a naive re-run of FSVAE's latent, and what the paper's equations demand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leanlight.contracts import UserError
from lit_modules.esvae.ann import VAE, FeatureAutoencoder
from lit_modules.esvae.evaluation import robustness
from lit_modules.esvae.layers import Neuron, SpikingDecoder, SpikingLayer, norm_of_copies
from lit_modules.esvae.metrics import FeatureMoments, disturb, frechet_distance
from lit_modules.esvae.networks import ESVAE, FSVAE, SAE, to_signed
from lit_modules.nn import LeakyReadout, ThresholdBatchNorm, reset

LARGE = (32, 64, 128, 256, 512)
TINY = {"image_size": 16, "channels": (4, 8), "latent_size": 6}
SPIKING = {**TINY, "time_steps": 5}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (lambda: ESVAE(1), 855_905),
        (lambda: ESVAE(1, latent_size=128), 1_068_257),
        (lambda: ESVAE(3, latent_size=128), 1_069_411),
        (lambda: ESVAE(3, 64, LARGE, 128), 3_696_227),
        (lambda: FSVAE(1), 4_053_601),
        (lambda: FSVAE(3), 4_054_755),
        (lambda: FSVAE(3, 64, LARGE), 6_681_571),
        (lambda: VAE(1), 1_180_641),
        (lambda: VAE(3), 1_181_795),
        (lambda: VAE(3, 64, LARGE), 3_937_635),
        (lambda: ESVAE(1, 16, (16, 32, 64), 32), 67_505),
        (lambda: FSVAE(1, 16, (16, 32, 64), 32), 257_809),
        (lambda: VAE(1, 16, (16, 32, 64), 32), 74_097),
    ],
)
def test_parameter_counts_are_those_of_the_layer_lists(network, parameters):
    with torch.device("meta"):
        assert count(network()) == parameters


def test_the_bottleneck_replaces_three_million_autoregressive_parameters():
    with torch.device("meta"):
        fsvae, esvae = FSVAE(1), ESVAE(1, latent_size=128)
    assert count(fsvae.prior) == 1_484_544
    assert count(fsvae.posterior) == 1_517_312
    assert count(esvae.bottleneck) == 128**2 + 128
    assert count(fsvae) - count(esvae) == 3_001_856 - 16_512


@pytest.mark.parametrize(
    "network",
    [
        lambda: ESVAE(2, **SPIKING),
        lambda: ESVAE(2, **SPIKING, prior="uniform_rate", sampler="straight_through", kernel="linear"),
        lambda: ESVAE(2, **SPIKING, prior="fixed_rate", sampler="identity", surrogate_gradient="rect"),
        lambda: FSVAE(2, **SPIKING, candidates=3),
        lambda: FSVAE(2, **SPIKING, candidates=3, divergence="kld", scheduled_sampling=False),
        lambda: SAE(2, **SPIKING),
        lambda: VAE(2, **TINY),
        lambda: FeatureAutoencoder(2, **TINY),
    ],
)
def test_every_parameter_learns_and_images_stay_in_range(network):
    torch.manual_seed(0)
    network = network()
    image = torch.rand(7, 2, 16, 16)
    code = network.encode(to_signed(image))
    (F.mse_loss(network.decode(code.z), to_signed(image)) + code.divergence).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert code.features.shape == (7, 6)
    assert code.divergence.shape == ()
    network.eval()
    with torch.no_grad():
        assert network(image).shape == image.shape
        images = network.generate(3) if network.generates else network(image)[:3]
    assert images.shape == (3, 2, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1


def test_no_neuron_remembers_a_forward_pass():
    torch.manual_seed(0)
    network = SAE(1, **SPIKING).eval()
    image = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        first = network(image)
        network(torch.rand(5, 1, 16, 16))
        assert torch.equal(network(image), first)


def test_readout_of_a_constant_signal_is_a_geometric_sum():
    steps, y = 16, 0.37
    got = LeakyReadout(0.8)(torch.full((steps, 2, 1, 3, 3), y)).tanh()
    torch.testing.assert_close(got, torch.full((2, 1, 3, 3), math.tanh(y * (1 - 0.8**steps) / (1 - 0.8))))


@pytest.mark.parametrize("decay", [0.8, 1.0, 0.0])
def test_last_convolution_before_the_readout_equals_the_convolution_of_every_step_first(decay):
    torch.manual_seed(0)
    decoder = SpikingDecoder(3, 16, (4, 8), 6, Neuron(), decay).double()
    spikes = (torch.rand(5, 2, 4, 16, 16) < 0.3).double()
    every_step = torch.stack([decoder.last(step) for step in spikes])
    weights = [decay ** (4 - t) for t in range(5)]
    expected = sum(w * y for w, y in zip(weights, every_step, strict=True))
    torch.testing.assert_close(decoder.potential(spikes), expected)


def test_norm_of_copies_equals_the_norm_of_the_repeated_batch():
    torch.manual_seed(0)
    one, many = ThresholdBatchNorm(3).double(), ThresholdBatchNorm(3).double()
    for _ in range(3):
        x = torch.randn(2, 3, 2, 1, dtype=torch.float64) * 3 + 1
        got, expected = norm_of_copies(one, x, 5), many(x.repeat(5, 1, 1, 1))
        torch.testing.assert_close(got, expected[:2])
    torch.testing.assert_close(one.norm.running_mean, many.norm.running_mean)
    torch.testing.assert_close(one.norm.running_var, many.norm.running_var)
    assert one.norm.num_batches_tracked == many.norm.num_batches_tracked
    one.eval(), many.eval()
    torch.testing.assert_close(norm_of_copies(one, x, 5), many(x))


def test_bias_before_a_norm_has_gradient_zero_and_counts_in_evaluation():
    torch.manual_seed(0)
    layer = SpikingLayer(nn.Linear(3, 4), 4, Neuron())
    spikes = (torch.rand(5, 6, 3) < 0.5).float()
    layer(spikes).sum().backward()
    assert torch.equal(layer.weights.bias.grad, torch.zeros(4))
    layer.eval()
    reset(layer)
    before = layer.norm(layer.weighted(spikes.flatten(0, 1)))
    with torch.no_grad():
        layer.weights.bias += 1.0
    assert not torch.allclose(layer.norm(layer.weighted(spikes.flatten(0, 1))), before)


# ---- FSVAE's latent ----


def naive_posterior(network, spikes, picks):
    """Every step runs the candidate network on the whole prefix, as the definition says."""
    before = torch.zeros_like(spikes[:1])
    for t in range(len(spikes) - 1):
        candidates = network.posterior(torch.cat([spikes[: t + 1], before], dim=-1))[-1]
        z = candidates.gather(-1, picks[t][..., None])[..., 0]
        before = torch.cat([before, z[None]])
    candidates = network.posterior(torch.cat([spikes, before], dim=-1))
    return candidates.gather(-1, picks[..., None])[..., 0], candidates


@pytest.mark.parametrize("training", [True, False])
def test_fsvae_posterior_equals_rerunning_every_prefix(training):
    torch.manual_seed(0)
    network = FSVAE(1, **{**SPIKING, "time_steps": 8}, candidates=4)
    spikes = (torch.rand(8, 16, 6) < 0.5).float()
    for _ in range(20):  # statistics that let neurons fire in evaluation
        network.posterior(torch.cat([spikes, spikes], -1))
    network.train(training)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    results = []
    for posterior in (network.sample_posterior, None):
        network.load_state_dict(state)
        torch.manual_seed(3)
        with torch.no_grad():
            if posterior is None:
                results.append(naive_posterior(network, spikes, torch.randint(4, spikes.shape)))
            else:
                results.append(posterior(spikes))
        results[-1] += ({name: value.clone() for name, value in network.state_dict().items()},)
    (z, q, after), (z_naive, q_naive, after_naive) = results
    assert 0.05 < z.mean() < 0.95
    assert torch.equal(z, z_naive)
    assert torch.equal(q, q_naive)
    for name in after:
        torch.testing.assert_close(after[name], after_naive[name])


def test_fsvae_generation_equals_rerunning_every_prefix():
    torch.manual_seed(0)
    network = FSVAE(1, **SPIKING, candidates=4)
    for _ in range(20):
        network.prior((torch.rand(5, 16, 6) < 0.5).float())
    network.eval()
    with torch.no_grad():
        torch.manual_seed(3)
        drawn = network.draw(9)
        torch.manual_seed(3)
        picks = torch.randint(4, (5, 9, 6))
        before = torch.zeros(1, 9, 6)
        for pick in picks:
            z = network.prior(before)[-1].gather(-1, pick[..., None])[..., 0]
            before = torch.cat([before, z[None]])
    assert 0 < drawn.mean() < 1
    assert torch.equal(drawn, before[1:])


def test_fsvae_picks_each_candidate_equally_often():
    """Given the candidates, a latent spike is Bernoulli with their mean."""
    torch.manual_seed(0)
    network = FSVAE(1, **{**SPIKING, "time_steps": 1}, candidates=5)
    spikes = (torch.rand(1, 4000, 6) < 0.5).float()
    z, q = network.sample_posterior(spikes)
    expected = q.mean(-1).mean().item()
    assert abs(z.mean().item() - expected) < 4 * math.sqrt(expected * (1 - expected) / z.numel())


def test_scheduled_sampling_replaces_inputs_from_step_five_in_training_only():
    torch.manual_seed(0)
    network = FSVAE(1, **{**SPIKING, "time_steps": 9}, candidates=4)
    z = torch.full((9, 3, 6), 0.5)  # no real spike has this value, so replaced steps show
    shifted = torch.cat([torch.zeros(1, 3, 6), z[:-1]])
    network.own_probability = 1.0
    replaced = (network.prior_inputs(z) != shifted).flatten(1).any(1)
    assert replaced.tolist() == [False] * 6 + [True] * 3
    network.own_probability = 0.0
    assert torch.equal(network.prior_inputs(z), shifted)
    network.own_probability = 1.0
    assert torch.equal(network.eval().prior_inputs(z), shifted)
    network.set_progress(0.0)
    assert network.own_probability == pytest.approx(0.1)
    network.set_progress(1.0)
    assert network.own_probability == pytest.approx(0.3)


# ---- the ESVAE prior, errors, training ----


def test_priors_give_rates_of_their_kind():
    torch.manual_seed(0)
    assert ESVAE(1, **SPIKING, prior="fixed_rate", prior_rate=0.3).prior_rates(4).unique().tolist() == pytest.approx(
        [0.3]
    )
    uniform = ESVAE(1, **SPIKING, prior="uniform_rate").prior_rates(4000)
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    network = ESVAE(1, **SPIKING)
    torch.manual_seed(1)
    rates = network.prior_rates(4)
    torch.manual_seed(1)
    torch.testing.assert_close(rates, torch.sigmoid(network.bottleneck(torch.randn(4, 6))))


def test_only_the_divergence_trains_the_bottleneck():
    torch.manual_seed(0)
    network, image = ESVAE(1, **SPIKING), torch.rand(8, 1, 16, 16)
    code = network.encode(to_signed(image))
    network.decode(code.z).square().mean().backward(retain_graph=True)
    assert network.bottleneck.weight.grad is None
    code.divergence.backward()
    assert network.bottleneck.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"image_size": 20, "channels": (4, 8, 16)}, "image_size"),
        ({"channels": ()}, "channels"),
        ({"latent_size": 0}, "latent_size"),
        ({"time_steps": -1}, "time_steps"),
        ({"kernel": "rfb"}, "did you mean 'rbf'"),
        ({"sampler": "poison"}, "did you mean 'poisson'"),
        ({"prior_rate": 1.5}, "prior_rate"),
        ({"half_width": 0.0}, "half_width"),
        ({"tau": 1.5}, "tau"),
    ],
)
def test_bad_arguments_are_named_in_one_line(arguments, named):
    with pytest.raises(UserError, match=named) as caught:
        ESVAE(**{**SPIKING, **arguments})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def trained():
    """A small ESVAE after 100 steps on real 8x8 digits, enlarged; the images; the divergence of each step."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    image = torch.tensor(load_digits().images, dtype=torch.float32)[:512, None] / 16
    image = F.interpolate(image, 16, mode="bilinear")
    network = ESVAE(1, 16, (8, 16), 16, time_steps=6)
    bottleneck = list(network.bottleneck.parameters())
    others = [p for name, p in network.named_parameters() if not name.startswith("bottleneck")]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": bottleneck, "lr": 3e-2}], lr=3e-3, weight_decay=1e-3)
    divergences = []
    for _ in range(25):
        for batch in to_signed(image).split(128):
            code = network.encode(batch)
            loss = F.mse_loss(network.decode(code.z), batch) + 1e-3 * code.divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            divergences.append(code.divergence.item())
    return network.eval(), image, divergences


def test_training_beats_the_mean_image_and_pulls_the_prior_to_the_posterior(trained):
    network, image, divergences = trained
    with torch.no_grad():
        error = F.mse_loss(network(image), image)
    assert error < 0.8 * F.mse_loss(image.mean(0).expand_as(image), image)
    assert divergences[-1] < 0.3 * divergences[0]


def test_generated_images_resemble_the_data_more_than_those_of_an_untrained_network(trained):
    network, image, _ = trained
    torch.manual_seed(0)
    distances = []
    for model in (network, ESVAE(1, 16, (8, 16), 16, time_steps=6).eval()):
        with torch.no_grad():
            generated = model.generate(512)
        both = FeatureMoments(64), FeatureMoments(64)
        for moments, images in zip(both, (image, generated), strict=True):
            moments.update(F.avg_pool2d(images, 2).flatten(1))
        distances.append(float(frechet_distance(*both[0].gaussian(), *both[1].gaussian())))
    assert distances[0] < 0.5 * distances[1]
    with torch.no_grad():
        assert network.generate(256).mean() == pytest.approx(float(image.mean()), abs=0.1)


def test_order_of_latent_steps_does_not_matter_and_flip_noise_hurts_more_the_stronger_it_is(trained):
    network, image, _ = trained
    torch.manual_seed(0)
    target = to_signed(image)
    with torch.no_grad():
        z = network.encode(target).z
        plain, again = (float(F.mse_loss(network.decode(network.encode(target).z), target)) for _ in range(2))
        shuffled = float(F.mse_loss(network.decode(z[torch.randperm(len(z))]), target))
        noisy = [float(F.mse_loss(network.decode(disturb(z, a)), target)) for a in (0.0, 0.1, 0.2, 0.3)]
    assert abs(shuffled - plain) < 0.05 * plain + 3 * abs(plain - again)
    assert noisy == sorted(noisy)


def test_what_noise_and_shuffles_cost_is_measured_on_the_spikes_that_are_disturbed(trained):
    network, image, _ = trained
    torch.manual_seed(3)
    shuffled, result = robustness(network, image, [0.1, 0.3], shuffles=3)
    torch.manual_seed(3)
    errors, orders = [], None
    with torch.no_grad():
        for batch in to_signed(image).split(256):
            z = network.encode(batch).z
            # One order for all images, drawn after the first spikes.
            orders = torch.rand(3, len(z)).argsort(1) if orders is None else orders
            latents = disturb(z, 0.1), disturb(z, 0.3), z, *(z[order] for order in orders)
            errors.append([F.mse_loss(network.decode(latent), batch).item() for latent in latents])
    expected = torch.tensor(errors).mean(0).tolist()
    got = [*result.noisy["flip"].values(), result.clean, *shuffled.tolist()]
    assert got == pytest.approx(expected, rel=1e-5)
    assert result.losses()["drop"] == pytest.approx(sum(expected[:2]) / 2 - expected[2], rel=1e-4)
    assert 0 < result.losses()["retention"] < 0.9


@pytest.mark.parametrize("make", [VAE, FeatureAutoencoder])
def test_encoder_and_decoder_of_ordinary_autoencoders_are_compiled(make):
    torch.compiler.reset()
    network, graphs = make(1, 8, (4, 8), 3), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for part in (network.encoder, network.decoder):
        part.compile(backend=backend, fullgraph=True)
    network(torch.rand(2, 1, 8, 8)).sum().backward()
    assert len(graphs) == 2
    torch.compiler.reset()
