"""The graph that DALI is given, for the CPU and, as far as it can be seen without one, for the GPU."""

import re

import pytest

from fastmim.data import ViewSpec
from fastmim.data.dali_graph import Graph
from fastmim.data.dali_trial import gist, trial, why_not

pytestmark = [pytest.mark.dali, pytest.mark.skipif(bool(why_not()), reason=why_not() or "DALI is there")]
VIEWS = (ViewSpec("images", (64, 64)), ViewSpec("small", (32, 32), crop="images"), ViewSpec("own", (32, 48)))
NUMBERS = {"mean": (0.5, 0.25, 0.125), "std": (0.5, 1.0, 0.25)}


def words(device, views=VIEWS, **options):
    """The names in the serialised graph, in order: operations, devices, arguments."""
    from nvidia.dali import Pipeline

    pipe = Pipeline(4, 1, None)
    Graph(views, 3, "bicubic", device=device, **options).define(pipe)
    return [word.decode() for word in re.findall(rb"[A-Za-z_]\w{2,}", pipe.serialize())]


def operations(found):
    return [word for word in found if word in ("decoders__Image", "decoders__ImageSlice", "Slice", "Resize")]


def devices(found):
    """Of every operation that is no input."""
    kinds = ("ExternalSource", "decoders__Image", "decoders__ImageSlice", "Slice", "Resize", "CropMirrorNormalize")
    of_all = [found[at + 2] for at in range(len(found) - 2) if found[at : at + 2] == ["device", "string"]]
    names = [word for word in found if word in kinds]
    assert len(of_all) == len(names)
    return [(name, device) for name, device in zip(names, of_all, strict=True) if name != "ExternalSource"]


@pytest.mark.parametrize("device, decoding", [("cpu", "cpu"), ("gpu", "mixed")])
def test_decoding_is_where_it_should_be_and_all_that_follows_too(device, decoding):
    expected = [(name, device) for name in ("Slice", "Resize", "CropMirrorNormalize") for _ in VIEWS]
    assert sorted(devices(words(device))) == sorted([("decoders__Image", decoding), *expected])
    one = [("decoders__ImageSlice", decoding), ("Resize", device), ("CropMirrorNormalize", device)]
    assert devices(words(device, VIEWS[:1])) == one


def test_both_devices_run_the_same_operations():
    def plain(found):
        return sorted(word for word in found if word not in ("cpu", "gpu", "mixed") and not word.startswith("__"))

    assert plain(words("cpu", **NUMBERS)) == plain(words("gpu", **NUMBERS))


def test_only_the_box_is_decoded_where_all_views_share_it():
    for views in (VIEWS[:1], VIEWS[:2]):
        assert operations(words("cpu", views)) == ["decoders__ImageSlice", *["Resize"] * len(views)]
    assert operations(words("cpu")).count("decoders__Image") == 1  # decoded once, cut three times


def test_a_graph_for_the_gpu_says_what_it_lacks():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no GPU" in why_not("gpu")
    assert "CUDA" in trial("gpu", 0)
    with pytest.raises(RuntimeError):
        Graph(VIEWS, 3, "bicubic", device="gpu").build(2, 1, 0)


def test_the_trial_passes_here_and_fails_where_colours_are_wrong(monkeypatch):
    assert trial("cpu", None) == ""
    original = Graph.fed

    def blue(self, encoded, drawn):
        import io

        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", (32, 32), (40, 90, 200)).save(file, "JPEG", quality=95)
        return original(self, file.getvalue(), drawn)

    monkeypatch.setattr(Graph, "fed", blue)
    assert re.search(r"an error of 1[56]\d levels", trial("cpu", None))


def test_the_gist_of_an_error_is_one_line():
    message = (
        'Critical error in pipeline:\n  File "a.py", line 3\n\nencountered:\n\nFailed to decode sample #5 : \nCurrent'
    )
    assert gist(RuntimeError(message)) == "Failed to decode sample #5"
    assert gist(RuntimeError("one\ntwo")) == "one"
    assert gist(RuntimeError()) == "RuntimeError"
