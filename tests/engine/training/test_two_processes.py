"""Two processes train the same supernet as one process with the same global batch.

Batch normalisation is frozen: each rank would normalise with the statistics of its own half of the batch, a different
computation. So the networks run in evaluation mode, which uses the running statistics, and everything else is compared.
"""

import os
import random
import socket
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.multiprocessing import start_processes
from torch.nn import functional as F

from bsnas.engine.config import OptimizerConfig
from bsnas.engine.host.distributed import Process, average_batchnorm, on_main, start_process
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.sampling import fair_round
from bsnas.engine.training.optimization import Optimization
from tests.engine.evaluation.cases import trained_like_supernet
from tests.engine.space.strategies import shrunk_at_random
from tests.engine.tiny import TINY

PASSES = 20
BATCH = 8
SPACE = shrunk_at_random(TINY, random.Random(7))


def train(process: Process, update: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(loss of the global batch in every pass, weights at the end) of 20 passes."""
    supernet = trained_like_supernet(SPACE, "nested" if update == "path" else "channels").eval()
    config = OptimizerConfig(batch_size=BATCH, learning_rate=0.05, weight_decay=0.01)
    optimization = Optimization(supernet, config, process, "fp32", {})
    generator = torch.Generator().manual_seed(3)
    losses: list[float] = []
    while len(losses) < PASSES:
        paths = fair_round(SPACE, 0, len(losses))
        for arch in paths:
            x = torch.randn(BATCH, 3, SPACE.resolution, SPACE.resolution, generator=generator)
            labels = torch.randint(SPACE.classes, (BATCH,), generator=generator)
            mine = slice(process.rank, None, process.world_size)
            loss = F.cross_entropy(optimization.forward(x[mine], arch), labels[mine])
            optimization.backward(loss)
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / process.world_size)
            if update == "path":
                optimization.step(supernet.active_parameters(arch), 0.02)
        if update == "round":
            used = dict.fromkeys(p for arch in paths for p in supernet.active_parameters(arch))
            optimization.step(used, 0.02)
    return losses, {name: tensor.clone() for name, tensor in supernet.state_dict().items()}


def run_rank(rank: int, world: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    process = start_process()
    assert (process.rank, process.world_size, process.is_main) == (rank, world, rank == 0)
    torch.save([train(process, update) for update in ("path", "round")], Path(directory) / f"{rank}.pt")
    check_exchange(process)
    dist.destroy_process_group()


def check_exchange(process: Process) -> None:
    """What the main process says reaches all, its errors too; running statistics become the mean over ranks."""

    def fails() -> None:
        raise UserError("the main process says no")

    assert on_main(process, lambda: {"rank": process.rank}) == {"rank": 0}
    with pytest.raises(UserError, match=r"^the main process says no$"):
        on_main(process, fails)
    norm = torch.nn.BatchNorm2d(2)
    norm.running_mean.fill_(process.rank)
    norm.running_var.fill_(4.0 - 2 * process.rank)
    average_batchnorm(norm)
    assert norm.running_mean.tolist() == [0.5, 0.5]
    assert norm.running_var.tolist() == [3.0, 3.0]


@pytest.mark.timeout(180)
def test_two_processes_train_as_one(alone, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    # Optimizers import torch._dynamo: seconds, which the two ranks spend once.
    get_context("forkserver").set_forkserver_preload(
        ["deepspeed", "torch._dynamo", "tests.engine.training.test_two_processes"]
    )
    ranks = start_processes(run_rank, (2, port, str(tmp_path)), nprocs=2, join=False, start_method="forkserver")
    expected = [train(alone, update) for update in ("path", "round")]
    while not ranks.join():
        pass
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for mode, (losses, weights) in enumerate(expected):
        (first_losses, first), (second_losses, second) = both[0][mode], both[1][mode]
        assert len(losses) >= PASSES
        assert first_losses == second_losses
        assert first_losses == pytest.approx(losses, rel=1e-5, abs=1e-5)
        assert abs(losses[-1] - losses[0]) > 1e-3
        for name, weight in weights.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], weight, rtol=1e-5, atol=1e-5, msg=name)
