"""A teacher from a file, whose predictions a training learns beside the labels (Hinton et al., arXiv 1503.02531).

TorchScript (.pt, .pth, .ts), torch.export (.pt2) or ONNX (.onnx): any network that takes images [N, C, H, W], float32,
normalised as the training's own are, and gives logits [N, classes].
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from bsnas.engine.config import RunConfig
from bsnas.engine.host.errors import UserError, first_line

Forward = Callable[[Tensor], Tensor]
TORCHSCRIPT, EXPORTED, ONNX = (".pt", ".pth", ".ts"), ".pt2", ".onnx"


class Teacher:
    """The network of a file, on a device.

    Raises `UserError` when the file cannot be read, or does not give `classes` logits for images of `shape` [C, H, W].
    """

    def __init__(self, file: Path, shape: tuple[int, int, int], classes: int, device: torch.device) -> None:
        self._forward = _opened(file, device)
        self._images: Tensor | None = None
        self._logits: Tensor | None = None
        try:
            given = self(torch.zeros((2, *shape), device=device))
        except Exception as error:  # whatever a network of somebody else's raises
            raise UserError(
                f"the teacher {file} does not take images [2, {', '.join(map(str, shape))}], float32 "
                f"({first_line(error)}); give one for this resolution, and for any number of images"
            ) from None
        if not isinstance(given, Tensor) or tuple(given.shape) != (2, classes):
            found = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise UserError(f"the teacher {file} gives {found} for two images; it must give logits [2, {classes}]")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits [N, classes], float32. Asked again for the same batch, as by the paths of a round, it remembers."""
        if self._logits is None or images is not self._images:
            logits = self._forward(images.float())
            self._images, self._logits = images, logits.float() if isinstance(logits, Tensor) else logits
        return self._logits


def teacher_of(config: RunConfig, device: torch.device) -> Teacher | None:
    """The teacher of a run, if it has one. Raises `UserError` also when the file has changed since the run began."""
    if config.teacher is None:
        return None
    file = Path(config.teacher)
    if config.teacher_sha256 is not None and digest(file) != config.teacher_sha256:
        raise UserError(
            f"the teacher {file} has changed since the run began; restore it, or start anew in another --run"
        )
    data = config.data
    return Teacher(file, (data.channels, data.resolution, data.resolution), config.space.classes, device)


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises `UserError` when it cannot be read."""
    try:
        with open(file, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"the teacher {file} cannot be read: {error.strerror}; give another --teacher")


def _opened(file: Path, device: torch.device) -> Forward:
    if file.suffix not in (*TORCHSCRIPT, EXPORTED, ONNX):
        raise UserError(
            f"the teacher {file} is of unknown kind {file.suffix!r}; allowed are TorchScript "
            f"({', '.join(TORCHSCRIPT)}), torch.export ({EXPORTED}) and ONNX ({ONNX})"
        )
    try:
        open(file, "rb").close()
    except OSError as error:  # which the libraries below tell in words of their own
        raise _unreadable(file, error) from None
    try:
        if file.suffix == ONNX:
            return _onnx(file, device)
        if file.suffix == EXPORTED:
            return _exported(file, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated in favour of torch.export, and still common
            return torch.jit.load(str(file), map_location=device).eval()
    except Exception as error:  # each library has kinds of its own
        raise UserError(
            f"the teacher {file} holds no network of the kind that its name says ({first_line(error)}); save one with "
            "torch.export.save, torch.jit.save or torch.onnx.export"
        ) from None


def _exported(file: Path, device: torch.device) -> Forward:
    program = torch.export.load(file)
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    return program.module()


def _onnx(file: Path, device: torch.device) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised too
    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    name = session.get_inputs()[0].name

    def forward(images: Tensor) -> Tensor:
        (logits, *_) = session.run(None, {name: images.contiguous().cpu().numpy()})
        return torch.from_numpy(logits).to(device)

    return forward
