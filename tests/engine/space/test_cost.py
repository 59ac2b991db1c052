"""MACs and parameters of released networks against published numbers, counted networks, and brute force."""

import itertools
import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.space.arch import Arch, BlockOp
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_named
from tests.engine.space.strategies import any_spaces, shrunk_at_random
from tests.engine.tiny import TINY


def one_option(space: Space, channels: int, op: BlockOp) -> Arch:
    """The architecture whose clusters take their channel option of that index and whose blocks take `op`."""
    return Arch(
        tuple(cluster.channels[channels] for cluster in space.clusters),
        tuple((op,) * cluster.blocks for cluster in space.clusters),
    )


def counted_macs(network: nn.Module, images: torch.Tensor) -> int:
    """Multiply-adds of convolutions and linear layers, seen from outside by forward hooks."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0] * module.kernel_size[1]
            total += output[0].numel() * area * module.in_channels // module.groups
        else:
            total += module.in_features * module.out_features

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        network.eval()(images)
    for hook in hooks:
        hook.remove()
    return total


def check_against_network(space: Space, arch: Arch) -> None:
    network, costs = Subnet(space, arch), CostModel(space)
    images = torch.zeros(1, space.input_channels, space.resolution, space.resolution)
    assert costs.macs(arch) == counted_macs(network, images)
    assert costs.params(arch) == sum(parameter.numel() for parameter in network.parameters())
    assert costs.macs_and_params(arch) == (costs.macs(arch), costs.params(arch))


def test_the_ends_of_the_papers_space():
    space = space_named("imagenet")
    costs = CostModel(space)
    assert costs.macs.range() == (199_964_416, 773_403_968)
    assert costs.macs(one_option(space, 0, BlockOp(3, 3))) == 199_964_416
    assert costs.macs(one_option(space, -1, BlockOp(7, 6))) == 773_403_968


def test_mobilenet_v2_has_its_published_costs():
    space = space_named("mobilenet-v2")
    arch = one_option(space, 0, BlockOp(3, 6))
    assert CostModel(space).macs_and_params(arch) == (300_774_272, 3_504_872)
    check_against_network(space, arch)


@pytest.mark.parametrize("name", ["imagenet", "digits", "fashion-mnist"])
def test_counted_from_real_networks(name):
    space, rng = space_named(name), random.Random(0)
    for _ in range(2):
        check_against_network(space, uniform_arch(space, rng))


@settings(max_examples=30, deadline=None)
@given(space=any_spaces(), seed=st.integers(0, 1000))
def test_counted_from_networks_of_any_space(space, seed):
    check_against_network(space, uniform_arch(space, random.Random(seed)))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_range_is_that_of_all_live_architectures(seed):
    space = shrunk_at_random(TINY, random.Random(seed))
    costs = CostModel(space)
    choices = [
        [
            (channels, ops)
            for channels in space.live_channels(j)
            for ops in itertools.product(*tables(space, j, channels))
        ]
        for j in range(len(space.clusters))
    ]
    macs = [
        costs.macs(Arch(tuple(c for c, _ in picks), tuple(ops for _, ops in picks)))
        for picks in itertools.product(*choices)
    ]
    assert len(macs) == space.num_architectures
    assert costs.macs.range() == (min(macs), max(macs))


def tables(space: Space, cluster: int, channels: int) -> list[tuple[BlockOp, ...]]:
    return [space.live_block_ops(i, channels) for i in space.cluster_blocks[cluster]]


def test_ten_thousand_architectures_a_second():
    space, rng = space_named("imagenet"), random.Random(3)
    costs, archs = CostModel(space), [uniform_arch(space, rng) for _ in range(2000)]
    start = time.process_time()
    for arch in archs:
        costs.macs_and_params(arch)
    assert len(archs) / (time.process_time() - start) >= 10_000
