import json
import logging
from pathlib import Path

from fastmim.engine.spikes import TIMES, SpikeWatch

NO_PAST = Path("/nowhere/metrics.jsonl")


def looked(watch, losses, first=1):
    return [watch.look(step, loss).get("loss_spikes", 0) for step, loss in enumerate(losses, first)]


def test_a_leap_is_counted_and_a_row_of_them_warned_of_once(caplog):
    watch = SpikeWatch(NO_PAST)
    with caplog.at_level(logging.WARNING):
        counts = looked(watch, [2.0] * 6 + [2 * TIMES + 0.1] * 2 + [2.0, 30.0])
    assert counts == [0] * 6 + [1, 2, 2, 3]
    assert [record.getMessage().partition(" is")[0] for record in caplog.records] == [
        "The loss of 20.1 at step 7",
        "The loss of 30 at step 10",
    ]
    assert "is 10 times 2, the median of the 6 logged before." in caplog.text


def test_a_slow_rise_a_first_loss_and_what_is_not_finite_are_none():
    assert looked(SpikeWatch(NO_PAST), [1.0, 100.0]) == [0, 0], "too few to have a median"
    assert looked(SpikeWatch(NO_PAST), [1.0] * 6 + [float("nan"), float("inf"), 9.0]) == [0] * 8 + [0]
    assert looked(SpikeWatch(NO_PAST), [1.02**k for k in range(200)])[-1] == 0
    assert looked(SpikeWatch(NO_PAST), [-1.0] * 6 + [5.0])[-1] == 0, "a loss below zero has no multiples"


def test_a_resumed_run_counts_on_as_if_nothing_had_happened(tmp_path, caplog):
    losses = [1.0 + 0.01 * (k % 7) for k in range(150)]
    losses[60] = losses[119] = losses[120] = 50.0
    whole = SpikeWatch(NO_PAST)
    expected = looked(whole, losses)
    assert expected[-1] == 3
    for cut in (3, 60, 61, 119, 120, 121, 140):
        path = tmp_path / "metrics.jsonl"
        first = SpikeWatch(NO_PAST)
        lines = [{"step": k, "loss": loss, **first.look(k, loss)} for k, loss in enumerate(losses[:cut], 1)]
        path.write_text('{"no": "loss"}\nrubbish\n' + "".join(json.dumps(line) + "\n" for line in lines))
        caplog.clear()
        second = SpikeWatch(path)
        assert looked(second, losses[cut:], cut + 1) == expected[cut:]
        warned = sum(k >= cut and losses[k] == 50.0 and losses[k - 1] != 50.0 for k in range(150))
        assert len(caplog.records) == warned, cut
