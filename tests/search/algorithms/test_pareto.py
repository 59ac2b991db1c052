from hypothesis import given
from hypothesis import strategies as st

from bsnas.search.algorithms.pareto import pareto_set

points = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=60)


@given(points)
def test_the_front_is_the_brute_force_one(items):
    front = pareto_set(items, cost=lambda p: p[0], value=lambda p: p[1])
    expected = {p for p in items if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in items)}
    assert set(front) == expected
    assert len(front) == len(expected), "equal points are kept once"
    assert front == sorted(front)


def test_of_equals_the_first_is_kept():
    assert pareto_set([(1, 2, "a"), (1, 2, "b"), (2, 2, "c")], lambda p: p[0], lambda p: p[1]) == [(1, 2, "a")]
