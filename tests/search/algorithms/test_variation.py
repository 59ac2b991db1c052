import random

from hypothesis import given, settings
from hypothesis import strategies as st

from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.spaces import space_named
from bsnas.search.algorithms.variation import crossover, mutate
from tests.search.spaces import random_space


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9).map(random.Random))
def test_children_stay_inside_shrunk_spaces(rng):
    space = random_space(rng)
    parents = [uniform_arch(space, rng) for _ in range(2)]
    space.check(crossover(space, parents, rng))
    space.check(mutate(space, parents[0], rng, rng.random()))


def test_crossover_takes_every_gene_from_a_parent():
    space = space_named("imagenet")
    rng = random.Random(0)
    parents = [uniform_arch(space, rng) for _ in range(2)]
    children = [crossover(space, parents, rng) for _ in range(200)]
    for child in children:
        for gene, pair in zip(child.channels, zip(*(p.channels for p in parents), strict=True), strict=True):
            assert gene in pair
        for gene, pair in zip(child.flat_blocks, zip(*(p.flat_blocks for p in parents), strict=True), strict=True):
            assert gene in pair
    for parent in parents:
        shares = [
            sum(child.flat_blocks[i] == parent.flat_blocks[i] for child in children) / len(children)
            for i in range(space.num_blocks)
        ]
        assert all(share == 1 or 0.35 < share < 0.65 for share in shares)


def test_mutation_redraws_a_tenth_of_the_genes():
    space = space_named("imagenet")
    rng = random.Random(0)
    changed = 0
    for _ in range(2000):
        parent = uniform_arch(space, rng)
        child = mutate(space, parent, rng, 0.1)
        changed += sum(a != b for a, b in zip(parent.flat_blocks, child.flat_blocks, strict=True))
    assert abs(changed / (2000 * 19) - 0.1 * 5 / 6) < 0.01, "a sixth of the redrawn genes draw the old value"
    assert mutate(space, parent, rng, 0.0) == parent


def test_equal_generators_give_equal_children():
    space = space_named("imagenet")
    parents = [uniform_arch(space, random.Random(seed)) for seed in (1, 2)]
    assert crossover(space, parents, random.Random(3)) == crossover(space, parents, random.Random(3))
    assert mutate(space, parents[0], random.Random(3), 0.5) == mutate(space, parents[0], random.Random(3), 0.5)
