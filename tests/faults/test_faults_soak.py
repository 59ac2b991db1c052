"""The soak benchmark tells what failed, and a pipeline that fails by itself is no reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bsnas.benchmarks import soak
from bsnas.benchmarks.parts.faults.disturbed_runs import differences, error_lines, wait_until
from bsnas.benchmarks.parts.faults.soak_pipeline import Pipelines, Report
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.rundir import read_json


def test_what_failed_is_listed_counted_and_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> Report:
        report = Report()
        report.counts["hits"] += 2
        report.expect(True, "nothing")
        report.expect(False, "weights differ")
        return report

    monkeypatch.setattr(soak.soak_parts, "nan", failing)
    arguments = ["soak.py", "--parts", "nan", "--directory", str(tmp_path), "--json", str(tmp_path / "soak.json")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(UserError, match="1 checks failed; they are listed above"):
        soak.main()
    said = capsys.readouterr().out
    assert "FAILED: weights differ" in said
    assert "2  hits" in said
    figures = read_json(tmp_path / "soak.json")
    assert figures["failures"] == 1
    assert figures["parts"]["nan"]["counts"] == {"hits": 2}


class Ended:
    def ended(self, _: float) -> int:
        return 1

    def said(self) -> str:
        return "error: something"


def test_an_undisturbed_run_that_fails_is_no_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines = Pipelines(tmp_path, seed=0, gap=1)
    monkeypatch.setattr("bsnas.benchmarks.parts.faults.soak_pipeline.start_ranks", lambda *_: [Ended(), Ended()])
    with pytest.raises(RuntimeError, match=r"undisturbed training by two ranks ended with \[1, 1\]: error: something"):
        pipelines.two_ranks("two")
    monkeypatch.setattr("bsnas.benchmarks.parts.faults.soak_pipeline.Started", lambda *_, **__: Ended())
    with pytest.raises(RuntimeError, match=r"undisturbed engine/train.py ended with 1: error: something"):
        pipelines.undisturbed(tmp_path / "run")


def test_every_difference_is_found() -> None:
    one = {"a": [torch.zeros(2), 1], "b": "x"}
    assert differences(one, {"a": [torch.zeros(2), 1], "b": "x"}) == []
    assert differences(one, {"a": [torch.zeros(2).double(), 1], "b": "x"}) == ["/a/0: tensors differ"]
    found = differences(one, {"a": [torch.zeros(2), 2], "c": 0})
    assert sorted(found) == ["/a/1: 1 and 2", "/b: in one of both", "/c: in one of both"]
    assert error_lines("a\nerror: b\n") == ["error: b"]
    with pytest.raises(TimeoutError, match=r"did not happen within 0.02 s"):
        wait_until(lambda: False, 0.02)
