"""The supernet: sharing, active parameters, and shrinking without a change of values."""

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet, release
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.arch import Arch, BlockOp, Operation
from bsnas.engine.space.sampling import fair_round, uniform_arch
from bsnas.engine.space.shrink import importance, shrink
from bsnas.engine.space.spaces import space_named
from bsnas.kernels import Block, choose_backend, run_blocks
from tests.engine.evaluation.cases import trained_like_supernet
from tests.engine.space.strategies import shrunk_at_random
from tests.engine.tiny import ARCH, SHARINGS, TINY, images, random_archs, tiny_space

both_spaces = pytest.mark.parametrize("space", [TINY, shrunk_at_random(TINY, random.Random(2))], ids=["full", "shrunk"])
all_sharings = pytest.mark.parametrize("sharing", SHARINGS)


# ---- one path


def plain_path(supernet: Supernet, x: Tensor, arch: Arch) -> Tensor:
    """A path of the supernet written with functional operations and slices taken from Table 1."""

    def norm(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        return F.batch_norm(x, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, bn.training)

    space = supernet.space
    stem, separable = supernet.stem_blocks
    x = F.relu6(norm(F.conv2d(x, stem.weights["conv"], stride=2, padding=1), stem.norms[0]))
    x = F.conv2d(x, separable.weights["depthwise"], padding=1, groups=x.shape[1])
    x = F.relu6(norm(x, separable.norms[0]))
    x = norm(F.conv2d(x, separable.weights["project"][:, :, None, None]), separable.norms[1])
    base = x.shape[1]
    for i, (op, channels) in enumerate(arch.operations):
        cluster = space.clusters[space.block_cluster[i]]
        _, weights, (bn1, bn2, bn3) = supernet.block(i, Operation(op, channels), x.shape[1])
        hidden = op.expansion * base
        out = max(cluster.channels) if space.is_spring(i) else channels
        y = F.relu6(norm(F.conv2d(x, weights["expand"][:hidden, : x.shape[1], None, None]), bn1))
        cut = (weights["depthwise"].shape[-1] - op.kernel) // 2
        kernel = weights["depthwise"][:hidden, :, cut : cut + op.kernel, cut : cut + op.kernel]
        y = F.conv2d(y, kernel, stride=space.block_stride(i), padding=op.kernel // 2, groups=hidden)
        y = norm(F.conv2d(F.relu6(norm(y, bn2)), weights["project"][:out, :hidden, None, None]), bn3)
        x = x + y if x.shape == y.shape and space.block_stride(i) == 1 else y
        base = max(cluster.channels) if cluster.blocks == 1 else out
    (tail,) = supernet.tail_blocks(x.shape[1])
    y = F.conv2d(x, tail.weights["conv"][:, : x.shape[1], None, None])
    y = F.relu6(norm(y, tail.norms[0]))
    return supernet.classifier(y.mean((2, 3)))


@all_sharings
@both_spaces
@pytest.mark.parametrize("training", [True, False])
def test_a_path_computes_what_the_table_says(space, sharing, training):
    supernet = trained_like_supernet(space, sharing).train(training).double()
    for arch in random_archs(space, 4):
        x = images(space).double()
        expected = plain_path(supernet, x, arch)  # first, as running statistics move in the other
        torch.testing.assert_close(supernet(x, arch), expected, rtol=1e-10, atol=1e-10)


class Activations(TorchDispatchMode):
    """Counts the activations of a network that operations of torch compute, outside of the kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("hardtanh", "relu6", "clamp", "native_batch_norm")
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    choose_backend(torch.ones(1)) != "onednn", reason="the reference backend is made of such operations"
)
def test_in_training_no_activation_is_computed_outside_of_the_kernels():
    """The stem's, at the largest resolution, is 6 % of what a pass at 224x224 writes and reads."""
    x = images(TINY).contiguous(memory_format=torch.channels_last)
    supernet, subnet = Supernet(TINY).train(), Subnet(TINY, ARCH).train()
    with Activations() as found:
        supernet(x, ARCH)
        subnet(x)
    assert found.count == 0


@pytest.mark.parametrize("network", ["supernet", "subnet"])
def test_a_separable_block_with_a_shortcut_adds_the_stems_activation(network):
    space = tiny_space(stem_channels=4)
    supernet = trained_like_supernet(space)
    x = images(space).double()
    supernet = supernet.train().double()
    stem, separable = supernet.stem_blocks
    y = F.conv2d(x, stem.weights["conv"], stride=2, padding=1)
    y = F.relu6(F.batch_norm(y, None, None, stem.norms[0].weight, stem.norms[0].bias, training=True))
    first, second = separable.norms
    z = F.conv2d(y, separable.weights["depthwise"], padding=1, groups=4)
    z = F.relu6(F.batch_norm(z, None, None, first.weight, first.bias, training=True))
    z = F.conv2d(z, separable.weights["project"][:, :, None, None])
    expected = y + F.batch_norm(z, None, None, second.weight, second.bias, training=True)
    if network == "supernet":
        blocks = supernet.stem_blocks
    else:
        blocks = [part.block() for part in release(supernet, ARCH).double().train().stem]
    torch.testing.assert_close(run_blocks(x, blocks, training=True), expected, rtol=1e-10, atol=1e-10)


def test_one_block_cluster_at_the_end_slices_the_tail():
    supernet = Supernet(space_named("digits"))
    narrow = Arch.parse("c16:k3t3,k3t3_c24:k3t3,k3t3,k3t3_c40:k3t3,k3t3_c56:k3t3")
    weight = supernet.tail_blocks(56)[0].weights["conv"]
    assert weight.shape == (256, 80)
    assert len({id(supernet.tail_blocks(width)[0].norms[0]) for width in (56, 64, 80)}) == 3
    assert supernet.space.supernet_plans(narrow)[-1].layers[-1].outputs == 56
    supernet(images(space_named("digits")), narrow).sum().backward()
    assert weight.grad[:, :56].abs().sum() > 0
    assert weight.grad[:, 56:].abs().sum() == 0


# ---- who shares weights


def any_form(supernet: Supernet, block: int, op: Operation) -> Block:
    """An operation of a block, behind the widest input that it can have."""
    return supernet.block(block, op, max(supernet.space.supernet_inputs(block, op.channels)))


def distinct_weights(supernet: Supernet, block: int) -> dict[int, list[Operation]]:
    """Operations of a block, grouped by the depthwise weight that they read."""
    groups: dict[int, list[Operation]] = {}
    for op in supernet.space.live[block]:
        weights = any_form(supernet, block, op).weights
        groups.setdefault(weights["depthwise"].data_ptr(), []).append(op)
    return groups


def test_who_shares_convolution_weights():
    ops = TINY.live[0]
    nested, channels, independent = (distinct_weights(Supernet(TINY, sharing), 0) for sharing in SHARINGS)
    assert list(nested.values()) == [list(ops)]
    assert sorted(map(sorted, channels.values())) == sorted(
        [Operation(BlockOp(k, t), 8), Operation(BlockOp(k, t), 12)] for k in (3, 5) for t in (2, 3)
    )
    assert sorted(independent.values()) == sorted([op] for op in ops)


@all_sharings
def test_every_operation_has_its_own_normalisation_and_weights_are_as_large_as_needed(sharing):
    supernet = Supernet(TINY, sharing)
    for i, live in enumerate(TINY.live):
        assert len({id(bn) for op in live for bn in any_form(supernet, i, op).norms}) == 3 * len(live)
    weights = any_form(supernet, 1, Operation(BlockOp(3, 2), 8)).weights  # in = c, spring: out = 12
    sizes = {"nested": (36, 12, 5, 12), "channels": (24, 12, 3, 12), "independent": (16, 8, 3, 12)}[sharing]
    assert weights["expand"].shape == sizes[:2]
    assert weights["depthwise"].shape == (sizes[0], 1, sizes[2], sizes[2])
    assert weights["project"].shape == (sizes[3], sizes[0])


def test_unknown_sharing():
    with pytest.raises(UserError, match="weight sharing 'own' is unknown; allowed are nested, channels, independent"):
        Supernet(TINY, "own")


# ---- active parameters


@all_sharings
@both_spaces
def test_active_parameters_are_exactly_those_with_a_gradient(space, sharing):
    supernet = trained_like_supernet(space, sharing).train()
    names = {id(p): name for name, p in supernet.named_parameters()}
    for arch in random_archs(space, 5):
        supernet.zero_grad(set_to_none=True)
        F.cross_entropy(supernet(images(space), arch), torch.arange(4) % space.classes).backward()
        active = supernet.active_parameters(arch)
        assert len({id(p) for p in active}) == len(active)
        moved = {name for name, p in supernet.named_parameters() if p.grad is not None}
        assert {names[id(p)] for p in active} == moved
        nonzero = {name for name, p in supernet.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert moved == nonzero


@all_sharings
def test_a_round_reaches_every_parameter(sharing):
    supernet = Supernet(TINY, sharing)
    reached = {id(p) for r in range(2) for arch in fair_round(TINY, 0, r) for p in supernet.active_parameters(arch)}
    assert reached == {id(p) for p in supernet.parameters()}


def test_statistics_move_only_on_the_path():
    supernet = trained_like_supernet(TINY).train()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    supernet(images(TINY), ARCH)
    on_path = {f"blocks.{i}.norms.{op}." for i, op in enumerate(ARCH.operations)}
    on_path |= {"stem.", "tail.0.norms.k1c40i32."}
    for name, buffer in supernet.named_buffers():
        assert torch.equal(buffer, before[name]) != name.startswith(tuple(on_path)), name


# ---- shrinking


@all_sharings
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shrinking_keeps_the_outputs_of_survivors(sharing, seed):
    supernet = trained_like_supernet(TINY, sharing)
    rng = random.Random(seed)
    space = shrunk_at_random(TINY, rng)
    smaller = supernet.shrunk(space)
    assert not smaller.training
    for arch in random_archs(space, 5):
        torch.testing.assert_close(smaller(images(TINY), arch), supernet(images(TINY), arch), rtol=1e-5, atol=1e-5)
    supernet.train()
    smaller.train()
    for arch in random_archs(space, 3, seed=1):
        torch.testing.assert_close(smaller(images(TINY), arch), supernet(images(TINY), arch), rtol=1e-5, atol=1e-5)


def test_the_centre_of_a_kernel_stays_when_the_largest_kernels_go():
    supernet = trained_like_supernet(TINY, "nested")
    space = TINY.with_live([[op for op in ops if op.block_op.kernel == 3] or ops for ops in TINY.live])
    smaller = supernet.shrunk(space)
    assert smaller.blocks[0].weights["all"].depthwise.shape == (12, 1, 3, 3)
    for arch in random_archs(space, 5):
        torch.testing.assert_close(smaller(images(TINY), arch), supernet(images(TINY), arch), rtol=1e-5, atol=1e-5)


@all_sharings
def test_dropped_operations_leave_the_supernet(sharing):
    supernet = trained_like_supernet(TINY, sharing)
    space = shrunk_at_random(TINY, random.Random(4))
    smaller = supernet.shrunk(space)
    for i, live in enumerate(space.live):
        assert set(smaller.blocks[i].norms) == {str(op) for op in live}
    expected = {"nested": lambda op: "all", "channels": lambda op: str(op.block_op), "independent": str}[sharing]
    for block, live in zip(smaller.blocks, space.live, strict=True):
        assert set(block.weights) == {expected(op) for op in live}
    assert {name for name, _ in smaller.named_parameters()} < {name for name, _ in supernet.named_parameters()}
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in supernet.parameters())
    # What is left belongs to the smaller supernet alone: the larger one can be freed.
    assert not {p.data_ptr() for p in smaller.parameters()} & {p.data_ptr() for p in supernet.parameters()}
    state = supernet.state_dict()
    for name, tensor in smaller.state_dict().items():
        if "norms" in name or name.startswith(("stem", "classifier")):
            assert torch.equal(tensor, state[name]), name


@all_sharings
def test_weights_are_no_larger_than_the_survivors_use(sharing):
    """Every element of every block weight is inside the slice of some surviving operation."""
    space = shrunk_at_random(TINY, random.Random(4))
    supernet = Supernet(TINY, sharing).shrunk(space)
    largest: dict[int, list[tuple[int, ...]]] = {}
    for arch in (arch for r in range(12) for arch in fair_round(space, 0, r)):
        for plan, weights, _ in supernet.path_blocks(arch)[2:-1]:
            _, depthwise, project = plan.layers
            largest.setdefault(id(weights["project"]), []).append((project.outputs, project.inputs))
            kernel = (depthwise.kernel, depthwise.kernel)
            largest.setdefault(id(weights["depthwise"]), []).append((depthwise.outputs, 1, *kernel))
    for block in supernet.blocks:
        for weights in block.weights.values():
            for parameter in (weights.project, weights.depthwise):
                assert tuple(parameter.shape) == tuple(map(max, zip(*largest[id(parameter)], strict=True)))


def test_shrinking_twice_ends_where_shrinking_once_does():
    supernet = trained_like_supernet(TINY, "nested")
    rng, spaces = random.Random(0), [TINY]
    for keep in (4, 1):
        archs = [uniform_arch(spaces[-1], rng) for _ in range(60)]
        spaces.append(shrink(spaces[-1], importance(spaces[-1], archs, [rng.random() for _ in archs]), keep))
    twice, once = supernet.shrunk(spaces[1]).shrunk(spaces[2]), supernet.shrunk(spaces[2])
    assert spaces[2].num_architectures == 1
    for (name, a), (other, b) in zip(twice.state_dict().items(), once.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_another_table_cannot_be_shrunk_to():
    with pytest.raises(AssertionError, match="shrinking keeps the table"):
        Supernet(TINY).shrunk(space_named("digits"))
