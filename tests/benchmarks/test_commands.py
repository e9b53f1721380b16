"""The commands: python -m benchmarks.ops, .throughput, .data and .table."""

import importlib
import json

import pytest
import torch

from benchmarks import data, ops, table, throughput
from benchmarks.ablation import pieces
from benchmarks.runner import KEYS, read_rows
from fastmim.data.dali_trial import why_not
from fastmim.ops.backends import operations

_needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable GPU")
TINY = ["--quick", "--device", "cpu"]
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _needs_gpu])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ops.list_ops())
def test_every_operation_runs_quickly(name, device, tmp_path, capsys):
    path = tmp_path / "ops.json"
    assert ops.main([name, "--quick", "--device", device, "--json", str(path)]) == 0, capsys.readouterr().err
    rows = json.loads(path.read_text())
    assert {row["op"] for row in rows} == {name}
    assert all(set(KEYS) <= set(row) for row in rows)
    assert all(row["command"].startswith("python -m benchmarks.ops ") for row in rows)
    assert name in capsys.readouterr().out


def test_an_unknown_operation_is_answered_with_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr(ops, "list_ops", lambda: ["random_mask", "masked_patch_loss"])
    assert ops.main(["randm_mask"]) == 2
    assert capsys.readouterr().err == "benchmarks.ops: unknown operation 'randm_mask'; did you mean 'random_mask'?\n"


def test_impossible_machine_options_are_answered(capsys):
    assert ops.main(["--threads", "0"]) == 2
    assert "--threads 0" in capsys.readouterr().err
    assert ops.main(["--device", "tpu9"]) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_every_way_to_read_images_is_measured_alone_and_with_a_model(device, tmp_path, capsys):
    path = tmp_path / "data.json"
    arguments = ["--quick", "--device", device, "--workers", "0", "1", "--json", str(path)]
    assert data.main(arguments) == 0, capsys.readouterr().err
    rows = read_rows(path)
    ways = ["pillow"] + [f"dali {place}" for place in ("cpu", "gpu") if not why_not(place)]
    load = [row for row in rows if row["op"] == "data"]
    assert {(row["backend"], row["workers"]) for row in load} == {("pillow", 0), *((way, 1) for way in ways)}
    for way in ways:
        cases = {(row["dtype"], "3 views" in row["case"]) for row in load if row["backend"] == way}
        assert cases == {(dtype, three) for dtype in ("fp32", "uint8") for three in (False, True)}
    assert all(row["images_per_second"] > 0 and row["ratio"] > 0 and "DataLoader" in row["baseline"] for row in load)
    together = [row for row in rows if row["op"] == "mae"]
    passes = ["step", *["load", "load + step"] * len(ways)]
    assert [row["pass"] for row in together] == passes
    assert all(0 <= row["data_wait"] <= 1 for row in together if row["pass"] == "load + step")
    assert "waiting" in capsys.readouterr().out


def test_parts_of_the_data_benchmark_can_be_chosen(tmp_path, capsys):
    path = tmp_path / "data.json"
    arguments = [*TINY, "--parts", "load", "--outputs", "uint8", "--views", "1", "--workers", "0", "--images", "5"]
    assert data.main([*arguments, "--json", str(path)]) == 0, capsys.readouterr().err
    assert {(row["dtype"], row["case"].split(", ")[1]) for row in read_rows(path)} == {("uint8", "1 view")}
    assert data.main(["--workers", "-1", "--device", "cpu"]) == 2
    assert "--workers -1" in capsys.readouterr().err


@pytest.mark.parametrize("device", DEVICES)
def test_throughput_of_all_methods_on_a_small_image(device, tmp_path, capsys):
    path = tmp_path / "throughput.json"
    arguments = ["--quick", "--device", device, "--model", "vit_tiny_patch16_224", "--json", str(path)]
    assert throughput.main([*arguments, "--methods", "mae", "simmim", "a2mim"]) == 0, capsys.readouterr().err
    rows = read_rows(path)
    assert [row["op"] for row in rows] == ["mae", "simmim", "a2mim"]
    for row in rows:
        assert (row["pass"], row["case"], row["dtype"]) == ("step", "vit_tiny_patch16_224 32px B4", "fp32")
        assert row["images_per_second"] > 0
        assert row["gflop_per_s"] > 0
        assert row["peak_mb"] > 4 * 5.3 * 4  # weights, gradients and AdamW's averages of 5.3 million parameters


@pytest.mark.parametrize("device", DEVICES)
def test_methods_on_tiles_are_measured_with_cnns_and_settings(device, tmp_path, capsys):
    path = tmp_path / "throughput.json"
    arguments = ["--quick", "--device", device, "--model", "convnextv2_tiny", "--json", str(path)]
    arguments += ["--methods", "fcmae", "spark", "--settings", "decoder=light", "decoder_dim=64"]
    assert throughput.main(arguments) == 0, capsys.readouterr().err
    assert [row["case"] for row in read_rows(path)] == [
        "convnextv2_tiny 64px B4 decoder_dim=64",
        "convnextv2_tiny 64px B4 decoder=light",
    ]


def test_throughput_against_another_precision_and_piece_by_piece(tmp_path, capsys):
    path = tmp_path / "throughput.json"
    arguments = ["--methods", "mae", "a2mim", "--model", "vit_tiny_patch16_224", "--precision", "bf16", *TINY]
    arguments += ["--baseline-precision", "fp32", "--baseline-optimizer", "default", "--ablate", "--json", str(path)]
    assert throughput.main(arguments) == 0, capsys.readouterr().err
    rows = read_rows(path)
    expected = [("mae", "plain PyTorch fp32, default AdamW"), ("a2mim", "plain PyTorch fp32, default AdamW")]
    expected += [(method, f"without {piece}") for method in ("mae", "a2mim") for piece in pieces(method)]
    assert sorted((row["op"], row["baseline"]) for row in rows) == sorted(expected)
    assert all(row["dtype"] == "bf16" and row["ratio"] > 0 and row["peak_mb"] > 0 for row in rows)


def test_the_plain_way_can_be_compiled(tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    path = tmp_path / "throughput.json"
    arguments = ["--methods", "mae", "--model", "vit_tiny_patch16_224", "--baseline-compile", *TINY]
    assert throughput.main([*arguments, "--json", str(path)]) == 0, capsys.readouterr().err
    assert [row["baseline"] for row in read_rows(path)] == ["plain PyTorch, torch.compile"]
    assert len(compiled) == 1


@pytest.mark.gpu
@_needs_gpu
def test_on_a_gpu_the_graph_is_a_piece_too(tmp_path, capsys):
    path = tmp_path / "throughput.json"
    arguments = ["--methods", "mae", "--model", "vit_tiny_patch16_224", "--quick", "--device", "cuda", "--ablate"]
    assert throughput.main([*arguments, "--json", str(path)]) == 0, capsys.readouterr().err
    assert read_rows(path)[-1]["baseline"] == f"without {throughput.GRAPH}"


def test_every_piece_is_really_left_out(monkeypatch):
    """Each switch changes what runs: the attention, the module's setting or the chosen backend."""
    for method in ("mae", "simmim", "a2mim", "mixedae"):
        for piece, switch in pieces(method).items():
            model = throughput._method(method, "vit_tiny_patch16_224", (64, 64), torch.device("cpu"), None)
            before = _ways(model)
            with switch(model):
                assert _ways(model) != before, (method, piece)


def _ways(model):
    chosen = {op: backends.choose for op, backends in operations().items()}
    names = ("attention", "share_masked", "prunes")
    own = [getattr(module, name, None) for module in model.modules() for name in names]
    return chosen, own, model.cfg.exact_pruning, importlib.import_module("fastmim.ops.linear")._chosen


def test_methods_without_a_model_get_one_that_fits():
    sizes = throughput._sizes(None, True, throughput.list_methods())
    pairs = dict(throughput._combinations(["mae", "spark", "fcmae"], [], sizes))
    assert pairs == {"mae": "vit_small_patch16_224", "spark": "convnext_small", "fcmae": "convnextv2_tiny"}


def test_a_method_that_does_not_fit_is_an_error_only_when_asked_for(capsys):
    assert throughput.main(["--model", "resnet18", "--methods", "mae", *TINY]) == 2
    assert "mae" in capsys.readouterr().err
    pairs = throughput._combinations([], ["resnet18"], throughput._sizes((32, 32), True, throughput.list_methods()))
    assert ("a2mim", "resnet18") in pairs
    assert ("mae", "resnet18") not in pairs


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--methods", "maee"], "mae"),
        (["--model", "vit_tny"], "vit_tny"),
        (["--batch_size", "1"], "1"),
        (["--settings", "decoderr=light"], "decoderr"),
    ],
)
def test_wrong_throughput_options_exit_2(arguments, named, capsys):
    assert throughput.main([*arguments, "--device", "cpu"]) == 2
    assert named in capsys.readouterr().err


ROW = dict.fromkeys(KEYS) | {
    "op": "random_mask", "case": "B64", "pass": "forward", "dtype": "fp32", "backend": "cpu", "ms": 0.5,
    "baseline": "torch", "baseline_ms": 1.25, "ratio": 2.5, "peak_mb": 1.0, "baseline_peak_mb": 3.25,
    "roofline": 0.42, "hardware": "a CPU", "torch": "2.13.0",
}  # fmt: skip


def test_tables_align_and_leave_out_empty_columns():
    lines = table.plain([ROW, ROW | {"op": "longer_operation"}]).splitlines()
    assert len(lines) == 4
    assert len({line.index("B64") for line in lines[2:]}) == 1
    assert "2.50x" in lines[2]
    assert "42 %" in lines[2]
    assert "img/s" not in lines[0]


def test_markdown_says_what_measured_it(tmp_path, capsys):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROW, ROW | {"pass": "both"}]))
    assert table.main([str(path), "--pass", "both"]) == 0
    out = capsys.readouterr().out
    assert out.count("| random_mask |") == 1
    assert "Measured on a CPU, torch 2.13.0." in out
    assert table.main([str(tmp_path / "missing.json")]) == 2


def test_a_table_is_put_into_a_page_again_and_again(tmp_path, capsys):
    rows, page = tmp_path / "rows.json", tmp_path / "README.md"
    rows.write_text(json.dumps([ROW]))
    page.write_text("above\n<!-- begin cpu -->\nold\n<!-- end cpu -->\nbelow\n")
    for _ in range(2):
        assert table.main([str(rows), "--into", str(page), "--mark", "cpu"]) == 0
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    assert "old" not in lines
    assert sum("random_mask" in line for line in lines) == 1
    assert table.main([str(rows), "--into", str(page), "--mark", "gpu"]) == 2
    assert "<!-- begin gpu -->" in capsys.readouterr().err
