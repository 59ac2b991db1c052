"""INT8 by quantize and dequantize nodes (Q/DQ): ranges from real images, through ONNX Runtime's quantizer.

Weights are quantized per output channel, activations per tensor and symmetrically, as TensorRT demands; ONNX Runtime
runs the same file. Calibration images must not be test images: the search-validation set is for that.
"""

import io
import logging
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError

Calibration = Literal["minmax", "entropy", "percentile"]
"""How an activation's range follows from what calibration images give.

- `minmax`: the whole range seen.
- `entropy`: the range that loses least information.
- `percentile`: all but the outermost values.
"""

_BATCH = 32


def quantize_onnx(
    source: Path, file: Path, images: npt.NDArray[np.generic], *, calibration: Calibration = "minmax"
) -> None:
    """Write the INT8 form of an ONNX file of fp32; its metadata comes along.

    Args:
        source: network of `images` -> `logits`.
        file: where to write; appears whole or not at all.
        images: in the file's input format; a few hundred do.
        calibration: how ranges are chosen.

    Raises `UserError` when there are no images.
    """
    if not len(images):
        raise UserError("INT8 needs images to calibrate on; give at least one")
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    logging.getLogger().setLevel(max(logging.getLogger().level, logging.ERROR))  # it warns of every skipped node
    with TemporaryDirectory() as directory, redirect_stdout(io.StringIO()):
        prepared, quantized = Path(directory) / "prepared.onnx", Path(directory) / "quantized.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantized,
            _Reader(images, _fixed_batch(onnx.load(source))),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Add", "Clip", "Relu", "MaxPool"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=methods[calibration],
            # TensorRT reads no INT32 biases; they stay in fp32.
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        model = onnx.load(quantized)
    original = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    onnx.helper.set_model_props(model, {**original, "precision": "int8", "calibration": calibration})
    onnx.checker.check_model(model, full_check=True)
    write_atomically(file, model.SerializeToString())


class _Reader:
    """Hands calibration images to the quantizer in batches of one size, as histograms and fixed batches need them."""

    def __init__(self, images: npt.NDArray[np.generic], batch: int | None) -> None:
        batch = batch or min(_BATCH, len(images))
        rows = np.arange(-(-len(images) // batch) * batch) % len(images)  # the last batch is filled from the first
        self._batches = iter([{"images": images[rows[start : start + batch]]} for start in range(0, len(rows), batch)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def _fixed_batch(model: Any) -> int | None:
    """The batch size of a file, or None where it is dynamic."""
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None
