"""Released networks: MobileNetV2 as torchvision has it, and what they inherit from a supernet."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet, release
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_named
from tests.engine.evaluation.cases import small_space, trained_like_supernet
from tests.engine.tiny import SHARINGS, TINY, images, random_archs

MOBILENET_V2 = Arch.parse(
    "c24:k3t6,k3t6_c32:k3t6,k3t6,k3t6_c64:k3t6,k3t6,k3t6,k3t6_c96:k3t6,k3t6,k3t6_c160:k3t6,k3t6,k3t6_c320:k3t6"
)


def layers(network: nn.Module) -> list[nn.Module]:
    """Convolutions, normalisations and linear layers in network order."""
    return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]


@pytest.mark.parametrize("training", [False, True])
def test_torchvisions_mobilenet_v2_gives_the_same_outputs(training):
    torch.manual_seed(0)
    theirs = mobilenet_v2(weights=None, dropout=0.0)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    nn.init.normal_(theirs.classifier[1].weight, std=0.03)
    ours = Subnet(space_named("mobilenet-v2"), MOBILENET_V2)
    for mine, yours in zip(layers(ours), layers(theirs), strict=True):
        assert type(mine) is type(yours)
        mine.load_state_dict(yours.state_dict())
    # Statistics of a batch of two: 52 norms in a row make rounding visible, so training is compared in float64.
    dtype = torch.float64 if training else torch.float32
    theirs.train(training).to(dtype)
    ours.train(training).to(dtype)
    x = torch.randn(2, 3, 224, 224, dtype=dtype)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


def test_the_released_network_is_made_of_the_architecture():
    subnet = Subnet(TINY, Arch.parse("c8:k3t2,k5t3_c16:k3t2_c20:k5t3,k5t3"))
    convs = [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.groups)
        for m in subnet.modules()
        if isinstance(m, nn.Conv2d)
    ]
    assert convs == [
        (3, 6, 3, 2, 1),
        (6, 6, 3, 1, 6), (6, 4, 1, 1, 1),
        (4, 8, 1, 1, 1), (8, 8, 3, 2, 8), (8, 8, 1, 1, 1),
        (8, 24, 1, 1, 1), (24, 24, 5, 1, 24), (24, 8, 1, 1, 1),
        (8, 16, 1, 1, 1), (16, 16, 3, 1, 16), (16, 16, 1, 1, 1),
        (16, 48, 1, 1, 1), (48, 48, 5, 2, 48), (48, 20, 1, 1, 1),
        (20, 60, 1, 1, 1), (60, 60, 5, 1, 60), (60, 20, 1, 1, 1),
        (20, 40, 1, 1, 1),
    ]  # fmt: skip
    shortcuts = [part.plan.shortcut for part in subnet.parts]
    assert shortcuts == [None, None, None, "identity", None, None, "identity", None]


def test_an_architecture_outside_the_space():
    with pytest.raises(UserError, match="has 9 channels; allowed are 8, 12"):
        Subnet(TINY, Arch.parse("c9:k3t2,k5t3_c16:k3t2_c20:k5t3,k5t3"))


# ---- inheritance


def widest(space: Space, seed: int) -> Arch:
    """A random architecture with every cluster at its largest option."""
    arch = uniform_arch(space, random.Random(seed))
    return Arch(tuple(max(cluster.channels) for cluster in space.clusters), arch.blocks)


def released_gradients(supernet: Supernet, subnet: Subnet) -> None:
    """Compare every gradient of the released network with the slice of the supernet's that it was made of."""
    with torch.no_grad():
        for parameter in supernet.parameters():  # release() copies slices of weights: let it copy slices of gradients
            parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
        expected = release(supernet, subnet.arch)
    for (name, mine), inherited in zip(subnet.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, inherited, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make_space", [lambda: TINY, small_space], ids=["tiny", "small"])
def test_with_all_channels_at_their_maximum_both_networks_are_equal(make_space, training, sharing):
    space = make_space()
    seed = SHARINGS.index(sharing)
    supernet = trained_like_supernet(space, sharing, seed)
    arch = widest(space, seed)
    subnet = release(supernet, arch).train(training)
    supernet.train(training)
    x = images(space, count=6, seed=seed)
    labels = torch.arange(6) % space.classes
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    mine, theirs = subnet(x1), supernet(x2, arch)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    F.cross_entropy(mine, labels).backward()
    F.cross_entropy(theirs, labels).backward()
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-5, atol=1e-5)
    again = release(supernet, arch)
    for (name, buffer), moved in zip(subnet.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(buffer, moved, rtol=1e-5, atol=1e-5, msg=name)  # running statistics too
    released_gradients(supernet, subnet)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_every_architecture_inherits_slices_and_runs(sharing):
    supernet = trained_like_supernet(TINY, sharing)
    for arch in random_archs(TINY, 4):
        subnet = release(supernet, arch).eval()
        assert subnet(images(TINY)).isfinite().all()
        for i, (op, block) in enumerate(zip(arch.operations, subnet.blocks, strict=True)):
            _, weights, norms = supernet.path_blocks(arch)[2 + i]
            kernel = op.block_op.kernel
            hidden, in_channels = block.expand[0].weight.shape[:2]
            out_channels = block.project[0].weight.shape[0]
            cut = (weights["depthwise"].shape[-1] - kernel) // 2
            centre = weights["depthwise"][:hidden, :, cut:, cut:][:, :, :kernel, :kernel]
            assert torch.equal(block.expand[0].weight[:, :, 0, 0], weights["expand"][:hidden, :in_channels])
            assert torch.equal(block.depthwise[0].weight, centre)
            assert torch.equal(block.project[0].weight[:, :, 0, 0], weights["project"][:out_channels, :hidden])
            assert torch.equal(block.depthwise[1].running_var, norms[1].running_var[:hidden])
            assert torch.equal(block.project[1].bias, norms[2].bias[:out_channels])
        assert torch.equal(subnet.classifier.weight, supernet.classifier.weight)


def test_the_released_network_is_a_copy():
    supernet = trained_like_supernet(TINY)
    subnet = release(supernet, random_archs(TINY, 1)[0])
    mine = {tensor.data_ptr() for tensor in subnet.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in supernet.state_dict().values()}
