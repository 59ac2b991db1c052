"""The weight-sharing supernet: every architecture of a space is a path through it (paper, section 3.1).

`supernet(x, arch)` runs one path; the active path is an argument and no state remembers it. Convolution weights are
slices of larger ones, read in place by the kernels. Which operations share a weight is the `Sharing` mode; batch
normalisation belongs to an operation alone in every mode, so that a path can be scored with running statistics.

A supernet holds only the live operations of its space. `shrunk` gives the smaller supernet that a smaller space needs.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch, Operation
from bsnas.engine.space.plan import Conv, Plan
from bsnas.engine.space.space import Sharing, Space
from bsnas.engine.space.table import Cluster
from bsnas.kernels import Block, run_blocks
from bsnas.kernels.plan import centre


class Variant(NamedTuple):
    """One form that a block can take in the supernet."""

    operation: Operation
    inputs: int
    """Channels that it reads."""
    plan: Plan


def _weight_key(op: Operation, sharing: Sharing) -> str:
    if sharing == "nested":
        return "all"
    return str(op.block_op) if sharing == "channels" else str(op)


class SharedWeights(nn.Module):
    """The convolution weights that some operations of a block share, by layer, at the largest sizes they need.

    [out, in] of a 1x1 convolution, [out, in, k, k] of others, [C, 1, k, k] of depthwise ones; float32.
    """

    def __init__(self, layers: Mapping[str, Conv]) -> None:
        super().__init__()
        for name, layer in layers.items():
            weight = _new_weight(layer)
            groups = layer.outputs if layer.depthwise else 1
            _init_conv(weight, fan_out=layer.kernel**2 * layer.outputs // groups)
            self.register_parameter(name, weight)


def _new_weight(layer: Conv) -> nn.Parameter:
    if layer.depthwise:
        return nn.Parameter(torch.empty(layer.outputs, 1, layer.kernel, layer.kernel))
    if layer.kernel == 1:
        return nn.Parameter(torch.empty(layer.outputs, layer.inputs))
    # As torch makes it, which draws from the generator: runs of earlier versions begin with the same weights.
    return cast(nn.Parameter, nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, bias=False).weight)


def _init_conv(weight: Tensor, fan_out: int) -> None:
    """He initialisation by fan-out, as torchvision's MobileNetV2."""
    nn.init.normal_(weight, std=(2.0 / fan_out) ** 0.5)


def _largest(layers: Iterable[Conv]) -> dict[str, Conv]:
    """Per name, a layer as large as the largest of that name in every dimension."""
    found: dict[str, Conv] = {}
    for layer in layers:
        known = found.get(layer.name, layer)
        found[layer.name] = layer._replace(
            inputs=max(known.inputs, layer.inputs),
            outputs=max(known.outputs, layer.outputs),
            kernel=max(known.kernel, layer.kernel),
        )
    return found


class SupernetBlock(nn.Module):
    """All live operations of one block: their shared weights and their own batch normalisations.

    Args:
        variants: every form that the block can take.
        largest: further forms that weights are kept large enough for.
        sharing: who shares weights.
        norms_by_input: whether an operation has norms of its own for each width that it reads.
    """

    def __init__(
        self,
        variants: Iterable[Variant],
        largest: Iterable[Variant],
        sharing: Sharing,
        *,
        norms_by_input: Callable[[Operation], bool],
    ) -> None:
        super().__init__()
        self.sharing = sharing
        self.variants = {(v.operation, v.inputs): v.plan for v in variants}
        self._norm_keys: dict[tuple[Operation, int], str] = {}
        self.norms = nn.ModuleDict()
        for (op, inputs), plan in self.variants.items():
            key = f"{op}i{inputs}" if norms_by_input(op) else str(op)
            self._norm_keys[op, inputs] = key
            if key not in self.norms:
                self.norms[key] = nn.ModuleList([nn.BatchNorm2d(layer.outputs) for layer in plan.convs])
        layers: dict[str, list[Conv]] = {}
        for op, _, plan in (*(Variant(op, i, plan) for (op, i), plan in self.variants.items()), *largest):
            layers.setdefault(_weight_key(op, sharing), []).extend(plan.convs)
        self.weights = nn.ModuleDict({key: SharedWeights(_largest(convs)) for key, convs in layers.items()})
        # Found once: walking through the modules took 10 ms in every round of the imagenet preset's 18 paths.
        self._blocks = {key: self._block(*key) for key in self.variants}
        self.active = {key: _parameters_of([block]) for key, block in self._blocks.items()}
        """The parameters that an operation uses that reads so many channels."""

    def _block(self, op: Operation, inputs: int) -> Block:
        plan = self.variants[op, inputs]
        shared = self.weights[_weight_key(op, self.sharing)]
        weights = {layer.name: cast(Tensor, getattr(shared, layer.name)) for layer in plan.convs}
        norms = [cast(nn.BatchNorm2d, norm) for norm in cast(nn.ModuleList, self.norms[self._norm_keys[op, inputs]])]
        return Block(plan, weights, norms)

    def block(self, op: Operation, inputs: int) -> Block:
        """Plan, full-size weights and norms of an operation that reads `inputs` channels."""
        return self._blocks[op, inputs]


def _parameters_of(blocks: Iterable[Block]) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for block in blocks:
        found += [cast(nn.Parameter, weight) for weight in block.weights.values()]
        found += [parameter for norm in block.norms for parameter in norm.parameters()]
    return found


class Supernet(nn.Module):
    """The supernet of a space's live operations. Raises `UserError` for an unknown sharing mode."""

    def __init__(self, space: Space, sharing: Sharing = "nested") -> None:
        super().__init__()
        if sharing not in get_args(Sharing):
            raise UserError(f"weight sharing {sharing!r} is unknown; allowed are {', '.join(get_args(Sharing))}")
        self.space = space
        self.sharing: Sharing = sharing
        self.stem = nn.ModuleList(_fixed_blocks(space.stem, [space.stem_plans], (space.input_channels,)))
        self.blocks = nn.ModuleList(_searched_block(space, i, sharing) for i in range(space.num_blocks))
        ends = space.tail_inputs
        tails = [space.tail_plans(width) for width in ends]
        self.tail = nn.ModuleList(_fixed_blocks(space.tail, tails, ends))
        self.classifier = nn.Linear(space.classifier_inputs(max(ends)), space.classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self._stem_and_classifier = [*_parameters_of(self.stem_blocks), *self.classifier.parameters()]
        self._tails = {width: _parameters_of(self.tail_blocks(width)) for width in ends}
        """Parameters of the tail per width that reaches it."""

    # ---- the parts, for whoever runs them in another way (evaluation, release)

    @property
    def stem_blocks(self) -> list[Block]:
        return self._chain(self.stem, self.space.input_channels)

    def block(self, index: int, op: Operation, inputs: int) -> Block:
        """A searched block with an operation, behind `inputs` channels."""
        return cast(SupernetBlock, self.blocks[index]).block(op, inputs)

    def tail_blocks(self, inputs: int) -> list[Block]:
        """The fixed blocks behind searched ones that put out `inputs` channels."""
        return self._chain(self.tail, inputs)

    def path_blocks(self, arch: Arch) -> list[Block]:
        """All blocks of an architecture's path, from the images to the classifier."""
        inputs, found = self.space.entry_channels, self.stem_blocks
        for i, op in enumerate(arch.operations):
            found.append(self.block(i, op, inputs))
            inputs = self.space.supernet_width(i, op)
        return [*found, *self.tail_blocks(inputs)]

    def active_parameters(self, arch: Arch) -> list[nn.Parameter]:
        """The parameters that the path of `arch` uses; all others get no gradient."""
        found, inputs = [*self._stem_and_classifier], self.space.entry_channels
        for block, op, spring in zip(self.blocks, arch.operations, self.space.spring_widths, strict=True):
            found += block.active[op, inputs]  # type: ignore[operator, index]
            inputs = spring or op.channels
        return [*found, *self._tails[inputs]]

    @staticmethod
    def _only_operations(blocks: Iterable[nn.Module]) -> list[Operation]:
        return [next(iter(cast(SupernetBlock, block).variants))[0] for block in blocks]

    def _chain(self, blocks: Iterable[nn.Module], inputs: int) -> list[Block]:
        """Blocks without a choice one after another, the first of which reads `inputs` channels."""
        found = []
        for block, op in zip(blocks, self._only_operations(blocks), strict=True):
            found.append(cast(SupernetBlock, block).block(op, inputs))
            inputs = op.channels
        return found

    # ---- running a path

    def forward(self, x: Tensor, arch: Arch) -> Tensor:
        """Images x [N, input_channels, H, W], channels_last, in the compute dtype -> logits [N, classes]."""
        x = run_blocks(x, self.path_blocks(arch), training=self.training)
        return classify(x, self.classifier.weight, self.classifier.bias)

    # ---- shrinking

    def shrunk(self, space: Space) -> "Supernet":
        """The supernet of a smaller space of the same table, with this one's values.

        Weights are cropped to what the live operations use, so nothing dead takes part in anything any more.
        """
        assert space.fingerprint == self.space.fingerprint, "shrinking keeps the table"
        smaller = Supernet(space, self.sharing)
        smaller.load_state_dict(crop_to(smaller.state_dict(), self.state_dict()))
        return smaller.train(self.training).to(self.classifier.weight.device)


def _searched_block(space: Space, i: int, sharing: Sharing) -> SupernetBlock:
    live = [
        Variant(op, inputs, space.supernet_plan(i, inputs, op))
        for op in space.live[i]
        for inputs in space.supernet_inputs(i, op.channels)
    ]
    # Behind a cluster of one block expansions multiply its largest option, and weights are kept for it.
    bases = {(v.operation, space.expansion_base(i, v.inputs)) for v in live}
    largest = [Variant(op, base, space.supernet_plan(i, base, op)) for op, base in sorted(bases)]

    def norms_by_input(op: Operation) -> bool:
        """With sliced springs, or where norms are as wide as what the block reads; whatever shrinking has left."""
        plans = [space.supernet_plan(i, inputs, op) for inputs in space.table_inputs(i, op.channels)]
        return space.springs == "sliced" or len({tuple(la.outputs for la in plan.convs) for plan in plans}) > 1

    return SupernetBlock(live, largest, sharing, norms_by_input=norms_by_input)


def _fixed_blocks(
    clusters: Iterable[Cluster], chains: Iterable[tuple[Plan, ...]], inputs: tuple[int, ...]
) -> Iterable[SupernetBlock]:
    """Blocks without a choice, whose plans are given for each width that the first of them can read."""
    operations = [Operation(row.choices[0], c.channels[0]) for c in clusters for row, _ in c.places]
    for op, plans in zip(operations, zip(*chains, strict=True), strict=True):
        variants = [Variant(op, width, plan) for width, plan in dict(zip(inputs, plans, strict=False)).items()]
        yield SupernetBlock(variants, (), "nested", norms_by_input=lambda _: True)
        inputs = (op.channels,)


def classify(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Average pool and linear layer: x [N, C, H, W], weight [classes, C or more] -> logits [N, classes]."""
    pooled = x.mean((2, 3))
    return F.linear(pooled, weight if weight.shape[1] == pooled.shape[1] else weight[:, : pooled.shape[1]], bias)


def crop_to(smaller: Mapping[str, Tensor], larger: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each name of `smaller` the part of the larger tensor that it keeps: first channels, centre of kernels."""
    return {name: _crop(larger[name], shape_of.shape).clone() for name, shape_of in smaller.items()}


def _crop(tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.dim() == 4:  # kernels are centred: [.., .., k, k]; where only 1x1 ones are left, their weight is [.., ..]
        tensor = centre(tensor, shape[2]) if len(shape) == 4 else centre(tensor, 1).flatten(1)
    return tensor[tuple(slice(size) for size in shape)]
