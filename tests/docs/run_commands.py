"""Run scripts one after another in one process: importing torch and DeepSpeed anew for each would take minutes.

Reads JSON from the file in argv[1], a list of {"words": [script, option, ...]}, and writes to argv[2] a list of
{"exit", "output", "seconds", "directory"}. It ends at the first that fails.
"""

import contextlib
import io
import json
import runpy
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ALONE = ("benchmarks/serve_check.py",)
"""Scripts that need a process of their own: this one proves that serving needs no torch."""


def run(words: list[str]) -> object:
    """The exit code of a script with its options."""
    if words[0] in ALONE:
        done = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], capture_output=True, text=True)
        print(done.stdout, done.stderr)
        return done.returncode
    sys.argv = words
    try:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    tasks, results_file = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).absolute()
    results = []
    for task in tasks:
        output, started = io.StringIO(), time.perf_counter()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = run(task["words"])
        took = {"seconds": time.perf_counter() - started, "directory": str(Path.cwd())}
        results.append({"exit": code, "output": output.getvalue(), **took})
        results_file.write_text(json.dumps(results))
        if code != 0:
            break


if __name__ == "__main__":
    main()
