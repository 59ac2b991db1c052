"""The tests mirror the packages."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The repository, where the scripts are."""
