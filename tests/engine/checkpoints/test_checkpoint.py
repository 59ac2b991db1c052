"""Checkpoints: whole or absent, old ones go, damaged and foreign ones are refused."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bsnas.engine.checkpoints.checkpoint import load_checkpoint, write_checkpoint
from bsnas.engine.checkpoints.keep import latest_checkpoint, newest_checkpoint, remove_old
from bsnas.engine.checkpoints.manifest import FORMAT, Manifest, Progress
from bsnas.engine.host.errors import MachineError, UserError
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.spaces import space_named
from bsnas.engine.space.table import Row
from tests.engine.tiny import TINY, tiny_space

PROGRESS = Progress(epoch=3, rounds=20, passes=160, batches=161, shrink_steps=1)


def save(directory: Path, epoch: int = 3, keep: set[int] | None = None, **state) -> Path:
    manifest = Manifest(progress=replace(PROGRESS, epoch=epoch), kept=keep is not None and epoch in keep)
    file = write_checkpoint(directory, manifest, {"space": TINY.to_json(), **state})
    remove_old(directory, last=2)
    return file


def checkpoint_file(directory: Path, epoch: int) -> Path:
    return directory / f"epoch-{epoch:04d}-shrunk-1.pt"


def epochs(directory: Path) -> list[int]:
    return sorted(int(file.stem.split("-")[1]) for file in directory.glob("*.pt"))


def test_everything_comes_back(tmp_path):
    supernet = Supernet(TINY)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9)
    sum((p**2).sum() for p in supernet.parameters()).backward()
    optimizer.step()
    space = TINY.with_live(
        [[op for op in ops if op.block_op.expansion == 3 or op.block_op.kernel == 3] for ops in TINY.live]
    )
    state = {"space": space.to_json(), "supernet": supernet.state_dict(), "optimizer": optimizer.state_dict()}
    file = write_checkpoint(tmp_path, Manifest(progress=PROGRESS), state)
    assert file == checkpoint_file(tmp_path, 3) == latest_checkpoint(tmp_path)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.manifest.progress == PROGRESS
    loaded_space, loaded = load_checkpoint(file, TINY)
    assert loaded_space == space
    for name, tensor in supernet.state_dict().items():
        assert torch.equal(loaded["supernet"][name], tensor)
    again = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9)
    again.load_state_dict(loaded["optimizer"])
    for p in supernet.parameters():
        assert torch.equal(again.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


def test_old_checkpoints_go_except_those_to_keep(tmp_path):
    for epoch in range(1, 8):
        save(tmp_path, epoch, keep={2, 4})
    assert epochs(tmp_path) == [2, 4, 6, 7]
    assert latest_checkpoint(tmp_path) == checkpoint_file(tmp_path, 7)
    for epoch in (9998, 9999, 10000, 10001):
        save(tmp_path, epoch)
    assert epochs(tmp_path) == [2, 4, 10000, 10001]  # by number, not by name
    assert latest_checkpoint(tmp_path) == checkpoint_file(tmp_path, 10001)


def test_none_yet(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


# ---- whole or absent


def test_a_write_that_is_cut_off_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1, value=torch.ones(3))
    before = checkpoint_file(tmp_path, 1).read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    for epoch in (1, 2):
        with pytest.raises(MachineError, match=r"000\d-shrunk-1.pt cannot be written: No space left on device; fr"):
            save(tmp_path, epoch)
    assert {file.name for file in tmp_path.iterdir()} == {"epoch-0001-shrunk-1.pt", "epoch-0001-shrunk-1.json"}
    assert checkpoint_file(tmp_path, 1).read_bytes() == before


def test_a_process_that_is_killed_while_writing_leaves_nothing_that_counts(tmp_path, monkeypatch):
    save(tmp_path, 1)

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(Killed):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == checkpoint_file(tmp_path, 1)
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == checkpoint_file(tmp_path, 2)
    assert epochs(tmp_path) == [1, 2]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "file" / "checkpoints")


# ---- refused


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "missing"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    file = save(tmp_path, weights=torch.arange(1000.0))
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:10] + bytes(255 - b for b in content[10:200]) + content[200:]
        file.write_bytes({"cut": content[:middle], "empty": b"", "text": b"hello", "flipped": flipped}[damage])
    with pytest.raises(UserError) as raised:
        load_checkpoint(file, TINY)
    message = str(raised.value)
    assert message.startswith(f"checkpoint {file} cannot be read: ")
    assert message.endswith("remove it to continue from the one before")
    assert "\n" not in message


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    file = tmp_path / "epoch-0001.pt"
    torch.save({"format": FORMAT, "space": TINY.to_json(), "progress": Trap()}, file)
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(file, TINY)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [{"format": FORMAT + 1}, {}, [1, 2], torch.ones(2), None])
def test_another_format_is_refused(tmp_path, content):
    file = tmp_path / "epoch-0001.pt"
    torch.save(content, file)
    with pytest.raises(UserError, match=f"is no checkpoint of format {FORMAT}; use a file that this version wrote"):
        load_checkpoint(file, TINY)


def test_another_spaces_checkpoint_is_refused(tmp_path):
    file = save(tmp_path)
    with pytest.raises(UserError, match=r"another search space than the run's: .*; use the run's own files"):
        load_checkpoint(file, space_named("digits"))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (tiny_space(classes=9), "classes is 4 there and 9 here"),
        (tiny_space(clusters=TINY.clusters[:2]), "6 clusters there and 5 here"),
        (tiny_space(tail_channels=41), r"channels of cluster 6 is \[40\] there and \[41\] here"),
        (tiny_space(stem_stride=1), "stride of cluster 1 is 2 there and 1 here"),
        (
            TINY.with_clusters([replace(c, rows=(*c.rows, Row(family="conv"))) for c in TINY.clusters]),
            "cluster 3 has 1 rows there and 2 here",
        ),
    ],
)
def test_what_differs_between_two_tables_is_told(tmp_path, other, difference):
    file = save(tmp_path)
    with pytest.raises(UserError, match=f"another search space than the run's: {difference}; use the run's own files"):
        load_checkpoint(file, other)


def test_a_checkpoint_without_its_parts_is_refused(tmp_path):
    file = tmp_path / "epoch-0001.pt"
    torch.save({"format": FORMAT}, file)
    with pytest.raises(UserError, match=r"checkpoint .*epoch-0001.pt: this is not a search space"):
        load_checkpoint(file, TINY)
    torch.save({"format": FORMAT, "space": TINY.to_json()}, file)
    assert load_checkpoint(file, TINY) == (TINY, {"format": FORMAT, "space": TINY.to_json()})


def test_other_files_beside_checkpoints_do_no_harm(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "epoch-best.pt").write_text("a user's own")
    assert latest_checkpoint(tmp_path) == checkpoint_file(tmp_path, 3)
