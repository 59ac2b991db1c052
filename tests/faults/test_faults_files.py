"""Files from outside: nothing in them is run or believed, damage is skipped or told in one line."""

import json
import re
import sqlite3
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bsnas.benchmarks.parts.faults.mutated_files import (
    arch_reader,
    config_reader,
    manifest_fields_reader,
    manifest_reader,
    space_reader,
    try_mutations,
    wrong_answer,
)
from bsnas.engine.checkpoints.checkpoint import CheckpointWriter, write_checkpoint
from bsnas.engine.checkpoints.keep import newest_checkpoint, set_newer_aside
from bsnas.engine.checkpoints.manifest import Manifest, Progress, manifest_file, read_manifest
from bsnas.engine.checkpoints.tensor_file import read_tensors, take, take_numbers, write_tensors
from bsnas.engine.config import RunConfig, from_json, to_json
from bsnas.engine.evaluation.store import EvaluationStore, StoreKey, Tally
from bsnas.engine.host.errors import MachineError, UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.presets import preset
from bsnas.engine.release.saved_network import FORMAT, load_network, save_network
from bsnas.engine.retrain import named_arch
from bsnas.engine.runs.rundir import MAX_JSON_BYTES, read_json, write_json
from bsnas.engine.space.mobile import mobile_cluster
from bsnas.engine.space.space import Space
from bsnas.engine.space.table import MOST, MOST_OPERATIONS
from tests.engine.tiny import ARCH, TINY, random_archs, tiny_space

DAMAGES = ("cut off", "bit flipped", "empty", "missing")


def damage(file: Path, kind: str) -> None:
    content = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
        return
    if kind == "bit flipped":
        content[len(content) // 2] ^= 4
    file.write_bytes({"cut off": content[:-7], "bit flipped": content, "empty": b""}[kind])


# ---- checkpoints


def checkpoints(directory: Path, count: int = 3) -> list[Path]:
    files = []
    for epoch in range(1, count + 1):
        manifest = Manifest(progress=Progress(epoch=epoch, passes=10 * epoch), data="d")
        files.append(write_checkpoint(directory, manifest, {"weights": torch.full((500,), float(epoch))}))
    return files


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("of", ["checkpoint", "manifest"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_newest_whole_checkpoint_is_taken_and_a_damaged_one_told(
    tmp_path: Path, which: int, of: str, kind: str
) -> None:
    files, said = checkpoints(tmp_path), []
    damage(files[which] if of == "checkpoint" else manifest_file(files[which]), kind)
    found = newest_checkpoint(tmp_path, say=said.append)
    assert found is not None
    assert found.file == (files[1] if which == 2 else files[2])
    looked_at = of == "manifest" or which == 2
    if looked_at and not (of == "checkpoint" and kind == "missing"):
        (line,) = said
        assert re.search(
            r"checkpoint skipped: .* (has \d+ bytes instead of|has changed since it was written|has no manifest"
            r"|cannot be read as JSON)",
            line,
        )
        assert files[which].stem in line


def test_when_all_are_damaged_the_user_is_asked(tmp_path: Path) -> None:
    for file in checkpoints(tmp_path):
        damage(file, "bit flipped")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(3 damaged, the last: .*SHA-256\)\); rest"):
        newest_checkpoint(tmp_path, say=lambda _: None)


def test_a_manifest_is_read_field_by_field(tmp_path: Path) -> None:
    (file,) = checkpoints(tmp_path, 1)
    manifest = json.loads(manifest_file(file).read_text())
    write_json(manifest_file(file), {**manifest, "format": 9})
    with pytest.raises(UserError, match=r"is no manifest of format 2; use a checkpoint that this version wrote"):
        read_manifest(file)
    write_json(manifest_file(file), {**manifest, "kept": True})
    with pytest.raises(UserError, match=r"epoch-0001.json has changed since it was written$"):
        read_manifest(file)
    manifest_file(file).unlink()
    with pytest.raises(UserError, match=r"has no manifest epoch-0001.json; it was not finished, or is of an older"):
        read_manifest(file)
    fields = {k: v for k, v in manifest.items() if k != "check"}
    for wrong in ({"bytes": 0}, {"processes": 0}, {"sha256": "no"}):
        with pytest.raises(UserError, match=r"a manifest tells of \d+ bytes, \d processes"):
            from_json(Manifest, {**fields, **wrong}, file)
    progress = fields["progress"]
    for told, message in (
        ({**progress, "rounds": -1}, r"progress rounds is -1; it must be a whole number of at least 0"),
        ({"epochs": 3}, r"progress.epochs is unknown; allowed are epoch, rounds"),
        (3, r"progress: Input should be a dictionary"),
    ):
        with pytest.raises(UserError, match=message):
            from_json(Manifest, {**fields, "progress": told}, file)
    with pytest.raises(UserError, match=r"progress: Field required"):
        from_json(Manifest, {name: value for name, value in fields.items() if name != "progress"}, file)


def test_what_is_newer_than_where_the_training_goes_on_is_set_aside(tmp_path: Path) -> None:
    files = checkpoints(tmp_path)
    damage(files[2], "cut off")
    found = newest_checkpoint(tmp_path, say=lambda _: None)
    assert found is not None
    set_newer_aside(found)
    assert not files[2].exists()
    assert (tmp_path / "set-aside" / files[2].name).exists()
    assert newest_checkpoint(tmp_path) == found


def test_the_writer_keeps_the_newest_and_those_for_good_and_tells_what_failed(tmp_path: Path, monkeypatch) -> None:
    writer = CheckpointWriter(tmp_path, last=2)
    weights = torch.zeros(8)
    for epoch in range(1, 6):
        writer.save(Manifest(progress=Progress(epoch=epoch), kept=epoch == 2), {"weights": weights})
        weights += 1  # what is written is a copy
    writer.wait()
    assert sorted(file.stem for file in tmp_path.glob("*.pt")) == ["epoch-0002", "epoch-0004", "epoch-0005"]
    assert read_tensors(tmp_path / "epoch-0005.pt")["weights"].tolist() == [4.0] * 8
    monkeypatch.setattr("os.fsync", _full)
    writer.save(Manifest(progress=Progress(epoch=6)), {})
    with pytest.raises(MachineError, match=r"epoch-0006.pt cannot be written: No space left on device; free space and"):
        writer.wait()
    monkeypatch.undo()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.file.stem == "epoch-0005"


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


# ---- tensors


def test_files_that_grow_on_being_read_are_refused(tmp_path: Path) -> None:
    file, packed = tmp_path / "a.pt", tmp_path / "b.pt"
    write_tensors(file, {"zeros": torch.zeros(10_000)})
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for part in plain.namelist():
            small.writestr(part, plain.read(part))
    assert packed.stat().st_size < 0.1 * file.stat().st_size
    with pytest.raises(ValueError, match="its parts are compressed, which this program never does"):
        read_tensors(packed)
    with zipfile.ZipFile(packed, "w") as twice:
        twice.writestr("archive/data.pkl", b"x" * 100)
    content = packed.read_bytes()
    packed.write_bytes(content.replace((100).to_bytes(4, "little"), (10**6).to_bytes(4, "little")))
    with pytest.raises(ValueError, match="its parts are larger than the file"):
        read_tensors(packed)


def test_entries_are_of_the_type_that_was_written(tmp_path: Path) -> None:
    content = {"count": 3, "below": -1, "values": {"a": 1.5}, "words": {"a": "b"}}
    assert take(content, "count", int, tmp_path) == 3
    for name, kind in (("missing", int), ("count", dict), ("below", int)):
        with pytest.raises(UserError, match=rf"{name} in .* is (missing|.* instead of \w+); use the run's own files"):
            take(content, name, kind, tmp_path)
    assert take_numbers(content, "values", tmp_path) == {"a": 1.5}
    with pytest.raises(UserError, match=r"words in .* holds 'b' for 'a'; names and numbers belong there"):
        take_numbers(content, "words", tmp_path)


# ---- released networks


def test_a_released_network_is_checked_part_by_part(tmp_path: Path) -> None:
    file = tmp_path / "network.pt"
    save_network(file, Subnet(TINY, ARCH))
    whole = read_tensors(file)
    assert str(load_network(file).arch) == str(ARCH)
    weights = whole["network"]
    first = next(iter(weights))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"format": 7}, r"is no released network of format 1; give a file that retraining wrote"),
        ({"space": 3}, r"network .*: this is not a search space"),
        ({"arch": "c1"}, r"network .*: architecture 'c1' does not parse"),
        ({"arch": "c8:k3t2,k3t2_c16:k3t2_c20:k3t2,k3t2"}, r"network .*: block 5 of architecture|network .*: block \d"),
        (
            {"network": {"other": torch.zeros(90_000)}},
            r"holds no weights of this network \(.*\); use the run's own files",
        ),
        ({"network": {**weights, first: torch.zeros(2)}}, r"is torch.float32 \[2\]; it must be torch.float32 \["),
        ({"network": {**weights, first: "text"}}, r"is str; it must be torch.float32"),
    ]
    for change, message in cases:
        write_tensors(file, {**whole, **change})
        with pytest.raises(UserError, match=message):
            load_network(file)
    wide = tiny_space(tail_channels=90_000)
    write_tensors(file, {"format": FORMAT, "space": wide.to_json(), "arch": str(ARCH), "network": {}})
    with pytest.raises(UserError, match=r"is too small for the weights of c8:"):
        load_network(file)
    damage(file, "cut off")
    with pytest.raises(UserError, match=r"network .* cannot be read: .*; give a file that retraining wrote"):
        load_network(file)


def test_a_network_that_finds_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", _full)
    with pytest.raises(MachineError, match=r"cannot write .*network.pt: No space left on device; free space on its"):
        save_network(tmp_path / "network.pt", Subnet(TINY, ARCH))
    assert list(tmp_path.iterdir()) == []


# ---- evaluations

KEY = StoreKey("w", "i", "m")
ROW = "INSERT OR REPLACE INTO evaluations VALUES ('w', 'i', 'm', {})"


def stored(file: Path) -> EvaluationStore:
    store = EvaluationStore(file)
    store.save(KEY, {"c8:k3t3": Tally(10, 8, 2.5, bytes([0b10110000, 0]))})
    return store


OF_ANOTHER_TYPE, CONTRADICTION = "a value is of another type", "the answers of a do not agree with their counts"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("'a', 10, 3, 8, 2.5, 'text'", OF_ANOTHER_TYPE),
        ("'a', 10, 3, 8, 'text', x'B000'", OF_ANOTHER_TYPE),
        ("'a', 'ten', 3, 8, 2.5, x'B000'", OF_ANOTHER_TYPE),
        ("x'00', 10, 3, 8, 2.5, x'B000'", OF_ANOTHER_TYPE),
        ("'a', 17, 3, 8, 2.5, x'B000'", CONTRADICTION),
        ("'a', 8, 3, 8, 2.5, x'B000'", CONTRADICTION),
        ("'a', -1, 0, 0, 2.5, x''", CONTRADICTION),
        ("'a', 10, 4, 8, 2.5, x'B000'", CONTRADICTION),
        ("'a', 10, 3, 2, 2.5, x'B000'", CONTRADICTION),
        ("'a', 10, 3, 11, 2.5, x'B000'", CONTRADICTION),
    ],
)
def test_a_row_that_contradicts_itself_is_no_score(tmp_path: Path, row: str, reason: str) -> None:
    file = tmp_path / "evaluations.sqlite"
    store = stored(file)
    assert store.load(KEY)["c8:k3t3"].correct1 == 3
    with sqlite3.connect(file) as database:
        database.execute(ROW.format(row))
    with pytest.raises(
        UserError, match=rf"the evaluations in .* are damaged: {reason}; restore the file, or remove it"
    ):
        store.load(KEY)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE more (a)",
        "CREATE VIEW more AS SELECT * FROM evaluations",
        "CREATE TRIGGER t AFTER INSERT ON evaluations BEGIN DELETE FROM evaluations; END",
    ],
)
def test_a_database_that_holds_more_is_refused(tmp_path: Path, statement: str) -> None:
    file = tmp_path / "evaluations.sqlite"
    stored(file).close()
    with sqlite3.connect(file) as database:
        database.execute(statement)
    with pytest.raises(UserError, match=r"has other tables than a file of evaluations; give one that this program"):
        EvaluationStore(file)


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "evaluations.sqlite"
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE evaluations (weights, images, mode, arch, seen, correct5, loss_sum, answers)")
    with pytest.raises(UserError, match="has other tables than"):
        EvaluationStore(file)


@pytest.mark.parametrize("page", [1, 2, 3])
def test_a_damaged_database_is_told(tmp_path: Path, page: int) -> None:
    file = tmp_path / "evaluations.sqlite"
    store = EvaluationStore(file)
    archs = [str(arch) for arch in random_archs(TINY, 300)]
    store.save(KEY, {arch: Tally(10, 8, 2.5, bytes([0b10110000, 0])) for arch in archs})
    store.close()
    content = bytearray(file.read_bytes())
    content[(page - 1) * 4096 : page * 4096] = b"\xa5" * 4096
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot use .*; give a file|are damaged: .*; restore the file, or remove it"):
        EvaluationStore(file).load(KEY)


# ---- JSON


def test_json_is_bounded_and_never_nested_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_json(file)
    assert MAX_JSON_BYTES < 1 << 30
    monkeypatch.setattr("bsnas.engine.runs.rundir.MAX_JSON_BYTES", 1000)
    with pytest.raises(UserError, match=r"is larger than 0 MiB, no file of a run; restore it or start a new run"):
        read_json(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"more": 1}, r"config.json: more is unknown; allowed are preset, space"),
        (lambda c: c | {"seed": "0"}, r"config.json: seed is '0', taken as 0; take a file that this program wrote"),
        (lambda c: c | {"seed": 1.5}, r"config.json: seed: .*; take a file that this program wrote \(1 problems\)"),
        (
            lambda c: c | {"retrain": c["retrain"] | {"learning_rate": float("inf")}},
            r"retrain.learning_rate is inf, which is no number to compute with",
        ),
        (lambda c: c | {"space": c["space"] | {"classes": 10**9}}, r"classes of a space is 1000000000; it must be"),
    ],
)
def test_a_configuration_is_taken_as_it_is_or_not_at_all(change: Callable[[Any], Any], message: str) -> None:
    data = to_json(preset("digits"))
    assert from_json(RunConfig, data, Path("config.json")) == preset("digits")
    with pytest.raises(UserError, match=message):
        from_json(RunConfig, change(data), Path("config.json"))


def test_a_configuration_nested_too_deeply(monkeypatch: pytest.MonkeyPatch) -> None:
    def deep(*_: Any) -> None:
        raise RecursionError

    monkeypatch.setattr("bsnas.engine.config.TypeAdapter.validate_python", deep)
    with pytest.raises(UserError, match=r"config.json is nested too deeply; take a file that this program wrote"):
        from_json(RunConfig, {}, Path("config.json"))


def test_tables_have_sizes_that_fit_in_memory() -> None:
    cluster = TINY.clusters[0]
    (row,) = cluster.rows
    for owner, name in ((row, "kernels"), (row, "expansions"), (cluster, "channels")):
        with pytest.raises(UserError, match=rf"{name} \(.*\) of a cluster: allowed are at most {MOST[name]}"):
            replace(owner, **{name: (MOST[name] + 2,)})
    with pytest.raises(UserError, match=r"a space has at most 1000 blocks; give clusters with fewer"):
        tiny_space(clusters=(replace(cluster, rows=(replace(row, blocks=600), replace(row, blocks=600))),))
    many = tuple(range(1, 1000))
    with pytest.raises(UserError, match=rf"a cluster has more than {MOST_OPERATIONS} operations; give fewer options"):
        mobile_cluster(blocks=1, kernels=(3, 5, 7, 9), expansions=(1, 2, 3), channels=many, stride=1)
    with pytest.raises(UserError, match=r"live operations of block 1 must be|operation .* does not parse"):
        Space.from_json({**TINY.to_json(), "live": [["k" + "9" * 5000]]})


def test_a_search_result_names_an_architecture(tmp_path: Path) -> None:
    file = tmp_path / "best.json"
    for content in ([], {}, {"arch": 3}):
        write_json(file, content)
        with pytest.raises(UserError, match=r"names no architecture; run search/evolve.py again, or give --arch"):
            named_arch(file)
    write_json(file, {"arch": str(ARCH)})
    assert named_arch(file) == str(ARCH)


def test_what_a_mutated_file_says_is_compared_by_value(tmp_path: Path) -> None:
    reader = arch_reader(TINY, ARCH)
    assert wrong_answer(reader, tmp_path, json.dumps({"arch": str(ARCH), "more": float("nan")}).encode()) == (
        "accepted",
        None,
    )
    other = replace(reader, read=lambda file: {"arch": "c1:k3t3"})
    assert wrong_answer(other, tmp_path, reader.content)[1] == "something else was read than the file says"


@pytest.mark.timeout(280)
def test_mutated_files_are_refused_in_one_line_or_read_as_they_are(tmp_path: Path) -> None:
    manifest = manifest_file(checkpoints(tmp_path, 1)[0])
    readers = {
        "arch": arch_reader(TINY, ARCH),
        "config": config_reader(preset("digits")),
        "space": space_reader(TINY),
        "manifest": manifest_reader(manifest),
        "manifest fields": manifest_fields_reader(manifest),
    }
    counts, wrong = try_mutations(readers, tmp_path, 60, seed=0)
    assert wrong == []
    assert all(counts[f"{kind} refused"] > 30 for kind in readers)
