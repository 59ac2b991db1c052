"""When and from which commit a figure was measured."""

import subprocess
from datetime import datetime, timezone
from pathlib import Path


def provenance() -> dict[str, str]:
    """`date` (UTC, to the second) and `commit`, marked with + when files differ from it."""
    return {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": _commit()}


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
