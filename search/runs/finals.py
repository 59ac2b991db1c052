"""The finals of a search: its best networks are trained alone, the better half for longer, until one is left.

A one-shot score tells networks of one budget apart only roughly; a short training of each tells far more. A rung
(successive halving, arXiv 1502.07943) trains every network that is left at a constant rate and then through a short
decay, and compares them on the search-validation images, which none of them trained on. The next rung goes on from
before the decay, so that nothing is trained twice.

finals/NAME/         a network's training at the constant rate
finals/NAME/rung-N/  its decay in rung N, and what it scored
finals/finals.json   the rungs so far and the winner, whose training engine/retrain.py goes on with
"""

import hashlib
import random
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bsnas.engine.config import SafetyConfig
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import on_main
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.runs.rundir import NetworkDir, read_json, write_json
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.training.network import RungTraining, measure_accuracy
from bsnas.search.algorithms.evolution import Candidate
from bsnas.search.runs.history import MOST_RANKED, LatestSearch
from bsnas.search.runs.printing import print_rung

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FinalsConfig:
    """How many networks, and how long they are trained."""

    networks: int = 8
    """The best networks of the latest search that enter."""
    random: int = 0
    """Networks of its first, random generation that are trained in the first rung too, for a correction to learn
    from; they do not compete."""
    epochs: int = 2
    """Epochs at a constant rate up to the end of the first rung; each further rung doubles them."""
    decay_epochs: int = 1
    """Epochs in which the rate then falls to zero, before networks are compared."""

    def __post_init__(self) -> None:
        if not 2 <= self.networks <= MOST_RANKED or min(self.random, self.decay_epochs) < 0 or self.epochs < 1:
            raise UserError(
                f"finals of {self.networks} networks and {self.random} random ones with {self.epochs} epochs and "
                f"{self.decay_epochs} of decay: need 2 to {MOST_RANKED} networks, 0 random ones or more, at least 1 "
                "epoch and 0 of decay"
            )

    @property
    def rungs(self) -> list[tuple[int, int]]:
        """Of each rung the number of networks and the epochs at its end, the decay not counted."""
        found, left, epochs = [], self.networks, self.epochs
        while left > 1:
            found.append((left, epochs))
            left, epochs = (left + 1) // 2, 2 * epochs
        return found


class Finals:
    """Holds the finals of a search, on all ranks; what was done before is not done again."""

    def __init__(
        self,
        trained: TrainedRun,
        config: FinalsConfig,
        overrides: Row,
        safety: SafetyConfig = SafetyConfig(),  # noqa: B008
        search: LatestSearch | None = None,
    ) -> None:
        """Of the run's latest search unless another one is given.

        Raises `UserError` where the last rung is longer than a retraining, or no search is there.
        """
        self.trained, self.config, self.overrides, self.safety = trained, config, overrides, safety
        self.process = trained.process
        planned, last = trained.config.retrain.epochs, config.rungs[-1][1]
        if last >= planned:
            raise UserError(
                f"the last rung ends after {last} epochs at a constant rate, and the winner's whole training has "
                f"{planned}; give fewer --networks or --epochs"
            )
        latest = search or on_main(self.process, lambda: LatestSearch.of(trained.run, trained.supernet.space))
        self._search = {"arch": latest.best["arch"], "limits": latest.best["limits"]}
        self.entrants = latest.ranked[: config.networks]
        entered = {candidate.arch for candidate in self.entrants}
        rest = [candidate for candidate in latest.first if candidate.arch not in entered]
        self.others = random.Random(trained.config.seed).sample(rest, min(config.random, len(rest)))
        self._costs = CostModel(trained.config.space)

    def hold(self) -> Row:
        """Train and compare rung by rung. Returns what finals.json holds."""
        found: Row = {
            "request": asdict(self.config),
            "search": self._search,
            "rungs": [],
            "others": [],
        }
        left = self.entrants
        for number, (_, epochs) in enumerate(self.config.rungs, 1):
            rows = {candidate.arch: self._row(candidate, number, epochs) for candidate in left}
            if number == 1:
                found["others"] = [self._row(candidate, number, epochs) for candidate in self.others]
            left = sorted(left, key=lambda c: (-rows[c.arch]["top1"], rows[c.arch]["loss"]))
            networks = [rows[candidate.arch] for candidate in left]
            found["rungs"].append({"epochs": epochs, "networks": networks})
            left = left[: (len(left) + 1) // 2]
            if len(left) == 1:
                found["winner"] = {"arch": str(left[0].arch), "epochs": epochs, "training": _name(left[0].arch)}
            on_main(self.process, lambda: write_json(self.trained.run.finals_file, found))
            if self.process.is_main:
                print_rung(number, epochs, networks, len(left))
            if len(left) == 1:
                break
        return found

    def _row(self, candidate: Candidate, number: int, epochs: int) -> Row:
        macs, params = self._costs.macs_and_params(candidate.arch)
        scores = self._scores(candidate, number, epochs)
        about = {"arch": str(candidate.arch), "macs": macs, "params": params}
        return {**about, "one_shot": candidate.top1, "one_shot_loss": candidate.loss, **scores}

    def _scores(self, candidate: Candidate, number: int, epochs: int) -> Row:
        """Top-1 and loss on the search-validation images of a network at the end of a rung."""
        config, decay, arch = self.trained.config, self.config.decay_epochs, candidate.arch
        directory = self.trained.run.finals / _name(arch)
        rung = NetworkDir(directory / f"rung-{number}")
        request = {
            "arch": str(arch), "seed": config.seed, "first_epochs": self.config.epochs, "decay_epochs": decay,
            "learning_rate": config.retrain.learning_rate, "batch_size": config.retrain.batch_size,
        }  # fmt: skip
        asked = {**request, "epochs": epochs}
        known = on_main(self.process, lambda: read_json(rung.result_file) if rung.result_file.is_file() else None)
        if isinstance(known, dict) and known.get("request") == asked:
            return dict(known["scores"])
        if self.process.is_main:
            print(f"rung {number}: {arch}")
        network = self._train(arch, NetworkDir(directory), request, epochs)
        if decay:
            network = self._train(arch, rung, asked, epochs, decay, start=NetworkDir(directory))
        images = self.trained.search_val
        accuracy = on_main(self.process, lambda: measure_accuracy(network, images, self.process.device))
        scores = {"top1": accuracy.top1, "loss": accuracy.loss}

        def store() -> None:
            write_json(rung.result_file, {"request": asked, "one_shot_loss": candidate.loss, "scores": scores})
            shutil.rmtree(rung.checkpoints, ignore_errors=True)

        on_main(self.process, store)
        return scores

    def _train(
        self, arch: Arch, files: NetworkDir, request: Row, epochs: int, decay: int = 0, start: NetworkDir | None = None
    ) -> Subnet:
        config = self.trained.config
        torch.manual_seed(config.seed)
        network = Subnet(config.space, arch)
        training = RungTraining(
            network, config, files.path, request, self.process, self.trained.data, self.overrides, self.safety,
            images=self.trained.data.train, epochs=epochs + decay, start=start.checkpoints if start else None,
            decay_epochs=decay,
        )  # fmt: skip
        if training.progress.epoch > training.epochs:
            raise UserError(
                f"{files.path} is trained {training.progress.epoch} epochs already, more than the {training.epochs} of "
                "its rung; remove the directory to train that network anew"
            )
        training.train()
        return network


def _name(arch: Arch) -> str:
    return hashlib.sha256(str(arch).encode()).hexdigest()[:12]
