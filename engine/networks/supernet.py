"""The weight-sharing supernet: every architecture of a space is a path through it (paper, section 3.1).

`supernet(x, arch)` runs one path; the active path is an argument and no state remembers it. Convolution weights are
slices of larger ones, read in place by the kernels. Which operations share a weight is the `Sharing` mode; batch
normalisation belongs to an operation alone in every mode, so that a path can be scored with running statistics.

A supernet holds only the live operations of its space. `shrunk` gives the smaller supernet that a smaller space needs.
"""

from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.space import Arch, Operation, Sharing, Space
from bsnas.kernels import BlockShape, BlockWeights, inverted_residual, pointwise_bn_relu6
from bsnas.kernels.reference import batch_norm
from bsnas.kernels.training import Norms


def _weight_key(op: Operation, sharing: Sharing) -> str:
    if sharing == "nested":
        return "all"
    return str(op.block_op) if sharing == "channels" else str(op)


class SharedWeights(nn.Module):
    """The three convolution weights that some operations of a block share, at the largest sizes they need.

    expand [hidden, in], depthwise [hidden, 1, k, k], project [out, hidden]; float32.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.expand = nn.Parameter(torch.empty(hidden, in_channels))
        self.depthwise = nn.Parameter(torch.empty(hidden, 1, kernel, kernel))
        self.project = nn.Parameter(torch.empty(out_channels, hidden))
        _init_conv(self.expand, fan_out=hidden)
        _init_conv(self.depthwise, fan_out=kernel * kernel)
        _init_conv(self.project, fan_out=out_channels)


def _init_conv(weight: Tensor, fan_out: int) -> None:
    """He initialisation by fan-out, as torchvision's MobileNetV2."""
    nn.init.normal_(weight, std=(2.0 / fan_out) ** 0.5)


class SupernetBlock(nn.Module):
    """All live operations of one block: their shared weights and their own batch normalisations."""

    def __init__(self, space: Space, block: int, sharing: Sharing) -> None:
        super().__init__()
        self.sharing = sharing
        cluster = space.clusters[space.block_cluster[block]]
        if space.is_first(block):
            previous = space.block_cluster[block] - 1
            fixed_in = max(space.clusters[previous].channels) if previous >= 0 else space.separable_channels
        else:
            fixed_in = None
        sizes: dict[str, tuple[int, int, int, int]] = {}
        self.norms = nn.ModuleDict()
        for op in space.live[block]:
            in_channels = fixed_in or op.channels
            hidden = op.expansion * in_channels
            out_channels = max(cluster.channels) if space.is_spring(block) else op.channels
            self.norms[str(op)] = nn.ModuleList(
                [nn.BatchNorm2d(hidden), nn.BatchNorm2d(hidden), nn.BatchNorm2d(out_channels)]
            )
            key = _weight_key(op, sharing)
            size = (in_channels, hidden, out_channels, op.kernel)
            sizes[key] = tuple(map(max, sizes.get(key, size), size))  # type: ignore[assignment]
        self.weights = nn.ModuleDict({key: SharedWeights(*size) for key, size in sizes.items()})
        # Found once: walking through the modules took 10 ms in every round of the imagenet preset's 18 paths.
        self.active_parameters: dict[Operation, list[nn.Parameter]] = {
            op: [*self.weights[_weight_key(op, sharing)].parameters(), *self.norms[str(op)].parameters()]
            for op in space.live[block]
        }
        """The parameters that each operation uses."""

    def shared_weights(self, op: Operation) -> BlockWeights:
        shared = cast(SharedWeights, self.weights[_weight_key(op, self.sharing)])
        return BlockWeights(shared.expand, shared.depthwise, shared.project)

    def op_norms(self, op: Operation) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]:
        expand, depthwise, project = cast(nn.ModuleList, self.norms[str(op)])
        return cast(nn.BatchNorm2d, expand), cast(nn.BatchNorm2d, depthwise), cast(nn.BatchNorm2d, project)

    def forward(self, x: Tensor, op: Operation, shape: BlockShape) -> Tensor:
        """x [N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""
        return inverted_residual(x, self.shared_weights(op), self.op_norms(op), shape, training=self.training)


class Supernet(nn.Module):
    """The supernet of a space's live operations. Raises `UserError` for an unknown sharing mode."""

    def __init__(self, space: Space, sharing: Sharing = "nested") -> None:
        super().__init__()
        if sharing not in get_args(Sharing):
            raise UserError(f"weight sharing {sharing!r} is unknown; allowed are {', '.join(get_args(Sharing))}")
        self.space = space
        self.sharing: Sharing = sharing
        stem, separable = space.stem_channels, space.separable_channels
        self.stem_conv = nn.Conv2d(space.input_channels, stem, 3, stride=space.stem_stride, padding=1, bias=False)
        _init_conv(self.stem_conv.weight, fan_out=9 * stem)
        self.stem_bn = nn.BatchNorm2d(stem)
        self.separable_depthwise = nn.Parameter(torch.empty(stem, 1, 3, 3))
        self.separable_project = nn.Parameter(torch.empty(separable, stem))
        _init_conv(self.separable_depthwise, fan_out=9)
        _init_conv(self.separable_project, fan_out=separable)
        self.separable_bns = nn.ModuleList([nn.BatchNorm2d(stem), nn.BatchNorm2d(separable)])
        self.blocks = nn.ModuleList(SupernetBlock(space, i, sharing) for i in range(space.num_blocks))
        last = space.clusters[-1]
        tail_inputs = space.live_channels(len(space.clusters) - 1) if last.blocks == 1 else (max(last.channels),)
        self.tail_weight = nn.Parameter(torch.empty(space.tail_channels, max(tail_inputs)))
        _init_conv(self.tail_weight, fan_out=space.tail_channels)
        self.tail_bns = nn.ModuleDict({f"c{width}": nn.BatchNorm2d(space.tail_channels) for width in tail_inputs})
        self.classifier = nn.Linear(space.tail_channels, space.classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self._fixed_parameters = [
            *self.stem_conv.parameters(), *self.stem_bn.parameters(), self.separable_depthwise,
            self.separable_project, *self.separable_bns.parameters(), self.tail_weight, *self.classifier.parameters(),
        ]  # fmt: skip
        """Those of every path."""

    # ---- the parts, for whoever runs them in another way (evaluation, release)

    @property
    def separable_weights(self) -> BlockWeights:
        return BlockWeights(None, self.separable_depthwise, self.separable_project)

    @property
    def separable_norms(self) -> tuple[None, nn.BatchNorm2d, nn.BatchNorm2d]:
        return None, self.separable_bns[0], self.separable_bns[1]  # type: ignore[return-value]

    @property
    def separable_shape(self) -> BlockShape:
        stem = self.space.stem_channels
        return BlockShape(stem, stem, self.space.separable_channels, kernel=3, stride=1)

    def block_weights(self, block: int, op: Operation) -> BlockWeights:
        """The full-size weights whose slices the operation uses."""
        return self.blocks[block].shared_weights(op)  # type: ignore[operator]

    def block_norms(self, block: int, op: Operation) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d, nn.BatchNorm2d]:
        """Batch normalisation after expand, depthwise and project."""
        return self.blocks[block].op_norms(op)  # type: ignore[operator]

    def block_shapes(self, arch: Arch) -> list[BlockShape]:
        """The slice that each block uses under `arch`."""
        return [BlockShape(*dims) for dims in self.space.supernet_dims(arch)]

    def tail_norm(self, in_channels: int) -> nn.BatchNorm2d:
        """Batch normalisation after the tail's 1x1 convolution; one for each width that can reach it."""
        return self.tail_bns[f"c{in_channels}"]  # type: ignore[return-value]

    def active_parameters(self, arch: Arch) -> list[nn.Parameter]:
        """The parameters that the path of `arch` uses; all others get no gradient."""
        last = self.space.clusters[-1]
        norm = self.tail_norm(arch.channels[-1] if last.blocks == 1 else max(last.channels))
        found = [*self._fixed_parameters, norm.weight, norm.bias]
        for block, op in zip(self.blocks, arch.operations, strict=True):
            found += block.active_parameters[op]  # type: ignore[operator, index]
        return found

    # ---- running a path

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """Images x [N, input_channels, H, W], channels_last, in the compute dtype -> logits [N, classes]."""
        x = separable_block(
            self.stem_conv(x), self.stem_bn, self.separable_weights, self.separable_norms, self.separable_shape,
            training=self.training,
        )  # fmt: skip
        shapes = self.block_shapes(arch)
        for block, op, shape in zip(self.blocks, arch.operations, shapes, strict=True):
            x = block(x, op, shape)
        width = shapes[-1].out_channels
        x = pointwise_bn_relu6(x, self.tail_weight, self.tail_norm(width), in_channels=width, training=self.training)
        return self.classifier(x.mean((2, 3)))

    # ---- shrinking

    def shrunk(self, space: Space) -> "Supernet":
        """The supernet of a smaller space of the same table, with this one's values.

        Weights are cropped to what the live operations use, so nothing dead takes part in anything any more.
        """
        assert space.fingerprint == self.space.fingerprint, "shrinking keeps the table"
        smaller = Supernet(space, self.sharing)
        smaller.load_state_dict(crop_to(smaller.state_dict(), self.state_dict()))
        return smaller.train(self.training).to(self.tail_weight.device)


def separable_block(
    x: Tensor, stem_bn: nn.BatchNorm2d, weights: BlockWeights, norms: Norms, shape: BlockShape, *, training: bool
) -> Tensor:
    """The stem's raw convolution output x [N, stem, H, W] -> norm, ReLU6, separable block -> [N, separable, H, W].

    The kernels normalise x as they load it: its activation, at the largest resolution of the network, is never written.
    Where the block has a shortcut (stem and separable channels are equal), that would have nothing to add.
    """
    if shape.residual:
        x = F.relu6(batch_norm(x, stem_bn, training))
    else:
        norms = (stem_bn, *norms[1:])
    return inverted_residual(x, weights, norms, shape, training=training)


def crop_to(smaller: dict[str, Tensor], larger: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each name of `smaller` the part of the larger tensor that it keeps: first channels, centre of kernels."""
    return {name: _crop(larger[name], shape_of.shape).clone() for name, shape_of in smaller.items()}


def _crop(tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.dim() == 4:  # kernels are centred: [.., .., k, k]
        margin = (tensor.shape[2] - shape[2]) // 2
        tensor = tensor[:, :, margin : margin + shape[2], margin : margin + shape[3]]
    return tensor[tuple(slice(size) for size in shape)]
