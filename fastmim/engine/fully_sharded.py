"""A method's forward pass under FSDP2: each process keeps a part of the weights, gradients and optimiser state.

The weights of a block are gathered while it runs, forward and again backward, and its gradients are averaged and dealt
out right after; so a process holds 1/n of everything that training keeps, and the whole weights of a block or two. The
rest of the method (embeddings, tokens, heads) forms one group, gathered for the whole step.

Weights, gradients and sums stay fp32; the trainer's autocast computes in bf16 as it does in one process. Operations see
plain tensors: FSDP puts the gathered weights into the modules before their forward runs.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from fastmim.engine.compiling import repeated_blocks
from fastmim.engine.data_parallel import DataParallel, MethodForward
from fastmim.engine.pieces import local_part
from fastmim.engine.settings import EngineConfig
from fastmim.methods import Batch, Method, Output

logger = logging.getLogger(__name__)


class FullySharded:
    """Called like the method, which keeps its class, its modules' names and its `state_dict` keys.

    From here on the method's parameters are DTensors that hold this process's rows. `local_part` of a parameter is a
    plain tensor of these rows, the same one throughout; `collect_gradients` gives it its gradient. Optimisers, averages
    and checkpoints use those.

    Args:
        method: on its device, with whole weights; made equal to the main process's. Its optimiser is built afterwards.
    """

    name = "fsdp"

    def __init__(self, method: Method) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        for tensor in (*method.parameters(), *method.buffers()):
            dist.broadcast(tensor.detach(), 0)
        mesh = init_device_mesh(next(method.parameters()).device.type, (dist.get_world_size(),))
        apart = {module for part in method.runs_in_layers() for module in part.modules()}
        blocks = [block for block in repeated_blocks(method) if block not in apart]
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
            if hasattr(block, "run"):
                register_fsdp_forward_method(block, "run")
        self._forward = MethodForward(method)
        fully_shard(self._forward, mesh=mesh, reshard_after_forward=False)
        assert isinstance(self._forward, FSDPModule)
        for module in (*blocks, self._forward):
            assert isinstance(module, FSDPModule)
            module.unshard()  # the first time FSDP pads its rows, which may move them
            module.reshard()
        self._trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self._rows = [local_part(parameter) for parameter in self._trained]
        self._checked = False  # after the first step, nothing moves
        held, count = (sum(p.numel() for p in parts) for parts in (self._rows, self._trained))
        logger.info(
            "FSDP: %d blocks are gathered one by one; this process keeps %.3g of %.3g M trained parameters.",
            len(blocks),
            held / 1e6,
            count / 1e6,
        )

    def __call__(self, batch: Batch) -> Output:
        loss, parts = self._forward(batch)
        return Output(loss, parts, self._forward.pictures)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """The context of forward and backward of one micro-batch: only after the last one gradients travel. Until then
        they are kept whole."""
        self._forward.set_requires_gradient_sync(last)  # type: ignore[operator]
        self._forward.set_is_last_backward(last)  # type: ignore[operator]
        yield

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After backward: each `local_part` gets the rows of its gradient; those of parameters without one, none."""
        for parameter, rows in zip(self._trained, self._rows, strict=True):
            if not self._checked:
                assert parameter.to_local().data_ptr() == rows.data_ptr(), "FSDP moved its rows"  # type: ignore[attr-defined]
            rows.grad = None if parameter.grad is None else local_part(parameter.grad)
            parameter.grad = None
        self._checked = True

    def add_up(self, squares: Tensor) -> Tensor:
        """Sums over the rows of this process -> over the rows of all."""
        dist.all_reduce(squares)
        return squares


def choose_parallel(
    method: Method, engine: EngineConfig, accumulate: int, processes: int
) -> DataParallel | FullySharded | None:
    """What runs the method in several processes, as the settings say; None where there is one.

    Raises:
        ValueError: settings that FSDP cannot go with.
    """
    if engine.parallel != "fsdp":
        return DataParallel(method, accumulate) if processes > 1 else None
    if engine.compile:
        raise ValueError("engine.compile and engine.parallel=fsdp do not go together; leave out one of them")
    if processes == 1:
        logger.info("engine.parallel: fsdp spreads weights over processes, and this run has one.")
        return None
    return FullySharded(method)
