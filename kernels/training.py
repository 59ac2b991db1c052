"""The public operations: blocks with batch normalisation, forward and backward, on whichever backend is chosen."""

from torch import Tensor, nn

from bsnas.kernels import reference
from bsnas.kernels.backends import choose_backend
from bsnas.kernels.block import BlockShape, BlockWeights, check_slice
from bsnas.kernels.cpu import block as onednn_block

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
    wider. Expand, BN, ReLU6; depthwise, BN, ReLU6; project, BN; identity shortcut where the shape has one. With
    `training` each norm uses the batch's statistics and updates its running ones exactly as torch.nn.BatchNorm2d does,
    else it uses the running ones; `bn.training` is not looked at.

    Without an expansion but with a first norm, x is a raw convolution output (the stem's): norm and ReLU6 come first,
    in the depthwise convolution's own loads, and there is no shortcut.

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


def pointwise_bn_relu6(
    x: Tensor,
    weight: Tensor,
    bn: nn.BatchNorm2d,
    *,
    in_channels: int,
    training: bool,
    backend: str | None = None,
) -> Tensor:
    """The tail: 1x1 convolution, BN, ReLU6. x [N, in_channels, H, W], weight [out, in_max] -> [N, out, H, W].

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

        return triton_block.pointwise_bn_relu6(x, weight, bn, training=training)
    if chosen == "onednn":
        return onednn_block.pointwise_bn_relu6(x, weight, bn, in_channels=in_channels, training=training)
    return reference.pointwise_bn_relu6(x, weight, bn, in_channels=in_channels, training=training)
