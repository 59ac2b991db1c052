"""Every family through everything that walks a plan: sharing, running, scoring, release, latency parts, ONNX, memory.

A new family is tested here as soon as it is in FAMILIES.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.evaluation.folded import FoldedLayers
from bsnas.engine.evaluation.memory import Memory
from bsnas.engine.evaluation.recalibration import RECALIBRATION_BATCH
from bsnas.engine.evaluation.tree import PrefixTree
from bsnas.engine.evaluation.walk import Walker
from bsnas.engine.networks.subnet import PlannedBlock, Subnet, release
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.release.int8 import quantize_onnx
from bsnas.engine.release.onnx import OnnxFormat, compare_logits, export_onnx, onnx_logits, torch_logits
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.canonical import canonical
from bsnas.engine.space.cost import BYTES, CostModel
from bsnas.engine.space.families import FAMILIES
from bsnas.engine.space.plan import Conv, Plan
from bsnas.engine.space.sampling import fair_archs, fair_round, uniform_arch
from bsnas.engine.space.space import Space
from bsnas.engine.space.table import Cluster, Row
from bsnas.kernels import Block
from bsnas.search.backends.plain_onnx import write_plain_onnx
from bsnas.search.latency_tables.network_parts import PartTable
from bsnas.search.latency_tables.part_stacks import stack
from tests.engine.evaluation.cases import counts, loop_logits, random_images, recalibrated_alone, trained_like_supernet
from tests.engine.space.strategies import any_spaces, full_spaces, shrunk_at_random
from tests.engine.tiny import SHARINGS

each_family = pytest.mark.parametrize("family", FAMILIES)
both_springs = pytest.mark.parametrize("springs", ["fixed", "sliced"])


def family_space(family: str, springs: str = "fixed", **changes: object) -> Space:
    """A small space with every axis of a family, a cluster of several blocks and one of a single block."""
    hidden = {"expansions": (1, 2)} if FAMILIES[family].hidden else {}
    axes = {"family": family, "kernels": (3, 5), "activations": ("relu", "relu6"), "identity": True, **hidden}
    plain = {**axes, "identity": False, "activations": ("relu6",), **changes}
    stem = Cluster(channels=(6,), rows=(Row(family="conv", stride=2),))
    several = Cluster(
        channels=(4, 8),
        rows=(Row(**axes, stride=2), Row(**axes, blocks=2)),  # type: ignore[arg-type]
    )
    single = Cluster(channels=(8, 12), rows=(Row(**plain),))  # type: ignore[arg-type]
    last = Cluster(channels=(8, 12), rows=(Row(**axes, blocks=2),))  # type: ignore[arg-type]
    return Space(table=(stem, several, single, last), springs=springs, resolution=16, classes=5)  # type: ignore[arg-type]


def archs_of(space: Space, count: int, seed: int = 0) -> list[Arch]:
    rng = random.Random(seed)
    return list(dict.fromkeys(uniform_arch(space, rng) for _ in range(count)))


def images(space: Space, count: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, space.resolution, space.resolution, generator=generator)


def plain_block(block: Block, x: Tensor, training: bool) -> Tensor:
    """A block written out with functional operations and slices, layer by layer."""

    def layer(conv: Conv, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        weight = block.weights[conv.name]
        weight = weight[:, :, None, None] if weight.dim() == 2 else weight
        cut = (weight.shape[-1] - conv.kernel) // 2
        weight = weight[: conv.outputs, :, cut : cut + conv.kernel, cut : cut + conv.kernel]
        weight = weight if conv.depthwise else weight[:, : conv.inputs]
        groups = conv.inputs if conv.depthwise else 1
        y = F.conv2d(x, weight, stride=conv.stride, padding=conv.kernel // 2, groups=groups)
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        return F.batch_norm(y, mean, var, norm.weight, norm.bias, training)

    plan = block.plan
    assert isinstance(plan, Plan)
    activations = {None: lambda y: y, "relu": F.relu, "relu6": F.relu6}
    y = x
    for conv, norm in zip(plan.layers, block.norms, strict=False):
        y = layer(conv, norm, y)
        if conv is plan.layers[-1] and plan.shortcut is not None:
            if plan.shortcut == "padded":
                y = torch.cat([y[:, : x.shape[1]] + x, y[:, x.shape[1] :]], 1)
            elif plan.shortcut == "identity":
                y = y + x
            else:
                y = y + layer(plan.shortcut, block.norms[-1], x)
        y = activations[conv.activation](y)
    return F.max_pool2d(y, 3, 2, 1) if plan.pool else y


def plain_path(supernet: Supernet, x: Tensor, arch: Arch) -> Tensor:
    for block in supernet.path_blocks(arch):
        x = plain_block(block, x, supernet.training)
    pooled = x.mean((2, 3))
    return F.linear(pooled, supernet.classifier.weight[:, : pooled.shape[1]], supernet.classifier.bias)


# ---- sharing and running


@each_family
@both_springs
@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_path_computes_its_plans_and_gives_gradients_to_what_it_uses(family, springs, sharing):
    space = family_space(family, springs)
    supernet = trained_like_supernet(space, sharing).double()
    for arch, training in zip(archs_of(space, 6), (True, False) * 3, strict=False):
        supernet.train(training)
        x = images(space).double()
        expected = plain_path(supernet, x, arch)  # first, as running statistics move in the other
        supernet.zero_grad(set_to_none=True)
        logits = supernet(x, arch)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        F.cross_entropy(logits, torch.arange(4)).backward()
        active = supernet.active_parameters(arch)
        assert len({id(p) for p in active}) == len(active)
        assert {id(p) for p in active} == {id(p) for p in supernet.parameters() if p.grad is not None}


@each_family
@pytest.mark.parametrize("sharing", SHARINGS)
def test_who_shares_weights_and_that_rounds_reach_all_of_them(family, sharing):
    space = family_space(family)
    supernet = Supernet(space, sharing)
    reached = {id(p) for r in range(60) for arch in fair_round(space, 0, r) for p in supernet.active_parameters(arch)}
    assert reached == {id(p) for p in supernet.parameters()}
    for i, live in enumerate(space.live):
        groups = {"nested": {"all"}, "channels": {str(op.block_op) for op in live}, "independent": set(map(str, live))}
        assert set(supernet.blocks[i].weights) == groups[sharing]
        norms = [
            id(norm)
            for op in live
            for inputs in space.supernet_inputs(i, op.channels)[:1]
            for norm in supernet.block(i, op, inputs).norms
        ]
        assert len(set(norms)) == len(norms)


# ---- scoring


@each_family
@both_springs
def test_folded_scores_are_those_of_a_loop(family, springs):
    space = family_space(family, springs)
    supernet, archs = trained_like_supernet(space), archs_of(space, 12)
    data = random_images(40, classes=5)
    layers = FoldedLayers(supernet, 16, torch.float32)
    tree = PrefixTree(space, archs, 16)
    layers.prepare(tree)
    memory = Memory.plan(torch.device("cpu"), None, 1)
    logits = torch.cat([scores.logits for scores in Walker(tree, layers).walk(data.normalized(), memory)])
    expected = loop_logits(supernet, data, [archs[leaf] for leaf in tree.leaves])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@each_family
@both_springs
def test_recalibrated_scores_are_those_of_networks_recalibrated_alone(family, springs):
    space = family_space(family, springs)
    supernet = trained_like_supernet(space)
    archs = list(dict.fromkeys(canonical(space, arch) for arch in archs_of(space, 6)))
    data, recalibration = random_images(60, classes=5), random_images(48, classes=5, seed=1)
    evaluator = Evaluator(supernet, data, bn="recalibrate", recalibration=recalibration, progress=False)
    scores = evaluator.evaluate(archs)
    for arch, score in zip(archs, scores, strict=True):
        alone = recalibrated_alone(supernet, recalibration, arch, min(48, RECALIBRATION_BATCH))
        logits = loop_logits(alone, data, [arch])
        loss = F.cross_entropy(logits[0], torch.from_numpy(data.labels)).item()
        assert score.loss == pytest.approx(loss, rel=1e-4)
        assert abs(score.correct1 - counts(logits, data.labels)[0]) <= 1


def test_texts_of_one_network_are_scored_once():
    space = family_space("ir")
    evaluator = Evaluator(trained_like_supernet(space), random_images(16, classes=5), progress=False)
    one = Arch.parse("c4:k3t1r,i,k5t2m_c8:k3t1_c8:i,k3t1r")
    other = Arch.parse("c4:k3t1r,k5t2m,i_c8:k3t1_c8:k3t1r,i")
    assert canonical(space, one) == canonical(space, other) == other
    assert evaluator.evaluate([one])[0] == evaluator.evaluate([other])[0]


# ---- release


def widest(space: Space, arch: Arch) -> Arch:
    return Arch(tuple(max(cluster.channels) for cluster in space.clusters), arch.blocks)


@each_family
@both_springs
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_release_equals_the_path_in_value_and_gradient(family, springs, training):
    """With sliced springs for every architecture, with fixed ones at full width."""
    space = family_space(family, springs)
    for arch in archs_of(space, 5, seed=3):
        arch = arch if springs == "sliced" else widest(space, arch)
        supernet = trained_like_supernet(space).double().train(training)
        subnet = release(supernet, arch).double().train(training)
        x1, x2 = (images(space).double().requires_grad_() for _ in range(2))
        mine, theirs = subnet(x1), supernet(x2, arch)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
        F.cross_entropy(mine, torch.arange(4)).backward()
        F.cross_entropy(theirs, torch.arange(4)).backward()
        torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            for parameter in supernet.parameters():  # release() copies slices: let it copy slices of gradients
                parameter.copy_(parameter.grad if parameter.grad is not None else torch.zeros_like(parameter))
        inherited = release(supernet, arch).double()
        for (name, p), expected in zip(subnet.named_parameters(), inherited.parameters(), strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-5, atol=1e-5, msg=name)


@settings(max_examples=25, deadline=None)
@given(space=any_spaces(), seed=st.integers(0, 1000))
def test_in_any_space_paths_run_and_sliced_ones_are_their_releases(space, seed):
    torch.manual_seed(seed)
    supernet = Supernet(space).eval()
    x = torch.randn(2, space.input_channels, space.resolution, space.resolution)
    for arch in fair_archs(space, seed, 2):
        subnet = release(supernet, arch).eval()
        with torch.no_grad():
            mine, theirs = subnet(x), supernet(x, arch)
        assert mine.isfinite().all()
        if space.springs == "sliced":
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        _, params = CostModel(space).macs_and_params(arch)
        assert params == sum(p.numel() for p in subnet.parameters())


@settings(max_examples=15, deadline=None)
@given(space=any_spaces(), seed=st.integers(0, 1000))
def test_in_any_space_the_evaluator_scores_as_a_loop(space, seed):
    torch.manual_seed(seed)
    supernet = Supernet(space).eval()
    rng = np.random.default_rng(seed)
    data = random_images(6, resolution=space.resolution, classes=space.classes, seed=seed)
    data.images = rng.integers(0, 256, (6, space.resolution, space.resolution, space.input_channels), dtype=np.uint8)
    data.mean = data.std = (0.5,) * space.input_channels
    archs = [canonical(space, arch) for arch in fair_archs(space, seed, 4)]
    scores = Evaluator(supernet, data, progress=False).evaluate(archs)
    for score, logits in zip(scores, loop_logits(supernet, data, archs), strict=True):
        assert score.loss == pytest.approx(F.cross_entropy(logits, torch.from_numpy(data.labels)).item(), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(space=full_spaces(), seed=st.integers(0, 1000), sharing=st.sampled_from(SHARINGS))
def test_in_any_space_shrinking_keeps_the_outputs_of_survivors(space, seed, sharing):
    torch.manual_seed(seed)
    supernet = Supernet(space, sharing).eval()
    smaller = supernet.shrunk(shrunk_at_random(space, random.Random(seed)))
    x = torch.randn(2, space.input_channels, space.resolution, space.resolution)
    for arch in fair_archs(smaller.space, seed, 3):
        with torch.no_grad():
            torch.testing.assert_close(smaller(x, arch), supernet(x, arch), rtol=1e-4, atol=1e-5)


def test_where_only_1x1_kernels_are_left_the_weight_is_a_matrix():
    row = Row(family="conv", blocks=2, kernels=(1, 3))
    space = Space(table=(Cluster(channels=(4, 6), rows=(row,)),), resolution=8, classes=5)
    supernet = trained_like_supernet(space)
    only_1x1 = space.with_live([[op for op in ops if op.block_op.kernel == 1] for ops in space.live])
    smaller = supernet.shrunk(only_1x1)
    assert smaller.blocks[0].weights["all"].conv.shape == (6, 3)
    for arch in archs_of(only_1x1, 2):
        torch.testing.assert_close(smaller(images(space), arch), supernet(images(space), arch), rtol=1e-5, atol=1e-5)


# ---- what is made of released networks


@each_family
def test_latency_parts_are_the_blocks_of_released_networks(family):
    space = family_space(family)
    table = PartTable(space)
    every = table.all_parts()
    assert len({str(part) for part in every}) == len(every)
    for arch in archs_of(space, 4):
        assert set(table.parts(arch)) <= set(every)
        network = Subnet(space, arch)
        blocks = [block for block in network.parts if block.plan.layers]
        parts = table.parts(arch)
        assert sum(len(part.plans) for part in parts) == len(blocks)
        for part in parts:
            (one, three) = (stack(part, n) for n in (1, 3))
            assert three(torch.randn(2, *part.input_shape)).shape == one(torch.randn(2, *part.input_shape)).shape
            copies = [m for m in one.modules() if isinstance(m, PlannedBlock)]
            assert [copy.plan for copy in copies] == list(part.plans)


@each_family
def test_onnx_answers_like_torch_in_fp32_and_int8(family, tmp_path):
    space = replace(family_space(family), springs="sliced")
    arch = archs_of(space, 20)[7]
    network = release(trained_like_supernet(space), arch).eval()
    format = OnnxFormat(resolution=16)
    export_onnx(network, tmp_path / "fp32.onnx", format)
    x = images(space, 64)
    expected = torch_logits(network, x)
    exact = compare_logits(onnx_logits(tmp_path / "fp32.onnx", x.numpy()), expected)
    assert exact.max_abs_error < 1e-3 * np.abs(expected).max()
    write_plain_onnx(network, tmp_path / "plain.onnx", input_shape=(3, 16, 16))  # what latency tables time
    plain = compare_logits(onnx_logits(tmp_path / "plain.onnx", x.numpy()), expected)
    assert plain.max_abs_error < 1e-3 * np.abs(expected).max()
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", x.numpy())
    rough = compare_logits(onnx_logits(tmp_path / "int8.onnx", x.numpy()), expected)
    assert 0 < rough.max_abs_error < 0.35 * np.abs(expected).max()
    assert rough.top1_agreement > 0.7


def test_a_stem_with_a_max_pool_is_written_for_latency_tables(tmp_path):
    stem = Cluster(channels=(6,), rows=(Row(family="conv", kernels=(7,), stride=2, activations=("relu",), pool=True),))
    basic = Cluster(channels=(6, 8), rows=(Row(family="basic", blocks=2, expansions=(1,), activations=("relu",)),))
    space = Space(table=(stem, basic), resolution=16, classes=5)
    network = release(trained_like_supernet(space), archs_of(space, 1)[0]).eval()
    x = images(space)
    write_plain_onnx(network, tmp_path / "plain.onnx", input_shape=(3, 16, 16))
    exact = compare_logits(onnx_logits(tmp_path / "plain.onnx", x.numpy()), torch_logits(network, x))
    assert exact.max_abs_error < 1e-3


def held(block: PlannedBlock, x: Tensor) -> int:
    """Most values that the block's layers and what its shortcut will add hold at once, counted while it runs."""
    most, beside, names = 0, 0, [layer.name for layer in block.plan.layers]

    def note(name: str, given: Sequence[Tensor], output: Tensor) -> None:
        nonlocal most, beside
        if name not in names:  # the shortcut's own convolution runs first
            most, beside = max(most, given[0].numel() + output.numel()), output.numel()
            return
        most = max(most, beside + given[0].numel() + output.numel())
        if block.plan.shortcut and name == names[0] and not beside:
            beside = x.numel()

    for name, layers in block.named_children():
        if name != "activation":
            layers[0].register_forward_hook(lambda _, given, output, name=name: note(name, given, output))
    y = block(x)
    if block.plan.pool:
        before = y.shape[1] * ((2 * y.shape[2]) ** 2)
        most = max(most, before + y.numel())
    return most


@each_family
@both_springs
def test_peak_memory_is_what_layers_hold(family, springs):
    space = family_space(family, springs)
    costs = CostModel(space)
    for arch in archs_of(space, 5, seed=1):
        network, most = Subnet(space, arch).eval(), 0
        x = torch.zeros(1, 3, 16, 16)
        for part in network.parts:
            most = max(most, held(part, x) if part.plan.layers else 0)
            x = part(x)
        assert costs.activation_bytes(arch) == BYTES * most
