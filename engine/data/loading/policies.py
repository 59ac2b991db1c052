"""AutoAugment, RandAugment, TrivialAugment: operations of nvidia.dali.auto_aug, chosen by numbers from outside.

DALI's own functions draw which operation an image gets inside the pipeline, from a state that a continued run would
have to restore. Here the choice comes with the batch, so that it depends on (seed, epoch, sample) alone, as every other
random number does.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from nvidia.dali.auto_aug import augmentations, auto_augment, rand_augment, trivial_augment
from nvidia.dali.auto_aug.core import Policy, _Augmentation, select, signed_bin
from nvidia.dali.pipeline import DataNode

from bsnas.engine.data.dataset import DataConfig, PolicyName

BINS = 31
FILL = 128
"""Gray level of what a rotated, sheared or shifted image leaves uncovered."""
TRIVIAL_TRANSLATION = 32 / 224
"""Largest shift as a share of the side: 32 pixels of 224 (TrivialAugment's paper)."""
AUTO_TRANSLATION = 150 / 331
"""The same of AutoAugment, whose policy was found on 331 pixels."""

Int32 = npt.NDArray[np.int32]


class Choices(NamedTuple):
    """What each image of a batch gets, [N, stages] each."""

    operation: Int32
    """Position in the stage's operations."""
    bin: Int32
    """Strength, from 0 to one below the plan's number of bins."""
    sign: Int32
    """1 where a magnitude that has a sign is negative."""


@dataclass(frozen=True)
class PolicyPlan:
    """Stages of operations, and the rule by which uniform numbers become choices."""

    stages: tuple[tuple[_Augmentation, ...], ...]
    bins: int
    side: int
    """Height and width of the images in pixels."""
    magnitude: int | None = None
    """Bin of every operation; None draws it."""
    table: Policy | None = None
    """AutoAugment's sub-policies."""

    @property
    def draws(self) -> int:
        """Uniform numbers that an image needs."""
        return 1 + 3 * len(self.stages)

    def choose(self, uniform: npt.NDArray[np.float64]) -> Choices:
        """Choices for a batch from numbers in [0, 1), [N, draws]."""
        per_stage = uniform[:, 1:].reshape(len(uniform), len(self.stages), 3)
        sign = (per_stage[..., 2] < 0.5).astype(np.int32)
        if self.table is not None:
            return Choices(*self._from_table(uniform[:, 0], per_stage[..., 0]), sign)
        operation = np.floor(per_stage[..., 0] * len(self.stages[0])).astype(np.int32)
        drawn = np.floor(per_stage[..., 1] * self.bins).astype(np.int32)
        return Choices(operation, drawn if self.magnitude is None else np.full_like(drawn, self.magnitude), sign)

    def _from_table(self, which: npt.NDArray[np.float64], run: npt.NDArray[np.float64]) -> tuple[Int32, Int32]:
        """Operations and bins of a random sub-policy, each with its probability; else identity, which comes last."""
        assert self.table is not None
        chosen = np.floor(which * len(self.table.sub_policies)).astype(int)
        operation = np.array([[len(stage) - 1 for stage in self.stages]] * len(which), np.int32)
        strength = np.zeros_like(operation)
        for row, number in enumerate(chosen):
            for stage, (augmentation, probability, magnitude) in enumerate(self.table.sub_policies[number]):
                if run[row, stage] < probability:
                    operation[row, stage] = self.stages[stage].index(augmentation)
                    strength[row, stage] = magnitude or 0
        return operation, strength

    def apply(self, images: DataNode, operation: DataNode, strength: DataNode, sign: DataNode) -> DataNode:
        """The chosen operations in DALI's graph, on uint8 images of HWC layout; conditionals must be on."""
        signed = signed_bin(strength, random_sign=sign)
        for stage, operations in enumerate(self.stages):
            images = select(
                list(operations),
                operation[stage],
                data=images,
                magnitude_bin=signed[stage],
                num_magnitude_bins=self.bins,
                shape=(self.side, self.side),
                fill_value=FILL,
                interp_type=None,
            )
        return images


def policy_plan(config: DataConfig) -> PolicyPlan | None:
    """The plan of a configuration; None when it has no policy."""
    name: PolicyName = config.policy
    side = config.resolution
    if name == "trivial":
        suite = trivial_augment.get_trivial_augment_wide_suite(use_shape=True, max_translate_rel=TRIVIAL_TRANSLATION)
        return PolicyPlan((tuple(suite),), BINS, side)
    if name == "rand":
        suite = rand_augment.get_rand_augment_suite(use_shape=True)
        return PolicyPlan((tuple(suite),) * config.rand_operations, BINS, side, magnitude=config.rand_magnitude)
    if name == "auto":
        table = auto_augment.get_image_net_policy(use_shape=True, max_translate_rel=AUTO_TRANSLATION)
        longest = max(len(sub_policy) for sub_policy in table.sub_policies)
        stages = [
            list(dict.fromkeys(sub_policy[stage][0] for sub_policy in table.sub_policies if stage < len(sub_policy)))
            for stage in range(longest)
        ]
        with_identity = tuple((*stage, augmentations.identity) for stage in stages)
        return PolicyPlan(with_identity, table.num_magnitude_bins, side, table=table)
    return None
