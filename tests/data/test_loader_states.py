"""Streams of a run that goes on with another number of processes."""

from fastmim.data.loader_states import state_of

TWO = [
    {"step": 7, "images": 90, "replaced": 3, "unreadable": [(4, "empty"), (9, "torn")]},
    {"step": 7, "images": 90, "replaced": 2, "unreadable": [(4, "empty"), (5, "text")]},
]


def test_as_many_processes_continue_each_its_own():
    assert [state_of(TWO, rank, 2) for rank in (0, 1)] == TWO
    assert state_of(TWO[:1], 0, 1) == state_of(TWO[0], 0, 1) == TWO[0]


def test_other_numbers_know_all_and_count_once():
    for size in (1, 3):
        states = [state_of(TWO, rank, size) for rank in range(size)]
        assert sum(state["replaced"] for state in states) == 5
        assert all(state["unreadable"] == [(4, "empty"), (5, "text"), (9, "torn")] for state in states)
        assert all(state["step"] == 7 for state in states)


def test_a_loader_that_counts_nothing():
    assert state_of([{"step": 3}, {"step": 3}], 0, 1) == {"step": 3}
