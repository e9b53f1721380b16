"""Shards that are damaged, missing or hostile: rows 33 and 34 of the fault table, on the real command."""

import signal
import tarfile

import pytest

from tests.data.write_shards import add, samples_of, write_tar, write_tfrecord
from tests.faults.command import ending, metrics, train

pytestmark = pytest.mark.slow

SETTINGS = {"img_size": 32, "data__in_chans": 1, "data__workers": 1}


@pytest.fixture
def shards(class_folder, tmp_path):
    """Four tar shards of nine."""
    samples = samples_of(class_folder)
    for number in range(4):
        write_tar(tmp_path / "shards" / f"train-{number:06d}.tar", samples[9 * number : 9 * number + 9])
    return tmp_path / "shards"


def test_a_kill_on_shards_goes_on_bit_for_bit(tmp_path, shards):
    assert train(tmp_path / "whole", data__root=shards, **SETTINGS).returncode == 0
    out = tmp_path / "run"
    assert train(out, inject="sigkill@step=7", data__root=shards, **SETTINGS).returncode == -signal.SIGKILL
    done = train(out, data__root=shards, **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert metrics(out) == metrics(tmp_path / "whole")
    assert len(metrics(out)) == 12


def test_damaged_and_missing_shards_cost_what_is_lost_of_them(tmp_path, shards):
    """One is cut off, one is a web page, one is gone; of one an image is damaged, which counts against the budget."""
    first, second, third = (shards / f"train-{number:06d}.tar" for number in range(3))
    first.write_bytes(first.read_bytes()[:30_000])
    second.write_bytes(b"<html>404 Not Found</html>" * 100)
    third.unlink()
    fourth = shards / "train-000003.tar"
    content = bytearray(fourth.read_bytes())
    content[512:516] = b"oops"
    fourth.write_bytes(content)
    out = tmp_path / "run"
    root = shards / "train-{000000..000003}.tar"
    done = train(out, data__root=root, **SETTINGS)
    assert done.returncode == 0, done.stderr
    log = (out / "train.log").read_text()
    assert "Traceback" not in done.stderr
    assert f"shard {first}: damaged at byte " in log
    assert f"shard {second}: damaged at byte 0 (a header with a wrong checksum)" in log
    assert f"shard {third}: missing: it is left out" in log
    assert log.count("unreadable image: ") == 1
    assert f"unreadable image: {fourth}/" in log
    assert metrics(out)[-1]["replaced_images"] > 0

    over = train(tmp_path / "over", data__root=root, data__bad_budget=0, **SETTINGS)
    assert over.returncode == 3
    assert ending(tmp_path / "over")["code"] == 3


def test_hostile_members_are_neither_written_nor_followed_nor_loaded(tmp_path, class_folder):
    image = samples_of(class_folder)[0][1]
    canary = tmp_path / "executed"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(16):
            add(tar, f"{number}.jpg", image)
            add(tar, f"{number}.pkl", b"cos\nsystem\n(S'touch %b'\ntR." % str(canary).encode())
            add(tar, f"{number}.pth", b"cos\nsystem\n(S'touch %b'\ntR." % str(canary).encode())
        add(tar, f"../../{tmp_path.name}.jpg", image)
        add(tar, str(tmp_path / "absolute.jpg"), image)
        add(tar, "link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "device.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
    out = tmp_path / "run"
    done = train(out, data__root=tmp_path / "x.tar", max_steps=4, **SETTINGS)
    assert done.returncode == 0, done.stderr
    log = (out / "train.log").read_text()
    assert "2 members that are links, devices or the like are left out, the first being link.jpg" in log
    assert "18 images" in log
    assert "unreadable" not in log
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.tar.fastmim-index", "run", "x.tar"]
    assert not (tmp_path.parent.parent / f"{tmp_path.name}.jpg").exists()


@pytest.mark.parametrize(
    "root, words",
    [
        ("https://example.org/train-{000000..000012}.tar", "download the shards first"),
        ("pipe:touch executed", "commands are never run"),
    ],
)
def test_addresses_and_commands_are_refused(tmp_path, root, words):
    refused = train(tmp_path / "run", data__root=root, **SETTINGS)
    assert refused.returncode == 2
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_labelled_shards_are_evaluated(tmp_path, class_folder):
    samples = samples_of(class_folder)
    write_tfrecord(tmp_path / "data" / "train-00000-of-00001", samples[:24])
    write_tfrecord(tmp_path / "data" / "validation-00000-of-00001", samples[24:])
    out = tmp_path / "run"
    done = train(out, data__root=tmp_path / "data", max_steps=2, evaluate="true", **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "24 images in 3 classes" in (out / "train.log").read_text()
    assert '"test_images": 12' in (out / "evaluation.json").read_text()
