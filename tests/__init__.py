"""The tests mirror the packages."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository, where the scripts are."""


def script(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script as a user does, by its path in the repository."""
    command = [sys.executable, str(ROOT / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=280)
