"""Multiply-adds (MACs) and parameters of released networks, by table look-up.

MACs count convolutions and linear layers of one image, without bias additions and batch normalisation, as the field
does ("FLOPs" in NAS papers means this number). Parameters include batch normalisation's scale and shift and the
classifier's bias. No torch: about 25 microseconds an architecture of Table 1.
"""

from collections.abc import Callable

from bsnas.engine.space.space import Arch, BlockDims, BlockOp, Space


def _out_size(size: int, stride: int) -> int:
    return -(-size // stride)


class CostModel:
    """Costs of the released networks of one space. Blocks are counted once and remembered."""

    def __init__(self, space: Space) -> None:
        self.space = space
        size = _out_size(space.resolution, space.stem_stride)
        stem, separable = space.stem_channels, space.separable_channels
        self._stem_macs = size * size * (9 * space.input_channels * stem + 9 * stem + stem * separable)
        self._stem_params = 9 * space.input_channels * stem + 2 * stem + 9 * stem + 2 * stem
        self._stem_params += stem * separable + 2 * separable
        self._sizes = []
        """Input height of every block in pixels."""
        for i in range(space.num_blocks):
            self._sizes.append(size)
            size = _out_size(size, space.block_stride(i))
        self._final_pixels = size * size
        self._block_costs: dict[tuple[int, int, BlockOp, int], tuple[int, int]] = {}

    def macs(self, arch: Arch) -> int:
        """Multiply-adds of the released network for one image."""
        return self.macs_and_params(arch)[0]

    def params(self, arch: Arch) -> int:
        """Number of trained parameters of the released network."""
        return self.macs_and_params(arch)[1]

    def macs_and_params(self, arch: Arch) -> tuple[int, int]:
        """(multiply-adds for one image, parameters) of the released network."""
        macs, params = self._stem_macs, self._stem_params
        in_channels = self.space.separable_channels
        block = 0
        for channels, ops in zip(arch.channels, arch.blocks, strict=True):
            for op in ops:
                key = (block, in_channels, op, channels)
                cost = self._block_costs.get(key)
                if cost is None:
                    cost = self._block_costs[key] = self._block_cost(*key)
                macs += cost[0]
                params += cost[1]
                in_channels = channels
                block += 1
        tail, classes = self.space.tail_channels, self.space.classes
        macs += self._final_pixels * in_channels * tail + tail * classes
        params += in_channels * tail + 2 * tail + tail * classes + classes
        return macs, params

    def _block_cost(self, block: int, in_channels: int, op: BlockOp, channels: int) -> tuple[int, int]:
        stride = self.space.block_stride(block)
        dims = BlockDims(in_channels, op.expansion * in_channels, channels, op.kernel, stride)
        pixels_in = self._sizes[block] ** 2
        pixels_out = _out_size(self._sizes[block], stride) ** 2
        expand = dims.in_channels * dims.hidden
        depthwise = dims.kernel**2 * dims.hidden
        project = dims.hidden * dims.out_channels
        macs = pixels_in * expand + pixels_out * (depthwise + project)
        params = expand + depthwise + project + 4 * dims.hidden + 2 * dims.out_channels
        return macs, params

    def macs_range(self) -> tuple[int, int]:
        """The smallest and largest MACs that a live architecture reaches."""
        return self._extreme(min), self._extreme(max)

    def _extreme(self, pick: Callable[..., int]) -> int:
        """Dynamic programming over the clusters: best MACs for each channel number that reaches the next cluster."""
        space = self.space
        best = {space.separable_channels: self._stem_macs}
        for j, blocks in enumerate(space.cluster_blocks):
            reached: dict[int, int] = {}
            for channels in space.live_channels(j):
                inner = sum(
                    pick(self._block_cost(i, channels, op, channels)[0] for op in space.live_block_ops(i, channels))
                    for i in blocks[1:]
                )
                reached[channels] = pick(
                    so_far + inner + self._block_cost(blocks[0], width, op, channels)[0]
                    for width, so_far in best.items()
                    for op in space.live_block_ops(blocks[0], channels)
                )
            best = reached
        tail, classes = space.tail_channels, space.classes
        return pick(so_far + self._final_pixels * width * tail + tail * classes for width, so_far in best.items())
