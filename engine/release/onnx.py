"""Released networks as ONNX files, and the check that a file computes what the network computes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError, first_line
from bsnas.engine.networks.fold_batchnorm import fold_batchnorm

Precision = Literal["fp32", "fp16", "bf16", "int8"]
Input = Literal["normalised", "uint8"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
"""Types of the network that the exporter sees; INT8 is made from its fp32 file."""
OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22}
"""Convolutions of bfloat16 came with opset 22."""
MAX_BATCH = 4096
"""Largest batch of a file with a dynamic one."""


@dataclass(frozen=True, kw_only=True)
class OnnxFormat:
    """What the file looks like from outside."""

    resolution: int
    """H and W of the images in pixels."""
    channels: int = 3
    """C of the images."""
    mean: tuple[float, ...] = (0.5,)
    """Of the normalisation, a value per channel or one for all, in units of 0 to 1."""
    std: tuple[float, ...] = (0.5,)
    precision: Precision = "fp32"
    """Type of weights and activations; TensorRT takes its precision from them. Input and output stay as they are."""
    input: Input = "normalised"
    """`normalised`: float32 [N, C, H, W]. `uint8`: raw pixels [N, H, W, C], the network normalises them itself."""
    batch: int | None = None
    """Fixed batch size; dynamic when not given."""


class ExportedNetwork(nn.Module):
    """A network with its normalisation and type conversions: `images` of the format's input -> float32 logits."""

    def __init__(self, network: nn.Module, format: OnnxFormat) -> None:
        super().__init__()
        self.network = network.eval()
        self.dtype = DTYPES[format.precision]
        self.raw = format.input == "uint8"
        self.shift = nn.Buffer(255 * torch.tensor(format.mean))
        self.scale = nn.Buffer(1 / (255 * torch.tensor(format.std)))

    def forward(self, images: Tensor) -> Tensor:
        if self.raw:
            images = ((images.float() - self.shift) * self.scale).permute(0, 3, 1, 2)
        return self.network(images.to(self.dtype)).float()


class PointwiseClassifier(nn.Module):
    """A linear layer as the 1x1 convolution that it is in the paper's Table 1: [N, C] -> [N, classes].

    TensorRT-RTX builds FP32 convolutions for every GPU generation, but FP32 matrix products not for Turing (SM75).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
        self.conv.load_state_dict(
            {
                name: tensor[..., None, None] if name == "weight" else tensor
                for name, tensor in linear.state_dict().items()
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :, None, None]).flatten(1)


def export_onnx(
    network: nn.Module, file: Path, format: OnnxFormat, metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Write a network as ONNX, with batch normalisation folded, and check the file.

    Args:
        network: images [N, C, H, W] -> logits [N, classes]; left as it is.
        file: where to write; appears whole or not at all.
        format: of the file; INT8 is made from a file of fp32 (engine/release/int8.py).
        metadata: strings stored in the file beside the format and the normalisation.
    """
    assert format.precision != "int8"
    folded = fold_batchnorm(network).cpu()
    for name, layer in list(folded.named_modules()):
        if isinstance(layer, nn.Linear):
            folded.set_submodule(name, PointwiseClassifier(layer))
        if hasattr(layer, "inplace"):
            layer.inplace = False  # the exporter undoes in-place operations, which doubles its time
    module = ExportedNetwork(folded.to(DTYPES[format.precision]), format).eval()
    shape = (format.batch or 2, format.channels, format.resolution, format.resolution)
    example = torch.zeros(shape)
    if format.input == "uint8":
        example = torch.zeros((shape[0], *shape[2:], shape[1]), dtype=torch.uint8)
    dynamic = None if format.batch else {"images": {0: torch.export.Dim("batch", min=1, max=MAX_BATCH)}}
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=dynamic,
        opset_version=OPSETS[format.precision],
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    _drop_traces(model)
    properties = {
        "precision": format.precision,
        "input": format.input,
        "mean": json.dumps(format.mean),
        "std": json.dumps(format.std),
        **metadata,
    }
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model, full_check=True)
    write_atomically(file, model.SerializeToString())


class Parity(NamedTuple):
    """How far the outputs of two forms of one network are apart on the same images."""

    images: int
    max_abs_error: float
    """Largest absolute difference of a logit."""
    top1_agreement: float
    """Share of images with the same most likely class."""


def compare_logits(logits: npt.NDArray[np.floating], reference: npt.NDArray[np.floating]) -> Parity:
    """Parity of logits [N, classes] with those of the reference."""
    difference = np.abs(logits.astype(np.float64) - reference.astype(np.float64))
    agreement = (logits.argmax(1) == reference.argmax(1)).mean()
    return Parity(len(reference), float(difference.max()), float(agreement))


@torch.inference_mode()
def torch_logits(network: nn.Module, images: Tensor, batch: int = 256) -> npt.NDArray[np.float32]:
    """The network's own answer [N, classes] to normalised images [N, 3, H, W]."""
    network.eval()
    return torch.cat([network(part).float() for part in images.split(batch)]).cpu().numpy()


def typed_logits(network: nn.Module, images: Tensor, precision: Precision) -> npt.NDArray[np.float32]:
    """What torch on the CPU answers with folded weights and activations of a type, as in the ONNX file of that type."""
    return torch_logits(_Typed(fold_batchnorm(network).to(DTYPES[precision]), DTYPES[precision]), images)


class _Typed(nn.Module):
    """A network that is given its images in its own type."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.to(self.dtype))


def onnx_logits(file: Path, images: npt.NDArray[np.generic], batch: int = 256) -> npt.NDArray[np.float32]:
    """The file's answer [N, classes] in ONNX Runtime on the CPU.

    Args:
        file: the ONNX file.
        images: in the file's input format.
        batch: images of one call, where the file's batch is dynamic.

    Raises `UserError` when ONNX Runtime cannot run the file.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds, one per status code
        raise UserError(
            f"ONNX Runtime cannot run {file}: {first_line(error)}; export it as fp32, or run it with TensorRT"
        ) from None
    fixed = session.get_inputs()[0].shape[0]
    batch = fixed if isinstance(fixed, int) else batch
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        missing = batch - len(part) if isinstance(fixed, int) else 0
        padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        parts.append(session.run(None, {"images": padded})[0][: len(part)])
    return np.concatenate(parts)


def _drop_traces(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes on source lines: more than half of a small file, and paths of this machine."""
    for item in (
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
    ):
        del item.metadata_props[:]
        item.doc_string = ""
    del model.graph.metadata_props[:]
