"""Released networks: the plain network of an architecture, built of standard modules.

In training its blocks run as the supernet's do, through kernels/; in evaluation, export included, module by module.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.plan import Conv, Plan
from bsnas.engine.space.space import Space
from bsnas.kernels import Block, run_blocks
from bsnas.kernels.plan import LayerPlan, run, slice_of

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu6": nn.ReLU6, "relu": nn.ReLU}


def _activation(name: str | None) -> list[nn.Module]:
    return [_ACTIVATIONS[name](inplace=True)] if name else []  # type: ignore[call-arg]


def _conv_bn(layer: Conv) -> list[nn.Module]:
    conv = nn.Conv2d(
        layer.inputs, layer.outputs, layer.kernel, stride=layer.stride, padding=layer.kernel // 2,
        groups=layer.inputs if layer.depthwise else 1, bias=False,
    )  # fmt: skip
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return [conv, nn.BatchNorm2d(layer.outputs)]


class PlannedBlock(nn.Module):
    """The block of a plan: a child for each convolution, with its norm, under the layer's name.

    x [N, inputs, H, W] -> [N, outputs, H', W'].
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        after_sum = plan.layers[-1] if plan.shortcut and plan.layers else None
        for layer in plan.convs:
            activation = [] if layer is after_sum else _activation(layer.activation)
            self.add_module(layer.name, nn.Sequential(*_conv_bn(layer), *activation))
        self.activation = nn.Sequential(*_activation(after_sum.activation if after_sum else None))
        """Behind the shortcut's sum."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return run_blocks(x, [self.block()], training=True)
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """Module by module, as in evaluation."""

        def layer(index: int, each: LayerPlan, y: Tensor, residual: Tensor | None) -> Tensor:
            y = getattr(self, each.name)(y)
            return y if residual is None else self.activation(residual + y)

        return run(self.plan, x, layer)

    def block(self) -> Block:
        """Plan, weights and norms for the kernels, which compute the same."""
        weights, norms = {}, []
        for layer in self.plan.convs:
            conv, norm, *_ = cast(Any, getattr(self, layer.name))
            weights[layer.name] = slice_of(conv.weight, layer)
            norms.append(norm)
        return Block(self.plan, weights, norms)


class Subnet(nn.Module):
    """The released network of an architecture: images [N, input_channels, H, W] -> logits [N, classes].

    Spring blocks put out the selected channels, and every block expands its real input width (paper, section 3.1).
    Raises `UserError` when the architecture is not of the space.
    """

    def __init__(self, space: Space, arch: Arch) -> None:
        super().__init__()
        space.check(arch)
        self.space = space
        self.arch = arch
        last = arch.channels[-1]
        self.stem = nn.Sequential(*map(PlannedBlock, space.stem_plans))
        self.blocks = nn.Sequential(*map(PlannedBlock, space.released_plans(arch)))
        self.tail = nn.Sequential(*map(PlannedBlock, space.tail_plans(last)))
        self.classifier = nn.Linear(space.classifier_inputs(last), space.classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @property
    def parts(self) -> list[PlannedBlock]:
        """All blocks, from the images to the classifier."""
        return [*cast(Any, self.stem), *cast(Any, self.blocks), *cast(Any, self.tail)]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = run_blocks(x, [part.block() for part in self.parts], training=True)
        else:
            x = self.tail(self.blocks(self.stem(x)))
        return self.classifier(x.mean((2, 3)))


def release(supernet: Supernet, arch: Arch) -> Subnet:
    """The released network of an architecture with the weights and statistics that it inherits from the supernet.

    Every released tensor is the first rows and columns (and the centre of the kernel) of the supernet's. With all
    channels at their maximum, and always with sliced springs, both networks compute the same; otherwise the spring
    blocks' narrower outputs are a start for training, not an equal network.
    """
    subnet = Subnet(supernet.space, arch).to(supernet.classifier.weight.device)
    with torch.no_grad():
        for part, source in zip(subnet.parts, supernet.path_blocks(arch), strict=True):
            inherit(part, source)
        subnet.classifier.weight.copy_(supernet.classifier.weight[:, : subnet.classifier.in_features])
        subnet.classifier.bias.copy_(supernet.classifier.bias)
    return subnet


def inherit(part: PlannedBlock, source: Block) -> None:
    """Fill a block in with its slices of a supernet's."""
    names = [layer.name for layer in cast(Plan, source.plan).convs]
    norms = dict(zip(names, source.norms, strict=True))
    for layer in part.plan.convs:
        conv, norm, *_ = cast(Any, getattr(part, layer.name))
        if layer.name not in norms:  # sizes agree in the supernet, where its input is wider: a plain shortcut there
            nn.init.dirac_(conv.weight)
            continue
        weight = slice_of(source.weights[layer.name], layer)
        conv.weight.copy_(weight[:, :, None, None] if weight.dim() == 2 else weight)
        _copy_norm(norm, norms[layer.name])


def _copy_norm(norm: Any, source: Any) -> None:
    for name, tensor in norm.state_dict().items():
        tensor.copy_(getattr(source, name)[: len(tensor)] if tensor.dim() else getattr(source, name))
