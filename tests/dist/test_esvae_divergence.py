"""ESVAE on two processes matches the rates of both batches together, and each gets the gradient of its share."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lit_modules.esvae import ESVAE
from lit_modules.esvae.losses import mmd2
from lit_modules.esvae.networks import to_signed


def make(rank, prior):
    torch.manual_seed(0)
    network = ESVAE(image_size=8, channels=(4, 8), latent_size=6, time_steps=4).train()
    network.prior_rates = lambda count: prior[rank]
    image = torch.rand(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(1))[rank]
    return network, to_signed(image)


def work(rank, folder, prior):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    network, image = make(rank, prior)
    code = network.encode(image)
    code.divergence.backward()
    weight = network.encoder.head.weights.weight
    torch.save((code.divergence.detach(), code.features.detach(), weight.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_divergence_is_that_of_the_whole_batch_with_gradients_for_each_share(tmp_path):
    prior = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(2))
    mp.spawn(work, args=(str(tmp_path), prior), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]

    rates = []
    for rank in (0, 1):
        network, image = make(rank, prior)
        rates.append((network, network.encode(image).features))
    whole = mmd2(torch.cat([rate for _, rate in rates]), prior.flatten(0, 1))
    whole.backward()
    for (divergence, rate, gradient), (network, expected_rate) in zip(ranks, rates, strict=True):
        torch.testing.assert_close(rate, expected_rate.detach())
        torch.testing.assert_close(divergence, whole.detach())
        # Both processes differentiate the same whole, and DDP averages them: each share's gradient arrives twice.
        torch.testing.assert_close(gradient, 2 * network.encoder.head.weights.weight.grad)
