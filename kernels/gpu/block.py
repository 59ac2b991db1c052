"""The inverted residual block on Triton: eight launches forward, ten or eleven backward.

Only the raw convolution outputs y1, y2, y3 and the block's output z are written. Backward recomputes every batch norm,
activation and mask from them while it loads. The plain reference is `bsnas.kernels.reference.inverted_residual`.

forward   weights | expand y1 | finalize | depthwise y2 | finalize | project y3 | finalize | apply z
backward  sums | finalize | project dz2, dW3 | finalize | depthwise dz1, dW2 | finalize | expand dx, dW1 | reduce dW
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bsnas.kernels import graphs
from bsnas.kernels.block import BlockShape, BlockWeights
from bsnas.kernels.gpu.batch_norm import (
    apply,
    apply_backward,
    finalize,
    finalize_backward,
    gradient_sums,
    statistics,
)  # fmt: skip
from bsnas.kernels.gpu.depthwise import depthwise_backward, depthwise_forward, output_size
from bsnas.kernels.gpu.pointwise import expand_backward, pointwise_forward, project_backward
from bsnas.kernels.gpu.weights import prepare_weights, reduce_gradients, reduce_pointwise_gradient
from bsnas.kernels.reference import compute_dtype


class Norm(NamedTuple):
    """A BatchNorm2d taken apart: what autograd follows, what the kernels move, and its two numbers."""

    affine: tuple[Tensor, Tensor]
    running: tuple[Tensor, Tensor, Tensor]
    momentum: float | None
    eps: float

    @classmethod
    def of(cls, bn: nn.BatchNorm2d) -> "Norm":
        if bn.weight is None or bn.running_mean is None or bn.running_var is None or bn.num_batches_tracked is None:
            raise ValueError(
                f"{bn} has no weights or no running statistics; the triton backend takes BatchNorm2d with both; "
                "use backend='reference' for others"
            )
        running = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
        return cls((bn.weight, bn.bias), running, bn.momentum, bn.eps)


def matrix(x: Tensor) -> Tensor:
    """[N, C, H, W] channels_last -> its view [N * H * W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """[N, channels, height, width], channels_last, of x's batch, dtype and device."""
    return torch.empty((x.shape[0], height, width, channels), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)


def _rows(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _has_shortcut(shape: BlockShape, expand: Tensor | None, norms: int) -> bool:
    """Not where x is a raw convolution output: its activation, which a shortcut would add, is never written."""
    return shape.residual and (expand is not None or norms == 2)


class Saved(NamedTuple):
    """What backward needs of a block's forward pass besides its arguments; as a list, those that are there."""

    y2: Tensor
    """Raw output of the depthwise convolution."""
    y3: Tensor
    """Raw output of the projection."""
    stats2: Tensor
    stats3: Tensor
    taps: Tensor
    """The depthwise kernel's slice, taps first."""
    w3: Tensor | None
    """The projection's slice in the compute dtype, where that is not its own."""
    stats1: Tensor | None
    """Of the first norm, where there is one."""
    y1: Tensor | None
    """Raw output of the expansion, where there is one."""
    w1: Tensor | None
    """The expansion's slice in the compute dtype, where that is not its own."""

    def pack(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    @classmethod
    def unpack(cls, tensors: list[Tensor], *, norms: int, expands: bool, cast: bool) -> "Saved":
        """What `pack` gave, of a block with that many norms, with an expansion, with weights of another dtype."""
        there = {"w3": cast, "stats1": norms == 3, "y1": expands, "w1": expands and cast}
        rest = iter(tensors)
        saved = cls(*(next(rest) if there.get(name, True) else None for name in cls._fields))  # type: ignore[arg-type]
        assert next(rest, None) is None, "a block saves nothing without a name"
        return saved


def block_forward(
    x: Tensor, expand: Tensor | None, depthwise: Tensor, project: Tensor, affine: list[Tensor], running: list[Tensor],
    momenta: list[float], eps: list[float], dims: list[int], activation: str, training: bool,
) -> list[Tensor]:  # fmt: skip
    """-> z, then what backward needs. Two or three norms; a negative momentum is the cumulative average.

    Three norms without an expansion: x itself is a raw convolution output and the first norm (and activation) is its.
    """
    shape = BlockShape.of(dims, activation)
    w1, taps, w3 = prepare_weights(BlockWeights(expand, depthwise, project), shape, x.dtype)
    first = 3 - len(eps)

    def norm(index: int, partials: tuple[Tensor, Tensor] | None, rows: int) -> Tensor:
        i = index - first
        return finalize(
            partials, (affine[2 * i], affine[2 * i + 1]), (running[3 * i], running[3 * i + 1], running[3 * i + 2]),
            rows, None if momenta[i] < 0 else momenta[i], eps[i],
        )  # fmt: skip

    y1 = x
    stats1 = None
    if w1 is not None:
        y1 = _empty(x, shape.hidden, x.shape[2], x.shape[3])
        partials = pointwise_forward(matrix(x), w1, matrix(y1), None, statistics=training)
        stats1 = norm(0, partials, _rows(x))
    elif first == 0:
        stats1 = norm(0, statistics(matrix(x)) if training else None, _rows(x))
    height, width = output_size(x.shape[2], shape.stride), output_size(x.shape[3], shape.stride)
    y2 = _empty(x, shape.hidden, height, width)
    partials = depthwise_forward(
        _nhwc(y1), taps, _nhwc(y2), stats1, shape.kernel, shape.stride,
        statistics=training, activation=activation,
    )  # fmt: skip
    stats2 = norm(1, partials, _rows(y2))
    y3 = _empty(x, shape.out_channels, height, width)
    partials = pointwise_forward(matrix(y2), w3, matrix(y3), stats2, statistics=training, activation=activation)
    stats3 = norm(2, partials, _rows(y3))
    z = torch.empty_like(y3)
    apply(matrix(y3), stats3, matrix(z), residual=matrix(x) if _has_shortcut(shape, expand, len(eps)) else None)
    cast, expands = x.dtype != project.dtype, expand is not None
    saved = Saved(
        y2, y3, stats2, stats3, taps, w3 if cast else None, stats1, y1 if expands else None, w1 if cast else None
    )
    return [z, *saved.pack()]


def block_backward(
    grad: Tensor, x: Tensor, expand: Tensor | None, depthwise: Tensor, project: Tensor, saved: list[Tensor],
    norms: int, dims: list[int], activation: str, training: bool,
) -> list[Tensor]:  # fmt: skip
    """-> gradients of x, (expand,) depthwise, project, then weight and bias of each norm."""
    shape = BlockShape.of(dims, activation)
    y2, y3, stats2, stats3, taps, cast_w3, stats1, expanded, cast_w1 = Saved.unpack(
        saved, norms=norms, expands=expand is not None, cast=x.dtype != project.dtype
    )
    w3 = project if cast_w3 is None else cast_w3
    w1 = expand if cast_w1 is None else cast_w1
    y1 = x if expanded is None else expanded
    shortcut = grad if _has_shortcut(shape, expand, norms) else None

    coefficients, *affine3 = finalize_backward(
        gradient_sums(matrix(grad), matrix(y3), stats3), stats3, _rows(y3), training
    )
    dz2 = torch.empty_like(y2)
    partial, w3_partial = project_backward(
        matrix(grad), matrix(y3), coefficients, w3, matrix(y2), stats2, matrix(dz2), activation=activation
    )
    coefficients, *affine2 = finalize_backward(partial, stats2, _rows(y2), training)
    dz1 = torch.empty_like(y1)
    sums, taps_partial = depthwise_backward(
        _nhwc(dz2), _nhwc(y2), coefficients, _nhwc(y1), stats1, taps, _nhwc(dz1), shape.kernel, shape.stride,
        activation,
    )  # fmt: skip
    affine1: list[Tensor] = []
    w1_partial = None
    dx = dz1
    if stats1 is not None:
        assert sums is not None
        coefficients, *affine1 = finalize_backward(sums, stats1, _rows(y1), training)
        dx = torch.empty_like(x)
        if w1 is None:
            apply_backward(matrix(dz1), matrix(y1), coefficients, matrix(dx))
        else:
            w1_partial = expand_backward(
                matrix(dz1), matrix(y1), stats1, coefficients, w1, matrix(x), matrix(dx),
                shortcut=None if shortcut is None else matrix(shortcut),
            )  # fmt: skip
    if shortcut is not None and w1 is None:
        dx = dx + shortcut
    weights = reduce_gradients(w1_partial, taps_partial, w3_partial, BlockWeights(expand, depthwise, project), shape)
    return [dx, *(w for w in weights if w is not None), *affine1, *affine2, *affine3]


# ---- torch.library: opaque to torch.compile, which sees shapes and mutations; eager calls the functions directly

_forward_op = torch.library.custom_op("bsnas::inverted_residual", block_forward, mutates_args={"running"})
_backward_op = torch.library.custom_op("bsnas::inverted_residual_backward", block_backward, mutates_args=())


@_forward_op.register_fake
def _(x, expand, depthwise, project, affine, running, momenta, eps, dims, activation, training):  # type: ignore[no-untyped-def]
    shape = BlockShape.of(dims, activation)
    height, width = output_size(x.shape[2], shape.stride), output_size(x.shape[3], shape.stride)
    cast, expands = x.dtype != project.dtype, expand is not None
    y3 = _empty(x, shape.out_channels, height, width)

    def float32(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=x.device)

    saved = Saved(
        y2=_empty(x, shape.hidden, height, width),
        y3=y3,
        stats2=float32(4, shape.hidden),
        stats3=float32(4, shape.out_channels),
        taps=float32(shape.kernel**2, shape.hidden),
        w3=x.new_empty((shape.out_channels, shape.hidden)) if cast else None,
        stats1=float32(4, shape.hidden) if len(eps) == 3 else None,
        y1=_empty(x, shape.hidden, x.shape[2], x.shape[3]) if expands else None,
        w1=x.new_empty((shape.hidden, shape.in_channels)) if expands and cast else None,
    )
    return [torch.empty_like(y3), *saved.pack()]


@_backward_op.register_fake
def _(grad, x, expand, depthwise, project, saved, norms, dims, activation, training):  # type: ignore[no-untyped-def]
    shape = BlockShape.of(dims, activation)
    weights = [torch.empty_like(w) for w in (expand, depthwise, project) if w is not None]
    widths = [shape.hidden] * (norms - 1) + [shape.out_channels]
    affine = [torch.empty((c,), dtype=torch.float32, device=x.device) for c in widths for _ in range(2)]
    return [torch.empty_like(x), *weights, *affine]


class InvertedResidual(torch.autograd.Function):
    """x, expand, depthwise, project, then weight and bias of each norm carry gradients."""

    @staticmethod
    def forward(ctx, x, expand, depthwise, project, running, momenta, eps, shape, training, *affine):  # type: ignore[no-untyped-def]
        dims, activation = shape.dims, shape.activation
        ctx.static = (len(eps), dims, activation, training)
        ctx.graphs = None
        if graphs.enabled() and training and any(ctx.needs_input_grad):
            ctx.graphs = _graphs_of(x, (expand, depthwise, project), list(affine), running, momenta, eps, shape)
        if ctx.graphs is not None:
            ctx.pending = graphs.Pending()
            return ctx.graphs.forward(x, ctx.pending)
        run = _forward_op if torch.compiler.is_compiling() else block_forward
        z, *saved = run(x, expand, depthwise, project, list(affine), running, momenta, eps, dims, activation, training)
        ctx.save_for_backward(x, expand, depthwise, project, *saved)
        return z

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.graphs is not None:
            dx, *rest = ctx.graphs.backward(grad)
        else:
            x, expand, depthwise, project, *saved = ctx.saved_tensors
            run = _backward_op if torch.compiler.is_compiling() else block_backward
            dx, *rest = run(grad, x, expand, depthwise, project, saved, *ctx.static)
        d_expand = rest.pop(0) if len(rest) % 2 else None  # two of each norm, then two or three weights
        d_depthwise, d_project, *d_affine = rest
        return dx, d_expand, d_depthwise, d_project, None, None, None, None, None, *d_affine


def _graphs_of(
    x: Tensor, weights: tuple[Tensor | None, Tensor, Tensor], affine: list[Tensor], running: list[Tensor],
    momenta: list[float], eps: list[float], shape: BlockShape,
) -> graphs.Captured | None:  # fmt: skip
    """Autograd does not see the captured launches, so the parameters are taken out of it."""
    fixed = BlockWeights(*(None if w is None else w.detach() for w in weights))  # type: ignore[arg-type]
    vectors = [tensor.detach() for tensor in affine]
    dims, activation = shape.dims, shape.activation

    def forward(x: Tensor) -> list[Tensor]:
        return block_forward(x, *fixed, vectors, running, momenta, eps, dims, activation, True)

    def backward(grad: Tensor, x: Tensor, saved: list[Tensor]) -> list[Tensor]:
        return block_backward(grad, x, *fixed, saved, len(eps), dims, activation, True)

    parameters = [*(w for w in weights if w is not None), *affine]
    numbers = (momenta, eps, dims, activation)
    return graphs.GRAPHS.find(graphs.Step(forward, backward, running), x, parameters, numbers)


def inverted_residual(
    x: Tensor,
    weights: BlockWeights,
    norms: tuple[nn.BatchNorm2d | None, nn.BatchNorm2d, nn.BatchNorm2d],
    shape: BlockShape,
    *,
    training: bool,
) -> Tensor:
    """See `kernels.inverted_residual`."""
    taken = [Norm.of(bn) for bn in norms if bn is not None]
    x = x.to(compute_dtype(x)).contiguous(memory_format=torch.channels_last)
    check_rows(training, x.shape[0] * output_size(x.shape[2], shape.stride) * output_size(x.shape[3], shape.stride))
    return InvertedResidual.apply(  # type: ignore[no-any-return]
        x, *weights,
        [tensor for norm in taken for tensor in norm.running],
        [-1.0 if norm.momentum is None else norm.momentum for norm in taken],
        [norm.eps for norm in taken],
        shape, training, *(tensor for norm in taken for tensor in norm.affine),
    )  # fmt: skip


def check_rows(training: bool, rows: int) -> None:
    if training and rows < 2:
        raise ValueError("batch statistics need more than one value per channel; got one; enlarge the batch or image")


# ---- the tail: pointwise convolution, BN, activation


def tail_forward(
    x: Tensor, weight: Tensor, affine: list[Tensor], running: list[Tensor], momentum: float, eps: float,
    activation: str, training: bool,
) -> list[Tensor]:  # fmt: skip
    """-> z, y, stats, and the weight's slice in the compute dtype where that is not its own."""
    outputs = weight.shape[0]
    cast = weight.dtype != x.dtype
    w = weight[:, : x.shape[1]].to(x.dtype, memory_format=torch.contiguous_format) if cast else weight
    y = _empty(x, outputs, x.shape[2], x.shape[3])
    partials = pointwise_forward(matrix(x), w, matrix(y), None, statistics=training)
    stats = finalize(
        partials, (affine[0], affine[1]), (running[0], running[1], running[2]), _rows(x),
        None if momentum < 0 else momentum, eps,
    )  # fmt: skip
    z = torch.empty_like(y)
    apply(matrix(y), stats, matrix(z), activation=activation)
    return [z, y, stats, w] if cast else [z, y, stats]


def tail_backward(
    grad: Tensor, x: Tensor, weight: Tensor, saved: list[Tensor], activation: str, training: bool
) -> list[Tensor]:
    """-> gradients of x, weight, and the norm's weight and bias."""
    y, stats = saved[:2]
    w = saved[2] if weight.dtype != x.dtype else weight
    partial = gradient_sums(matrix(grad), matrix(y), stats, activation=activation)
    coefficients, grad_gamma, grad_beta = finalize_backward(partial, stats, _rows(y), training)
    dx = torch.empty_like(x)
    w_partial = expand_backward(
        matrix(grad), matrix(y), stats, coefficients, w, matrix(x), matrix(dx),
        shortcut=None, activation=activation,
    )  # fmt: skip
    return [dx, reduce_pointwise_gradient(w_partial, weight), grad_gamma, grad_beta]


_tail_op = torch.library.custom_op("bsnas::pointwise_bn_act", tail_forward, mutates_args={"running"})
_tail_backward_op = torch.library.custom_op("bsnas::pointwise_bn_act_backward", tail_backward, mutates_args=())


@_tail_op.register_fake
def _(x, weight, affine, running, momentum, eps, activation, training):  # type: ignore[no-untyped-def]
    y = _empty(x, weight.shape[0], x.shape[2], x.shape[3])
    out = [torch.empty_like(y), y, torch.empty((4, weight.shape[0]), dtype=torch.float32, device=x.device)]
    return out if weight.dtype == x.dtype else [*out, x.new_empty((weight.shape[0], x.shape[1]))]


@_tail_backward_op.register_fake
def _(grad, x, weight, saved, activation, training):  # type: ignore[no-untyped-def]
    affine = torch.empty((weight.shape[0],), dtype=torch.float32, device=x.device)
    return [torch.empty_like(x), torch.empty_like(weight), affine, torch.empty_like(affine)]


class PointwiseBnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, running, momentum, eps, activation, training, gamma, beta):  # type: ignore[no-untyped-def]
        ctx.graphs = None
        if graphs.enabled() and training and any(ctx.needs_input_grad):
            ctx.graphs = _tail_graphs_of(x, weight, [gamma, beta], running, momentum, eps, activation)
        if ctx.graphs is not None:
            ctx.pending = graphs.Pending()
            return ctx.graphs.forward(x, ctx.pending)
        run = _tail_op if torch.compiler.is_compiling() else tail_forward
        z, *saved = run(x, weight, [gamma, beta], running, momentum, eps, activation, training)
        ctx.save_for_backward(x, weight, *saved)
        ctx.static = (activation, training)
        return z

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.graphs is not None:
            dx, d_weight, d_gamma, d_beta = ctx.graphs.backward(grad)
        else:
            x, weight, *saved = ctx.saved_tensors
            run = _tail_backward_op if torch.compiler.is_compiling() else tail_backward
            dx, d_weight, d_gamma, d_beta = run(grad, x, weight, saved, *ctx.static)
        return dx, d_weight, None, None, None, None, None, d_gamma, d_beta


def _tail_graphs_of(
    x: Tensor, weight: Tensor, affine: list[Tensor], running: list[Tensor], momentum: float, eps: float,
    activation: str,
) -> graphs.Captured | None:  # fmt: skip
    fixed, vectors = weight.detach(), [tensor.detach() for tensor in affine]

    def forward(x: Tensor) -> list[Tensor]:
        return tail_forward(x, fixed, vectors, running, momentum, eps, activation, True)

    def backward(grad: Tensor, x: Tensor, saved: list[Tensor]) -> list[Tensor]:
        return tail_backward(grad, x, fixed, saved, activation, True)

    step = graphs.Step(forward, backward, running)
    return graphs.GRAPHS.find(step, x, [weight, *affine], (momentum, eps, activation))


def pointwise_bn_act(x: Tensor, weight: Tensor, bn: nn.BatchNorm2d, *, activation: str, training: bool) -> Tensor:
    """See `kernels.pointwise_bn_act`."""
    norm = Norm.of(bn)
    x = x.to(compute_dtype(x)).contiguous(memory_format=torch.channels_last)
    check_rows(training, _rows(x))
    momentum = -1.0 if norm.momentum is None else norm.momentum
    return PointwiseBnAct.apply(  # type: ignore[no-any-return]
        x, weight, list(norm.running), momentum, norm.eps, activation, training, *norm.affine
    )
