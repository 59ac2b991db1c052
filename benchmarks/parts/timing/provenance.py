"""When and from which commit a figure was measured."""

from bsnas.engine.runs.commands import commit, now


def provenance() -> dict[str, str]:
    """`date` (UTC, to the second) and `commit`, marked with + when files differ from it."""
    return {"date": now(), "commit": commit()}
