"""Teachers of every kind of file, what a training learns from one, and the files that are none."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.retrain import RetrainArguments, retrain
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.train import TrainArguments
from bsnas.engine.train import _open_run as open_run
from bsnas.engine.training.distillation import kl_divergence
from bsnas.engine.training.teacher import Teacher, digest, teacher_of
from tests.engine.training.cases import make_trainer, tiny_config

CPU = torch.device("cpu")
SHAPE = (3, 16, 16)


class Small(nn.Module):
    """Sees a change of any pixel."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def saved(directory: Path, suffix: str, network: nn.Module | None = None) -> Path:
    torch.manual_seed(0)
    network = network or Small()
    file, example = directory / f"teacher{suffix}", torch.zeros(2, *SHAPE)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if suffix == ".pt2":
            torch.export.save(torch.export.export(network, (example,), dynamic_shapes=dynamic), file)
        elif suffix == ".onnx":
            torch.onnx.export(network, (example,), file, dynamo=True, dynamic_shapes=dynamic, verbose=False)
        else:
            torch.jit.save(torch.jit.script(network), str(file))
    return file


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".onnx"])
def test_a_teacher_of_any_kind_says_what_its_network_says(tmp_path, suffix):
    teacher = Teacher(saved(tmp_path, suffix), SHAPE, 10, CPU)
    torch.manual_seed(0)
    network, images = Small(), torch.randn(7, *SHAPE).contiguous(memory_format=torch.channels_last)
    logits = teacher(images)
    assert torch.allclose(logits, network(images), atol=1e-5)
    assert not logits.requires_grad
    assert teacher(images) is logits
    assert not torch.equal(teacher(images.flip(0)), logits)


def test_the_loss_is_shared_between_labels_and_teacher(alone: Process, tmp_path: Path, cache: Path) -> None:
    config = replace(tiny_config(cache), teacher=str(saved(tmp_path, ".pt")), teacher_weight=0.25)
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone)
    assert trainer.teacher is not None
    images, labels = next(trainer.batches())
    logits = torch.randn(len(images), 10)
    wanted = 0.75 * functional.cross_entropy(logits, labels) + 0.25 * kl_divergence(logits, trainer.teacher(images))
    assert torch.allclose(trainer.loss(images, logits, labels), wanted)
    trainer.train_epoch()
    assert trainer.progress.passes > 0


def test_a_retraining_has_the_runs_teacher_or_its_own(alone: Process, tmp_path: Path, cache: Path) -> None:
    own, other = saved(tmp_path, ".pt"), saved(tmp_path, ".pt2")
    config = replace(tiny_config(cache), teacher=str(own), teacher_sha256=digest(own))
    run = RunDir.create(tmp_path / "run", config)
    trainer = make_trainer(run, config, alone)
    trainer.train_epoch()
    trainer.writer.wait()
    arch = str(trainer.paths()[0][0])
    figures = retrain(run, RetrainArguments(run=run.path, arch=arch, epochs=1), alone, {})
    assert figures["teacher"] == digest(own)
    with pytest.raises(UserError, match="holds the training of"):
        retrain(run, RetrainArguments(run=run.path, arch=arch, epochs=1, teacher=other), alone, {})


def test_a_teacher_that_changed_is_told(tmp_path, cache):
    file = saved(tmp_path, ".pt")
    config = replace(tiny_config(cache), teacher=str(file), teacher_sha256=digest(file))
    assert teacher_of(config, CPU) is not None
    assert teacher_of(replace(config, teacher=None), CPU) is None
    saved(tmp_path, ".pt", Small(11))
    with pytest.raises(UserError, match="has changed since the run began; restore it, or start anew in another --run"):
        teacher_of(config, CPU)


def test_files_that_are_no_teacher(tmp_path):
    with pytest.raises(
        UserError, match=r"teacher.safetensors is of unknown kind '.safetensors'; allowed are TorchScript"
    ):
        Teacher(tmp_path / "teacher.safetensors", SHAPE, 10, CPU)
    for suffix in (".pt", ".pt2", ".onnx"):
        file = tmp_path / f"none{suffix}"
        with pytest.raises(UserError, match="cannot be read: No such file or directory; give another --teacher"):
            Teacher(file, SHAPE, 10, CPU)
        file.write_bytes(b"no network" * 100)
        with pytest.raises(UserError, match=r"holds no network of the kind that its name says \(.*\); save one with"):
            Teacher(file, SHAPE, 10, CPU)
    weights = tmp_path / "weights.pt"
    torch.save(Small().state_dict(), weights)
    with pytest.raises(UserError, match="holds no network of the kind that its name says"):
        Teacher(weights, SHAPE, 10, CPU)


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_a_teacher_of_other_images_or_classes(tmp_path, suffix):
    file = saved(tmp_path, suffix)
    with pytest.raises(UserError, match=r"gives \[2, 10\] for two images; it must give logits \[2, 4\]"):
        Teacher(file, SHAPE, 4, CPU)
    with pytest.raises(
        UserError, match=r"does not take images \[2, 3, 20, 20\], float32 \(.*\); give one for this res"
    ):
        Teacher(file, (3, 20, 20), 10, CPU)


def test_a_weight_is_a_share(cache):
    for weight in (0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"teacher weight .*; it must be above 0 and at most 1, as 0.5"):
            replace(tiny_config(cache), teacher_weight=weight)


def test_a_teacher_that_does_not_fit_leaves_no_run_behind(tmp_path, cache):
    config = tiny_config(cache)
    for suffix, network, message in ((".pt", Small(11), r"gives \[2, 11\] for two images"), (".pt2", None, None)):
        file = saved(tmp_path, suffix, network)
        arguments = TrainArguments(config=replace(config, teacher=str(file)), run=tmp_path / "run")
        if message:
            with pytest.raises(UserError, match=message):
                open_run(tmp_path / "run", arguments)
            assert not (tmp_path / "run").exists()
        else:
            _, opened = open_run(tmp_path / "run", arguments)
            assert (opened.teacher, opened.teacher_sha256) == (str(file), digest(file))
