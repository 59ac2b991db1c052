"""AutoAugment, RandAugment, TrivialAugment, random erasing, mixup, CutMix: what they do, and that it is repeatable."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bsnas.engine.data.dataset import DataConfig, open_dataset
from bsnas.engine.data.loading.augment import ERASE_DRAWS, erased
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.data.loading.mixing import Mixing
from bsnas.engine.data.loading.order import sample_uniform
from bsnas.engine.data.loading.policies import policy_plan
from bsnas.engine.data.loading.show import COLUMNS, augmented
from bsnas.engine.presets import at_channels, preset
from bsnas.engine.training.metrics import Meter
from tests import ROOT
from tests.engine.data.cases import folder_config, write_image_folder

AUGMENTED = {
    "auto": {"policy": "auto"},
    "rand": {"policy": "rand", "rand_operations": 3},
    "trivial": {"policy": "trivial"},
    "erase": {"erase": 0.7},
    "mixup": {"mixup": 0.4},
    "cutmix": {"cutmix": 1.0},
    "everything": {"policy": "trivial", "erase": 0.5, "mixup": 0.2, "cutmix": 1.0},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return write_image_folder(root / "images"), root / "cache"


def loader_over(place, changes, *, rank=0, world_size=1, batch_size=9, **settings):
    config = folder_config(*place, **(changes | settings))
    return TrainLoader(
        open_dataset(config).train, config, batch_size=batch_size, seed=5, rank=rank, world_size=world_size
    )


def batches(loader, epoch=0, start=0):
    return [(images.clone(), labels.clone()) for images, labels in loader.epoch(epoch, start)]


def assert_equal(first, second):
    assert len(first) == len(second)
    for (images, labels), (others, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("changes", AUGMENTED.values(), ids=AUGMENTED.keys())
def test_same_pixels_for_any_threads_and_when_continued_inside_an_epoch(place, changes):
    uninterrupted = loader_over(place, changes)
    batches(uninterrupted, 0)
    expected = batches(uninterrupted, 1)
    assert_equal(batches(loader_over(place, changes, threads=3, prefetch=4), 1, 1), expected[1:])


@pytest.mark.parametrize("changes", AUGMENTED.values(), ids=AUGMENTED.keys())
def test_images_change_and_differ_between_epochs(place, changes):
    plain, first, second = (
        {image.numpy().tobytes() for images, _ in batches(loader, epoch) for image in images}
        for loader, epoch in (
            (loader_over(place, {}), 0),
            (loader_over(place, changes), 0),
            (loader_over(place, changes), 1),
        )
    )
    assert len(first - plain) > 9
    assert len(first & second) <= 1


@pytest.mark.parametrize("name", ["auto", "rand", "trivial", "erase"])
def test_ranks_together_see_the_pixels_of_one_process(place, name):
    alone = batches(loader_over(place, AUGMENTED[name]))
    parts = [batches(loader_over(place, AUGMENTED[name], rank=rank, world_size=3, batch_size=3)) for rank in range(3)]
    together = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert_equal(alone, together)


@pytest.mark.parametrize("name", ["auto", "rand", "trivial"])
def test_every_operation_is_chosen_and_none_out_of_range(name):
    plan = policy_plan(DataConfig(policy=name))
    choices = plan.choose(sample_uniform(0, 0, np.arange(4000), plan.draws))
    for stage, operations in enumerate(plan.stages):
        counts = np.bincount(choices.operation[:, stage], minlength=len(operations))
        assert len(counts) == len(operations)
        assert counts.min() > 0
        if name != "auto":
            assert abs(counts / 4000 - 1 / len(operations)).max() < 0.02
    assert 0 <= choices.bin.min() <= choices.bin.max() < plan.bins
    assert 0.45 < choices.sign.mean() < 0.55
    if name == "rand":
        assert (choices.bin == 9).all()
    if name == "trivial":
        assert len(np.unique(choices.bin)) == 31


def test_auto_augment_follows_its_table():
    """How often each pair of operations comes, against the probabilities of the published policy."""
    plan = policy_plan(DataConfig(policy="auto"))
    draws = 40_000
    choices = plan.choose(sample_uniform(0, 0, np.arange(draws), plan.draws))
    expected: dict[str, float] = {}
    for sub_policy in plan.table.sub_policies:
        for augmentation, probability, _ in sub_policy:
            expected[augmentation.name] = expected.get(augmentation.name, 0) + probability / 25
    seen: dict[str, float] = {}
    for stage, operations in enumerate(plan.stages):
        for place, operation in enumerate(operations):
            share = float((choices.operation[:, stage] == place).mean())
            seen[operation.name] = seen.get(operation.name, 0) + share
    for name, share in expected.items():
        assert abs(seen[name] - share) < 0.015, name


def test_a_known_operation_does_what_it_says():
    """Operations of TrivialAugment at full strength, against what their names mean."""
    plan = policy_plan(DataConfig(policy="trivial", resolution=24))
    names = [operation.name for operation in plan.stages[0]]
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    assert np.array_equal(_apply(plan, image, names.index("identity")), image)
    dull = 60 + image // 2
    low, high = (extreme(dull.reshape(-1, 3).astype(float), axis=0) for extreme in (np.min, np.max))
    stretched = _apply(plan, dull, names.index("auto_contrast"))
    assert np.abs(stretched - (dull - low) / (high - low) * 255).max() <= 1
    solarized = _apply(plan, image, names.index("solarize"))
    assert np.array_equal(solarized, 255 - image)  # the strongest threshold is 0
    posterized = _apply(plan, image, names.index("posterize"))
    assert np.array_equal(posterized, image & 0b11000000)


def _apply(plan, image, operation):
    from nvidia.dali.pipeline import pipeline_def

    from bsnas.engine.data.loading.decode import fn

    def source():
        return [image], *([np.array([value], np.int32)] for value in (operation, 30, 0))

    @pipeline_def(enable_conditionals=True)
    def graph():
        given, *choices = fn.external_source(source, num_outputs=4, batch=True, layout=["HWC", "", "", ""])
        return plan.apply(given, *choices)

    pipeline = graph(batch_size=1, num_threads=1, device_id=None)
    pipeline.build()
    return np.array(pipeline.run()[0].at(0))


def test_erased_rectangles():
    start, shape = erased(100, sample_uniform(0, 0, np.arange(5000), ERASE_DRAWS), 0.25)
    some = shape.prod(1) > 0
    assert 0.22 < some.mean() < 0.28
    assert (start >= 0).all()
    assert (start + shape <= 100).all()
    area = shape[some].prod(1) / 100**2
    assert area.min() >= 0.019
    assert area.max() <= 0.34
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.02
    ratio = np.log(shape[some, 0] / shape[some, 1])
    assert abs(ratio.mean() - np.log([0.3, 3.3]).mean()) < 0.06


def test_what_is_erased_is_the_mean(place):
    changes = {"augment": "none", "flip": False, "mean": (0.2, 0.5, 0.7)}
    plain, erased_ones = batches(loader_over(place, changes)), batches(loader_over(place, changes | {"erase": 1.0}))
    for (images, _), (others, _) in zip(plain, erased_ones, strict=True):
        differs = (images != others).any(1)
        assert differs.flatten(1).any(1).float().mean() > 0.8
        assert (others.permute(0, 2, 3, 1)[differs] == 0).all()


def test_mixup_is_a_convex_combination_with_the_reversed_batch():
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 2, 1, 0])
    mixed, targets = Mixing(DataConfig(mixup=1.0), 0, classes=4).mix(images, labels, 3, 7)
    share = float(targets[1, 1] if labels[1] != labels[4] else (mixed[1] - images[4]).flatten()[0])
    share = float(((mixed[0] - images[5]) / (images[0] - images[5])).mean())
    assert 0 < share < 1
    assert torch.allclose(mixed, share * images + (1 - share) * images.flip(0), atol=1e-5)
    expected = torch.nn.functional.one_hot(labels, 4).float()
    assert torch.allclose(targets, share * expected + (1 - share) * expected.flip(0), atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(6))


def test_cutmix_labels_are_the_areas():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4)
    mixing = Mixing(DataConfig(cutmix=1.0), 0, classes=4)
    shares = set()
    for step in range(20):
        mixed, targets = mixing.mix(images, labels, 0, step)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        for row in range(4):
            for label in range(4):
                assert float((mixed[row, 0] == label).float().mean()) == pytest.approx(
                    float(targets[row, label]), abs=1e-5
                )
        shares.add(float(targets[0, 0]))
    assert len(shares) > 10
    assert torch.equal(images[2], torch.full((3, 16, 16), 2.0))  # the batch itself is left alone


def test_both_take_turns_and_steps_differ():
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    mixing = Mixing(DataConfig(mixup=0.5, cutmix=0.5), 0, classes=4)
    kinds = []
    for step in range(40):
        mixed, _ = mixing.mix(images, labels, 1, step)
        kept = ((mixed == images) | (mixed == images.flip(0))).all()
        kinds.append(bool(kept))
    assert 8 < sum(kinds) < 32
    assert not torch.equal(mixing.mix(images, labels, 0, 1)[0], mixing.mix(images, labels, 0, 2)[0])


def test_top1_of_mixed_labels_counts_the_likelier_class():
    meter = Meter(torch.device("cpu"))
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    meter.add(torch.tensor(1.0), logits, torch.tensor([[0.7, 0.3], [0.4, 0.6]]))
    assert meter.read(0.0)["top1"] == 0.5


def test_a_step_of_training_takes_mixed_labels(place):
    images, labels = batches(loader_over(place, {"mixup": 1.0}))[0]
    logits = torch.zeros(len(images), 3, requires_grad=True)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(np.log(3), abs=1e-5)
    expected = (1 / 3 - (0.9 * labels + 0.1 / 3)) / len(images)
    assert torch.allclose(logits.grad, expected, atol=1e-6)


# ---- channels


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(tmp_path, channels):
    rng = np.random.default_rng(0)
    mode = {1: "L", 4: "RGBA"}[channels]
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(4):
                pixels = rng.integers(0, 256, (24, 24, channels), dtype=np.uint8)
                image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)
                image.save(tmp_path / "images" / part / name / f"{index}.png")
    config = folder_config(
        tmp_path / "images", tmp_path / "cache", channels=channels, mean=(0.5,), std=(0.5,), augment="none", flip=False
    )
    dataset = open_dataset(config)
    loader = TrainLoader(dataset.everything, config, batch_size=8, seed=0)
    ((images, _),) = loader.epoch(0)
    assert images.shape == (8, channels, 24, 24)
    for image, index in zip(images, loader.order_of(0), strict=True):
        expected = np.asarray(Image.open(dataset.everything.path(index))).reshape(24, 24, channels)
        pixels = ((image * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels, expected)


def test_gray_images_of_colour_files(place):
    config = folder_config(*place, channels=1, mean=(0.5,), std=(0.5,))
    ((images, _), *_) = batches(TrainLoader(open_dataset(config).train, config, batch_size=9, seed=0))
    assert images.shape == (9, 1, 24, 24)


# ---- the picture


def test_the_picture_shows_each_image_beside_its_augmentations(place):
    config = folder_config(*place, augment="pad-crop", pad=0, flip=False)
    files = open_dataset(config).train
    pixels = augmented(files, config, seed=0).reshape(-1, COLUMNS, 24, 24, 3)
    for row in pixels:  # nothing random is left, so all columns are the first
        assert np.abs(row.astype(int) - row[0]).max() <= 1
    changed = augmented(files, folder_config(*place, policy="trivial"), seed=0).reshape(-1, COLUMNS, 24, 24, 3)
    assert all(np.abs(row.astype(int) - row[0]).max() > 20 for row in changed)


@pytest.mark.slow
def test_the_script_shows(place, tmp_path):
    options = [
        "--preset",
        "digits",
        "--data.source",
        "folder",
        "--data.path",
        str(place[0]),
        "--data.val-per-class",
        "2",
    ]
    options += ["--data.cache-dir", str(place[1]), "--data.resolution", "48", "--data.policy", "rand"]
    command = [sys.executable, str(ROOT / "engine/train.py"), *options, "--show", str(tmp_path / "show.png")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert Image.open(tmp_path / "show.png").size == (8 * 96, 8 * 96)
    assert not (tmp_path / "runs").exists()


def test_channels_reach_the_space():
    gray = at_channels(preset("imagenet"), 1)
    assert gray.space.input_channels == gray.data.channels == 1
    assert gray.data.mean == (0.449,)
    assert at_channels(preset("digits"), 3) == preset("digits")
