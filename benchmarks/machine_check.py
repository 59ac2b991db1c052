"""What is on this machine of what a run on a GPU needs: one table, and a file of its rows for scripts.

    python benchmarks/machine_check.py --place runs --output machine.tsv

Each package is loaded in a process of its own: one that crashes or hangs as it loads is a row like any other. This file
needs nothing but Python, so that it can also tell what an environment lacks that is not complete.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SECONDS = 180
"""After which a package counts as one that does not load; DeepSpeed takes ten on a slow disk."""
DISK_GB = 5.0
"""Generated images, checkpoints, and what Triton and torch.compile keep."""
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
PROBES = {
    "torch": "import torch, torchvision; print(torch.__version__)",
    "gpu": """
import torch
torch.ones(8, device="cuda").sum().item()
gpu = torch.cuda.get_device_properties(0)
print(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}")
""",
    "triton": """
import sys, torch, triton
if torch.cuda.is_available():
    if torch.cuda.get_device_capability() < (8, 0):
        sys.exit("the kernels need compute capability 8.0 or newer")
    triton.runtime.driver.active.get_current_target()  # compiles Triton's driver with the C compiler and Python.h
print(triton.__version__)
""",
    "dali": "import nvidia.dali; print(nvidia.dali.__version__)",
    "deepspeed": "import deepspeed; print(deepspeed.__version__)",
    "onnxruntime": "import onnxruntime as ort; print(ort.__version__, *ort.get_available_providers())",
    "tensorrt": "import tensorrt; print(tensorrt.__version__)",
    "tensorrt-rtx": "import tensorrt_rtx; print(tensorrt_rtx.__version__)",
    "pytest": "import pytest; print(pytest.__version__)",
}
"""Programs that print what they found, or end with why not as the last line of stderr."""


class Row(NamedTuple):
    name: str
    there: bool
    what: str
    """Versions and places; where it is not there, why."""


def probed(name: str, program: str) -> Row:
    """The row of a program, run by this interpreter."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Row(name, False, f"did not load within {SECONDS} s")
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return Row(name, done.returncode == 0, said[-1] if said else f"ended with exit code {done.returncode}")


def python() -> Row:
    version = ".".join(map(str, sys.version_info[:3]))
    return Row("python", sys.version_info >= (3, 10), f"{version}, {sys.executable} (3.10 or newer is needed)")


def cores() -> Row:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Row("cores", True, f"{len(os.sched_getaffinity(0))} CPU cores, {memory:.0f} GB of memory")


def driver() -> Row:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return Row("driver", False, "nvidia-smi does not run")
    return Row("driver", done.returncode == 0, " ".join(done.stdout.split()))


def compiler() -> Row:
    """The C compiler that Triton would take."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return Row("C compiler", found is not None, found or "neither CC nor gcc nor clang; apt-get install gcc")


def python_h() -> Row:
    file = Path(sysconfig.get_path("include")) / "Python.h"
    return Row("Python.h", file.is_file(), str(file) if file.is_file() else f"no {file}; apt-get install python3-dev")


def disk(place: Path) -> Row:
    there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free / 1e9
    return Row("disk", free >= DISK_GB, f"{free:.0f} GB free in {there} ({DISK_GB:.0f} are needed)")


def fashion_mnist() -> Row:
    there = FASHION_MNIST.is_dir()
    return Row("fashion-mnist", there, str(FASHION_MNIST) if there else "apt-get install dataset-fashion-mnist")


def rows(place: Path) -> list[Row]:
    """All rows, in the order of the table."""
    tasks: list[Callable[[], Row]] = [python, cores, lambda: disk(place), driver, compiler, python_h, fashion_mnist]
    tasks += [lambda name=name, program=program: probed(name, program) for name, program in PROBES.items()]  # type: ignore[misc]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda task: task(), tasks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", type=Path, default=Path("."), help="directory whose disk has to take what is made")
    parser.add_argument("--output", type=Path, help="file for the rows: name, yes or no, what; between tabs")
    arguments = parser.parse_args()
    found = rows(arguments.place)
    for row in found:
        print(f"{row.name:14} {'yes' if row.there else 'NO':4} {row.what}")
    if arguments.output:
        lines = ["\t".join((row.name, "yes" if row.there else "no", " ".join(row.what.split()))) for row in found]
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
