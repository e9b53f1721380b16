"""What a row says, and what the runner refuses to time."""

import dataclasses

import pytest
import torch

from benchmarks import memory
from benchmarks.runner import KEYS, BenchmarkError, Case, Settings, Side, read_rows, run_case, run_cases, write_rows

QUICK = Settings(quick=True, seconds=0.0, rounds=3, warmup=1)


def matmul_case(**changes) -> Case:
    case = Case(
        op="matmul",
        case="16x32",
        candidate=Side("reference", lambda x, w: x @ w),
        baseline=Side("einsum", lambda x, w: torch.einsum("ij,jk->ik", x, w)),
        inputs=lambda: (torch.randn(16, 32, requires_grad=True), torch.randn(32, 8)),
        images=16,
        moved={"forward": 4 * (16 * 32 + 32 * 8 + 16 * 8)},
        flops={"forward": 2 * 16 * 32 * 8, "both": 4 * 16 * 32 * 8},
    )
    return dataclasses.replace(case, **changes)


def test_rows_have_the_promised_keys_and_arithmetic():
    rows = list(run_case(matmul_case(), QUICK))
    assert [row["pass"] for row in rows] == ["forward", "backward", "both"]
    for row in rows:
        assert tuple(row)[: len(KEYS)] == KEYS
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ms"])
        assert row["p20"] <= row["ms"] <= row["p80"]
        assert row["images_per_second"] == pytest.approx(16 / row["ms"] * 1e3)
        assert (row["dtype"], row["backend"], row["baseline"], row["rounds"]) == ("fp32", "reference", "einsum", 3)
    forward, backward, both = rows
    assert forward["roofline"] == pytest.approx(forward["floor_ms"] / forward["ms"])
    assert "gb_per_s" not in both
    assert "gflop_per_s" in both
    assert "roofline" not in backward


def test_a_case_without_a_baseline_has_empty_columns():
    (row,) = run_case(matmul_case(baseline=None, passes=("forward",)), QUICK)
    assert row["baseline"] is row["baseline_ms"] is row["ratio"] is row["baseline_peak_mb"] is None


def test_step_runs_each_side_as_often_as_the_other():
    counts = {"ours": 0, "theirs": 0}

    def count(name):
        counts[name] += 1

    sides = Side("auto", lambda: count("ours")), Side("plain", lambda: count("theirs"), resident_bytes=3 * 2**20)
    case = matmul_case(candidate=sides[0], baseline=sides[1], inputs=lambda: (), passes=("step",), moved={}, flops={})
    (row,) = run_case(case, QUICK)
    assert counts["ours"] >= 5
    assert row["baseline_peak_mb"] >= 3
    assert row["pass"] == "step"


def test_disagreeing_sides_are_not_timed():
    with pytest.raises(BenchmarkError, match="differs from einsum"):
        next(run_case(matmul_case(candidate=Side("cpu", lambda x, w: 1.01 * (x @ w))), QUICK))
    next(run_case(matmul_case(candidate=Side("cpu", lambda x, w: 1.01 * (x @ w)), tolerance=None), QUICK))


def test_disagreeing_gradients_are_not_timed():
    wrong = Side("cpu", lambda x, w: (2 * x - x.detach()) @ w)
    with pytest.raises(BenchmarkError, match="result 1 differs"):
        next(run_case(matmul_case(candidate=wrong), QUICK))


def test_an_output_element_left_unwritten_is_seen():
    def forgetful(x, w):
        out = torch.empty(16, 8)
        out[:15] = (x @ w)[:15].detach()
        return out

    with pytest.raises(BenchmarkError, match="not finite"):
        next(run_case(matmul_case(candidate=Side("cpu", forgetful), passes=("forward",), tolerance=None), QUICK))
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_failing_case_does_not_stop_the_others():
    broken = matmul_case(candidate=Side("cpu", lambda x, w: x @ w.t()))
    rows, failures = run_cases([broken, matmul_case(passes=("forward",))], QUICK)
    assert len(rows) == 1
    assert len(failures) == 1
    assert failures[0].startswith("matmul 16x32 fp32 cpu: ")


@pytest.mark.parametrize("passes", [(), ("sideways",), ("step", "forward")])
def test_impossible_passes_are_refused(passes):
    with pytest.raises(ValueError, match="matmul 16x32"):
        matmul_case(passes=passes)


def test_peak_memory_counts_what_the_call_adds():
    x = torch.randn(4 * 2**20)  # 16 MiB, resident before

    def call():
        y = x + 1
        return (y * 2).sum()

    for measure in (lambda: memory.peak_bytes(call, x.device), lambda: memory._allocator_peak(call)):
        assert 31 < measure() / 2**20 < 36


def test_json_is_complete_or_not_written(tmp_path, monkeypatch):
    rows = list(run_case(matmul_case(passes=("forward",)), QUICK))
    path = tmp_path / "new" / "rows.json"
    write_rows(rows, path)
    assert read_rows(path) == rows
    before = path.read_bytes()
    with pytest.raises(ValueError, match="lacks ms"):
        write_rows([{key: value for key, value in rows[0].items() if key != "ms"}], path)
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_rows(rows * 2, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("text", ["", "{}", '[{"op": "x"}]', "[1"])
def test_a_file_that_holds_no_rows_is_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        read_rows(tmp_path / "bad.json")
