"""Spiking autoencoders: ESVAE, FSVAE and the plain spiking autoencoder (`docs/methods/esvae.md`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from leanlight.contracts import UserError, nearest
from leanlight.contracts.ranges import PositiveFloat, PositiveInt, TimeSteps, UnitInterval
from lit_modules.esvae.layers import CHANNELS_32, Neuron, SpikingDecoder, SpikingEncoder, SpikingLayer
from lit_modules.esvae.losses import Kernel, bernoulli_kl, mmd2, psp_mmd
from lit_modules.esvae.sampling import SAMPLERS, Sampler, poisson_spikes, sample_spikes
from lit_modules.nn import reset
from lit_modules.nn.checks import require_positive
from lit_modules.nn.neurons import SurrogateName

Prior = Literal["bottleneck", "uniform_rate", "fixed_rate"]


@dataclass(frozen=True)
class Code:
    """What an encoder says about N images.

    Args:
        z: sampled latent that the decoder reads: (T, N, d) spikes or (N, d) numbers.
        features: (N, d) deterministic summary: firing rates in [0, 1], or means of a Gaussian.
        divergence: scalar distance of posterior from prior; 0 for plain autoencoders.
    """

    z: Tensor
    features: Tensor
    divergence: Tensor


class Autoencoder(nn.Module):
    """Base of the family: images (N, C, H, W) float in [0, 1] in and out; the map to the family's [-1, 1] lives here.

    Subclasses have an `encoder` and a `decoder`, and give `encode` and `decode` on [-1, 1] and, where the model can
    generate, `draw`.

    Args:
        in_channels: C of the images.
        image_size: side of the square images, in pixels.
        latent_size: d.
    """

    spiking = True  # whether the latent is a spike train
    generates = True  # whether there is a prior to draw from

    def __init__(self, in_channels: int, image_size: int, latent_size: int) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, image_size=image_size, latent_size=latent_size)
        self.image_shape = (in_channels, image_size, image_size)
        self.latent_size = latent_size

    def encode(self, image: Tensor) -> Code:
        """(N, C, H, W) in [-1, 1] → Code."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Latent → (N, C, H, W) in (-1, 1)."""
        raise NotImplementedError

    def draw(self, count: int) -> Tensor:
        """Latents of `count` images from the prior."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct: (N, C, H, W) in [0, 1] → the same."""
        return to_unit(self.decode(self.encode(to_signed(image)).z))

    def generate(self, count: int) -> Tensor:
        """New images (count, C, H, W) in [0, 1]; meant for eval mode."""
        return to_unit(self.decode(self.draw(count)))

    def set_progress(self, done: float) -> None:
        """Tell how much of training is done, in [0, 1], for what changes with it."""


class SAE(Autoencoder):
    """Spiking autoencoder: the decoder reads the encoder's spikes. Without a prior it reconstructs but cannot generate.

    Args:
        in_channels: C of the images.
        image_size: side of the square images, in pixels.
        channels: output channels of each convolution; each halves the side.
        latent_size: d, latent neurons.
        time_steps: T; 16 in the paper.
        tau: τ, share of the membrane potential kept a step, in [0, 1]; 0.25 in the paper.
        v_threshold: V_th, potential that fires; 0.2 in the paper.
        surrogate_gradient: centre of the boxcar derivative: ``rect_zero``: 0 (published code); ``rect``: V_th.
        readout_decay: λ_o, share of the output potential kept a step; 0.8 in the paper.
    """

    generates = False

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        image_size: PositiveInt = 32,
        channels: Sequence[PositiveInt] = CHANNELS_32,
        latent_size: PositiveInt = 128,
        time_steps: TimeSteps = 16,
        tau: UnitInterval = 0.25,
        v_threshold: PositiveFloat = 0.2,
        surrogate_gradient: SurrogateName = "rect_zero",
        readout_decay: UnitInterval = 0.8,
    ) -> None:
        super().__init__(in_channels, image_size, latent_size)
        require_positive(time_steps=time_steps)
        self.time_steps = time_steps
        self.neuron = Neuron(tau, v_threshold, surrogate_gradient)
        self.encoder = SpikingEncoder(in_channels, image_size, channels, latent_size, time_steps, self.neuron)
        self.decoder = SpikingDecoder(in_channels, image_size, channels, latent_size, self.neuron, readout_decay)

    def embed(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] → the encoder's spikes (T, N, d)."""
        return _at_rest(self.encoder, image)

    def encode(self, image: Tensor) -> Code:
        spikes = self.embed(image)
        return Code(spikes, spikes.mean(0), spikes.new_zeros(()))

    def decode(self, z: Tensor) -> Tensor:
        return _at_rest(self.decoder, z)


class ESVAE(SAE):
    """Efficient spiking variational autoencoder (Zhan et al., arXiv:2310.14839).

    Posterior: firing rates of the encoder. Prior: rates made from Gaussian noise by one linear layer and a sigmoid.
    Latent spikes are drawn from the rates (`poisson_spikes`); divergence: MMD² of the two sets of rates.

    Args:
        in_channels: C of the images.
        image_size: side of the square images, in pixels.
        channels: output channels of each convolution; each halves the side.
        latent_size: d, latent neurons; 32 (MNIST, Fashion-MNIST) or 128 in the paper.
        time_steps: T; 16 in the paper.
        kernel: of the MMD: ``rbf``, five Gaussian kernels (paper), or ``linear``, the distance of the means.
        sampler: spikes given rates: ``poisson`` (paper), ``identity``, ``straight_through``; see `sample_spikes`.
        half_width: a, half the width of the window in which a drawn spike has a derivative; 0.5 in the paper.
        prior: rates from noise by one layer (``bottleneck``, paper), uniform on [0, 1], or all equal (``fixed_rate``).
        prior_rate: firing rate in [0, 1] of the prior ``fixed_rate``.
        tau: τ, share of the membrane potential kept a step, in [0, 1]; 0.25 in the paper.
        v_threshold: V_th, potential that fires; 0.2 in the paper.
        surrogate_gradient: centre of the boxcar derivative: ``rect_zero``: 0 (published code); ``rect``: V_th.
        readout_decay: λ_o, share of the output potential kept a step; 0.8 in the paper.
    """

    generates = True

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        image_size: PositiveInt = 32,
        channels: Sequence[PositiveInt] = CHANNELS_32,
        latent_size: PositiveInt = 32,
        time_steps: TimeSteps = 16,
        kernel: Kernel = "rbf",
        sampler: Sampler = "poisson",
        half_width: PositiveFloat = 0.5,
        prior: Prior = "bottleneck",
        prior_rate: UnitInterval = 0.5,
        tau: UnitInterval = 0.25,
        v_threshold: PositiveFloat = 0.2,
        surrogate_gradient: SurrogateName = "rect_zero",
        readout_decay: UnitInterval = 0.8,
    ) -> None:
        super().__init__(
            in_channels,
            image_size,
            channels,
            latent_size,
            time_steps,
            tau,
            v_threshold,
            surrogate_gradient,
            readout_decay,
        )
        _require_known("kernel", kernel, ("rbf", "linear"))
        _require_known("sampler", sampler, SAMPLERS)
        _require_known("prior", prior, ("bottleneck", "uniform_rate", "fixed_rate"))
        if half_width <= 0:
            raise UserError(f"half_width: expected a positive number, got {half_width}")
        if not 0.0 <= prior_rate <= 1.0:
            raise UserError(f"prior_rate: expected a number in [0, 1], got {prior_rate}")
        self.kernel, self.sampler, self.half_width = kernel, sampler, half_width
        self.prior, self.prior_rate = prior, prior_rate
        self.bottleneck = nn.Linear(latent_size, latent_size) if prior == "bottleneck" else None

    def encode(self, image: Tensor) -> Code:
        z, rate = sample_spikes(self.embed(image), self.sampler, self.half_width)
        prior = self.prior_rates(len(rate))
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            # A distance between whole batches: of all processes together, with gradient for this one's share.
            rate_set, prior_set = (torch.cat(all_gather(each)) for each in (rate, prior))
            return Code(z, rate, mmd2(rate_set, prior_set, self.kernel))
        divergence = mmd2(rate, prior, self.kernel)
        return Code(z, rate, divergence)

    def prior_rates(self, count: int) -> Tensor:
        """Firing rates (count, d) in [0, 1] from the prior."""
        like = next(self.parameters())
        if self.bottleneck is not None:
            noise = torch.randn(count, self.latent_size, dtype=like.dtype, device=like.device)
            return self.bottleneck(noise).sigmoid()
        if self.prior == "uniform_rate":
            return torch.rand(count, self.latent_size, dtype=like.dtype, device=like.device)
        return like.new_full((count, self.latent_size), self.prior_rate)

    def draw(self, count: int) -> Tensor:
        return poisson_spikes(self.prior_rates(count), self.time_steps, self.half_width)


class FSVAE(SAE):
    """Fully spiking variational autoencoder (Kamata et al. 2022, arXiv:2110.00375), the predecessor with an
    autoregressive latent.

    Posterior and prior are spiking networks that give k binary candidates a latent unit and step, one of which is
    picked at random; each step sees the latent of the step before.

    Args:
        in_channels: C of the images.
        image_size: side of the square images, in pixels.
        channels: output channels of each convolution; each halves the side.
        latent_size: d, latent neurons; 128 in the paper.
        time_steps: T; 16 in the paper.
        candidates: k; 20 in the published code.
        divergence: of posterior from prior: ``mmd`` on postsynaptic potentials (paper) or ``kld`` of the spikes.
        scheduled_sampling: in training, feed the prior its own votes from step 5 on, with probability 0.1 to 0.3.
        tau: τ, share of the membrane potential kept a step, in [0, 1]; 0.25 in the paper.
        v_threshold: V_th, potential that fires; 0.2 in the paper.
        surrogate_gradient: centre of the boxcar derivative: ``rect_zero``: 0 (published code); ``rect``: V_th.
        readout_decay: λ_o, share of the output potential kept a step; 0.8 in the paper.
    """

    generates = True

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        image_size: PositiveInt = 32,
        channels: Sequence[PositiveInt] = CHANNELS_32,
        latent_size: PositiveInt = 128,
        time_steps: TimeSteps = 16,
        candidates: PositiveInt = 20,
        divergence: Literal["mmd", "kld"] = "mmd",
        scheduled_sampling: bool = True,
        tau: UnitInterval = 0.25,
        v_threshold: PositiveFloat = 0.2,
        surrogate_gradient: SurrogateName = "rect_zero",
        readout_decay: UnitInterval = 0.8,
    ) -> None:
        super().__init__(
            in_channels,
            image_size,
            channels,
            latent_size,
            time_steps,
            tau,
            v_threshold,
            surrogate_gradient,
            readout_decay,
        )
        _require_known("divergence", divergence, ("mmd", "kld"))
        require_positive(candidates=candidates)
        self.distance = psp_mmd if divergence == "mmd" else bernoulli_kl
        self.scheduled_sampling = scheduled_sampling
        self.own_probability = 0.1
        self.posterior = CandidateNetwork(2 * latent_size, latent_size, candidates, self.neuron)
        self.prior = CandidateNetwork(latent_size, latent_size, candidates, self.neuron)

    def set_progress(self, done: float) -> None:
        self.own_probability = 0.1 + 0.2 * done

    def encode(self, image: Tensor) -> Code:
        spikes = self.embed(image)
        z, q = self.sample_posterior(spikes)
        p = self.prior(self.prior_inputs(z.detach()))
        return Code(z, spikes.mean(0), self.distance(q.mean(-1), p.mean(-1)))

    def sample_posterior(self, spikes: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's spikes (T, N, d) → sampled latent (T, N, d) and all candidates (T, N, d, k).

        First the latent is generated step by step without gradient, then one pass over the whole sequence gives the
        same picks with gradient. In training the norms of that pass see other statistics than those of the shorter
        prefixes, as in the published code, so the second latent can differ from the first.
        """
        picks = torch.randint(self.posterior.candidates, spikes.shape, device=spikes.device)
        with torch.no_grad():
            before = self.posterior.roll_out(picks[:-1], spikes)
        q = self.posterior(torch.cat([spikes, before], dim=-1))
        return _pick(q, picks), q

    def prior_inputs(self, z: Tensor) -> Tensor:
        """Latent one step late, starting with zeros; in training with scheduled sampling some steps are the prior's
        own.
        """
        before = torch.cat([torch.zeros_like(z[:1]), z[:-1]])
        if not (self.training and self.scheduled_sampling):
            return before
        own = torch.rand(len(z)) < self.own_probability
        with torch.no_grad():
            for t in range(5, len(z) - 1):
                if own[t]:
                    votes = self.prior(before[: t + 1])[-1].mean(-1)
                    before[t + 1] = (votes + 1e-3 * torch.randn_like(votes) > 0.5).to(z.dtype)  # noise breaks ties
        return before

    def draw(self, count: int) -> Tensor:
        like = next(self.parameters())
        picks = torch.randint(self.prior.candidates, (self.time_steps, count, self.latent_size), device=like.device)
        return self.prior.roll_out(picks)[1:]


class CandidateNetwork(nn.Module):
    """Three spiking linear layers, in → 2d → 4d → k·d, tdBN with alpha 2: (T, N, in) → candidates (T, N, d, k).

    Every call starts at rest.

    Args:
        in_size: length of an input.
        latent_size: d.
        candidates: k.
        neuron: constants of its neurons.
    """

    def __init__(self, in_size: int, latent_size: int, candidates: int, neuron: Neuron) -> None:
        super().__init__()
        self.latent_size, self.candidates = latent_size, candidates
        sizes = (in_size, 2 * latent_size, 4 * latent_size, candidates * latent_size)
        self.layers = nn.Sequential(
            *(SpikingLayer(nn.Linear(before, after), after, neuron, alpha=2.0) for before, after in pairwise(sizes))
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return _at_rest(self.layers, inputs).unflatten(-1, (self.latent_size, self.candidates))

    def roll_out(self, picks: Tensor, condition: Tensor | None = None) -> Tensor:
        """Generate step by step: z[0] = 0, then z[t+1] = the picked candidate at input (condition[t], z[t]).

        picks: (L, N, d) int64, which of the k candidates. condition: (at least L, N, c) or none. Returns z (L + 1, N,
        d). In training the norms take their statistics from the whole prefix, so each step runs all steps before it
        again; in evaluation the neurons' potentials carry everything over and each step runs once.
        """
        z = next(self.parameters()).new_zeros(len(picks) + 1, *picks.shape[1:])
        inputs = z if condition is None else torch.cat([condition[: len(z)], z], dim=-1)
        reset(self)
        for t, pick in enumerate(picks):
            if self.training:
                output = self.layers(inputs[: t + 1])[-1:]
                reset(self)
            else:
                output = self.layers(inputs[t : t + 1])
            z[t + 1] = _pick(output.unflatten(-1, (self.latent_size, self.candidates))[0], pick)
            inputs[t + 1, :, -self.latent_size :] = z[t + 1]
        reset(self)
        return z


def to_signed(image: Tensor) -> Tensor:
    """[0, 1] → [-1, 1]."""
    return 2 * image - 1


def to_unit(image: Tensor) -> Tensor:
    """[-1, 1] → [0, 1]."""
    return (image + 1) / 2


def _pick(candidates: Tensor, picks: Tensor) -> Tensor:
    """(..., k) and indices (...) → (...)."""
    return candidates.gather(-1, picks.unsqueeze(-1)).squeeze(-1)


def _at_rest(module: nn.Module, x: Tensor) -> Tensor:
    """Run with every neuron at rest before and holding nothing afterwards."""
    reset(module)
    out = module(x)
    reset(module)
    return out


def _require_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name}: expected one of {', '.join(known)}, got {value!r}{nearest(value, known)}")
