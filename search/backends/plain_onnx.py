"""Networks of plain layers as ONNX in milliseconds, for the hundreds of files that a latency table needs.

torch.onnx.export takes seconds a file. What it writes for released networks is known: convolutions with folded batch
normalisation, Clip, Add, the mean over H and W, and the classifier as a convolution. This writes the same operators, so
that a backend builds the same program from either file; a test compares the two.
"""

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.networks.fold_batchnorm import fold_batchnorm
from bsnas.engine.release.onnx import DTYPES, OPSETS, Precision

_TYPES: dict[str, int] = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def write_plain_onnx(
    network: nn.Module, file: Path, *, input_shape: tuple[int, int, int], precision: Precision = "fp32"
) -> None:
    """Write a network of Conv2d, BatchNorm2d, ReLU6, ReLU, Linear, sums of two, 3x3 max pools of stride 2, and
    means over H and W.

    Args:
        network: images [N, C, H, W] -> logits [N, K]; left as it is.
        file: where to write.
        input_shape: C, H and W of the images. Images and logits are float32, the batch is dynamic.
        precision: type of weights and activations.

    Raises `TypeError` for a layer or an operation that is not among these.
    """
    folded = fold_batchnorm(network).cpu().to(DTYPES[precision])
    writer = _Writer(fx.symbolic_trace(folded), precision)
    images = "images"
    if precision != "fp32":
        images = writer.add("Cast", [images], to=_TYPES[precision])
    logits = writer.run(images)
    if precision != "fp32":
        logits = writer.add("Cast", [logits], to=TensorProto.FLOAT)
    writer.nodes[-1].output[0] = "logits"
    graph = helper.make_graph(
        writer.nodes,
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *input_shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", None])],
        writer.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSETS[precision])], ir_version=10)
    write_atomically(file, model.SerializeToString())


class _Writer(fx.Interpreter):
    """Runs a traced network on names of tensors in place of tensors, and notes an ONNX node for every operation."""

    def __init__(self, traced: fx.GraphModule, precision: Precision) -> None:
        super().__init__(traced)
        self.type = _TYPES[precision]
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._six = self._constant("max_val", torch.tensor(6.0, dtype=DTYPES[precision]), self.type)
        self._zero = self._constant("min_val", torch.tensor(0.0, dtype=DTYPES[precision]), self.type)
        self._height_width = self._constant("height_width", torch.tensor([2, 3]), TensorProto.INT64)

    def add(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Note a node; the name of its output."""
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def call_module(self, target: Any, args: Any, kwargs: Any) -> str:
        layer, (x,) = self.fetch_attr(target), args
        if isinstance(layer, nn.Identity):
            return x
        if isinstance(layer, nn.ReLU6):
            return self.add("Clip", [x, self._zero, self._six])
        if isinstance(layer, nn.ReLU):
            return self.add("Relu", [x])
        if isinstance(layer, nn.Conv2d):
            return self._conv(target, x, layer.weight, layer.bias, layer)
        if isinstance(layer, nn.Linear):
            pixel = self.add("Unsqueeze", [x, self._height_width])
            return self.add("Flatten", [self._conv(target, pixel, layer.weight[..., None, None], layer.bias)])
        raise TypeError(f"{type(layer).__name__} is not written by write_plain_onnx; use export_onnx")

    def call_function(self, target: Callable[..., Any] | str, args: Any, kwargs: Any) -> str:
        if target is operator.add:
            return self.add("Add", args)
        if target is F.max_pool2d and (args[1:], kwargs["stride"], kwargs["padding"]) == ((3,), 2, 1):
            return self.add("MaxPool", args[:1], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
        raise TypeError(f"{target} is not written by write_plain_onnx; use export_onnx")

    def call_method(self, target: Any, args: Any, kwargs: Any) -> str:
        if target == "mean" and args[1:] == ((2, 3),):
            return self.add("ReduceMean", [args[0], self._height_width], keepdims=0)
        raise TypeError(f"{target}{args[1:]} is not written by write_plain_onnx; use export_onnx")

    def _conv(self, name: str, x: str, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d | None = None) -> str:
        inputs = [x, self._constant(f"{name}.weight", weight, self.type)]
        if bias is not None:
            inputs.append(self._constant(f"{name}.bias", bias, self.type))
        shape: dict[str, Any] = {"kernel_shape": list(weight.shape[2:])}
        if layer is not None:
            pads = [int(p) for p in layer.padding] * 2
            shape |= {"strides": list(layer.stride), "pads": pads, "group": layer.groups}
        return self.add("Conv", inputs, **shape)

    def _constant(self, name: str, value: Tensor, kind: int) -> str:
        content = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        self.constants.append(helper.make_tensor(name, kind, list(value.shape), content, raw=True))
        return name
