"""Released networks: the plain MobileNetV2-style network of an architecture, built of standard modules.

In training its blocks run as the supernet's do, through kernels/; in evaluation, export included, module by module.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from bsnas.engine.networks.supernet import Supernet, separable_block
from bsnas.engine.space.space import Arch, BlockDims, Space
from bsnas.kernels import BlockShape, BlockWeights, inverted_residual, pointwise_bn_relu6
from bsnas.kernels.training import Norms


def _conv_bn(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return [conv, nn.BatchNorm2d(out_channels)]


class InvertedResidual(nn.Module):
    """Pointwise expand (none in the stem), depthwise, pointwise project, and the identity shortcut where it fits."""

    def __init__(self, dims: BlockDims, *, expands: bool = True) -> None:
        super().__init__()
        self.expand = nn.Sequential()
        if expands:
            self.expand = nn.Sequential(*_conv_bn(dims.in_channels, dims.hidden, 1), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            *_conv_bn(dims.hidden, dims.hidden, dims.kernel, stride=dims.stride, groups=dims.hidden),
            nn.ReLU6(inplace=True),
        )
        self.project = nn.Sequential(*_conv_bn(dims.hidden, dims.out_channels, 1))
        self.residual = dims.residual
        self.shape = BlockShape(*dims)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            weights, norms = self.parts()
            return inverted_residual(x, weights, norms, self.shape, training=True)
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y

    def parts(self) -> tuple[BlockWeights, Norms]:
        """Weights and norms for the fused block, which computes the same."""
        expand, depthwise, project = cast(Any, (self.expand, self.depthwise, self.project))
        has_expand = len(expand) > 0
        matrix = expand[0].weight.flatten(1) if has_expand else None
        weights = BlockWeights(matrix, depthwise[0].weight, project[0].weight.flatten(1))
        return weights, (expand[1] if has_expand else None, depthwise[1], project[1])


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
        stem = space.stem_channels
        dims = space.released_dims(arch)
        self.stem = nn.Sequential(
            *_conv_bn(space.input_channels, stem, 3, stride=space.stem_stride),
            nn.ReLU6(inplace=True),
        )
        self.separable = InvertedResidual(
            BlockDims(stem, stem, space.separable_channels, kernel=3, stride=1), expands=False
        )
        self.blocks = nn.Sequential(*(InvertedResidual(dim) for dim in dims))
        self.tail = nn.Sequential(*_conv_bn(dims[-1].out_channels, space.tail_channels, 1), nn.ReLU6(inplace=True))
        self.classifier = nn.Linear(space.tail_channels, space.classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            conv, norm, _ = cast(Any, self.stem)
            x = separable_block(conv(x), norm, *self.separable.parts(), self.separable.shape, training=True)
            x = self.blocks(x)
            conv, norm, _ = cast(Any, self.tail)
            x = pointwise_bn_relu6(x, conv.weight.flatten(1), norm, in_channels=x.shape[1], training=True)
        else:
            x = self.tail(self.blocks(self.separable(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


def release(supernet: Supernet, arch: Arch) -> Subnet:
    """The released network of an architecture with the weights and statistics that it inherits from the supernet.

    Every released tensor is the first rows and columns (and the centre of the kernel) of the supernet's. With all
    channels at their maximum both networks compute the same; otherwise the spring blocks' narrower outputs are a start
    for training, not an equal network.
    """
    subnet = Subnet(supernet.space, arch).to(supernet.tail_weight.device)
    with torch.no_grad():
        _copy_conv(subnet.stem[0], supernet.stem_conv.weight)
        _copy_norm(subnet.stem[1], supernet.stem_bn)
        _copy_block(subnet.separable, supernet.separable_weights, supernet.separable_norms)
        for i, op in enumerate(arch.operations):
            _copy_block(subnet.blocks[i], supernet.block_weights(i, op), supernet.block_norms(i, op))
        _copy_pointwise(subnet.tail[0], supernet.tail_weight)
        _copy_norm(subnet.tail[1], supernet.tail_norm(supernet.block_shapes(arch)[-1].out_channels))
    subnet.classifier.load_state_dict(supernet.classifier.state_dict())
    return subnet


def _copy_block(block: Any, weights: BlockWeights, norms: Norms) -> None:
    if weights.expand is not None:
        _copy_pointwise(block.expand[0], weights.expand)
    _copy_depthwise(block.depthwise[0], weights.depthwise)
    _copy_pointwise(block.project[0], weights.project)
    for part, norm in zip((block.expand, block.depthwise, block.project), norms, strict=True):
        if norm is not None:
            _copy_norm(part[1], norm)


def _copy_conv(conv: Any, weight: Tensor) -> None:
    conv.weight.copy_(weight)


def _copy_pointwise(conv: Any, weight: Tensor) -> None:
    out_channels, in_channels = conv.weight.shape[:2]
    conv.weight.copy_(weight[:out_channels, :in_channels, None, None])


def _copy_depthwise(conv: Any, weight: Tensor) -> None:
    channels, kernel = conv.weight.shape[0], conv.weight.shape[2]
    margin = (weight.shape[2] - kernel) // 2
    conv.weight.copy_(weight[:channels, :, margin : margin + kernel, margin : margin + kernel])


def _copy_norm(norm: Any, source: Any) -> None:
    for name, tensor in norm.state_dict().items():
        tensor.copy_(getattr(source, name)[: len(tensor)] if tensor.dim() else getattr(source, name))
