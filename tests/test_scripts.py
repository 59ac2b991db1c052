"""The scripts as a user runs them: the imagenet preset end to end on generated JPEGs, and every mistake in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bsnas.engine.runs.rundir import RunDir
from tests import script


def write_photographs(root: Path) -> Path:
    """Two classes of smooth noise at 256x224: 8 training and 2 test images each."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("fish", "goat")):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                coarse = rng.integers(0, 128, (6, 7, 3)) + 100 * label
                image = Image.fromarray(coarse.astype(np.uint8)).resize((256, 224), Image.Resampling.BICUBIC)
                image.save(root / part / name / f"{index}.jpg", quality=90)
    return root


def test_the_imagenet_preset_trains_shrinks_and_searches(tmp_path: Path) -> None:
    data = write_photographs(tmp_path / "photographs")
    run = tmp_path / "run"
    settings = ["--preset", "imagenet", "--data.path", str(data), "--data.cache-dir", str(tmp_path / "cache")]
    settings += ["--data.val-per-class", "2", "--optimizer.batch-size", "4", "--optimizer.warmup-epochs", "0"]
    settings += ["--shrink.first-epochs", "1", "--shrink.interval-epochs", "1", "--shrink.keep", "3"]
    settings += ["--shrink.models-per-operation", "1"]
    trained = script("engine/train.py", *settings, "--run", str(run), "--json", "train.json", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    figures = json.loads((tmp_path / "train.json").read_text())
    assert figures["architectures"][0] == str(3**6 * 6**19)
    assert int(figures["architectures"][1]) < 3**6 * 3**19
    assert figures["passes"] == 18 + RunDir(run).spaces()[1].max_live
    found = script(
        "search/evolve.py", "--run", str(run), "--max-macs", "773.5M", "--population", "6", "--iterations", "1",
        "--json", "evolve.json", cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert json.loads((tmp_path / "evolve.json").read_text())["best"]["macs"] <= 773_500_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "mnist"], "preset 'mnist' is unknown; allowed are digits, fashion-mnist, cifar10, imagenet"),
        (["--preset", "imagenet", "--data.path", "missing"], "missing"),
        (["--optimizer.batch-size", "0"], "batch size 0"),
        (["--shrink.keep", "3", "5"], "keep (3, 5): give falling numbers"),
        (["--optimizer.warmup-epochs", "900"], "warmup of 900"),
        (["--deepspeed-config", "none.json"], "DeepSpeed configuration none.json cannot be read"),
        (["--run", "nothing", "--resume"], "holds no run"),
        (["--kernels", "cuda"], "backend 'cuda' is unknown; allowed are reference, triton, onednn"),
    ],
)
def test_a_mistake_ends_train_with_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = script("engine/train.py", *arguments, cwd=tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_written_over_and_not_shared(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    result = script("engine/train.py", "--run", "mine", cwd=tmp_path)
    assert result.returncode == 2
    assert "is not empty (thesis.txt, ...) and holds no run" in result.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "keep me"
