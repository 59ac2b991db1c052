"""Searches under latency and memory, with several objectives, and for several budgets."""

import random
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsnas.benchmarks.search_quality import QualityArguments, against_best_limit, against_shared, hypervolumes, won
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.runs.rundir import RunDir, read_json
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limited_sampling import Sampler, check_limits
from bsnas.engine.space.limits import Limit, format_cost
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.spaces import space_named
from bsnas.search.algorithms.evolution import Candidate, EvolutionConfig
from bsnas.search.algorithms.nsga2 import hypervolume, pareto_front, survivors
from bsnas.search.evolve import EvolveArguments, refuse_unreachable
from bsnas.search.latency import LatencyTableArguments, measure_table
from bsnas.search.latency_tables.model import LatencyModel
from bsnas.search.runs.finalists import LatencyTable, first_inside
from bsnas.search.runs.search import generations
from bsnas.search.runs.search_run import search_run
from tests import ROOT
from tests.search.algorithms.test_evolution import Toy
from tests.search.runs import small_space, untrained_run
from tests.search.spaces import all_archs, random_space

ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SMALL = EvolutionConfig.scaled(population=6, iterations=2, seed=0)


def candidate(top1: float, macs: float, params: float = 1.0) -> Candidate:
    arch = uniform_arch(small_space(), random.Random(f"{top1} {macs} {params}"))
    return Candidate(arch, {"macs": macs, "params": params}, top1, 1.0, 0.0)


def test_peak_activation_is_what_the_layers_hold():
    space = small_space()
    arch = uniform_arch(space, random.Random(2))
    network = Subnet(space, arch).eval()
    most, shortcut = 0, None

    def enter(block, inputs):
        nonlocal shortcut
        shortcut = inputs[0] if block.plan.shortcut else None

    def note(layer, inputs, output):
        nonlocal most
        kept = 0 if shortcut is None or inputs[0] is shortcut else shortcut.numel()
        most = max(most, kept + inputs[0].numel() + output.numel())

    for block in network.parts:
        block.register_forward_pre_hook(enter)
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(note)
    network(torch.zeros(1, 3, 16, 16))
    assert CostModel(space).activation_bytes(arch) == 4 * most


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9).map(random.Random))
def test_limits_on_the_peak_are_sampled_without_rejection(rng):
    space = random_space(rng, max_architectures=300)
    peak = CostModel(space).activation_bytes
    archs = all_archs(space)
    assert peak.range() == (min(map(peak, archs)), max(map(peak, archs)))
    limit = Limit("activation_bytes", high=peak(rng.choice(archs)))
    sampler = Sampler(Problem.of(space, (limit,)))
    for _ in range(60):
        arch = sampler.draw(rng)
        space.check(arch)
        assert peak(arch) <= limit.high


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9).map(random.Random))
def test_the_smallest_network_is_found(rng):
    space = random_space(rng, max_architectures=300)
    macs = CostModel(space).macs
    arch = macs.best(min)[1]
    space.check(arch)
    assert macs(arch) == min(map(macs, all_archs(space)))


def test_four_limits_that_nothing_keeps_end_soon_with_every_range():
    space = space_named("imagenet")
    macs = CostModel(space).macs
    latency = replace(
        macs,
        stem=macs.stem / 2e7,
        block=lambda *place: macs.block(*place) / 2e7,
        tail=lambda channels: macs.tail(channels) / 2e7,
    )
    started = time.perf_counter()
    limits = (
        Limit("macs", low=700e6), Limit("params", high=4e6), Limit("latency_ms", high=25.0),
        Limit("activation_bytes", high=5e6),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"no architecture has macs >= 700M and .* latency_ms <= 25 .*reachable"):
        check_limits(Problem.of(space, limits, latency=latency))
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("value", "text"), [(0.61237, "0.6124"), (12.3456, "12.35"), (1234.5, "1234"), (float("inf"), "any")]
)
def test_milliseconds_are_written_with_four_digits(value, text):
    assert format_cost("latency_ms", value) == text


def brute_force(candidates):
    def points(c):
        return (-c.top1, c.costs["macs"], c.costs["params"])

    def dominated(a, b):
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    return {points(a) for a in candidates if not any(dominated(points(a), points(b)) for b in candidates)}


def test_the_pareto_front_is_the_brute_force_one():
    rng = random.Random(0)
    for _ in range(20):
        found = [candidate(rng.randrange(6) / 6, rng.randrange(6), rng.randrange(6)) for _ in range(40)]
        front = pareto_front(found, ("macs", "params"))
        assert {(-c.top1, c.costs["macs"], c.costs["params"]) for c in front} == brute_force(found)
        assert len(front) == len(brute_force(found)), "equals are kept once"
        assert set(map(id, survivors(found, ("macs", "params"), len(front)))) & set(map(id, front))


def test_the_hypervolume_is_the_dominated_share_of_the_box():
    ranges = {"macs": (0.0, 10.0)}
    assert hypervolume([candidate(1.0, 0.0)], ("macs",), ranges) == pytest.approx(1)
    assert hypervolume([candidate(0.5, 5.0), candidate(0.75, 8.0)], ("macs",), ranges) == pytest.approx(
        0.5 * 0.5 + 0.25 * 0.2
    )
    assert hypervolume([], ("macs",), ranges) == 0


def test_nsga2_is_reproducible_continues_and_beats_a_search_per_budget():
    space = space_named("imagenet")
    toy = Toy(uniform_arch(space, random.Random(1)))
    problem = Problem.of(space, objectives=("top1", "macs"))
    config = EvolutionConfig.scaled(population=40, iterations=9, seed=0)
    whole = list(generations(problem, config, toy))
    assert [len(g) for g in whole] == [40] * 10
    assert len(set(toy.asked)) == 400, "evaluated twice"
    rest = list(generations(problem, config, Toy(toy.target), whole[:4]))
    assert whole[4:] == rest
    ranges = {"macs": problem.costs["macs"].range()}
    low, high = ranges["macs"]
    parts = []
    for budget in np.linspace(low, high, 5)[1:]:
        limited = Problem.of(space, (Limit("macs", high=float(budget)),))
        small = EvolutionConfig.scaled(population=10, iterations=9, seed=0)
        parts += [c for g in generations(limited, small, toy) for c in g]
    assert len(parts) == 400
    together = [c for g in whole for c in g]
    assert hypervolume(together, ("macs",), ranges) > hypervolume(parts, ("macs",), ranges)


def test_nsga2_keeps_limits():
    space = space_named("imagenet")
    toy = Toy(uniform_arch(space, random.Random(1)))
    limits = (Limit("macs", high=300e6), Limit("activation_bytes", high=6e6))
    problem = Problem.of(space, limits, objectives=("top1", "macs", "params"))
    config = EvolutionConfig.scaled(population=12, iterations=2, seed=0)
    for generation in generations(problem, config, toy):
        assert all(problem.allows(c.arch) for c in generation)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a latency table."""
    run = untrained_run(tmp_path_factory.mktemp("goals") / "run")
    measure_table(run, LatencyTableArguments(run=run.path, fit=12, held_out=5, visits=5, threads=1))
    return run


def test_a_search_under_latency_times_its_finalists(run, capsys):
    trained = TrainedRun.open(run.path, ALONE)
    space = trained.supernet.space
    (file,) = run.latency.glob("model-*.json")
    table = LatencyTable.of(file, LatencyModel.load(file), space, foreign=False)
    low, high = table.cost.range()
    limit = Limit("latency_ms", high=(low + high) / 2)
    figures = search_run(trained, (limit, Limit("macs", high=50_000)), SMALL, None, table=table, finalists=3)
    assert figures["best"]["macs"] <= 50_000
    assert len(figures["finalists"]) == 3
    assert all(row["predicted_ms"] <= limit.high and row["measured_ms"] > 0 for row in figures["finalists"])
    printed = capsys.readouterr().out
    assert "predicted   measured" in printed
    assert read_json(run.search / "best.json")["latency_ms"] == figures["best"]["latency_ms"]

    both = search_run(trained, (), SMALL, None, objectives=("top1", "macs", "latency"), table=table, finalists=2)
    assert both["pareto"] == len(read_json(run.search / "pareto.json"))
    assert 0 < both["hypervolume"] <= 1
    assert "top1-macs-latency-seed0" in both["file"]
    assert search_run(trained, (), SMALL, None, objectives=("top1", "macs", "latency"), table=table)["reused"] == 18


def test_the_slower_ones_of_the_finalists_are_passed_over():
    assert first_inside([1.2, 1.02, 0.5], Limit("latency_ms", high=1.0)) == 1
    assert first_inside([1.2, 1.1, 1.05], Limit("latency_ms", high=1.0)) is None
    assert first_inside([0.5, 0.88, 0.98], Limit("latency_ms", 0.9, 1.0)) == 1, "3 % of noise at either end"


def test_a_foreign_table_is_refused_unless_asked_for(run):
    (file,) = run.latency.glob("model-*.json")
    model = LatencyModel.load(file)
    foreign = LatencyModel(**{**model.__dict__, "context": type(model.context)(
        **{**model.context.__dict__, "device": "another CPU"})})  # fmt: skip
    with pytest.raises(UserError, match=r"device another CPU and not .*, \d+ threads; .*--foreign-table"):
        LatencyTable.of(file, foreign, small_space(), foreign=False)
    assert not LatencyTable.of(file, foreign, small_space(), foreign=True).local


def test_budgets_share_evaluations_and_unreachable_limits_need_no_torch(run):
    command = [sys.executable, str(ROOT / "search/evolve.py"), "--run", str(run.path)]
    small = ["--population", "6", "--iterations", "1", "--json", str(run.path / "f.json")]
    done = subprocess.run([*command, "--budgets", "30K,40K,50K", *small], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    figures = read_json(run.path / "f.json")
    assert [row["limits"]["macs"] for row in figures["budgets"]] == ["macs <= 30K", "macs <= 40K", "macs <= 50K"]
    tops = [row["best"]["top1"] for row in figures["budgets"]]
    assert tops == sorted(tops), "what smaller budgets found counts for larger ones"
    started = time.perf_counter()
    done = subprocess.run([*command, "--max-latency-ms", "0.000001"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no architecture has latency_ms <= 1e-06; reachable in this space: latency_ms" in done.stderr
    assert time.perf_counter() - started < 5


def test_spaces_are_read_without_the_run(run, tmp_path):
    refuse_unreachable(RunDir(tmp_path), [(Limit("macs", high=1),)], None)
    with pytest.raises(UserError, match="no architecture has macs <= 1"):
        refuse_unreachable(run, [(Limit("macs", high=1),)], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": ("macs",)}, "objectives macs: give top1 first"),
        ({"objectives": ("top1,speed",)}, "objectives top1,speed: give top1 first, then any of macs, params, memory"),
        ({"budgets": ("1M",), "max_macs": "2M"}, "--budgets sets the limit on MACs"),
        ({"max_latency_ms": 0.0}, "latency limit 0.0 ms; it must be above 0, and finite"),
        ({"min_latency_ms": float("inf")}, "latency limit inf ms; it must be above 0, and finite"),
        ({"finalists": 13}, "finalists 13; allowed are 0 to 12"),
    ],
)
def test_requests_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        EvolveArguments(run=tmp_path, **options)


def test_a_latency_has_both_ends(tmp_path):
    arguments = EvolveArguments(run=tmp_path, min_latency_ms=0.9, max_latency_ms=1.0)
    assert arguments.limits() == (Limit("latency_ms", 0.9, 1.0),)
    assert EvolveArguments(run=tmp_path, min_latency_ms=0.9).limits() == (Limit("latency_ms", 0.9),)
    with pytest.raises(UserError, match="latency_ms from 2 to 1 is empty; the lower limit must not exceed the upper"):
        EvolveArguments(run=tmp_path, min_latency_ms=2.0, max_latency_ms=1.0).limits()


def test_lists_are_written_with_spaces_or_commas(tmp_path):
    assert EvolveArguments(run=tmp_path, objectives=("top1,macs", "latency")).goals == ("top1", "macs", "latency")
    assert EvolveArguments(run=tmp_path, budgets=("1M,2M", "3M")).all_budgets == ("1M", "2M", "3M")
    assert isinstance(Problem.of(small_space()), Problem)


def test_the_best_macs_limit_is_judged_by_the_other_seeds():
    top1 = {"latency_ms <= 1": (0.7, 0.7, 0.7), "macs <= 1M": (0.9, 0.5, 0.6), "macs <= 2M": (0.6, 0.7, 0.8)}
    rows = [
        {"limit_ms": 1.0, "seed": seed, "searched": searched, "searches": 1, "top1": value}
        for searched, values in top1.items()
        for seed, value in enumerate(values)
    ]
    found = against_best_limit([*rows, {**rows[0], "searched": "macs <= 1M", "searches": 5, "top1": 1.0}])
    # seed 0: 1M has 0.5 and 0.6 elsewhere, 2M 0.7 and 0.8, so 2M, 0.6 here; seed 1: 1M, 0.5; seed 2: 1M, 0.6
    assert list(found) == ["1.0000 ms", "all"]
    assert found["all"] == found["1.0000 ms"]
    assert (found["all"]["more"], found["all"]["as"], found["all"]["less"]) == (3, 0, 0)
    assert found["all"]["mean"] == pytest.approx(0.4 / 3)
    assert against_best_limit([row for row in rows if row["seed"] == 0]) is None, "no other seed can judge"
    nothing = [{**row, "why": "nothing is fast enough"} for row in rows]
    for row in nothing:
        if row["searched"] == "macs <= 2M":
            del row["top1"]
    assert against_best_limit(nothing)["all"]["less"] == 1  # a search that finds nothing is never the best


def test_the_quality_benchmark_counts_comparisons_and_shares_evaluations(tmp_path):
    rows = [
        {"limit_ms": 1.0, "seed": 0, "searched": "latency_ms <= 1", "searches": 1, "top1": 0.9},
        {"limit_ms": 1.0, "seed": 0, "searched": "macs <= 1M", "searches": 1, "top1": 0.8},
        {"limit_ms": 1.0, "seed": 0, "searched": "macs <= 2M", "searches": 1, "top1": 0.9},
        {"limit_ms": 1.0, "seed": 0, "searched": "macs <= 3M", "searches": 1, "why": "nothing is fast enough"},
        {"limit_ms": 1.0, "seed": 1, "searched": "latency_ms <= 1", "searches": 1, "top1": 0.7},
        {"limit_ms": 1.0, "seed": 1, "searched": "macs <= 1M", "searches": 1, "top1": 0.8},
    ]
    assert won(rows) == {"more": 2, "as": 1, "less": 1}
    shared = [{**row, "searches": 5, "top1": top1} for row, top1 in zip(rows, (0, 0.5, 0.7, 0, 0, 0.7), strict=True)]
    found = against_shared(rows + [row for row in shared if "macs" in row["searched"]])
    assert (found["more"], found["as"], found["less"]) == (1, 1, 0)
    assert found["mean"] == pytest.approx(0.1)
    assert found["standard_error"] == pytest.approx(0.1)
    space = space_named("imagenet")
    arguments = QualityArguments(run=tmp_path, population=15, iterations=1, seeds=1)
    figures = hypervolumes(space, Toy(uniform_arch(space, random.Random(1))), arguments)
    assert (figures["rows"][0]["evaluations_nsga2"], figures["rows"][0]["evaluations_budgets"]) == (30, 30)
    assert 0 < figures["budgets"] < 1
    with pytest.raises(UserError, match="population 14: give a multiple of the 5 budgets"):
        QualityArguments(run=tmp_path, population=14)
    with pytest.raises(UserError, match="limits are above 0 and at most 1"):
        QualityArguments(run=tmp_path, limits=(1.5,))
