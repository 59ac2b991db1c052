"""Training batches: which images, in which order, which pixels, and where a run can begin."""

import ctypes
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("nvidia.dali")

import nvidia.dali.plugin.pytorch.torch_utils
from nvidia.dali.pipeline import Pipeline

from bsnas.engine.data.dataset import DataConfig, open_dataset
from bsnas.engine.data.loading.augment import Augmentation
from bsnas.engine.data.loading.decode import fn, types
from bsnas.engine.data.loading.decode_ahead import threads_per_pipeline
from bsnas.engine.data.loading.evaluation_set import evaluation_set
from bsnas.engine.data.loading.loader import TrainLoader, as_torch
from bsnas.engine.data.loading.order import EpochOrder, sample_uniform
from bsnas.engine.data.loading.train_pipeline import train_pipeline
from bsnas.engine.host.errors import UserError
from bsnas.kernels.graphs import capture
from tests.engine.data.cases import folder_config, write_image_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write_image_folder(root / "images"), root / "cache"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    config = DataConfig(cache_dir=str(tmp_path_factory.mktemp("digits")), threads=1)
    return open_dataset(config), config


def loader_over(place, config=None, **settings):
    config = config or folder_config(*place)
    settings = {"batch_size": 4, "seed": 7} | settings
    return TrainLoader(open_dataset(config).train, config, **settings)


def batches(loader, epoch=0, start=0):
    return [(images.clone(), labels.clone()) for images, labels in loader.epoch(epoch, start)]


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for (images_a, labels_a), (images_b, labels_b) in zip(first, second, strict=True):
        assert torch.equal(images_a, images_b)
        assert torch.equal(labels_a, labels_b)


# Order: pure arithmetic


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("drop_last", [True, False])
def test_every_sample_once_per_epoch(world_size, drop_last):
    samples, global_batch = 101, 12
    seen = []
    for rank in range(world_size):
        order = EpochOrder(
            samples, global_batch=global_batch, seed=3, rank=rank, world_size=world_size, drop_last=drop_last
        )
        for step in range(order.steps):
            part = order.rank_batch(2, step)
            assert 1 <= len(part) <= global_batch // world_size
            seen.extend(part.tolist())
    assert len(seen) == len(set(seen)) == (96 if drop_last else samples)


@pytest.mark.parametrize("drop_last", [True, False])
def test_union_of_ranks_is_the_same_batch_for_every_number_of_ranks(drop_last):
    def union(world_size, epoch, step):
        parts = [
            EpochOrder(101, global_batch=12, seed=3, rank=rank, world_size=world_size, drop_last=drop_last)
            for rank in range(world_size)
        ]
        return np.concatenate([order.rank_batch(epoch, step) for order in parts]).tolist()

    for epoch in (0, 5):
        for step in range(8):
            assert len({tuple(union(world_size, epoch, step)) for world_size in (1, 2, 3, 4)}) == 1
    assert union(1, 0, 0) != union(1, 1, 0)


def test_order_depends_on_the_seed_and_the_epoch_only():
    def epoch(seed, number):
        order = EpochOrder(50, global_batch=10, seed=seed, rank=0, world_size=1, drop_last=True)
        order.rank_batch(number + 1, 0)  # what was asked before must not matter
        return np.concatenate([order.rank_batch(number, step) for step in range(5)]).tolist()

    assert epoch(1, 0) == epoch(1, 0)
    assert len({tuple(epoch(seed, number)) for seed in (1, 2) for number in (0, 1)}) == 4


def test_sample_random_numbers_are_uniform_and_independent_of_the_batch():
    everything = sample_uniform(5, 2, np.arange(20000), 4)
    assert np.array_equal(sample_uniform(5, 2, np.array([17, 3]), 4), everything[[17, 3]])
    assert np.array_equal(sample_uniform(5, 2, np.arange(9), 2), everything[:9, :2])
    assert everything.min() >= 0
    assert everything.max() < 1
    for column in everything.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square with 19 degrees of freedom, p = 0.001
    others = [sample_uniform(6, 2, np.arange(20000), 4), sample_uniform(5, 3, np.arange(20000), 4)]
    columns = np.concatenate([everything, *others], 1)
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 0.03  # four standard deviations of independent columns


# Batches through DALI


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_digits_pass_exactly_once_whatever_the_number_of_ranks(digits, world_size):
    """Images of one epoch, gathered over ranks, are the whole training set; each with its own label."""
    dataset, config = digits
    exact = DataConfig(cache_dir=config.cache_dir, threads=1, augment="none")
    reference = evaluation_set(dataset.train, exact)
    expected = {image.tobytes(): label for image, label in zip(reference.images, reference.labels, strict=True)}
    seen = []
    for rank in range(world_size):
        loader = TrainLoader(
            dataset.train,
            exact,
            batch_size=240 // world_size,
            seed=1,
            rank=rank,
            world_size=world_size,
            drop_last=False,
        )
        for images, labels in loader.epoch(0):
            pixels = ((images * 0.25 + 0.5) * 255).round().byte().permute(0, 2, 3, 1).numpy()
            for image, label in zip(pixels, labels.tolist(), strict=True):
                assert expected[image.tobytes()] == label
                seen.append(image.tobytes())
    originals = sorted(image.tobytes() for image in reference.images)
    assert sorted(seen) == originals


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_the_pixels_of_one_process(place, world_size):
    alone = batches(loader_over(place, batch_size=12), epoch=1)
    parts = [
        batches(loader_over(place, batch_size=12 // world_size, rank=rank, world_size=world_size), epoch=1)
        for rank in range(world_size)
    ]
    together = [
        (torch.cat([images for images, _ in step]), torch.cat([labels for _, labels in step]))
        for step in zip(*parts, strict=True)
    ]
    assert_equal(alone, together)


@pytest.mark.parametrize("augment", ["resized-crop", "pad-crop", "none"])
def test_one_seed_gives_the_same_pixels_for_any_threads_and_prefetch(place, augment):
    first = batches(loader_over(place, folder_config(*place, augment=augment, threads=1)))
    for threads, prefetch in ((2, 1), (2, 2), (3, 4)):  # the last two with two pipelines
        config = folder_config(*place, augment=augment, threads=threads, prefetch=prefetch)
        assert_equal(first, batches(loader_over(place, config)))


def test_threads_are_halved_between_two_pipelines_on_a_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [threads_per_pipeline(DataConfig(threads=n), cpu) for n in (1, 2, 5)] == [[1], [1, 1], [3, 2]]
    assert threads_per_pipeline(DataConfig(threads=5), gpu) == [5]
    assert threads_per_pipeline(DataConfig(threads=5, prefetch=1), cpu) == [5], "one would wait for the other"


def test_nothing_that_was_decoded_ahead_is_lost_between_epochs(place, monkeypatch):
    asked = []
    batch = TrainLoader._batch
    monkeypatch.setattr(
        TrainLoader, "_batch", lambda self, position: (asked.append(position), batch(self, position))[1]
    )
    loader = loader_over(place, batch_size=9)
    assert loader.steps_per_epoch % 2, "so that epochs begin with either pipeline"
    for epoch in range(3):
        batches(loader, epoch)
    assert len(asked) == len(set(asked)) <= 3 * loader.steps_per_epoch + 4


@pytest.mark.parametrize(("epoch", "start"), [(0, 3), (1, 0), (1, 5), (4, 2)])
def test_starting_at_a_step_gives_what_an_uninterrupted_run_sees(place, epoch, start):
    uninterrupted = loader_over(place)
    for before in range(epoch):
        batches(uninterrupted, before)
    assert_equal(batches(uninterrupted, epoch)[start:], batches(loader_over(place), epoch, start))


def test_jumping_back_and_forth_within_one_loader(place):
    loader = loader_over(place)
    expected = {epoch: batches(loader_over(place), epoch) for epoch in (0, 1, 2)}
    iterator = loader.epoch(1)
    for _ in range(2):
        next(iterator)
    for epoch, start in ((1, 1), (0, 4), (2, 5), (0, 0)):
        assert_equal(batches(loader, epoch, start), expected[epoch][start:])


def test_augmentation_differs_between_epochs_and_seeds(place):
    def by_content(seed, epoch):
        return {images.numpy().tobytes() for images, _ in batches(loader_over(place, batch_size=1, seed=seed), epoch)}

    assert not by_content(7, 0) & by_content(7, 1)
    assert not by_content(7, 0) & by_content(8, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layout_type_and_normalisation(place, dtype):
    config = folder_config(*place, augment="none", mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    loader = loader_over(place, config, batch_size=27, dtype=dtype)
    images, labels = next(loader.epoch(0))
    assert images.shape == (27, 3, 24, 24)
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    order = EpochOrder(27, global_batch=27, seed=7, rank=0, world_size=1, drop_last=True).rank_batch(0, 0)
    expected = evaluation_set(open_dataset(config).train, config).normalized("cpu", dtype)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    unflipped = (images.float() - expected[order].float()).abs().amax((1, 2, 3))
    flipped = (images.float().flip(3) - expected[order].float()).abs().amax((1, 2, 3))
    assert torch.minimum(unflipped, flipped).max() <= tolerance
    assert 0 < (flipped < unflipped).sum() < 27


def test_pad_crop_shifts_the_image_into_black_borders(place):
    config = folder_config(*place, augment="pad-crop", pad=4, flip=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    whole = evaluation_set(open_dataset(config).train, config)
    padded = np.pad(whole.images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    loader = loader_over(place, config, batch_size=27)
    order = EpochOrder(27, global_batch=27, seed=7, rank=0, world_size=1, drop_last=True)
    shifts = set()
    for epoch in range(6):
        images, _ = next(loader.epoch(epoch))
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for image, index in zip(pixels, order.rank_batch(epoch, 0), strict=True):
            windows = [(y, x) for y in range(9) for x in range(9)]
            found = [(y, x) for y, x in windows if np.array_equal(padded[index, y : y + 24, x : x + 24], image)]
            assert found
            shifts.update(found)
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(9))


@pytest.mark.parametrize("channels", [1, 3])
def test_without_antialiasing_only_shrunk_crops_differ(place, channels):
    """Images of at most 97 pixels: enlarged to 128 the two ways agree to a grey level, shrunk to 24 they do not."""
    worst = {}
    for resolution in (128, 24):
        filtered, plain = (
            loader_over(
                place,
                folder_config(*place, resolution=resolution, channels=channels, mean=(0.5,), std=(0.25,), **change),
            )
            for change in ({}, {"antialias": False})
        )
        pairs = zip(batches(filtered), batches(plain), strict=True)
        worst[resolution] = max(float((a - b).abs().max()) for (a, _), (b, _) in pairs) * 0.25 * 255
    assert worst[128] < 1.5
    assert worst[24] > 2


def test_threads_and_prefetch_leave_plain_crops_as_they_are(place):
    first = batches(loader_over(place, folder_config(*place, antialias=False)))
    config = folder_config(*place, antialias=False, threads=3, prefetch=4)
    assert_equal(first, batches(loader_over(place, config)))


def test_share_decoded_by_the_cpu(place):
    """On a GPU the share is drawn per sample and steers the pipeline; without one it is refused."""
    config = folder_config(*place, cpu_decode_share=0.2)
    augmentation, shapes = Augmentation(config, seed=3), np.full((5000, 2), 64, np.int32)
    on_cpu = augmentation.draw(1, np.arange(5000), shapes, on_gpu=True)["on_cpu"]
    assert 0.17 < on_cpu.mean() < 0.23
    assert np.array_equal(on_cpu[[7, 3]], augmentation.draw(1, np.array([7, 3]), shapes[:2], on_gpu=True)["on_cpu"])
    assert "on_cpu" not in Augmentation(folder_config(*place), seed=3).inputs(on_gpu=True)
    with pytest.raises(UserError, match=r"the CPU decodes every image; set --data.cpu-decode-share 0"):
        loader_over(place, config)
    with pytest.raises(UserError, match=r"cpu_decode_share is 1.5; it must be a share between 0 and 1"):
        folder_config(*place, cpu_decode_share=1.5)


def traced(place, monkeypatch, *, dtype=torch.float32, **changes):
    """The operators of a training pipeline for a GPU, which are defined but not made: that needs one."""
    config = folder_config(*place, **changes)
    files = open_dataset(config).train
    monkeypatch.setattr(Pipeline, "build", Pipeline._build_graph)
    pipeline = train_pipeline(
        Augmentation(config, seed=3), lambda: (), files, batch_size=2, threads=1,
        device=torch.device("cuda", 0), dtype=dtype, exact_size=False,
    )  # fmt: skip
    return pipeline._ops


def kind(operator):
    return type(operator._op).__name__


def argument(operator, name):
    found = re.search(rf"^    {name}: (.*)$", str(operator.spec), re.MULTILINE)
    return found and found[1]


@pytest.mark.parametrize(("share", "decoders"), [(0.0, ["mixed"]), (0.5, ["cpu", "mixed"])])
def test_decoders_of_a_pipeline_for_a_gpu(place, monkeypatch, share, decoders):
    operators = traced(place, monkeypatch, cpu_decode_share=share)
    assert [op._op.device for op in operators if kind(op) == "ImageSlice"] == decoders


@pytest.mark.parametrize("augment", ["resized-crop", "pad-crop"])
def test_a_gpu_interpolates_chroma_as_the_cpu_does(place, monkeypatch, augment):
    operators = traced(place, monkeypatch, augment=augment, cpu_decode_share=0.5)
    decoders = [op for op in operators if kind(op) in ("ImageSlice", "Image")]
    assert len(decoders) == 2
    assert [argument(op, "jpeg_fancy_upsampling") for op in decoders] == ["True", "True"]


@pytest.mark.parametrize("policy", ["none", "trivial"])
@pytest.mark.parametrize("erase", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gpu_erases_in_float32_which_is_all_it_can(place, monkeypatch, dtype, erase, policy):
    """DALI's Erase for GPUs has no fp16; what leaves the pipeline is fp16 all the same where the network takes it."""
    operators = traced(place, monkeypatch, dtype=dtype, erase=erase, policy=policy)
    erasing = [op for op in operators if kind(op) == "Erase"]
    assert len(erasing) == bool(erase)
    for op in erasing:
        assert argument(op.inputs[0].source, "dtype") == str(int(types.FLOAT))
    (last,) = [op for op in operators if kind(op) in ("CropMirrorNormalize", "Cast", "Erase")][-1:]
    leaves_as = types.FLOAT if dtype == torch.float32 else types.FLOAT16
    assert argument(erasing[0].inputs[0].source if last in erasing else last, "dtype") == str(int(leaves_as))


def test_waiting_is_counted(place):
    loader = loader_over(place)
    assert loader.wait_seconds == 0
    waited = []
    for epoch in range(2):
        batches(loader, epoch)
        waited.append(loader.wait_seconds)
    assert 0 < waited[0] < waited[1]


def test_steps_per_epoch(place):
    assert loader_over(place, batch_size=4, drop_last=True).steps_per_epoch == 6
    assert loader_over(place, batch_size=4).steps_per_epoch == 7
    assert len(batches(loader_over(place, batch_size=4))) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU for mixed decoding")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("augment", ["resized-crop", "pad-crop", "none"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_gpu_batches_match_the_cpu(place, augment, dtype, share):
    on_cpu = batches(loader_over(place, folder_config(*place, augment=augment)))
    config = folder_config(*place, augment=augment, cpu_decode_share=share)
    on_gpu = batches(loader_over(place, config, device="cuda", dtype=dtype))
    assert len(on_cpu) == len(on_gpu)
    for (expected, labels), (images, gpu_labels) in zip(on_cpu, on_gpu, strict=True):
        assert images.is_cuda
        assert images.dtype == dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(labels, gpu_labels.cpu())
        # Grey levels: 0.8 to 1.8 on these miniatures (H100) while nvJPEG did not interpolate chroma as the CPU does.
        difference = (images.cpu().float() - expected).abs() * 0.25 * 255
        assert difference.mean() < 2.5


class InGpuMemory:
    """Stands in for a tensor of DALI's on a GPU; its memory here is the host's."""

    dtype = types.FLOAT16

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.copied_by: list[tuple[int, bool]] = []

    def shape(self):
        return list(self.values.shape)

    def copy_to_external(self, target, stream, non_blocking):
        self.copied_by.append((stream.value, non_blocking))
        ctypes.memmove(target, self.values.ctypes.data, self.values.nbytes)


def test_a_batch_on_a_gpu_is_copied_by_torchs_stream_without_waiting(monkeypatch):
    """DALI waits for the whole device when memory that it handed over by DLPack is dropped; a stand-in has none."""
    monkeypatch.setattr(nvidia.dali.plugin.pytorch.torch_utils, "TensorGPU", InGpuMemory)
    given = InGpuMemory(np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    stream = SimpleNamespace(cuda_stream=4711)
    tensor = as_torch(given, torch.device("cpu"), stream)
    assert given.copied_by == [(4711, True)]
    expected = torch.from_numpy(given.values.copy())
    given.values[:] = 0
    assert tensor.dtype == torch.float16
    assert torch.equal(tensor, expected)


def test_a_batch_on_a_cpu_is_not_copied():
    pipeline = Pipeline(2, 1, None, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(fn.external_source(lambda: np.ones((2, 3), np.float32), batch=True))
    given = pipeline.run()[0].as_tensor()
    assert as_torch(given, torch.device("cpu"), None).data_ptr() == given.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU to capture graphs")
@pytest.mark.timeout(300)
def test_a_graph_is_captured_while_batches_are_dropped(place):
    """200 batches, each dropped just before a capture: DALI may not synchronise the device meanwhile."""
    loader = loader_over(place, device="cuda", dtype=torch.bfloat16)
    x = torch.ones(1 << 16, device="cuda")
    every = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
    for _ in range(200):
        batch = next(every)
        total = batch[0].float().sum()
        del batch
        doubled, replay = capture(lambda: [(x * 2).sum()])
        replay()
        assert doubled[0].item() == 2 * x.numel()
        assert total.isfinite()
