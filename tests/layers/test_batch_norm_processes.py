"""Batch norm over two processes equals batch norm over both their batches in one."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fastmim.layers import MaskedBatchNorm2d, sparsify
from fastmim.ops import TileIndex

SHAPE = (4, 3, 2, 2, 5)  # two images of each process


def case():
    generator = torch.Generator().manual_seed(0)
    x, cotangent = torch.randn(2, *SHAPE, generator=generator, dtype=torch.float64)
    ids_keep = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(SHAPE[0])])
    norm = nn.BatchNorm2d(SHAPE[-1]).double()
    nn.init.normal_(norm.weight, generator=generator)
    return 3 * x + 2, cotangent, ids_keep, norm


def run(norm, x, cotangent, ids_keep):
    """Two steps; what came out of the last, gradients and running statistics."""
    tiles = TileIndex.from_ids_keep(ids_keep, (2, 3))
    for _ in range(2):
        x = x.detach().requires_grad_()
        out = norm(x, tiles)
        gradients = torch.autograd.grad(out, [x, norm.weight, norm.bias], cotangent)
    return [out.detach(), *gradients], dict(norm.named_buffers())


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, cotangent, ids_keep, plain = case()
    half = slice(2 * rank, 2 * rank + 2)
    layer = MaskedBatchNorm2d(SHAPE[-1], sync=True).double()
    layer.load_state_dict(plain.state_dict())
    converted = sparsify(nn.SyncBatchNorm.convert_sync_batchnorm(plain))
    results = [run(norm, x[half], cotangent[half], ids_keep[half]) for norm in (layer, converted)]
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    x, cotangent, ids_keep, plain = case()
    (out, x_gradient, *sums), statistics = run(sparsify(plain), x, cotangent, ids_keep)
    of_both_ranks = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for first, second in zip(*of_both_ranks, strict=True):  # the layer, then the converted module
        torch.testing.assert_close(torch.cat([first[0][0], second[0][0]]), out)
        torch.testing.assert_close(torch.cat([first[0][1], second[0][1]]), x_gradient)
        for mine, theirs, both in zip(first[0][2:], second[0][2:], sums, strict=True):
            torch.testing.assert_close(mine + theirs, both)  # the trainer averages gradients of parameters
        for part in (first, second):
            torch.testing.assert_close(part[1], statistics)


def test_alone_it_is_ordinary_batch_norm():
    x, cotangent, ids_keep, plain = case()
    alone = MaskedBatchNorm2d(SHAPE[-1], sync=True).double()
    alone.load_state_dict(plain.state_dict())
    torch.testing.assert_close(run(alone, x, cotangent, ids_keep), run(sparsify(plain), x, cotangent, ids_keep))
