"""The bookkeeping of CUDA graphs, of which nothing is captured or launched here: what is kept, how long, how much."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton")

from bsnas.engine.networks.subnet import Subnet
from bsnas.kernels import BlockShape, BlockWeights, graphs, inverted_residual, training
from bsnas.kernels.gpu.launch import CachedLaunches
from tests.engine.tiny import ARCH, TINY, images

MIB = 1 << 20


class Gpu:
    """Counts captures; each takes one MiB of the memory that it pretends to have."""

    captures = held = asked = 0
    spare = 1000 * MIB

    def capture(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        self.captures += 1
        self.held += MIB
        return run(), lambda: None

    def spare_memory(self) -> int:
        self.asked += 1
        return self.spare

    def held_memory(self) -> int:
        self.asked += 1
        return self.held


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Graphs turned on, with an empty store, for the Triton kernels, of which none is launched."""
    gpu = Gpu()
    for name in ("capture", "spare_memory", "held_memory"):
        monkeypatch.setattr(graphs, name, getattr(gpu, name))
    monkeypatch.setattr(graphs, "GRAPHS", graphs.Graphs())
    monkeypatch.setattr(graphs, "_switch", True)
    monkeypatch.setattr(training, "choose_backend", lambda x, backend=None: "triton")
    monkeypatch.setattr(CachedLaunches, "launch", lambda *args, **named: None)
    return gpu


def train(network: Subnet, batches: list[int]) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    for batch in batches:
        labels = torch.zeros(batch, dtype=torch.int64)
        F.cross_entropy(network(images(TINY, batch).contiguous(memory_format=torch.channels_last)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_graphs_of_a_released_network_live_as_long_as_its_parameters(gpu: Gpu) -> None:
    """Its kernels read the 1x1 convolutions' weights through views, which are new in every forward."""
    network = Subnet(TINY, ARCH).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    operations = 2 + len(network.blocks)  # the separable block and the tail besides
    train(network, [4, 4, 4])
    assert gpu.captures == 2 * operations
    assert len(graphs.GRAPHS) == operations
    del network
    assert len(graphs.GRAPHS) == graphs.GRAPHS.taken == 0


def test_an_operation_is_captured_for_one_batch_size(gpu: Gpu) -> None:
    network = Subnet(TINY, ARCH)
    train(network, [4, 3, 4, 3])
    assert gpu.captures == 2 * (2 + len(network.blocks))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shape = BlockShape(8, 16, 8, 3, 1)
        self.weights = nn.ParameterList([torch.ones(16, 8), torch.ones(16, 1, 3, 3), torch.ones(8, 16)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm2d(8)])

    def forward(self, x: Tensor) -> Tensor:
        weights, norms = BlockWeights(*self.weights), tuple(self.norms)
        return inverted_residual(x, weights, norms, self.shape, training=True)  # type: ignore[arg-type]


def test_all_graphs_together_have_a_budget(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What did not fit is launched and asks for no memory again; what goes makes room for others."""
    gpu.spare = 3 * MIB
    blocks = [Block() for _ in range(4)]
    x = torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    for block in blocks:
        block(x).sum().backward()
    assert gpu.captures == 4, "forward and backward of two blocks, the second of which goes past the budget"
    assert graphs.GRAPHS.taken == 4 * MIB
    asked = gpu.asked
    for block in blocks:
        block(x).sum().backward()
    assert (gpu.captures, gpu.asked) == (4, asked)
    del blocks[0], block
    assert graphs.GRAPHS.taken == 2 * MIB
    blocks.append(Block())
    blocks[-1](x).sum().backward()
    assert len(graphs.GRAPHS) == 2


def test_nothing_is_captured_where_no_memory_is_spare(gpu: Gpu) -> None:
    gpu.spare = 0
    train(Subnet(TINY, ARCH), [4, 4])
    assert gpu.captures == 0


def test_given_back_graphs_are_captured_again(gpu: Gpu) -> None:
    """As scoring asks for it: its own activations need the memory. The budget is asked for anew then."""
    network = Subnet(TINY, ARCH)
    train(network, [4])
    before, gpu.spare = gpu.captures, MIB
    graphs.GRAPHS.clear()
    assert len(graphs.GRAPHS) == graphs.GRAPHS.taken == 0
    train(network, [3, 3])
    assert gpu.captures == before + 2
    del network
    assert graphs.GRAPHS.taken == 0, "parameters that end count once, however often they were captured"
