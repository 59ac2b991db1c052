"""Which samples each rank sees at each step, and each sample's random numbers: pure functions of the seed.

Nothing here keeps state. A run can start at any (epoch, step), and neither the order nor the random numbers
depend on the number of ranks, on threads, or on what ran before.
"""

import numpy as np
import numpy.typing as npt

from bsnas.engine.host.errors import UserError

Indices = npt.NDArray[np.int64]


class EpochOrder:
    """A permutation of the samples per epoch, cut into global batches, each cut into one contiguous part per rank."""

    def __init__(
        self,
        samples: int,
        *,
        global_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        drop_last: bool,
    ) -> None:
        """`drop_last` leaves out what does not fill a global batch; otherwise batch sizes differ by one at most."""
        assert 0 <= rank < world_size <= global_batch
        if samples < (global_batch if drop_last else world_size):
            raise UserError(
                f"{samples} training images do not fill one batch of {global_batch} over {world_size} processes; "
                "lower the batch size or add images"
            )
        self.steps = samples // global_batch if drop_last else -(-samples // global_batch)
        self._used = self.steps * global_batch if drop_last else samples
        self._samples, self._seed, self._rank, self._world_size = (
            samples,
            seed,
            rank,
            world_size,
        )
        self._epoch = -1
        self._permutation: Indices = np.empty(0, np.int64)

    def global_batch(self, epoch: int, step: int) -> Indices:
        """Sample indices of all ranks together."""
        if epoch != self._epoch:
            self._permutation = np.random.Generator(np.random.Philox([self._seed, epoch])).permutation(self._samples)
            self._epoch = epoch
        return self._permutation[step * self._used // self.steps : (step + 1) * self._used // self.steps]

    def rank_batch(self, epoch: int, step: int, rank: int | None = None) -> Indices:
        """Sample indices of this rank, or of another."""
        rank = self._rank if rank is None else rank
        batch = self.global_batch(epoch, step)
        return batch[len(batch) * rank // self._world_size : len(batch) * (rank + 1) // self._world_size]


def sample_uniform(seed: int, epoch: int, indices: Indices, count: int, *, first: int = 0) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) of each sample, from its number `first` on, [len(indices), count].

    Each depends on (seed, epoch, index) and its own position only.

    SplitMix64's finaliser over a counter: a generator object per sample would cost 20 us each.
    """
    key = _mix(_mix(np.uint64(seed & (2**64 - 1))) + np.uint64(epoch))
    rows = _mix(key + np.asarray(indices).astype(np.uint64))
    bits = _mix(
        rows[:, None] + np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    z = np.atleast_1d(value) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
