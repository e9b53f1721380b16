"""A method's forward pass under DistributedDataParallel: gradients are averaged over processes while backward runs."""

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmim.methods import Batch, Method, Output, Pictures

logger = logging.getLogger(__name__)


class MethodForward(nn.Module):
    """What is wrapped: gives tensors in a tuple and a dict, because what wraps it looks into no others."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.pictures: Callable[[], Pictures] | None = None

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        output = self.method(batch)
        self.pictures = output.pictures
        return output.loss, output.parts


class DataParallel:
    """Called like the method. A method stays as it is: its parameters, names and `state_dict` are not wrapped.

    Weights are made equal to the main process's at the start and stay equal, because every process takes the same
    optimiser step. Parameters without a gradient get none here either, so the optimiser passes over them as it does in
    one process.

    Args:
        method: on its device; its trained parameters may not be exchanged from here on.
        accumulate: micro-batches per step. With one, every step has the same graph and that is told to
            DistributedDataParallel; with more, torch cannot combine that with postponed averaging.
    """

    name = "ddp"
    add_up = None  # every process holds all of every gradient

    def __init__(self, method: Method, accumulate: int) -> None:
        self._forward = MethodForward(method)
        device = next(method.parameters()).device
        with warnings.catch_warnings(), _side_stream(device):
            warnings.filterwarnings(
                "ignore", ".*broadcast_buffers", FutureWarning
            )  # its successor is not in torch 2.11
            self._parallel = DistributedDataParallel(
                self._forward,
                broadcast_buffers=False,  # statistics are of all processes anyway, or the main one's are saved
                gradient_as_bucket_view=True,
                static_graph=accumulate == 1,
                find_unused_parameters=accumulate > 1,
            )

    def __call__(self, batch: Batch) -> Output:
        loss, parts = self._parallel(batch)
        return Output(loss, parts, self._forward.pictures)

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """The context of forward and backward of one micro-batch: only after the last one gradients travel."""
        return nullcontext() if last else self._parallel.no_sync()

    def collect_gradients(self) -> None:
        """They are where they belong."""


def _side_stream(device: torch.device) -> AbstractContextManager[None]:
    """Buckets are made on a stream that a graph can be captured from."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def tell_of_local_statistics(method: nn.Module) -> None:
    """Say so where batch norms see the images of one process only."""
    norms = [module for module in method.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    local = [n for n in norms if not (getattr(n, "sync", False) or isinstance(n, nn.SyncBatchNorm))]
    if local:
        logger.info(
            "%d batch norms take their statistics over each process's own images; the main process's are saved; "
            "--engine.sync_bn true takes them over all.",
            len(local),
        )
