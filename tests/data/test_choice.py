"""What `data.pipeline` and `data.dali_device` come to, with machines that are pretended."""

import builtins
import io
import logging

import pytest
from PIL import Image

from fastmim.data import DataConfig, DataError, create_loader, create_source, dali_trial
from fastmim.data import choice as choice_module
from fastmim.data.choice import Choice, checked, choose_pipeline, jpeg_share
from tests.data.write_shards import samples_of, write_tar, write_tfrecord


@pytest.fixture
def machine(monkeypatch):
    """Pretends what DALI says of itself on the CPU and the GPU."""

    def pretend(cpu="", gpu="torch finds no GPU for it to decode on"):
        monkeypatch.setattr(dali_trial, "why_not", lambda device="cpu": cpu or (gpu if device == "gpu" else ""))

    return pretend


MISSING = f"DALI is not installed (No module named 'nvidia'): {dali_trial.INSTALL}"


def choose(root, training="cpu", **settings):
    cfg = DataConfig(root=root, **settings)
    return choose_pipeline(create_source(cfg), cfg, training)


def test_auto_takes_pillow_for_images_in_memory(machine):
    machine(gpu="")
    chosen = choose(None, "gpu")
    assert (chosen.name, chosen.reason) == ("pillow", "the images are in memory")


def test_auto_takes_dali_on_a_gpu_for_a_folder_of_jpegs(machine, jpeg_folder):
    machine(gpu="")
    assert choose(jpeg_folder, "gpu") == Choice(
        "dali", "gpu", "100% of the images are JPEGs, which DALI decodes on the GPU"
    )
    assert choose(jpeg_folder, "gpu", dali_device="cpu").name == "pillow"
    chosen = choose(jpeg_folder, "cpu")
    assert chosen.name == "pillow"
    assert "faster than DALI" in chosen.reason


def test_auto_takes_pillow_where_few_are_jpegs(machine, with_files, jpeg_folder):
    machine(gpu="")
    folder = with_files({f"{number}.png": b"" for number in range(3)}, good=21)
    cfg = DataConfig(root=folder)
    assert jpeg_share(create_source(cfg)) == 21 / 24
    assert "88% of the images are JPEGs" in choose(folder, "gpu").reason


def test_images_in_shards_are_known_by_their_bytes(machine, tmp_path, class_folder):
    machine(gpu="")
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    samples = samples_of(class_folder)
    write_tar(tmp_path / "jpegs" / "0.tar", samples)
    assert choose(tmp_path / "jpegs", "gpu").name == "dali gpu"
    write_tfrecord(tmp_path / "mixed" / "0.tfrecord", [*samples[:6], *((f"z{n}", png.getvalue(), 1) for n in range(2))])
    assert "75% of the images are JPEGs" in choose(tmp_path / "mixed", "gpu").reason


def test_auto_takes_pillow_where_dali_does_not_work_and_says_why(machine, jpeg_folder):
    machine(gpu="an image of one colour came out with an error of 99 levels")
    assert "99 levels" in choose(jpeg_folder, "gpu").reason


def test_only_who_would_gain_is_told_to_install_dali(machine, jpeg_folder, monkeypatch):
    machine(cpu=MISSING)
    assert "decoded on the GPU" not in choose(jpeg_folder, "gpu").reason
    assert "install" not in choose(jpeg_folder, "cpu").reason
    monkeypatch.setattr(choice_module, "_MANY", 24)
    assert choose(jpeg_folder, "gpu").reason == f"{MISSING}; with it, images are decoded on the GPU"


@pytest.mark.parametrize(
    "error, words",
    [
        (
            ModuleNotFoundError("No module named 'nvidia'"),
            "DALI is not installed (No module named 'nvidia'): pip install",
        ),
        (OSError("libnvjpeg.so: cannot open"), "DALI cannot be imported: libnvjpeg.so: cannot open"),
    ],
)
def test_an_import_that_fails_is_a_reason(monkeypatch, error, words):
    original = builtins.__import__

    def importing(name, *arguments):
        if name == "nvidia.dali":
            raise error
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", importing)
    assert dali_trial.why_not().startswith(words)


def test_the_choice_is_one_line_in_the_log(machine, jpeg_folder, caplog):
    machine(gpu="")
    for settings, lines in (({}, 1), ({"pipeline": "pillow"}, 0)):
        caplog.clear()
        cfg = DataConfig(root=jpeg_folder, workers=0, **settings)
        with caplog.at_level(logging.INFO, "fastmim.data"):
            create_loader(create_source(cfg), cfg, (32, 32), 4, 0).close()
        assert len(caplog.records) == lines
    with caplog.at_level(logging.INFO, "fastmim.data"):
        create_loader(create_source(DataConfig()), DataConfig(), (32, 32), 4, 0).close()
    assert caplog.messages == ["Images are read by Pillow (data.pipeline: auto): the images are in memory."]


def test_what_was_asked_for_and_cannot_be_is_refused(machine, jpeg_folder):
    machine(cpu=MISSING)
    with pytest.raises(DataError, match=r"dali was asked for, but DALI is not installed.*pip install"):
        choose(jpeg_folder, pipeline="dali")
    with pytest.raises(DataError, match="the main process chose dali, but here DALI is not installed"):
        checked(Choice("dali"))
    machine()
    assert choose(jpeg_folder, pipeline="dali").name == "dali cpu"
    assert checked(Choice("dali")) == Choice("dali")
    for settings in ({"pipeline": "dali"}, {}):
        with pytest.raises(DataError, match=r"dali_device: gpu was asked for, but torch finds no GPU"):
            choose(jpeg_folder, dali_device="gpu", **settings)
    machine(gpu="")
    with pytest.raises(DataError, match="but training is on the CPU"):
        choose(jpeg_folder, dali_device="gpu")
    with pytest.raises(DataError, match="drop one of the two"):
        DataConfig(root=jpeg_folder, pipeline="pillow", dali_device="cpu").check()


def test_asked_for_dali_decodes_where_training_is_unless_told_otherwise(machine, jpeg_folder):
    machine(gpu="")
    assert choose(jpeg_folder, "gpu", pipeline="dali").name == "dali gpu"
    assert choose(jpeg_folder, "cpu", pipeline="dali").name == "dali cpu"
    assert choose(jpeg_folder, "gpu", pipeline="dali", dali_device="cpu").name == "dali cpu"
    assert choose(jpeg_folder, "gpu", pipeline="dali", dali_device="gpu").name == "dali gpu"


def resumed(root, saved, **settings):
    cfg = DataConfig(root=root, workers=0, **settings)
    with create_loader(create_source(cfg), cfg, (32, 32), 4, 0) as loader:
        loader.load_state(loader.state() | {"pipeline": saved})
        return loader.choice.name


def test_auto_goes_on_with_what_the_run_began_with(machine, jpeg_folder, caplog):
    machine()
    caplog.set_level(logging.INFO)
    assert resumed(jpeg_folder, "pillow") == "pillow"
    assert "it goes on so" not in caplog.text
    assert resumed(jpeg_folder, "dali cpu") == "dali cpu"
    assert "made by dali cpu: it goes on so" in caplog.text


def test_auto_does_not_go_on_with_other_batches_unasked(machine, jpeg_folder):
    machine(cpu=MISSING)
    with pytest.raises(DataError, match=r"made by dali cpu.*not installed.*--data.pipeline pillow"):
        resumed(jpeg_folder, "dali cpu")
    machine()
    with pytest.raises(DataError, match=r"made by dali gpu.*no GPU"):
        resumed(jpeg_folder, "dali gpu")


def test_another_pipeline_asked_for_by_name_is_taken_and_mentioned(machine, jpeg_folder, caplog):
    machine()
    assert resumed(jpeg_folder, "dali gpu", pipeline="pillow") == "pillow"
    assert "made by dali gpu, now they are by pillow: they differ by resampling" in caplog.text
    assert resumed(jpeg_folder, "dali gpu", pipeline="dali", dali_device="cpu") == "dali cpu"
    assert "now they are by dali cpu" in caplog.text


def test_a_state_from_before_there_was_a_choice_changes_nothing(jpeg_folder, machine):
    machine()
    cfg = DataConfig(root=jpeg_folder, workers=0)
    with create_loader(create_source(cfg), cfg, (32, 32), 4, 0) as loader:
        state = loader.state()
        del state["pipeline"]
        loader.load_state(state)
        assert loader.choice.name == "pillow"
