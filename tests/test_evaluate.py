"""`python -m fastmim.evaluate`: what it prints and writes, and how it answers mistakes."""

import json
import re
import subprocess
import sys

import pytest

from fastmim.command_line import command
from fastmim.evaluate import main
from tests.small_run import write_run


def run(*argv, capsys):
    with pytest.raises(SystemExit) as end:
        command(main, [str(word) for word in argv])
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_prints_accuracy_and_spread_on_the_digits(kind, tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    code, out, err = run(kind, "--checkpoint", folder, "--json", tmp_path / "new" / "facts.json", capsys=capsys)
    assert (code, err) == (0, "")
    first, score = out.splitlines()
    assert first == (f"vit_tiny_patch16_224, {folder}/checkpoints/step-00000010; digits: 1438 + 359 images of 32x32")
    assert re.fullmatch(rf"{kind} top-1 \d+\.\d % \(± \d+\.\d over 3 split seeds\)", score)
    facts = json.loads((tmp_path / "new" / "facts.json").read_text())
    assert (facts["kind"], facts["encoder"], facts["step"], facts["seeds"]) == (
        kind,
        "vit_tiny_patch16_224",
        10,
        [0, 1, 2],
    )
    assert f"top-1 {facts['top1']:.1f} %" in score
    assert facts["top1"] > 30  # ten classes: even an untrained encoder beats chance


def test_says_the_same_thing_twice(tmp_path, capsys):
    argv = ("linear", "--checkpoint", write_run(tmp_path / "run"), "--seeds", 1, "--seed", 7)
    first = run(*argv, capsys=capsys)
    assert first == run(*argv, capsys=capsys)
    assert "(split seed 7)" in first[1]


def test_evaluates_an_untrained_encoder_on_class_folders(class_folder, capsys):
    code, out, _ = run(
        *("knn", "--checkpoint", "random:vit_tiny_patch16_224", "--data.root", class_folder, "--img_size", 32),
        *("--k", 3, "--seeds", 2),
        capsys=capsys,
    )
    assert code == 0
    assert f"random weights; {class_folder}: 30 + 6 images of 32x32" in out
    assert "over 2 split seeds" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        ("", "knn or linear is missing: python -m fastmim.evaluate"),
        ("--checkpoint RUN", "knn or linear is missing"),
        ("kmeans --checkpoint RUN", "kmeans: is neither knn nor linear"),
        ("knn", "checkpoint: is missing; give --checkpoint RUN, or random:NAME"),
        ("knn --chekpoint RUN", "chekpoint: there is no such setting; did you mean checkpoint?"),
        ("knn --root RUN", "did you mean data.root?"),
        ("knn --checkpoint RUN --k two", "k: 'two' is not a whole number"),
        ("knn --checkpoint RUN --k 0", "k: 0 is too small; 1 is the least"),
        ("knn --checkpoint RUN --temperature 0", "temperature: 0 is not above 0"),
        ("linear --checkpoint RUN --l2 -1", "l2: -1 is below 0"),
        ("knn --checkpoint RUN --img_size 64,0", "img_size: 0 is too small"),
        ("knn --checkpoint RUN --img_size 64", "takes images of 32x32, but 64x64 was asked for"),
        ("knn --checkpoint nowhere", "nowhere: there is no such run"),
        ("knn --checkpoint random:resnet81", "unknown encoder 'resnet81': did you mean resnet18"),
        ("knn --checkpoint RUN --data.root nowhere", "data.root: nowhere does not exist"),
        ("knn --checkpoint RUN --data.root FLAT", "has no class folders"),
        ("knn --checkpoint RUN --json RUN", "is a folder; give the name of a file"),
        ("knn --checkpoint RUN --json RUN/config.yaml/facts.json", "cannot be written"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(argv, message, tmp_path, jpeg_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "run", steps=(1,))
    words = argv.replace("RUN", str(folder)).replace("FLAT", str(jpeg_folder)).split()
    code, out, err = run(*words, capsys=capsys)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    if "facts.json" not in argv:
        assert out == ""


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_help_needs_no_torch(name):
    words = f"import sys, fastmim.{name} as e; sys.argv[1:] = ['--help']; e.command(e.main)"
    check = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {words}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: python -m fastmim.{name}")
    assert done.stdout.endswith("False\n")
