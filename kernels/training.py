"""The public operations: blocks with batch normalisation, forward and backward, on whichever backend is chosen."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from bsnas.kernels import reference
from bsnas.kernels.backends import choose_backend, say_unfused
from bsnas.kernels.block import BlockShape, BlockWeights, check_slice
from bsnas.kernels.cpu import block as onednn_block
from bsnas.kernels.plan import BlockPlan, LayerPlan, is_matrix

FUSED = ("relu6", "relu")
"""Activations that the fused kernels know."""
Norms = tuple[nn.BatchNorm2d | None, nn.BatchNorm2d, nn.BatchNorm2d]


def inverted_residual(
    x: Tensor,
    weights: BlockWeights,
    norms: Norms,
    shape: BlockShape,
    *,
    training: bool,
    backend: str | None = None,
) -> Tensor:
    """Inverted residual block (MobileNetV2; paper, section 3.1) on slices of full-size weights.

    x [N, in_channels, H, W], best channels_last -> [N, out_channels, ceil(H / stride), ceil(W / stride)] in the compute
    dtype, which is autocast's where autocast is on for the device and x's own elsewhere; accumulation is in float32 or
    wider. Expand, BN, activation; depthwise, BN, activation; project, BN; identity shortcut where the shape has one.
    With `training` each norm uses the batch's statistics and updates its running ones exactly as torch.nn.BatchNorm2d
    does, else it uses the running ones; `bn.training` is not looked at.

    Without an expansion but with a first norm, x is a raw convolution output (the stem's): norm and activation come
    first, in the depthwise convolution's own loads, and there is no shortcut.

    Raises ValueError when the shape is no slice of the weights, RuntimeError when a forced backend cannot run.
    """
    check_slice(weights, shape, x.shape[1])
    chosen = choose_backend(x, backend)
    if chosen == "triton":
        from bsnas.kernels.gpu import block as triton_block

        return triton_block.inverted_residual(x, weights, norms, shape, training=training)
    if chosen == "onednn":
        return onednn_block.inverted_residual(x, weights, norms, shape, training=training)
    return reference.inverted_residual(x, weights, norms, shape, training=training)


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bn: nn.BatchNorm2d,
    *,
    in_channels: int,
    activation: str = "relu6",
    training: bool,
    backend: str | None = None,
) -> Tensor:
    """The tail: 1x1 convolution, BN, activation (relu6 or relu).

    x [N, in_channels, H, W], weight [out, in_max] -> [N, out, H, W].

    Dtypes, statistics and errors as in `inverted_residual`.
    """
    if x.shape[1] != in_channels or weight.shape[1] < in_channels:
        raise ValueError(
            f"in_channels {in_channels} with x {tuple(x.shape)} and weight {tuple(weight.shape)}; x must have exactly "
            "that many channels and the weight at least that many inputs"
        )
    chosen = choose_backend(x, backend)
    if chosen == "triton":
        from bsnas.kernels.gpu import block as triton_block

        return triton_block.pointwise_bn_act(x, weight, bn, activation=activation, training=training)
    of_backend = onednn_block if chosen == "onednn" else reference
    return of_backend.pointwise_bn_act(x, weight, bn, in_channels=in_channels, activation=activation, training=training)


# ---- blocks of any plan


class Block(NamedTuple):
    """What runs a block: its plan, the full-size weights by the names of its layers, its norms in their order."""

    plan: BlockPlan
    weights: Mapping[str, Tensor]
    norms: Sequence[nn.BatchNorm2d]


def run_blocks(x: Tensor, blocks: Sequence[Block], *, training: bool) -> Tensor:
    """Blocks one after another, fused where a kernel here computes what their plans say.

    x [N, inputs, H, W] -> the last block's output. Dtypes, statistics and errors as in `inverted_residual`. A plan that
    no fused kernel knows runs on the reference, which is said once for each form.
    """
    raw: nn.BatchNorm2d | None = None
    """The norm that x, a raw convolution output, still has to pass; the next block's activation follows it."""
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        plan = block.plan
        if _is_inverted_residual(plan):
            x = _run_inverted_residual(x, block, raw, training)
            raw = None
        elif _is_pointwise(plan) and block.weights[plan.layers[0].name].dim() == 2:
            (layer,) = plan.layers
            weight = block.weights[layer.name]
            x = pointwise_bn_act(
                x, weight if len(weight) == layer.outputs else weight[: layer.outputs], block.norms[0],
                in_channels=layer.inputs, activation=str(layer.activation), training=training,
            )  # fmt: skip
        elif following is not None and _may_stay_raw(plan, following.plan):
            # The next block's kernel normalises x as it loads it: this activation, at the largest resolution of the
            # network, is never written.
            (layer,) = plan.layers
            x = reference.convolve(x.to(reference.compute_dtype(x)), block.weights[layer.name], layer)
            raw = block.norms[0]
        else:
            if training and _is_searched_form(plan):
                say_unfused(x, ", ".join(_form(layer) for layer in plan.layers))
            x = reference.run_plan(x, plan, block.weights, block.norms, training=training)
    return x


def _is_inverted_residual(plan: BlockPlan) -> bool:
    """(1x1, activation,) depthwise, the same activation, 1x1, with the plain shortcut exactly where sizes agree."""
    if len(plan.layers) not in (2, 3) or plan.pool:
        return False
    *expand, depthwise, project = plan.layers
    fits = depthwise.depthwise and depthwise.activation in FUSED
    fits = fits and is_matrix(project) and project.activation is None and not any(e.depthwise for e in expand)
    fits = fits and all(is_matrix(layer) and layer.activation == depthwise.activation for layer in expand)
    same = depthwise.stride == 1 and plan.layers[0].inputs == project.outputs
    return fits and plan.shortcut == ("identity" if same else None)


def _is_pointwise(plan: BlockPlan) -> bool:
    if len(plan.layers) != 1 or plan.pool or plan.shortcut is not None:
        return False
    return is_matrix(plan.layers[0]) and plan.layers[0].activation in FUSED


def _is_searched_form(plan: BlockPlan) -> bool:
    """Not a single convolution, as stems are, nor nothing."""
    return len(plan.layers) > 1


def _may_stay_raw(plan: BlockPlan, following: BlockPlan) -> bool:
    """Whether a convolution's norm and activation can happen in the next block: of no expansion and no shortcut."""
    alone = len(plan.layers) == 1 and not plan.pool and plan.shortcut is None
    fits = alone and not plan.layers[0].depthwise and following.shortcut is None and len(following.layers) == 2
    return fits and _is_inverted_residual(following) and plan.layers[0].activation == following.layers[0].activation


def _run_inverted_residual(x: Tensor, block: Block, raw: nn.BatchNorm2d | None, training: bool) -> Tensor:
    *expand, depthwise, project = block.plan.layers
    shape = BlockShape(
        block.plan.layers[0].inputs, depthwise.outputs, project.outputs, depthwise.kernel, depthwise.stride,
        str(depthwise.activation),
    )  # fmt: skip
    weights = BlockWeights(
        block.weights[expand[0].name] if expand else None, block.weights[depthwise.name], block.weights[project.name]
    )
    first = block.norms[0] if expand else raw
    return inverted_residual(x, weights, (first, *block.norms[-2:]), shape, training=training)  # type: ignore[arg-type]


def _form(layer: LayerPlan) -> str:
    kind = "depthwise " if layer.depthwise else ""
    size = "kxk" if layer.kernel > 1 else "1x1"
    return f"{kind}{size} {layer.activation or 'linear'}"
