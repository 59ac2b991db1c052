"""The networks of a run that the first rungs of its finals have trained alone: what a correction learns from."""

from collections import defaultdict
from typing import Any

from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.rundir import RunDir, read_json
from bsnas.engine.space.arch import Arch
from bsnas.search.algorithms.correction import TrainedNetwork


def trained_networks(run: RunDir) -> list[TrainedNetwork]:
    """Those with the same schedule; where there are several schedules, of the one that most networks had.

    Raises `UserError` for a damaged file.
    """
    found: dict[str, list[TrainedNetwork]] = defaultdict(list)
    space = run.config().space
    for file in sorted(run.finals.glob("*/rung-1/result.json")):
        content: Any = read_json(file)
        try:
            request, scores = dict(content["request"]), content["scores"]
            arch = Arch.parse(request.pop("arch"))
            space.check(arch)
            network = TrainedNetwork(arch, float(content["one_shot_loss"]), float(scores["top1"]))
        except (TypeError, KeyError, ValueError, UserError) as error:
            raise UserError(
                f"{file} holds no result of the finals ({error}); remove it, and repeat search/finals.py"
            ) from None
        found[str(sorted(request.items()))].append(network)
    return max(found.values(), key=len, default=[])
