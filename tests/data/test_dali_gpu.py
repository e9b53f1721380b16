"""DALI on a GPU: the batches of the CPU but for the decoder's rounding, on the device, beside a training step."""

import pytest
import torch

from fastmim.data import DataConfig, ViewSpec, create_loader, create_source
from fastmim.data.dali_trial import why_not

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(bool(why_not("gpu")), reason=why_not("gpu") or "DALI works on the GPU"),
]
VIEWS = (ViewSpec("images", (64, 64)), ViewSpec("small", (32, 32), crop="images"), ViewSpec("own", (32, 48)))
ONE_BOX = VIEWS[:2]


def loader_of(root, place="gpu", views=VIEWS, rank=0, world_size=1, start_step=0, **settings):
    cfg = DataConfig(
        **({"root": root, "workers": 2, "output": "uint8", "pipeline": "dali", "dali_device": place} | settings)
    )
    source, device = create_source(cfg), torch.device("cuda", torch.cuda.current_device())
    return create_loader(source, cfg, (64, 64), 8, 0, rank, world_size, start_step, views, device)


def batches(root, place="gpu", steps=4, **options):
    with loader_of(root, place, **options) as loader:
        return [next(loader) for _ in range(steps)]


def tensors(batch):
    return [batch.images, *batch.views.values()]


def assert_close(one, two, levels=1.0):
    """nvJPEG and libjpeg round their transforms differently: on average less than a level, worse at few pixels."""
    for a, b in zip(tensors(one), tensors(two), strict=True):
        assert a.is_cuda
        distance = (a.float().cpu() - b.float().cpu()).abs() / levels
        assert distance.flatten(1).mean(1).max() < 2
        assert distance.max() < 50


@pytest.mark.parametrize("views", [VIEWS, ONE_BOX, ()], ids=["three views", "one box", "one view"])
def test_batches_are_those_of_the_cpu(class_folder, views):
    pairs = zip(batches(class_folder, views=views), batches(class_folder, "cpu", views=views), strict=True)
    for one, two in pairs:
        assert torch.equal(one.indices, two.indices)
        assert torch.equal(one.labels, two.labels)
        assert_close(one, two)


def test_normalised_batches_are_those_of_the_cpu(class_folder):
    one, two = (batches(class_folder, place, output="float32") for place in ("gpu", "cpu"))
    for a, b in zip(one, two, strict=True):
        assert a.images.dtype == torch.float32
        assert_close(a, b, levels=1 / (255 * 0.22))


def test_batches_are_the_same_whatever_runs_ahead_and_from_any_step(class_folder):
    straight = batches(class_folder, steps=6, prefetch=1)
    for start, settings in ((0, {"prefetch": 5, "workers": 1}), (3, {"prefetch": 2})):
        for a, b in zip(
            batches(class_folder, steps=6 - start, start_step=start, **settings), straight[start:], strict=True
        ):
            assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_ranks_share_the_batch(class_folder):
    whole = batches(class_folder)
    parts = [batches(class_folder, rank=rank, world_size=2) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for number, tensor in enumerate(tensors(batch)):
            assert torch.equal(torch.cat([tensors(half)[number] for half in halves]), tensor)


def test_unreadable_images_are_replaced_as_on_the_cpu(with_files, damaged):
    folder = with_files(damaged)
    one, two = (batches(folder, place, steps=6) for place in ("gpu", "cpu"))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert a.replaced == b.replaced
        assert_close(a, b)
    assert one[-1].replaced > 0


def test_what_the_decoder_fails_on_is_found_and_replaced(with_files, jpeg_folder):
    jpeg = min(jpeg_folder.iterdir()).read_bytes()
    start = jpeg.find(b"\xff\xc4")
    folder = with_files({"zz.jpg": jpeg[: start + 5] + b"\xff" * 16 + jpeg[start + 21 :]}, good=15)
    one, two = (batches(folder, place, steps=4) for place in ("gpu", "cpu"))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert a.replaced == b.replaced
    assert one[-1].replaced == 2


def test_batches_stay_as_given_while_steps_are_captured_and_replayed(class_folder):
    expected = batches(class_folder, steps=12)
    static = torch.empty_like(expected[0].images)
    with loader_of(class_folder, prefetch=4) as loader:
        given = [next(loader)]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            total = static.float().sum()
        for _ in range(11):
            given.append(next(loader))
            static.copy_(given[-1].images)
            graph.replay()
        assert total.item() == expected[-1].images.float().sum().item()
    for a, b in zip(given, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))
