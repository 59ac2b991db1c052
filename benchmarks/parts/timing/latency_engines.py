"""TensorRT-RTX engines ahead of time: for GPUs that this machine does not have."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.release.onnx import Precision
from bsnas.search.backends import BACKENDS, CannotRun, Model
from bsnas.search.backends.tensorrt import build_engine, import_package

BACKEND = "tensorrt-rtx"


def engines_ahead(
    model: Model, precisions: Sequence[Precision], targets: Sequence[str], batch_sizes: Sequence[int], directory: Path
) -> Iterator[dict[str, Any]]:
    """Build an engine per precision and target where TensorRT-RTX is installed and has no GPU to run on.

    Each is written to `directory` with a JSON file of the layers that it runs: kind, name, and the ONNX operators
    fused into it. Yields a row per engine, its size and build time, or why it does not build.
    """
    try:
        trt = import_package("tensorrt_rtx")
    except CannotRun:
        return
    try:
        BACKENDS[BACKEND].describe()
        return
    except CannotRun:
        pass
    sizes = sorted(batch_sizes)
    batches = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    for precision in precisions:
        onnx = model.onnx_file(precision).read_bytes()
        for target in targets:
            row = {"network": model.name, "backend": BACKEND, "version": trt.__version__}
            row |= {"precision": precision, "target": target}
            started = time.perf_counter()
            try:
                engine = build_engine(trt, onnx, batches, target)
            except CannotRun as reason:
                yield {**row, "why": str(reason)}
                continue
            seconds = time.perf_counter() - started
            file = directory / f"{model.name}-{precision}-{target}.engine"
            write_atomically(file, engine.content)
            layers = json.dumps([layer._asdict() for layer in engine.layers], indent=1) + "\n"
            write_atomically(file.with_suffix(".layers.json"), layers.encode())
            row |= {"file": str(file), "bytes": len(engine.content), "layers": len(engine.layers)}
            yield {**row, "build_seconds": seconds, "smallest_usual_largest_batch": batches}
