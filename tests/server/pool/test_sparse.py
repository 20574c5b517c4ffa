"""A sparse permutation is a set from whose complement one can draw."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxystash_server.pool.sparse import SparsePermutation

_STEPS = st.lists(
    st.tuples(st.sampled_from(["block", "unblock", "grow", "shrink"]), st.integers(0, 1000)), max_size=80
)


@given(size=st.integers(0, 12), steps=_STEPS)
def test_it_is_what_a_list_of_flags_would_be(size: int, steps: list[tuple[str, int]]) -> None:
    sparse, model = SparsePermutation(size), [False] * size
    for what, drawn in steps:
        if what == "grow":
            sparse.grow()
            model.append(False)
        elif model:
            number = drawn % len(model)
            if what == "shrink":
                sparse.shrink(number)
                model[number] = model[-1]
                model.pop()
            else:
                (sparse.block if what == "block" else sparse.unblock)(number)
                model[number] = what == "block"
        assert sparse.size == len(model)
        assert sparse.blocked == sum(model)
        assert [sparse.is_blocked(number) for number in range(len(model))] == model
        free = sorted(sparse.free_at(place) for place in range(sparse.free))
        assert free == [number for number, is_blocked in enumerate(model) if not is_blocked]


def test_it_stores_only_what_is_out_of_its_place() -> None:
    """Given a million numbers, of which other three are blocked again and again."""
    sparse = SparsePermutation(1_000_000)
    for number in range(0, 30_000, 3):
        for other in range(3):
            sparse.block(number + other)
        for other in range(3):
            sparse.unblock(number + other)
        assert len(sparse._at) <= 32
    assert sparse.blocked == 0
