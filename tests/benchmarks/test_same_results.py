"""benchmarks/same_results.py: what it finds, and what it says of a script or a commit that is not there."""

import subprocess
import sys
from pathlib import Path

import pytest

from bsnas.benchmarks import same_results
from bsnas.engine.host.errors import UserError
from tests import ROOT

SCRIPT = ROOT / "benchmarks/same_results.py"


def test_a_commit_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--against", "no-such-commit"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "--against no-such-commit cannot be checked out" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_script_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import sys; print('no room'); sys.exit(3)")
    with pytest.raises(UserError, match=r"train.py of .* ended with an error; it said: no room"):
        same_results.call(tmp_path, "train.py", [], 2)


def test_differences_are_counted_and_end_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {"before": 1.0, "after": 1.0}
    monkeypatch.setattr(same_results, "check_out", lambda commit, where: tmp_path)
    monkeypatch.setattr(same_results, "git", lambda *arguments: None)
    monkeypatch.setattr(same_results, "pipeline", lambda *arguments: None)
    monkeypatch.setattr(same_results, "outcome", lambda run: {"loss": losses[run.name.split("-")[0]]})
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--against", "HEAD", "--directory", str(tmp_path)])
    same_results.main()
    assert "1 processes: 1 files compared, 0 differences" in capsys.readouterr().out
    losses["after"] = 1.0000001
    with pytest.raises(UserError, match=r"results differ from those of HEAD in the places listed above"):
        same_results.main()
    assert "/loss: 1.0 and 1.0000001" in capsys.readouterr().out
