"""Training batches: DALI decodes and augments, the order and every random number come from (seed, epoch, sample)."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
from torch import Tensor

from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.file_list import FileList
from bsnas.engine.data.loading.augment import Augmentation
from bsnas.engine.data.loading.decode import Batch, handed_over, undecodable_image
from bsnas.engine.data.loading.decode_ahead import DecodeAhead, threads_per_pipeline
from bsnas.engine.data.loading.mixing import Mixing
from bsnas.engine.data.loading.order import EpochOrder
from bsnas.engine.data.loading.train_pipeline import train_pipeline
from bsnas.engine.host.errors import UserError


class TrainLoader:
    """Batches of one rank: normalised images [N, C, H, W] in channels_last and `dtype`, labels int64 [N], on `device`.

    With mixup or CutMix, labels are probabilities fp32 [N, classes] instead.

    Global batch g of an epoch is the same set of images for every number of ranks; each rank gets a
    contiguous part of it. Iteration can begin at any (epoch, step) and gives what an uninterrupted run would
    have seen there. Pipelines stay alive between epochs and decode into the next one.
    """

    def __init__(
        self,
        files: FileList,
        config: DataConfig,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        drop_last: bool = False,
    ) -> None:
        """`batch_size` is per rank. Every image is seen once an epoch; batch sizes then differ by one at most.

        `drop_last` leaves out what does not fill a batch over all ranks. Raises UserError for a CPU-decoded share
        without a GPU.
        """
        if config.cpu_decode_share and torch.device(device).type != "cuda":
            raise UserError(
                f"cpu_decode_share is {config.cpu_decode_share}, but there is no GPU and the CPU decodes every image; "
                "set --data.cpu-decode-share 0"
            )
        self._order = EpochOrder(
            len(files),
            global_batch=batch_size * world_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        self.steps_per_epoch = self._order.steps
        self._files, self._config, self._dtype = files, config, dtype
        self._augmentation = Augmentation(config, seed)
        self._mixing = Mixing(config, seed, classes=int(files.labels.max()) + 1)
        self._device = torch.device(device)
        self._shapes = files.shapes[:, :2]
        self._wait = _Wait(self._device)
        exact_size = config.resize is None and bool((self._shapes == config.resolution).all())

        def pipeline(threads: int, source: Callable[[], Batch]) -> Pipeline:
            return train_pipeline(
                self._augmentation,
                source,
                files,
                batch_size=batch_size,
                threads=threads,
                device=self._device,
                dtype=dtype,
                exact_size=exact_size,
            )

        counts = threads_per_pipeline(config, self._device)
        self._pipelines = [DecodeAhead(self._batch, partial(pipeline, threads), len(counts)) for threads in counts]

    @property
    def wait_seconds(self) -> float:
        """Time since the start for which training stood still for want of a batch."""
        return self._wait.seconds()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from step `start` on. Raises UserError that names a file that cannot be decoded.

        On a GPU, a JPEG that breaks off amid its pixels counts as decodable: nvJPEG fills in the rest.
        """
        for step in range(start, self.steps_per_epoch):
            yield self._receive(epoch * self.steps_per_epoch + step)

    def order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        """Positions in the list of files, in the order in which this rank sees them."""
        return np.concatenate([self._order.rank_batch(epoch, step) for step in range(self.steps_per_epoch)])

    def names(self, position: int, ranks: Iterable[int]) -> str:
        """The files of a batch, counted over all epochs, that some ranks got: for a message."""
        place = divmod(position, self.steps_per_epoch)
        files = [self._files.describe(i) for rank in ranks for i in self._order.rank_batch(*place, rank)]
        return ", ".join(files[:8]) + (f" and {len(files) - 8} more" if len(files) > 8 else "")

    def _batch(self, position: int) -> Batch:
        """What a pipeline needs for the batch at a position counted over all epochs."""
        epoch, step = divmod(position, self.steps_per_epoch)
        indices = self._order.rank_batch(epoch, step)
        on_gpu = self._device.type == "cuda"
        drawn = self._augmentation.draw(epoch, indices, self._shapes[indices], on_gpu=on_gpu)
        return handed_over(self._files, indices.tolist()), self._files.labels[indices], *drawn.values()

    def _receive(self, position: int) -> tuple[Tensor, Tensor]:
        """The batch at a position counted over all epochs."""
        # On a GPU the outputs belong to torch's current stream: the host does not wait, and DALI reuses their memory
        # only after the work that the stream holds by then.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        with self._wait:
            outputs = self._run(position, stream)
        images, labels = (as_torch(output.as_tensor(), self._device, stream) for output in outputs)
        images = images.to(self._dtype).permute(0, 3, 1, 2)
        return self._mixing.mix(images, labels, *divmod(position, self.steps_per_epoch))

    def _run(self, position: int, stream: torch.cuda.Stream | None) -> tuple:  # type: ignore[type-arg]
        pipeline = self._pipelines[position % len(self._pipelines)]
        try:
            return pipeline.run(position, stream)
        except RuntimeError as error:
            steps = [divmod(position, self.steps_per_epoch) for position in pipeline.ahead]
            indices = np.concatenate([np.empty(0, np.int64), *(self._order.rank_batch(*step) for step in steps)])
            raise undecodable_image(self._files, indices.tolist(), self._config, error) from None


def as_torch(given: Any, device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
    """DALI's tensor as one of torch on the same device: its memory itself on a CPU, a copy made by `stream` on a GPU.

    DALI cannot know when a GPU is done with memory that DLPack handed over: it waits for the whole device, in a thread
    of its own and whenever a tensor is dropped. While a stream captures a graph, waiting for the device is an error.
    """
    if stream is None:
        return torch.from_dlpack(given)
    copy = torch.empty(given.shape(), dtype=to_torch_type[given.dtype], device=device)
    return feed_ndarray(given, copy, cuda_stream=stream)


class _Wait:
    """Sums the time between enter and exit: the host's on a CPU, that of torch's stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._total, self._begun = device, 0.0, 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            # From the first event to the second the stream has no work left and no batch yet.
            self._pending.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._pending[-1][0].record(torch.cuda.current_stream(self._device))
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._pending[-1][1].record(torch.cuda.current_stream(self._device))
        else:
            self._total += time.perf_counter() - self._begun

    def seconds(self) -> float:
        while self._pending and self._pending[0][1].query():
            before, after = self._pending.popleft()
            self._total += before.elapsed_time(after) / 1000
        return self._total
