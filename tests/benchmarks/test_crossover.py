"""python -m benchmarks.crossover, and --mask-ratio of python -m benchmarks.ops."""

import pytest

from benchmarks import crossover, ops, table
from benchmarks.runner import read_rows


@pytest.mark.parametrize(
    "points, expected",
    [
        ([(0.0, 0.5), (0.5, 1.5)], 0.25),
        ([(0.5, 1.5), (0.0, 0.5), (0.25, 0.75)], 0.25 + 0.25 / 3),
        ([(0.0, 1.0), (0.5, 2.0)], 0.0),
        ([(0.0, 0.5), (0.5, 0.9)], None),
        ([(0.0, 1.2), (0.2, 0.8), (0.4, 1.2)], 0.3),  # once is not from there on
        ([(0.0, 1.2), (0.2, 0.8)], None),
    ],
)
def test_tiles_win_from_the_crossing_on(points, expected):
    found = crossover.crossover(points)
    assert found == (None if expected is None else pytest.approx(expected))


def test_every_row_gets_one_crossover(tmp_path, capsys):
    path = tmp_path / "crossover.json"
    assert crossover.main(["--quick", "--device", "cpu", "--json", str(path)]) == 0, capsys.readouterr().err
    rows = read_rows(path)
    assert {row["op"] for row in rows} == {"masked_conv", "masked_encoder"}
    assert len({(row["case"], row["pass"], row["baseline"]) for row in rows}) == len(rows)
    for row in rows:
        ratios = [ratio for ratio, _ in row["points"]]
        assert ratios == sorted(ratios)
        assert ratios[0] == 0
        assert len(ratios) == 3
        assert "mask" not in row["case"]
        assert row["crossover"] == crossover.crossover([tuple(point) for point in row["points"]])
        assert row["command"].startswith("python -m benchmarks.crossover --quick")
    capsys.readouterr()
    assert table.main([str(path)]) == 0
    assert "wins from mask ratio" in capsys.readouterr().out


def test_ratios_are_measured_as_whole_cells(tmp_path):
    path = tmp_path / "ops.json"
    arguments = ["masked_conv", "--quick", "--device", "cpu", "--case", "dense", "--json", str(path)]
    assert ops.main([*arguments, "--mask-ratio", "0", "0.6"]) == 0
    rows = read_rows(path)
    assert sorted({row["mask_ratio"] for row in rows}) == pytest.approx([0, 4 / 6])
    for row in rows:
        assert row["gflop_per_s"] > 0
        assert row["gb_per_s"] > 0


@pytest.mark.parametrize(
    "main, arguments, message",
    [
        (ops.main, ["random_mask", "--mask-ratio", "0.5"], "random_mask: its benchmark has no mask ratio to set"),
        (ops.main, ["masked_conv", "--mask-ratio", "1"], "mask ratio 1: a removed share is at least 0 and below 1"),
        (crossover.main, ["masked_con"], "did you mean 'masked_conv'?"),
        (crossover.main, ["--mask-ratio", "-0.1"], "mask ratio -0.1"),
    ],
)
def test_what_cannot_be_is_answered(main, arguments, message, capsys):
    assert main([*arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
