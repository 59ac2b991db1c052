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
from collections import Counter
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

from bsnas.engine.data.checking.quarantine import describe_left_out
from bsnas.engine.data.file_list import HIDDEN, IMAGE_SUFFIXES, is_hidden, rule_of
from bsnas.engine.data.index import is_prepared, read_index
from bsnas.engine.data.pillow_image import upright
from bsnas.engine.host.errors import UserError, first_line
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.rundir import RunDir


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
    answers: dict[Path, str] = {}
    for k in range(0, len(files), server.batch):
        batch = files[k : k + server.batch]
        names = zip(batch, server.answer(batch), strict=True)
        answers |= {file: name for file, name in names if name is not None}
    seconds = time.perf_counter() - started
    if server.set_aside:
        first = next(iter(server.set_aside.values()))
        print(f"{len(server.set_aside)} of {len(files)} images are set aside, the first: {first}")
    if not answers:
        raise UserError(f"none of {len(files)} images can be decoded, the first is {files[0]}; give other --images")
    labelled = [(file.parent.name, name) for file, name in answers.items() if file.parent.name in server.classes]
    right = sum(label == name for label, name in labelled)
    for file, name in list(answers.items())[:5]:
        print(f"{file} -> {name}")
    speed, network_speed = len(answers) / seconds, len(answers) / (server.network_seconds or seconds)
    print(
        f"{model.name}: {len(answers)} images from file to class name, {speed:,.0f} images/s in batches of "
        f"{server.batch} (network alone {network_speed:,.0f}), torch not imported"
    )
    if labelled:
        print(f"top-1 {right / len(labelled):.4f} on {len(labelled)} images in directories named like a class")
    return {
        "model": str(model),
        "images": len(answers),
        "set_aside": len(server.set_aside),
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
            raise UserError(
                f"ONNX Runtime cannot run {model}: {first_line(error)}; export it as fp32, fp16 or int8"
            ) from None
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
        self.set_aside: dict[str, str] = {}
        """Images that do not decode, each with the reason."""

    def answer(self, files: Sequence[Path]) -> list[str | None]:
        """The class names of at most a batch of image files; None for those that do not decode, see `set_aside`."""
        decoded: dict[Path, npt.NDArray[np.uint8]] = {}
        for file in files:
            try:
                decoded[file] = self._load(file)
            except UserError as error:
                self.set_aside[str(file)] = str(error)
        if not decoded:
            return [None] * len(files)
        pixels = np.stack(list(decoded.values()))
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
        classes = dict(zip(decoded, logits[: len(decoded)].argmax(1).tolist(), strict=True))
        return [self.classes[classes[file]] if file in classes else None for file in files]

    def _load(self, file: Path) -> npt.NDArray[np.uint8]:
        """Decoded and resized as for the run's evaluation: [H, W, channels]. Raises UserError."""
        try:
            return served_pixels(file, self._resolution, self._resize, self._channels)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers of damaged images raise all kinds
            raise UserError(
                f"image {file} cannot be decoded: {first_line(error)}; remove it or give other --images"
            ) from None


def served_pixels(file: Path, resolution: int, resize: int | None, channels: int) -> npt.NDArray[np.uint8]:
    """An image decoded and resized as for a run's evaluation: [H, W, channels]. Raises what Pillow does."""
    with Image.open(file) as opened:
        image = upright(opened, channels)
    if resize is None:
        image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
    else:
        width, height = (side * resize // min(image.size) for side in image.size)
        left, top = (round((side - resolution) / 2) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + resolution, top + resolution))
    return np.asarray(image).reshape(resolution, resolution, channels)


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
    left_out: Counter[str] = Counter()
    for place in places:
        if place.is_file():
            found.append(place)
        for file in sorted(file for file in place.rglob("*") if file.is_file()):
            if is_hidden(str(file.relative_to(place))):
                left_out[HIDDEN] += 1
            elif file.suffix.lower() in IMAGE_SUFFIXES:
                found.append(file)
            else:
                left_out[rule_of(file.suffix.lower())] += 1
    if left_out:
        print(describe_left_out(left_out, ", ".join(map(str, places))))
    if not found:
        raise UserError(f"no images in {', '.join(map(str, places))}; give image files or directories with --images")
    return found


if __name__ == "__main__":
    run(main)
