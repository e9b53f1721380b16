"""Whole training steps as graphs: captured once for each form of input, replayed with one launch.

A step issues a thousand kernels and more; for small models or few images per GPU the host is busy longer than the
device. A captured step runs forward, backward, clipping, finite check, optimiser and averages with a single call.
What the steps of a run differ in lies in device tensors: the batch is copied into fixed buffers, the step's index
counts itself, rates are filled in before each replay, masks are drawn from (seed, step) by Philox on the device.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastmim.engine.injector import inject
from fastmim.engine.step import StepOutput, TrainStep

logger = logging.getLogger(__name__)

WARMUP = 3  # eager steps before a capture: lazy initialisation, optimiser state, choice of kernels
WARMUP_DDP = 11  # DistributedDataParallel settles its buckets and its statistics in ten
_VIEW = "view "  # before the name of a view among the inputs
MOST_FORMS = 4  # graphs that are kept; each holds the memory of a step

Replay = Callable[[], None]


class Graphs(Protocol):
    """What capturing needs of a device."""

    def warm_up(self) -> AbstractContextManager[None]:
        """The context of eager steps before a capture."""
        ...

    def capture(self, body: Callable[[], StepOutput]) -> tuple[Replay, StepOutput]:
        """Record what `body` does, without doing it. Raises RuntimeError where it cannot be captured."""
        ...


class CudaGraphs:
    """CUDA graphs with one memory pool, captured on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    @contextmanager
    def warm_up(self) -> Any:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, body: Callable[[], StepOutput]) -> tuple[Replay, StepOutput]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # thread_local: loader threads may pin memory and copy meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = body()
        self._pool = graph.pool()
        return graph.replay, output


def why_no_graph(wanted: str, device: torch.device, optimizer: torch.optim.Optimizer, *, gathers: bool = False) -> str:
    """Empty where steps can be captured, else the reason. `gathers`: weights are spread over processes.

    Raises:
        ValueError: graphs were asked for (`wanted` is "on") where they cannot be.
    """
    if wanted == "off":
        return "engine.graph is off"
    reason = ""
    if device.type != "cuda":
        reason = f"graphs need a CUDA device, this run is on {device.type}"
    elif gathers:
        reason = "FSDP (engine.parallel) gathers weights anew in each step"
    elif any(not isinstance(group["lr"], Tensor) for group in optimizer.param_groups):
        reason = f"{type(optimizer).__name__} takes its learning rate from the host"
    if reason and wanted == "on":
        raise ValueError(
            f"engine.graph: on was asked for, but {reason}; engine.graph=auto or off trains without graphs"
        )
    return reason


@dataclass
class _Form:
    """One form of input: its buffers, and once captured its graph."""

    buffers: dict[str, Tensor | None]
    eager_steps: int = 0
    replay: Replay | None = None
    output: StepOutput | None = None
    norms: list[tuple[str, Tensor]] | None = None


class GraphedStep:
    """Runs a `TrainStep` as a graph; called as the step is.

    The first `warmup` steps of each form of input (shapes, dtypes, strides, and the method's own settings) are eager,
    the next is captured and replayed from then on. What cannot be captured goes on eagerly, with the reason in the log,
    once; with `must` it is an error.

    The tensors of an output are those of the graph: the next step overwrites them.

    Raises:
        ValueError: inputs on another device than the step's.
        RuntimeError: with `must`, a step that cannot be captured.
    """

    def __init__(self, step: TrainStep, graphs: Graphs, *, warmup: int = WARMUP, must: bool = False) -> None:
        self.step, self._graphs, self._warmup, self._must = step, graphs, warmup, must
        self._forms: dict[tuple, _Form] = {}
        self.reason = ""  # why steps are no longer captured
        step.weight_cache = False

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None,
        indices: Tensor | None,
        step: int,
        *,
        views: Mapping[str, Tensor] | None = None,
        pictures: bool = False,
    ) -> StepOutput:
        """Do step `step`, as `TrainStep` does."""
        inputs: dict[str, Tensor | None] = {"images": images, "labels": labels, "indices": indices}
        inputs |= {f"{_VIEW}{name}": view for name, view in (views or {}).items()}
        form = self._form_of(inputs)
        self.step.begin(step)
        if form is None:
            return self.step.run(images, labels, indices, views=views, pictures=pictures)
        if form.replay is None and form.eager_steps < self._warmup:
            form.eager_steps += 1
            with self._graphs.warm_up():
                return self.step.run(images, labels, indices, views=views, pictures=pictures)
        for name, tensor in inputs.items():
            buffer = form.buffers[name]
            if buffer is not None and tensor is not None:
                buffer.copy_(tensor, non_blocking=True)
        if form.replay is None and not self._capture(form):
            return self.step.run(images, labels, indices, views=views, pictures=pictures)
        assert form.replay is not None
        assert form.output is not None
        assert form.norms is not None
        form.replay()
        self.step.norms = form.norms
        return form.output if pictures else replace(form.output, pictures=None)

    def _capture(self, form: _Form) -> bool:
        buffers = dict(form.buffers)
        images, labels, indices = (buffers.pop(name) for name in ("images", "labels", "indices"))
        views = {name.removeprefix(_VIEW): view for name, view in buffers.items() if view is not None}
        assert images is not None
        try:
            inject("capture")
            form.replay, form.output = self._graphs.capture(
                lambda: self.step.run(images, labels, indices, views=views, pictures=True)
            )
        except RuntimeError as error:
            first_line = str(error).strip().partition("\n")[0]
            self._give_up(f"the step cannot be captured: {first_line}", error)
            self.step.optimizer.zero_grad(set_to_none=True)  # gradients of the attempt were never computed
            return False
        form.norms = self.step.norms
        logger.info("The step on images %s is captured as a graph.", list(images.shape))
        return True

    def _form_of(self, inputs: dict[str, Tensor | None]) -> _Form | None:
        """The form of these inputs; None where they are to run eagerly."""
        if self.reason:
            return None
        for name, tensor in inputs.items():
            if tensor is not None and tensor.device != self.step.device:
                raise ValueError(f"a captured step on {self.step.device} was given {name} on {tensor.device}")
        key = (*((name, _form(tensor)) for name, tensor in inputs.items()), *self._settings())
        form = self._forms.get(key)
        if form is None:
            if len(self._forms) == MOST_FORMS:
                shapes = [None if tensor is None else list(tensor.shape) for tensor in inputs.values()]
                self._give_up(f"inputs came in more than {MOST_FORMS} forms, the newest of shapes {shapes}", None)
                return None
            form = self._forms[key] = _Form(
                {name: None if tensor is None else tensor.clone() for name, tensor in inputs.items()}
            )
        return form

    def _settings(self) -> tuple:
        """What a capture bakes in and a caller could change: numbers, flags and words that the method holds itself."""
        return tuple(
            (name, value)
            for name, value in vars(self.step.method).items()
            if isinstance(value, (bool, int, float, str))
        )

    def _give_up(self, reason: str, error: Exception | None) -> None:
        if self._must:
            raise RuntimeError(f"engine.graph: on was asked for, but {reason}") from error
        self.reason = reason
        self._forms.clear()
        logger.warning("Steps run without graphs from here on: %s.", reason)


def _form(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.stride())


def choose_runner(
    step: TrainStep, wanted: str, *, processes: int = 1, gathers: bool = False
) -> TrainStep | GraphedStep:
    """What does the steps of a run, eagerly or as graphs; the log says why where not. Arguments of `why_no_graph`.

    Raises:
        ValueError: graphs were asked for where they cannot be.
    """
    reason = why_no_graph(wanted, step.device, step.optimizer, gathers=gathers)
    if reason:
        logger.info("Steps are not captured as graphs: %s.", reason)
        return step
    warmup = WARMUP if processes == 1 else WARMUP_DDP
    return GraphedStep(step, CudaGraphs(step.device), warmup=warmup, must=wanted == "on")
