"""Steps with weights spread over two processes are those of one process with the same batch."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastmim.engine.background import HostCopies
from fastmim.engine.capture import why_no_graph
from fastmim.engine.checkpoint import CheckpointStore
from fastmim.engine.ema import Ema
from fastmim.engine.fully_sharded import FullySharded, choose_parallel
from fastmim.engine.optimizer import create_optimizer, set_lr
from fastmim.engine.pieces import Piece, local_part, share_of_rows
from fastmim.engine.settings import EngineConfig, OptimConfig
from fastmim.engine.sharded_checkpoint import save_sharded
from fastmim.engine.step import TrainStep
from fastmim.engine.training_state import TrainingState
from fastmim.methods import create_method, method_config
from fastmim.models import create_encoder
from fastmim.models.norms import synchronise_batch_norms
from tests.engine.tiny_run import TinyMethod

CPU = torch.device("cpu")
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STEPS, BATCH = 6, 8
VIT = {"patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 2}
BEIT = {**VIT, "use_abs_pos_emb": False, "use_rel_pos_bias": True}


@dataclasses.dataclass
class Case:
    method: str
    encoder: str = "vit_tiny_patch16_224"
    settings: dict = dataclasses.field(default_factory=dict)
    kwargs: dict = dataclasses.field(default_factory=lambda: VIT)
    optim: dict = dataclasses.field(default_factory=dict)
    size: int = 32
    sync_bn: bool = False
    lr: float = 1e-3
    precision: str = "fp32"


CASES = {
    "mae": Case("mae", settings={"decoder_depth": 3}),
    "mae-partial": Case("mae", settings={"decoder": "partial", "decoder_depth": 3}),
    "mae-cross": Case("mae", settings={"decoder": "cross", "decoder_depth": 2}),
    "simmim": Case("simmim"),
    "simmim-beit": Case("simmim", "beit_base_patch16_224", kwargs=BEIT),
    "a2mim": Case("a2mim"),
    "a2mim-resnet": Case("a2mim", "resnet18", kwargs={}, size=64, sync_bn=True),
    "a2mim-tiles": Case("a2mim", "resnet18", {"tiles": True}, kwargs={}, size=64, sync_bn=True),
    # Batch norms over sixteen rows make much of rounding, so small steps.
    "spark": Case("spark", "resnet18", {"decoder_width": 32}, kwargs={}, size=64, lr=1e-5),
    "fcmae": Case("fcmae", "convnextv2_atto", {"decoder_dim": 32}, kwargs={}, size=64),
    "mixedae": Case("mixedae", settings={"decoder_depth": 3}),
    "bf16": Case("mae", precision="bf16"),
    "accumulate-clip": Case("mae", optim={"accumulate": 2, "clip_grad_norm": 0.5}),
    "per-tensor": Case("mae", optim={"clip_grad_norm": 0.1, "clip_mode": "per_tensor"}),
    "lamb": Case("simmim", optim={"name": "lamb", "weight_decay": 0.1}),
}


def build(case):
    torch.manual_seed(3)
    encoder = create_encoder(case.encoder, img_size=case.size, in_chans=1, **case.kwargs)
    config = method_config(case.method)(**case.settings)
    return create_method(case.method, encoder, config, (case.size, case.size)).train()


def prepare(case, rank=0, size=1, *, spread=False, device=CPU):
    """The step of one process, and all that it changes."""
    method = build(case).to(device)
    if case.sync_bn:
        synchronise_batch_norms(method)
    optim = OptimConfig(lr=case.lr, **case.optim)
    parallel = FullySharded(method) if spread or size > 1 else None
    optimizer = create_optimizer(method, optim, add_up=parallel and parallel.add_up)
    ema = Ema(method, 0.9)
    share = BATCH // size
    step = TrainStep(
        method,
        optimizer,
        optim,
        precision=case.precision,
        device=device,
        seed=5,
        micro_batch=share // optim.accumulate,
        stop=True,
        ema=ema,
        first=rank * share,
        parallel=parallel,
        agree=(lambda flag: dist.all_reduce(flag, dist.ReduceOp.MAX)) if size > 1 else None,
    )
    return step, TrainingState(method, optimizer, ema)


def train(case, rank=0, size=1, spoil=-1, **settings):
    """Losses, gradient norms, and all tensors at the end, whole."""
    step, state = prepare(case, rank, size, **settings)
    rows, course = slice(rank * BATCH // size, (rank + 1) * BATCH // size), []
    for i in range(STEPS):
        set_lr(step.optimizer, case.lr)
        images = torch.rand(BATCH, 1, case.size, case.size, generator=torch.Generator().manual_seed(i))
        if i == spoil:
            images[-1] = float("nan")
        output = step(images[rows].to(step.device), None, None, i, pictures=i == STEPS - 1)
        loss = output.loss.clone()
        if size > 1:
            dist.all_reduce(loss)
        course.append([float(loss) / size, float(output.grad_norm)])
    assert len(output.pictures().reconstruction) == step.micro_batch
    return torch.tensor(course), copies(state)


def copies(state):
    return {k: {n: p.tensor.cpu().clone() for n, p in v.items()} for k, v in state.gathered().items()}


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, case in CASES.items():
        results = train(case, rank, 2)
        if rank == 0:
            torch.save(results, Path(folder) / f"{name}.pt")
    spoilt = [train(CASES["mae"], rank, 2, spoil)[1] for spoil in (2, STEPS)]  # a bad step on the last rank; none
    if rank == 0:
        torch.save(spoilt, Path(folder) / "spoilt.pt")
    held = local_part(build_spread().encoder.blocks[0].mlp.fc1.weight)
    assert held.shape == (72, 36), "half of 144 rows"
    dist.destroy_process_group()


def build_spread():
    method = build(CASES["mae"])
    keys = list(method.state_dict())
    FullySharded(method)
    assert list(method.state_dict()) == keys
    return method


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes made of every case; they start once."""
    folder = tmp_path_factory.mktemp("pair")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return functools.partial(read, folder)


def read(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_steps_of_one(pair, name):
    (alone, tensors), (both, spread) = train(CASES[name]), pair(name)
    exact = CASES[name].precision == "fp32"
    torch.testing.assert_close(both, alone, rtol=2e-4 if exact else 2e-2, atol=1e-6)
    assert both[0, 1] == pytest.approx(float(alone[0, 1]), rel=1e-5 if exact else 1e-2), "the norm over all rows"
    assert spread.keys() == tensors.keys()
    for group, expected in tensors.items():
        assert spread[group].keys() == expected.keys(), "a parameter without a gradient has no state"
        for key, tensor in expected.items():
            assert spread[group][key].shape == tensor.shape, key
            if group == "method" and exact:  # Adam turns a tiny gradient's rounding into a step
                torch.testing.assert_close(spread[group][key], tensor, rtol=1e-2, atol=2e-3, msg=key)


@pytest.mark.slow
def test_a_bad_step_of_one_process_changes_no_row_of_any(pair):
    spoilt, clean = pair("spoilt")
    counts = {key: int(t) for key, t in spoilt["optimizer"].items() if key.startswith("step/")}
    assert set(counts.values()) == {2}, "steps after it are left out too"
    assert all(bool(t.isfinite().all()) for t in spoilt["method"].values())
    assert not torch.equal(spoilt["method"]["encoder.norm.weight"], clean["method"]["encoder.norm.weight"])


@pytest.fixture
def group_of_one(device):
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_weights_spread_over_one_process_train_as_others_do_and_are_saved(tmp_path, device, group_of_one):
    """What a machine with a single GPU can show of FSDP, of copies in pinned memory and of sharded checkpoints."""
    case, where = CASES["mae"], torch.device(device)
    (_, plain), (_, spread) = train(case, device=where), train(case, spread=True, device=where)
    exact = {} if device == "cuda" else {"rtol": 0, "atol": 0}
    for group, expected in plain.items():
        torch.testing.assert_close(spread[group], expected, **exact)

    _, state = prepare(case, spread=True, device=where)
    assert state.spread
    pieces = HostCopies().take(state.shares(0, 1))
    assert all(p.tensor.is_pinned() == (device == "cuda") for part in pieces.values() for p in part.values())
    before, store = copies(state), CheckpointStore(tmp_path)
    save_sharded(store, 6, pieces, {}, rank=0, group=None)
    with torch.no_grad():
        for part in state.pieces().values():
            for piece in part.values():
                piece.tensor.zero_()
    state.load(store.newest())
    for group, expected in before.items():
        torch.testing.assert_close(copies(state)[group], expected, rtol=0, atol=0)


def test_rows_are_dealt_out_as_chunk_does():
    for rows in (1, 2, 3, 7, 8):
        for size in (1, 2, 3, 4):
            chunks = torch.arange(rows).chunk(size)
            for rank in range(size):
                first, count = share_of_rows(rows, rank, size)
                expected = chunks[rank].tolist() if rank < len(chunks) else []
                assert list(range(first, first + count)) == expected


def test_a_piece_cuts_its_rows():
    tensor = torch.arange(10.0).reshape(5, 2)
    assert Piece(tensor[3:], tensor.shape, 3, spread=True).cut(tensor).tolist() == [[6.0, 7.0], [8.0, 9.0]]
    assert Piece(tensor, tensor.shape).cut(tensor) is tensor


def test_what_does_not_go_together_is_said():
    method = TinyMethod()
    with pytest.raises(ValueError, match=r"engine\.compile and engine\.parallel=fsdp"):
        choose_parallel(method, EngineConfig(parallel="fsdp", compile=True), 1, 2)
    optimizer = create_optimizer(method, OptimConfig(lr=1e-3), rates_on_device=True)
    assert "FSDP" in why_no_graph("auto", torch.device("cuda"), optimizer, gathers=True)
    with pytest.raises(ValueError, match="FSDP"):
        why_no_graph("on", torch.device("cuda"), optimizer, gathers=True)


def test_one_process_has_nothing_to_spread(caplog):
    caplog.set_level("INFO")
    assert choose_parallel(TinyMethod(), EngineConfig(parallel="fsdp"), 1, 1) is None
    assert "this run has one" in caplog.text
