"""Fixed points from outside: costs of three public tables, and torchvision's MobileNetV2 and ResNet-18.

A table's file in tables/ holds twenty rows `code flops params`; of all its rows, sorted, the tests hold the SHA-256.
"""

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bsnas.benchmarks.parts.tabular.public_table import CodeReader
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.canonical import canonical
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import fair_round
from bsnas.engine.space.spaces import space_named

TABLES = {
    "nas-bench-macro": ("012", 8, "3938de2d884c7ad153ce4d37f9d94a4920a2f8e331ee42b3894a421056a1d9dd"),
    "channel-bench-mobilenet": ("1234", 7, "dda3fc48f17f872c0d3922634771662afd1b92b80dd4c7cb98c0ed62b473350b"),
    "channel-bench-resnet": ("1234", 7, "ece3589d7975c8262633f663368cadf4fc389c1e6b1d3d099a1636c6fc92b71f"),
}


def lines(name: str) -> list[str]:
    digits, length, _ = TABLES[name]
    space = space_named(name)
    reader, costs = CodeReader(space), CostModel(space)
    found = []
    for code in map("".join, itertools.product(digits, repeat=length)):
        macs, params = costs.macs_and_params(reader.arch(code, int(digits[0])))
        found.append(f"{code} {macs} {params}")
    return sorted(found)


@pytest.mark.parametrize("name", TABLES)
def test_all_rows_of_a_public_table(name):
    ours = lines(name)
    theirs = (Path(__file__).parent / "tables" / f"{name}.txt").read_text().splitlines()
    assert len(theirs) == 20
    assert set(theirs) <= set(ours)
    assert hashlib.sha256("\n".join(ours).encode()).hexdigest() == TABLES[name][2]


def test_nas_bench_macro_has_3969_different_networks():
    space, reader = space_named("nas-bench-macro"), CodeReader(space_named("nas-bench-macro"))
    archs = [reader.arch("".join(code), 0) for code in itertools.product("012", repeat=8)]
    assert len({canonical(space, arch) for arch in archs}) == 3969
    assert len({tuple(plan for plan in space.released_plans(arch) if plan.layers) for arch in archs}) == 3969


def randomised(network: nn.Module) -> nn.Module:
    """Norms that do something, so that a lost one is seen."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def copy_layers(ours: nn.Module, theirs: nn.Module) -> None:
    """Convolutions, norms and linear layers in the order in which they stand; in ResNet a block's shortcut is last."""

    def layers(network: nn.Module) -> list[nn.Module]:
        return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]

    for mine, yours in zip(layers(ours), layers(theirs), strict=True):
        mine.load_state_dict(yours.state_dict())


@pytest.mark.parametrize(
    ("name", "maker"), [("mobilenet-v2", torchvision.models.mobilenet_v2), ("resnet18", torchvision.models.resnet18)]
)
def test_torchvisions_networks_as_spaces_of_one_architecture(name, maker):
    space = space_named(name)
    assert space.num_architectures == 1
    (arch,) = fair_round(space, 0, 0)
    theirs = randomised(maker(weights=None))
    ours = Subnet(space, arch).eval()
    copy_layers(ours, theirs)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        with FlopCounterMode(display=False) as counted:
            theirs(x[:1])
    macs, params = CostModel(space).macs_and_params(arch)
    assert macs == counted.get_total_flops() // 2
    assert params == sum(parameter.numel() for parameter in theirs.parameters())
    assert params == sum(parameter.numel() for parameter in Supernet(space).parameters())
