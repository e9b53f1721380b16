"""The real command on a folder of JPEGs with DALI: damaged files, interruptions, several processes, other pipelines."""

import json
import shutil

import pytest
import torch

from fastmim.data.dali_trial import why_not
from tests.data.test_dali import broken
from tests.faults.command import ending, metrics, train

pytestmark = [
    pytest.mark.dali,
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "DALI is there"),
]
SETTINGS = {"data__pipeline": "dali", "data__workers": 1, "img_size": 32, "batch_size": 8, "engine__precision": "fp32"}
SETTINGS |= {"model__drop_path_rate": 0}  # drawn by each process for itself


@pytest.fixture(scope="module")
def images(jpeg_folder, tmp_path_factory):
    """20 photographs, one JPEG that neither DALI nor Pillow decodes, and an empty one."""
    folder = tmp_path_factory.mktemp("with_dali") / "images"
    folder.mkdir()
    paths = sorted(jpeg_folder.iterdir())[:20]
    for path in paths:
        shutil.copy(path, folder)
    (folder / "bad.jpg").write_bytes(broken(paths[0].read_bytes(), "tables"))
    (folder / "empty.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def straight(images, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "run"
    done = train(out, data__root=images, **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return out


def weights(out):
    from safetensors.torch import load_file

    return load_file(out / "checkpoints" / "step-00000012" / "method.safetensors")


def assert_same(one, two):
    assert metrics(one) == metrics(two)
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_damaged_files_are_replaced_counted_and_named(straight):
    log = (straight / "train.log").read_text()
    for name in ("bad.jpg", "empty.jpg"):
        assert log.count(f"/{name} (") == 1, log
    # 96 images in four passes and a bit over 22, with two damaged ones in each.
    assert 8 <= metrics(straight)[-1]["replaced_images"] <= 10
    state = json.loads((straight / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert [one["pipeline"] for one in state["data"]] == ["dali cpu"]
    assert ending(straight)["code"] == 0


def test_a_run_killed_in_the_middle_ends_with_the_same_bits(images, straight, tmp_path):
    killed = train(tmp_path / "run", inject="sigkill@step=7", data__root=images, **SETTINGS)
    assert killed.returncode < 0
    settings = SETTINGS | {"data__prefetch": 2, "data__workers": 2}
    done = train(tmp_path / "run", data__root=images, **settings)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", straight)


def test_a_run_begun_with_dali_goes_on_with_it_and_with_pillow_only_by_name(images, straight, tmp_path):
    out = shutil.copytree(straight, tmp_path / "run")
    settings = SETTINGS | {"max_steps": 16, "data__root": images}
    unasked = train(out, **settings | {"data__pipeline": "auto"})
    assert unasked.returncode == 0, unasked.stderr
    assert "made by dali cpu: it goes on so" in unasked.stdout + unasked.stderr
    named = train(out, **settings | {"data__pipeline": "pillow", "max_steps": 20})
    assert named.returncode == 0, named.stderr
    assert "now they are by pillow: they differ by resampling" in named.stderr
    assert metrics(out)[-1]["step"] == 20


def test_two_processes_see_the_images_of_one(images, straight, tmp_path):
    done = train(tmp_path / "run", processes=2, data__root=images, **SETTINGS)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(straight), metrics(tmp_path / "run"), strict=True):
        assert one["replaced_images"] == two["replaced_images"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_without_a_gpu_its_decoder_is_refused_in_a_sentence(images, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = train(tmp_path / "run", data__root=images, **SETTINGS | {"data__dali_device": "gpu"})
    assert done.returncode == 2
    assert "data.dali_device: gpu was asked for, but torch finds no GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
