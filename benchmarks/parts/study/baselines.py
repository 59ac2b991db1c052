"""Networks of the same MACs that were not found by evolution: what a search has to beat."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from bsnas.benchmarks.parts.study.trained_alone import TrainedAlone
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.space.arch import Arch, BlockOp
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limited_sampling import Sampler
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.mobile import mobile_cluster
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.space import Space

MOBILENET_V2_CHANNELS = (24, 32, 64, 96, 160, 320)
"""Output channels of MobileNetV2's stages with expansion 6 (arXiv 1801.04381, table 2)."""


@dataclass(frozen=True)
class Setting:
    """What all baselines of one seed share."""

    trained: TrainedRun
    """The supernet without shrinking, whose scores a random search ranks by."""
    alone: TrainedAlone
    max_macs: float
    evaluations: int
    """Subnets that evolution scores, and so does random search."""

    @property
    def space(self) -> Space:
        return self.trained.config.space

    @property
    def seed(self) -> int:
        return self.trained.config.seed

    def draw(self, count: int, *, share: float = 0.0) -> list[Arch]:
        """Different random architectures of at most `max_macs` MACs, and at least a share of that."""
        problem = Problem.of(self.space, (Limit("macs", share * self.max_macs, self.max_macs),))
        sampler, rng = Sampler(problem), random.Random(f"{self.seed}/baseline")
        drawn = (sampler.draw(rng) for _ in range(20 * count))
        return list(dict.fromkeys(arch for arch in drawn if problem.allows(arch)))[:count]


def random_search(setting: Setting) -> dict[str, Any]:
    """The best of as many random architectures as evolution scores, by the same scores, trained alone."""
    archs = setting.draw(setting.evaluations)
    scores = setting.trained.evaluator().evaluate(archs)
    best = max(zip(archs, scores, strict=True), key=lambda pair: (pair[1].top1, -pair[1].loss))[0]
    return _trained(setting, setting.space, best)


def random_network(setting: Setting) -> dict[str, Any]:
    """One random architecture of nearly the allowed MACs, trained alone."""
    return _trained(setting, setting.space, setting.draw(1, share=0.95)[0])


def scaled_mobilenet_v2(setting: Setting) -> dict[str, Any]:
    """MobileNetV2's kernels, expansion and ratios of channels at the space's depth, as wide as the MACs allow."""
    space, arch = mobilenet_v2_of(setting.space, setting.max_macs)
    return _trained(setting, space, arch)


def pruned_network(setting: Setting) -> dict[str, Any]:
    """The largest network of the space, trained, pruned to the MACs by Torch-Pruning, and trained as long again."""
    space, alone = setting.space, setting.alone
    arch = largest_arch(space)
    request = {"arch": str(arch), "seed": setting.seed, "epochs": alone.config.retrain.epochs}
    torch.manual_seed(setting.seed)
    network = Subnet(space, arch)
    directory = alone.directory / f"largest-{setting.seed}"
    largest_top1 = alone.train(network, request, directory)
    macs = prune(network, setting.max_macs)
    pruned_request = {**request, "pruned_to_macs": macs}
    top1 = alone.train(Plain(network), pruned_request, alone.directory / f"pruned-{setting.seed}")
    return {"arch": f"{arch} pruned", "macs": macs, "test_top1": top1, "largest_top1": largest_top1}


BASELINES: dict[str, tuple[str, Callable[[Setting], dict[str, Any]]]] = {
    "random-search": ("best of as many random architectures", random_search),
    "random-network": ("one random architecture", random_network),
    "mobilenet-v2": ("MobileNetV2 scaled", scaled_mobilenet_v2),
    "torch-pruning": ("largest network pruned by Torch-Pruning", pruned_network),
}


def _trained(setting: Setting, space: Space, arch: Arch) -> dict[str, Any]:
    macs = CostModel(space).macs_and_params(arch)[0]
    return {"arch": str(arch), "macs": macs, "test_top1": setting.alone.top1(space, arch)}


# ---- MobileNetV2


def mobilenet_v2_of(space: Space, max_macs: float) -> tuple[Space, Arch]:
    """The widest MobileNetV2 of a space's depth, strides, stem and tail with at most `max_macs` MACs.

    Channels are multiples of 4. Raises `UserError` when even the narrowest has more MACs.
    """
    found = None
    for percent in range(5, 400):
        channels = [max(4, round(c * percent / 400) * 4) for c in MOBILENET_V2_CHANNELS[: len(space.clusters)]]
        candidate = _mobilenet_v2(space, channels)
        if CostModel(candidate[0]).macs_and_params(candidate[1])[0] > max_macs:
            break
        found = candidate
    if found is None:
        raise UserError(f"no MobileNetV2 of this depth has at most {max_macs:.0f} MACs; raise --max-macs")
    return found


def _mobilenet_v2(space: Space, channels: Sequence[int]) -> tuple[Space, Arch]:
    clusters = tuple(
        mobile_cluster(blocks=c.blocks, kernels=(3,), expansions=(6,), channels=(width,), stride=c.rows[0].stride)
        for c, width in zip(space.clusters, channels, strict=True)
    )
    arch = Arch(tuple(channels), tuple((BlockOp(3, 6),) * c.blocks for c in space.clusters))
    return space.with_clusters(clusters), arch


# ---- pruning


def largest_arch(space: Space) -> Arch:
    """Every dimension at its maximum."""
    return Arch(
        tuple(max(c.channels) for c in space.clusters),
        tuple(tuple(max(row.choices) for row, _ in c.places) for c in space.clusters),
    )


def prune(network: Subnet, max_macs: float, steps: int = 200) -> int:
    """Remove the channels of least group magnitude, over all layers, until the MACs fit. Returns the MACs left.

    In place. Channels stay multiples of 4. Raises `UserError` when the MACs cannot be reached.
    """
    if find_spec("torch_pruning") is None:
        raise UserError("this part needs Torch-Pruning; pip install torch-pruning, or leave it out of --cells")
    import torch_pruning

    network.eval().cpu()
    space = network.space
    example = torch.zeros(1, space.input_channels, space.resolution, space.resolution)
    pruner = torch_pruning.pruner.MetaPruner(
        network,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.95,
        max_pruning_ratio=0.9,
        iterative_steps=steps,
        round_to=4,
        ignored_layers=[network.classifier],
    )
    for _ in range(steps):
        if count_macs(network, example) <= max_macs:
            break
        pruner.step()
    for parameter in network.parameters():
        parameter.data = torch.empty(parameter.shape).copy_(parameter.data)  # with the strides of a new one
    macs = count_macs(network, example)
    if macs > max_macs:
        raise UserError(f"pruning ends at {macs} MACs, above the limit of {max_macs:.0f}; raise --max-macs")
    return macs


class Plain(nn.Module):
    """A released network that runs module by module in training too: after pruning its layers have any width."""

    def __init__(self, network: Subnet) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """images [N, channels, H, W] -> logits [N, classes]"""
        for block in self.network.parts:
            x = block.run(x)
        return self.network.classifier(x.mean((2, 3)))


def count_macs(network: nn.Module, example: torch.Tensor) -> int:
    """Multiply-adds of convolutions and linear layers for one image."""
    total = 0

    def count(layer: Any, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    return total
