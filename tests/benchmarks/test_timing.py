"""Percentiles, and who is timed when."""

import pytest

from benchmarks.timing import CpuClock, interleave, order, percentile


@pytest.mark.parametrize(
    "values, q, expected",
    [
        ([3.0], 80, 3.0),
        ([1.0, 3.0], 50, 2.0),
        ([5.0, 1.0, 3.0], 50, 3.0),
        ([0.0, 10.0], 20, 2.0),
        ([1, 2, 3, 4], 100, 4),
    ],
)
def test_percentile_is_linear_between_neighbours(values, q, expected):
    assert percentile(values, q) == pytest.approx(expected)


def test_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one round"):
        percentile([], 50)


def test_order_alternates():
    assert [order(i, 2) for i in range(3)] == [[0, 1], [1, 0], [0, 1]]


class ScriptedClock:
    """Calls, and answers with the duration that the call returns, in milliseconds."""

    def sample(self, call, index, repeat):
        return [call(index + i) for i in range(repeat)]

    def read(self, sample):
        return sum(sample) / len(sample)


def test_sides_take_turns_after_their_warm_up():
    calls = []

    def side(name, ms):
        return lambda i: calls.append((name, i)) or ms

    times = interleave([side("ours", 1.0), side("theirs", 2.0)], ScriptedClock(), seconds=0, rounds=4, warmup=2)
    assert times == [[1.0] * 4, [2.0] * 4]
    assert [name for name, _ in calls[:4]] == ["ours", "ours", "theirs", "theirs"]
    assert [name for name, _ in calls[4:]] == ["ours", "theirs", "theirs", "ours"] * 2
    assert [i for name, i in calls[4:] if name == "ours"] == [0, 1, 2, 3]  # the counter that rotates inputs


def test_seconds_decide_the_number_of_rounds():
    counted = []
    interleave([lambda i: counted.append(i) or 10.0, lambda i: 30.0], ScriptedClock(), seconds=0.8, warmup=1)
    assert len(counted) == 1 + 20


def test_short_cpu_calls_are_repeated_within_a_sample():
    count = 0

    def call(i):
        nonlocal count
        count += 1

    (times,) = interleave([call], CpuClock(), seconds=0, rounds=5, warmup=1)
    assert len(times) == 5
    assert count > 100
    assert max(times) < 0.5
