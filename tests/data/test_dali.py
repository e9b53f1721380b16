"""DALI's batches against Pillow's: the same images, crops and replacements, whatever runs ahead or breaks."""

import contextlib
import io
import time

import pytest
import torch
from PIL import Image

from fastmim.data import BadDataError, DataConfig, ViewSpec, WorkerError, create_loader, create_source, normalise
from fastmim.data import dali as dali_module
from fastmim.data.choice import jpeg_share
from fastmim.data.dali_graph import Graph
from fastmim.data.dali_trial import why_not
from tests.data.write_shards import samples_of, write_tar, write_tfrecord

pytestmark = [pytest.mark.dali, pytest.mark.skipif(bool(why_not()), reason=why_not() or "DALI is there")]
VIEWS = (ViewSpec("images", (64, 64)), ViewSpec("small", (32, 32), crop="images"), ViewSpec("own", (32, 48)))
ONE_BOX = VIEWS[:2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def loader_of(root, pipeline="dali", views=VIEWS, batch_size=8, rank=0, world_size=1, start_step=0, **settings):
    cfg = DataConfig(**({"root": root, "workers": 1, "output": "uint8", "pipeline": pipeline} | settings))
    return create_loader(create_source(cfg), cfg, (64, 64), batch_size, 0, rank, world_size, start_step, views)


def batches(root, pipeline="dali", steps=3, **options):
    with loader_of(root, pipeline, **options) as loader:
        return [next(loader) for _ in range(steps)]


def tensors(batch):
    return [batch.images, *batch.views.values()]


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        assert a.replaced == b.replaced
        assert torch.equal(a.indices, b.indices)
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def close(a, b):
    distance = (a.float() - b.float()).abs()
    return bool(distance.flatten(1).mean(1).max() < 0.6 and distance.max() < 30)


@pytest.mark.parametrize("views", [VIEWS, ONE_BOX, ()], ids=["three views", "one box", "one view"])
def test_differs_from_pillow_by_resampling_only(class_folder, views):
    for one, two in zip(batches(class_folder, views=views), batches(class_folder, "pillow", views=views), strict=True):
        assert torch.equal(one.indices, two.indices)
        assert torch.equal(one.labels, two.labels)
        assert list(one.views) == list(two.views) == [view.name for view in views[1:]]
        assert all(close(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_distance_on_photographs_is_what_the_documentation_says(photographs, tmp_path, interpolation):
    for name, photograph in photographs.items():
        photograph.convert("RGB").save(tmp_path / f"{name}.jpg", quality=92)
    distances = []
    for pipeline in ("dali", "pillow"):
        cfg = DataConfig(root=tmp_path, workers=2, output="uint8", pipeline=pipeline, interpolation=interpolation)
        with create_loader(create_source(cfg), cfg, (224, 224), 6, 0) as loader:
            distances.append(torch.cat([next(loader).images for _ in range(3)]).float())
    distance = (distances[0] - distances[1]).abs()
    images = distance.flatten(1).mean(1)
    assert images.mean() < 0.2
    assert images.max() < 0.3
    assert distance.max() <= 20


def test_grey_images_and_grey_output(photographs, tmp_path):
    for number, photograph in enumerate(photographs.values()):
        small = photograph.resize((160, 120))  # Pillow decodes larger ones at half their size
        small.convert("L" if number % 2 else "RGB").save(tmp_path / f"{number}.jpg", quality=90)
    for channels in (1, 3):
        one, two = (batches(tmp_path, kind, 2, in_chans=channels, views=()) for kind in ("dali", "pillow"))
        for a, b in zip(one, two, strict=True):
            assert a.images.shape[1] == channels
            assert close(a.images, b.images)


@pytest.mark.parametrize("views", [VIEWS, ()], ids=["three views", "one view"])
def test_float_output_is_the_normalised_one(class_folder, views):
    raw = batches(class_folder, views=views)
    for one, two in zip(batches(class_folder, views=views, output="float32"), raw, strict=True):
        for a, b in zip(tensors(one), tensors(two), strict=True):
            assert a.dtype == torch.float32
            assert a.is_contiguous()
            torch.testing.assert_close(a, normalise(b, MEAN, STD), rtol=0, atol=1e-5)


def test_batches_are_the_same_whatever_runs_ahead(class_folder):
    straight = batches(class_folder, steps=7, prefetch=1)
    for settings in ({"prefetch": 2}, {"prefetch": 5, "workers": 2}, {"workers": 0, "output": "uint8"}):
        assert_same(batches(class_folder, steps=7, **settings), straight)


def test_it_runs_ahead(class_folder):
    with loader_of(class_folder, prefetch=3) as loader:
        next(loader)
        deadline = time.monotonic() + 30
        while loader._batches._done.qsize() < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert loader._batches._done.qsize() == 2


def test_starts_anywhere_and_goes_on_from_a_state(class_folder):
    straight = batches(class_folder, steps=6)
    assert_same(batches(class_folder, steps=4, start_step=2), straight[2:])
    with loader_of(class_folder, prefetch=3) as loader:
        for _ in range(3):
            next(loader)
        state = loader.state()
        next(loader)
        loader.load_state(state)
        assert_same([next(loader) for _ in range(3)], straight[3:])
    assert state["pipeline"] == "dali cpu"


def test_ranks_share_the_batch_from_any_step(class_folder):
    whole = batches(class_folder)
    for start in (0, 2):
        parts = [batches(class_folder, steps=3 - start, rank=r, world_size=2, start_step=start) for r in range(2)]
        for batch, *halves in zip(whole[start:], *parts, strict=True):
            for number, tensor in enumerate(tensors(batch)):
                assert torch.equal(torch.cat([tensors(half)[number] for half in halves]), tensor)


def test_a_batch_stays_as_it_was_given(class_folder):
    with loader_of(class_folder, prefetch=2) as loader:
        first = next(loader)
        copies = [tensor.clone() for tensor in tensors(first)]
        for _ in range(4):
            next(loader)
        assert all(torch.equal(a, b) for a, b in zip(tensors(first), copies, strict=True))


def test_unreadable_images_are_replaced_as_pillow_replaces_them(with_files, damaged):
    folder = with_files(damaged)
    for one, two in zip(batches(folder, steps=5), batches(folder, "pillow", 5), strict=True):
        assert torch.equal(one.indices, two.indices)
        assert one.replaced == two.replaced
        assert all(close(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))
    assert one.replaced > 0


@pytest.mark.parametrize("kind", ["palette", "cmyk", "turned", "png"])
def test_what_dali_would_convert_by_other_rules_is_made_by_pillow(with_files, photographs, kind):
    image, file = photographs["coffee"].resize((160, 120)), io.BytesIO()
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(file, "JPEG", exif=exif)
    elif kind == "cmyk":
        image.convert("CMYK").save(file, "JPEG")
    else:
        (image.convert("P") if kind == "palette" else image).save(file, "PNG")
    folder = with_files({"b.jpg": file.getvalue()}, good=3)
    for one, two in zip(
        batches(folder, views=(), batch_size=4), batches(folder, "pillow", views=(), batch_size=4), strict=True
    ):
        equal = [torch.equal(a, b) for a, b in zip(one.images, two.images, strict=True)]
        assert equal == [index == 3 for index in one.indices.tolist()]


def test_dali_turns_nothing_that_we_count_as_upright(photographs, tmp_path, monkeypatch):
    """As images do whose EXIF data only we find damaged."""
    exif = Image.Exif()
    exif[0x0112] = 3
    for name, options in (("turned", {"exif": exif}), ("plain", {})):
        (tmp_path / name).mkdir()
        photographs["coffee"].resize((160, 120)).save(tmp_path / name / "1.jpg", "JPEG", **options)
    monkeypatch.setattr(dali_module, "orientation", lambda image: 1)
    one, two = (batches(tmp_path / name, views=(), steps=1) for name in ("turned", "plain"))
    assert torch.equal(one[0].images, two[0].images)


def broken(jpeg: bytes, how: str) -> bytes:
    """A JPEG whose header Pillow accepts, and whose pixels neither it nor DALI decodes."""
    if how == "tables":  # DALI's message names it
        start = jpeg.find(b"\xff\xc4")
        return jpeg[: start + 5] + b"\xff" * 16 + jpeg[start + 21 :]
    return jpeg[: jpeg.find(b"\xff\xda")] + b"\xff\xd9"  # no scan: it does not


@pytest.mark.parametrize("how", ["tables", "scan"])
@pytest.mark.parametrize("views", [VIEWS, ()], ids=["three views", "one view"])
def test_what_dali_fails_on_is_found_named_and_replaced(with_files, jpeg_folder, caplog, how, views):
    jpeg = min(jpeg_folder.iterdir()).read_bytes()
    folder = with_files({"zz_bad.jpg": broken(jpeg, how), "zz_worse.jpg": broken(jpeg, how)}, good=14)
    caplog.set_level("WARNING")
    expected = batches(folder, "pillow", 8, views=views)
    assert caplog.text.count("unreadable image") == 2
    caplog.clear()
    straight = batches(folder, steps=8, views=views)
    assert caplog.text.count("unreadable image") == 2
    assert "zz_bad.jpg" in caplog.text
    assert "zz_worse.jpg" in caplog.text
    by_pillow = 0
    for one, two in zip(straight, expected, strict=True):
        assert torch.equal(one.indices, two.indices)
        assert one.replaced == two.replaced
        assert all(close(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))
        by_pillow += sum(torch.equal(a, b) for a, b in zip(one.images, two.images, strict=True))
    assert by_pillow == straight[-1].replaced  # the other rows are still DALI's
    assert straight[-1].replaced == 8  # two in each of four passes
    for settings in ({"prefetch": 1}, {"prefetch": 6, "workers": 2}):
        assert_same(batches(folder, steps=8, views=views, **settings), straight)
    for start in (1, 5):
        for a, b in zip(batches(folder, steps=8 - start, views=views, start_step=start), straight[start:], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_a_file_that_only_dali_refuses_is_read_by_pillow(class_folder, monkeypatch, caplog):
    expected, usual = batches(class_folder, "pillow", 9, views=()), batches(class_folder, steps=9, views=())
    original, victim = Graph.fed, (class_folder / "coffee" / "1_03.jpg").read_bytes()

    def fed(self, encoded, drawn):
        return original(self, broken(encoded, "tables") if encoded == victim else encoded, drawn)

    monkeypatch.setattr(Graph, "fed", fed)
    got = batches(class_folder, steps=9, views=())
    index = 12 + 3
    for one, pillow, dali in zip(got, expected, usual, strict=True):
        assert one.replaced == 0
        for row, image in enumerate(one.indices.tolist()):
            assert torch.equal(one.images[row], (pillow if image == index else dali).images[row])
    assert caplog.text.count("DALI cannot decode") == 1
    assert "1_03.jpg (Failed to decode sample" in caplog.text


def test_a_failure_that_does_not_come_again_changes_nothing(class_folder, monkeypatch):
    expected = batches(class_folder)
    original, failures = dali_module.DaliPipe.finish, [RuntimeError("a passing trouble")]

    def finish(self, count):
        if failures:
            raise failures.pop()
        return original(self, count)

    monkeypatch.setattr(dali_module.DaliPipe, "finish", finish)
    assert_same(batches(class_folder), expected)


def test_when_dali_itself_fails_the_run_is_told(class_folder, monkeypatch):
    def build(self, *arguments):
        raise RuntimeError("Critical error\nencountered:\n\nout of everything")

    monkeypatch.setattr(Graph, "build", build)
    with loader_of(class_folder) as loader:
        for _ in range(2):
            with pytest.raises(WorkerError, match=r"out of everything.*pipeline pillow"):
                next(loader)


def test_the_budget_holds(with_files, damaged):
    folder = with_files(damaged, good=8)
    with loader_of(folder, batch_size=30, bad_budget=2) as loader, pytest.raises(BadDataError):
        next(loader)


def test_closing_in_the_middle_ends_the_threads(class_folder):
    import threading

    loader = loader_of(class_folder, prefetch=4)
    next(loader)
    loader.close()
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("fastmim DALI", "fastmim data r"))
    ]
    next(loader)  # and it starts again
    loader.close()


@pytest.mark.parametrize("write", [write_tar, write_tfrecord])
def test_images_in_shards_are_those_of_files(class_folder, tmp_path, write):
    samples = samples_of(class_folder)
    (tmp_path / "files").mkdir()
    for number, (_, image, _) in enumerate(samples):
        (tmp_path / "files" / f"{number:03d}.jpg").write_bytes(image)
    for number in range(3):
        name = f"{number}.{'tar' if write is write_tar else 'tfrecord'}"
        write(tmp_path / "shards" / name, samples[12 * number : 12 * number + 12])
    shards = create_source(DataConfig(root=tmp_path / "shards"))
    assert jpeg_share(shards) == 1, "auto knows what DALI is for"
    assert_same(batches(tmp_path / "shards", steps=6, workers=3), batches(tmp_path / "files", steps=6, workers=3))


def test_on_a_gpu_the_copy_is_awaited_before_the_batch_is_given(monkeypatch):
    """The order of calls there, with a device that is pretended."""
    from nvidia.dali.plugin import pytorch as plugin

    said = []

    class Stream:
        def synchronize(self):
            said.append("synchronised")

    class Output:
        def as_tensor(self):
            return "pixels"

    class Pipe:
        def outputs(self, cuda_stream):
            said.append(cuda_stream)
            return [Output()]

    def feed_ndarray(pixels, view, cuda_stream):
        said.append((pixels, tuple(view.shape), cuda_stream))

    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(plugin, "feed_ndarray", feed_ndarray)
    asked = []
    monkeypatch.setattr(Graph, "build", lambda self, *arguments: asked.append(arguments) or Pipe())
    monkeypatch.setattr(Graph, "feed", lambda self, pipe, fed: None)
    graph = Graph((ViewSpec("images", (16, 24)),), 3, "bicubic", device="gpu")
    pipe = dali_module.DaliPipe(graph, 8, 2, torch.device("cpu"))
    pipe.start([])
    pipe.finish(5)
    assert asked == [(8, 2, 3)]
    assert said == [stream, ("pixels", (5, 3, 16, 24), stream), "synchronised"]
