"""Serve an exported network as a deployment would: raw image files to class names, without torch.

python benchmarks/serve_check.py --run runs/digits
python benchmarks/serve_check.py --model network.onnx --images photographs/

Everything that is needed comes from the ONNX file: input format, normalisation, resize and class names. Images are
decoded and resized with Pillow and run in ONNX Runtime on the CPU. Where an image lies in a directory named like a
class, the answer is compared with it.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from bsnas.engine.data.index import is_prepared, read_index
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.rundir import RunDir

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""Pillow's mode for a number of channels."""


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    run: Path | None = None
    """Run directory: its newest exported file and its test images."""
    model: Path | None = None
    """ONNX file that engine/export.py wrote, in place of the run's newest."""
    images: tuple[Path, ...] = ()
    """Image files or directories of them, in place of the run's test images."""
    batch: int = 32
    """Images of one call, where the file's batch is dynamic."""
    limit: int = 1000
    """Most images, evenly spaced."""
    threads: int | None = None
    """CPU threads; by default as many as cores that this process may use."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if self.run is None and (self.model is None or not self.images):
            raise UserError("give --run DIR, or both --model FILE and --images")
        if min(self.batch, self.limit, 1 if self.threads is None else self.threads) < 1:
            raise UserError("batch, limit and threads must be at least 1")


def main() -> None:
    arguments = parse(ServeArguments, __doc__, sys.argv[1:])
    figures = serve(arguments)
    if "torch" in sys.modules:
        raise AssertionError("torch was imported: a deployment would need it")
    write_figures(arguments.json, figures)


def serve(arguments: ServeArguments) -> dict[str, Any]:
    """Classify the images, say how fast, and return the figures of --json."""
    model = arguments.model or newest_export(arguments.run or Path())
    server = Server(model, arguments.batch, arguments.threads or len(os.sched_getaffinity(0)))
    files = image_files(arguments.images or images_of_run(arguments.run or Path()))
    rows = np.linspace(0, len(files) - 1, min(arguments.limit, len(files))).astype(int)
    files = [files[row] for row in rows]
    server.answer(files[: server.batch])  # the first call allocates
    started = time.perf_counter()
    names = [name for k in range(0, len(files), server.batch) for name in server.answer(files[k : k + server.batch])]
    seconds = time.perf_counter() - started
    known = [(file.parent.name, name) for file, name in zip(files, names, strict=True)]
    labelled = [pair for pair in known if pair[0] in server.classes]
    right = sum(label == name for label, name in labelled)
    for file, name in list(zip(files, names, strict=True))[:5]:
        print(f"{file} -> {name}")
    speed, network_speed = len(files) / seconds, len(files) / (server.network_seconds or seconds)
    print(
        f"{model.name}: {len(files)} images from file to class name, {speed:,.0f} images/s in batches of "
        f"{server.batch} (network alone {network_speed:,.0f}), torch not imported"
    )
    if labelled:
        print(f"top-1 {right / len(labelled):.4f} on {len(labelled)} images in directories named like a class")
    return {
        "model": str(model),
        "images": len(files),
        "batch": server.batch,
        "images_per_s": speed,
        "network_images_per_s": network_speed,
        "top1": right / len(labelled) if labelled else None,
        "onnxruntime": onnxruntime.__version__,
        "torch_imported": "torch" in sys.modules,
    }


class Server:
    """An exported network that takes image files. Raises `UserError` when ONNX Runtime cannot run the file."""

    def __init__(self, model: Path, batch: int, threads: int) -> None:
        if not model.is_file():
            raise UserError(f"{model} does not exist; export a network with engine/export.py")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds, one per status code
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"ONNX Runtime cannot run {model}: {reason}; export it as fp32, fp16 or int8") from None
        facts = self._session.get_modelmeta().custom_metadata_map
        missing = {"classes", "input", "mean", "std"} - facts.keys()
        if missing:
            raise UserError(f"{model} does not say its {', '.join(sorted(missing))}; export it with engine/export.py")
        shape = self._session.get_inputs()[0].shape
        self.classes: list[str] = json.loads(facts["classes"])
        self._raw = facts["input"] == "uint8"
        self._resolution = int(shape[1] if self._raw else shape[2])
        self._channels = int(shape[3] if self._raw else shape[1])
        self._resize: int | None = json.loads(facts.get("resize", "null"))
        self._mean, self._std = (np.array(json.loads(facts[name]), np.float32) for name in ("mean", "std"))
        self._fixed = isinstance(shape[0], int)
        self.batch = shape[0] if self._fixed else batch
        self.network_seconds = 0.0
        """Time inside ONNX Runtime so far, without the first call."""
        self._called = False

    def answer(self, files: Sequence[Path]) -> list[str]:
        """The class names of at most a batch of image files."""
        pixels = np.stack([self._load(file) for file in files])
        if self._fixed and len(pixels) < self.batch:
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], self.batch - len(pixels), axis=0)])
        inputs: npt.NDArray[np.generic] = pixels
        if not self._raw:
            inputs = np.ascontiguousarray(((pixels / np.float32(255) - self._mean) / self._std).transpose(0, 3, 1, 2))
        started = time.perf_counter()
        (logits,) = self._session.run(None, {"images": inputs})
        if self._called:
            self.network_seconds += time.perf_counter() - started
        self._called = True
        return [self.classes[index] for index in logits[: len(files)].argmax(1)]

    def _load(self, file: Path) -> npt.NDArray[np.uint8]:
        """Decoded and resized as for the run's evaluation: [H, W, channels]."""
        try:
            with Image.open(file) as opened:
                image = opened.convert(MODES[self._channels])
        except OSError as error:
            raise UserError(f"image {file} cannot be decoded: {error}; remove it or give other --images") from None
        size = self._resolution
        if self._resize is None:
            return self._pixels(image.resize((size, size), Image.Resampling.BILINEAR))
        width, height = (side * self._resize // min(image.size) for side in image.size)
        left, top = (round((side - size) / 2) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return self._pixels(image.crop((left, top, left + size, top + size)))

    def _pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        return np.asarray(image).reshape(self._resolution, self._resolution, self._channels)


def newest_export(run_dir: Path) -> Path:
    """The ONNX file that was exported last. Raises `UserError` when there is none."""
    files = sorted(RunDir(run_dir).export.glob("*.onnx"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"{run_dir} holds no exported network; run engine/export.py --run {run_dir}, or give --model")
    return files[-1]


def images_of_run(run_dir: Path) -> list[Path]:
    """The directory of a run's test images, or their files where an index lists them."""
    try:
        data = json.loads(RunDir(run_dir).config_file.read_text())["data"]
        source, cache = data["source"], Path(data["cache_dir"]).expanduser()
        root = Path(data["path"]).expanduser() if source == "folder" else cache / source
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir} does not say where its images are ({error}); give --images") from None
    if not is_prepared(root):
        return [root / "val"]
    files = read_index(root).part("val")
    if files.offsets is not None:
        raise UserError(f"the test images of {root} are packed in shards; give image files with --images")
    return [Path(path) for path in files.paths]


def image_files(places: Sequence[Path]) -> list[Path]:
    """All image files in files and directories, in order. Raises `UserError` when there are none."""
    found: list[Path] = []
    for place in places:
        inside = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES) if place.is_dir() else []
        found += inside or ([place] if place.is_file() else [])
    if not found:
        raise UserError(f"no images in {', '.join(map(str, places))}; give image files or directories with --images")
    return found


if __name__ == "__main__":
    run(main)
