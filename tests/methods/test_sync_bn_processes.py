"""A SparK step in two processes equals the step of one process over both their images."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastmim.methods import Batch, create_method
from fastmim.methods.fcmae import FCMAE, FCMAEConfig
from fastmim.methods.spark import SparKConfig
from fastmim.models import create_encoder

SIZE = (64, 96)


def build(sync_bn=True, decoder="full"):
    torch.manual_seed(0)
    encoder = create_encoder("resnet18", img_size=SIZE)
    cfg = SparKConfig(decoder_width=32, decoder=decoder, sync_bn=sync_bn)
    return create_method("spark", encoder, cfg, SIZE).double().train()


def step(method, first, count):
    """Gradients and statistics after a step on images first, first + 1, ... of four."""
    images = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = Batch(images[first : first + count], torch.tensor([0, 0, first]))
    loss = method(batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}, dict(method.named_buffers())


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    runs = {"full": build(), "light": build(decoder="light"), "off": build(sync_bn=False)}
    torch.save({name: step(method, 2 * rank, 2) for name, method in runs.items()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_both_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("decoder", ["full", "light"])
def test_two_processes_equal_one(of_both_ranks, decoder):
    results, statistics = step(build(decoder=decoder), 0, 4)
    (first, of_first), (second, of_second) = (rank[decoder] for rank in of_both_ranks)
    assert len(first) > 60
    for name, whole in results.items():  # the mean over processes, as the trainer takes it
        torch.testing.assert_close((first[name] + second[name]) / 2, whole, rtol=1e-7, atol=1e-10, msg=name)
    assert any("decoder.blocks" in name for name in statistics) == (decoder == "full")
    for name, whole in statistics.items():
        for buffers in (of_first, of_second):
            torch.testing.assert_close(buffers[name], whole, msg=name)


def test_switched_off_each_process_has_statistics_of_its_own(of_both_ranks):
    first, second = (rank["off"][1] for rank in of_both_ranks)
    for name in ("encoder.bn1.running_mean", "decoder.blocks.0.bn1.running_mean"):
        assert not torch.allclose(first[name], second[name])


def test_it_is_on_by_default_and_an_option():
    assert build().encoder.bn1.sync
    assert build().decoder.blocks[0].bn1.sync
    assert not getattr(build(sync_bn=False).encoder.bn1, "sync", False)
    encoder = create_encoder("resnet18", img_size=SIZE)
    assert FCMAE(encoder, FCMAEConfig(decoder_dim=32), SIZE).encoder.bn1.sync
