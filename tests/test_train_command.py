"""The training command as a person meets it: where it writes, how it goes on, what it says."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmim.command_line import command, load_config, parse
from fastmim.config import ConfigError
from fastmim.evaluation import load_encoder
from fastmim.resume import choose_place
from fastmim.train import main

TINY = shlex.split(
    "--model vit_tiny_patch16_224 --model.patch_size 8 --model.kwargs.embed_dim 16 --model.kwargs.depth 1 "
    "--model.kwargs.num_heads 2 --batch_size 8 --log.every 1 --log.tensorboard false"
)
DIGITS = [*TINY, "--evaluate", "false"]  # of the default recipe


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Default output folders lie below the working directory."""
    monkeypatch.chdir(tmp_path)


def metrics(run: Path) -> list[dict]:
    """What a run logged, without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


def only_run() -> Path:
    (run,) = Path("runs").iterdir()
    return run


def test_default_run_ends_with_picture_accuracies_and_the_next_command(capsys):
    main([*TINY, "--max_steps", "3"])
    run, said = only_run(), capsys.readouterr().out
    assert run.name == "digits-vit_tiny_patch16_224"
    for line in ("1797 images in 10 classes", "peak learning rate", "knn", "linear", "python -m fastmim.export runs/"):
        assert line in said
    for name in (
        "config.yaml",
        "train.log",
        "metrics.jsonl",
        "exit.json",
        "evaluation.json",
        "checkpoints",
        "pictures",
    ):
        assert (run / name).exists(), name
    assert [path.name for path in (run / "pictures").iterdir()] == ["step-00000003.png"]
    scores = json.loads((run / "evaluation.json").read_text())
    assert {*scores["before"]} == {*scores["after"]} == {"knn", "linear"}
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert load_encoder(run)[1].step == 3


@pytest.mark.parametrize("kind", ["jpeg_folder", "class_folder"])
def test_a_recipe_runs_on_a_folder_with_another_model_and_size(kind, request, capsys):
    root = request.getfixturevalue(kind)
    words = "--recipe a2mim_resnet50 --model resnet18 --epochs 1 --img_size 64 --batch_size 8 --data.workers 0"
    main([*words.split(), "--data.root", str(root)])
    said = capsys.readouterr()
    assert only_run().name == "a2mim_resnet50-resnet18"
    assert "0.0003 per 512 images" in said.out
    assert "Warm-up" in said.err, "a warm-up of 10 epochs in a run of 1 is shortened, and that is said"
    assert ("without labels" in said.out) == (kind == "jpeg_folder")


def test_a_finished_run_is_not_overwritten_but_numbered():
    main([*DIGITS, "--max_steps", "1"])
    main([*DIGITS, "--max_steps", "1"])
    assert sorted(run.name for run in Path("runs").iterdir()) == [
        "digits-vit_tiny_patch16_224",
        "digits-vit_tiny_patch16_224-2",
    ]


def test_a_run_in_progress_is_left_alone():
    main([*DIGITS, "--max_steps", "1"])
    run = only_run()
    (run / "exit.json").unlink()  # as if it were not at its end
    place = choose_place(parse([*DIGITS, "--max_steps", "1"]))
    assert (place.folder.name, place.resume) == (run.name, "auto")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(run / "run.lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    place = choose_place(parse([*DIGITS, "--max_steps", "1"]))
    assert (place.folder.name, place.resume) == (f"{run.name}-2", "never")
    holder.communicate(b"\n")


def test_a_config_file_does_the_run_again_elsewhere():
    main([*DIGITS, "--max_steps", "3", "--seed", "5", "--out", "first"])
    main(["--config", "first/config.yaml", "--out", "second"])
    assert metrics(Path("second")) == metrics(Path("first"))
    assert load_config(Path("second/config.yaml")) == load_config(Path("first/config.yaml"))


def test_other_settings_do_not_continue_a_run_but_a_longer_one_does(capsys):
    main([*DIGITS, "--max_steps", "2", "--out", "run"])
    with pytest.raises(ConfigError, match=r"(?s)seed: 0 -> 1.*may not change") as refused:
        main([*DIGITS, "--max_steps", "2", "--out", "run", "--seed", "1"])
    assert "max_steps:" not in str(refused.value)
    capsys.readouterr()
    main([*DIGITS, "--max_steps", "4", "--out", "run"])
    assert "max_steps: 2 -> 4" in capsys.readouterr().out
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2, 3, 4]


def test_resume_with_a_path_takes_the_settings_of_that_run(capsys):
    main([*DIGITS, "--max_steps", "2", "--seed", "3", "--out", "run"])
    main(["--resume", "run", "--max_steps", "3"])
    assert [line["step"] for line in metrics(Path("run"))] == [1, 2, 3]
    assert not Path("runs").exists()


def test_resume_never_sets_the_old_run_aside():
    main([*DIGITS, "--max_steps", "2", "--out", "run"])
    main([*DIGITS, "--max_steps", "1", "--out", "run", "--resume", "never"])
    assert [line["step"] for line in metrics(Path("run"))] == [1]
    assert [line["step"] for line in metrics(Path("run/previous-1"))] == [1, 2]


@pytest.mark.slow
def test_killed_and_started_again_it_repeats_the_uninterrupted_run_bitwise():
    words = [*DIGITS, "--max_steps", "60", "--engine.checkpoint_every", "2", "--log.pictures_every", "0"]
    main([*words, "--out", "whole"])
    process = subprocess.Popen([sys.executable, "-m", "fastmim.train", *words], env=_environment())
    log = Path("runs/digits-vit_tiny_patch16_224/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(metrics(log.parent)) < 60
    main([*words, "--resume", "auto"])
    assert metrics(only_run()) == metrics(Path("whole"))


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--model vit_tinny_patch16_224", ["vit_tiny_patch16_224"]),
        ("--model.kwargs.embed_dimm 4", ["embed_dim"]),
        ("--model resnet18 --img_size 40", ["40", "32"]),
        ("--method mae --model resnet18", ["mae", "resnet18"]),
        ("--model resnet18 --model.patch_size 4", ["resnet18", "patch_size"]),
        ("--optim.accumulate 3", ["batch_size: 32", "optim.accumulate 3"]),
        ("--engine.device cuda", ["engine.device", "cuda"]),
    ],
)
def test_what_does_not_fit_together_is_one_sentence(words, parts):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(ConfigError) as caught:
        main(words.split())
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_evaluating_images_without_labels_is_refused(jpeg_folder):
    with pytest.raises(ConfigError, match="no labels"):
        main(["--data.root", str(jpeg_folder), "--evaluate", "--img_size", "32"])


def test_a_mistake_is_one_message_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "-m", "fastmim.train", "--epohs", "3"], env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: epohs: there is no such setting; did you mean epochs? --help lists all\n"


def test_exit_codes_come_with_the_errors(capsys):
    def ends_with(error: BaseException) -> int:
        def fail(argv: list[str]) -> None:
            raise error

        with pytest.raises(SystemExit) as left:
            command(fail, [])
        return left.value.code

    from fastmim.data import BadDataError
    from fastmim.engine import Interrupted, NonFiniteError

    assert ends_with(ConfigError("x: 1 is wrong")) == 2
    assert ends_with(BadDataError("too many")) == 3
    assert ends_with(NonFiniteError("NaN")) == 4
    assert ends_with(OSError(28, "No space left on device")) == 5
    assert ends_with(Interrupted("saved", 75)) == 75
    assert ends_with(KeyboardInterrupt()) == 130
    assert "error: x: 1 is wrong\n" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        ends_with(ZeroDivisionError("bug"))


def _environment() -> dict[str, str]:
    """The package is found from any working directory."""
    return os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
