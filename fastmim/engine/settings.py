"""What a user may set about optimisation, the engine and the logs. The docstrings of the fields are the help.

Free of torch, so that `--help` and configuration errors answer at once.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["EngineConfig", "LogConfig", "OptimConfig", "Period", "in_steps"]

Period = int | str  # 200 or "200": steps; "1ep", "0.5ep": epochs; 0: never

_PERIOD = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(ep|epoch|epochs|step|steps)?\s*")


def in_steps(period: Period, steps_per_epoch: int) -> int:
    """A period in steps, at least 1; 0 means never.

    Raises:
        ValueError: neither a whole number of steps ("200") nor epochs ("1ep").
    """
    match = _PERIOD.fullmatch(str(period))
    if match is None:
        raise ValueError(f'{period!r} is no period: give steps ("200"), epochs ("1ep") or 0 for never')
    number, unit = float(match[1]), match[2] or "steps"
    if number == 0:
        return 0
    if unit.startswith("ep"):
        return max(1, round(number * steps_per_epoch))
    if number != int(number):
        raise ValueError(f'{period!r} is not a whole number of steps; epochs are written "{match[1]}ep"')
    return int(number)


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


@dataclass
class OptimConfig:
    """The optimiser, its learning rate and weight decay over time, and gradient handling."""

    name: Literal["adamw", "lamb"] = "adamw"
    """The optimiser: AdamW, or LAMB (SparK's; with NVIDIA's apex on a GPU where that is installed)."""
    lr: float | None = None
    """Peak learning rate, absolute. Give this or `base_lr`."""
    base_lr: float | None = None
    """Peak learning rate per `lr_per` images: the peak is base_lr * batch_size / lr_per. With neither `lr` nor
    `base_lr` the peak is 1.5e-4 per 256 images, but at least 5e-4."""
    lr_per: int = 256
    """Number of images that `base_lr` refers to: 256 (MAE) or 512 (SimMIM)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the optimiser's running averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the optimiser's denominator (1e-6 is usual for LAMB)."""
    weight_decay: float = 0.05
    """Decoupled weight decay; biases, one-dimensional parameters and those a method names are left out."""
    weight_decay_end: float | None = None
    """Weight decay at the end of the run, reached from `weight_decay` along half a cosine. None: it stays."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up. Give this or `warmup_steps`; neither means none. Shortened to a tenth of the run (with
    a line in the log) when the run is not longer than its warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    warmup_start: float = 0.0
    """Where the warm-up begins, as a share of the peak learning rate."""
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    """After warm-up: half a cosine from the peak to `min_lr`, a drop by `gamma` at each milestone, or the peak."""
    min_lr: float = 0.0
    """Where the cosine ends, absolute."""
    milestones: list[float] = field(default_factory=list)
    """Epochs at which the multistep schedule drops."""
    gamma: float = 0.1
    """Factor of each drop of the multistep schedule."""
    clip_grad_norm: float | None = None
    """Largest norm of the gradient; larger ones are scaled down to it. None: no clipping."""
    clip_mode: Literal["global", "per_tensor"] = "global"
    """Clip the norm over all parameters together, or that of each parameter by itself."""
    accumulate: int = 1
    """Micro-batches per step: each holds batch_size / accumulate images, the gradients are averaged."""

    def __post_init__(self) -> None:
        _check(
            self.lr is None or self.base_lr is None,
            "optim.lr and optim.base_lr are two ways to say one thing: give one",
        )
        for key in ("lr", "base_lr"):
            value = getattr(self, key)
            _check(value is None or (value > 0 and math.isfinite(value)), f"optim.{key} must be positive, got {value}")
        _check(self.lr_per > 0, f"optim.lr_per must be positive, got {self.lr_per}")
        _check(all(0 <= b < 1 for b in self.betas), f"optim.betas must lie in [0, 1), got {list(self.betas)}")
        _check(self.eps > 0, f"optim.eps must be positive, got {self.eps}")
        _check(self.weight_decay >= 0, f"optim.weight_decay must not be negative, got {self.weight_decay}")
        _check(
            self.weight_decay_end is None or self.weight_decay_end >= 0,
            f"optim.weight_decay_end must not be negative, got {self.weight_decay_end}",
        )
        _check(
            self.warmup_epochs is None or self.warmup_steps is None,
            "optim.warmup_epochs and optim.warmup_steps are two ways to say one thing: give one",
        )
        _check((self.warmup_epochs or 0) >= 0, f"optim.warmup_epochs must not be negative, got {self.warmup_epochs}")
        _check((self.warmup_steps or 0) >= 0, f"optim.warmup_steps must not be negative, got {self.warmup_steps}")
        _check(0 <= self.warmup_start <= 1, f"optim.warmup_start is a share, from 0 to 1, got {self.warmup_start}")
        _check(self.min_lr >= 0, f"optim.min_lr must not be negative, got {self.min_lr}")
        _check(all(m > 0 for m in self.milestones), f"optim.milestones must be positive epochs, got {self.milestones}")
        _check(self.gamma > 0, f"optim.gamma must be positive, got {self.gamma}")
        _check(
            self.clip_grad_norm is None or self.clip_grad_norm > 0,
            f"optim.clip_grad_norm must be positive (null turns clipping off), got {self.clip_grad_norm}",
        )
        _check(self.accumulate >= 1, f"optim.accumulate must be at least 1, got {self.accumulate}")

    def peak_lr(self, batch_size: int) -> float:
        """The peak learning rate for a global batch of `batch_size` images."""
        if self.lr is not None:
            return self.lr
        if self.base_lr is not None:
            return self.base_lr * batch_size / self.lr_per
        return max(1.5e-4 * batch_size / 256, 5e-4)


@dataclass
class EngineConfig:
    """Device, precision, checkpoints and what happens when numbers go wrong."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocast or fp32; auto takes bf16 where the CPU or GPU computes it fast. Weights and losses stay fp32."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Capture whole training steps as CUDA graphs: fewer launches, which counts for small models and small batches per
    GPU. auto does so where it is possible, and trains without where it is not, saying why; on makes that an error."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Several processes: ddp keeps all weights in each of them; fsdp (FSDP2) spreads weights, gradients and optimiser
    state over them, for encoders that are too large for one GPU, and sends more. auto is ddp."""
    sync_bn: bool = False
    """Several processes: batch norms of any encoder take their statistics over all of them, so that the run does not
    depend on their number. The papers of SparK and FCMAE do so (`method.sync_bn`, on by default), those of the other
    methods do not say so."""
    compile: bool = False
    """torch.compile the blocks of encoder and decoder (minutes at the start of a run, for faster steps)."""
    checkpoint_every: Period = "1ep"
    """Steps ("200") or epochs ("1ep") between checkpoints; 0 saves only at the end and on signals."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay."""
    checkpoint: Literal["auto", "plain", "sharded"] = "auto"
    """plain: one file each for weights, optimiser and average, written by the first process. sharded: each process
    writes and reads its own part, in a folder that all machines share; any number of processes can go on from it. auto
    takes sharded with `parallel: fsdp`. Either can be read whatever a run uses itself."""
    async_save: Literal["auto", "on", "off"] = "auto"
    """Write checkpoints beside training, which waits only for a copy to host memory: with AdamW 12 bytes per parameter
    (16 with an average), of all parameters in the first process, or sharded of its share in each. The last one of a run
    is waited for. auto does so where checkpoints are sharded."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, for example 0.9999; 0 turns it off."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation (matters on GPUs; CPU runs repeat exactly anyway)."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: end the run with exit code 4, or skip the step."""
    max_skips: int = 20
    """How many steps `nonfinite: skip` may skip in one run before it stops after all."""
    timeout: float = 600.0
    """Several processes: seconds without an answer or a sign of life after which another one counts as lost and the run
    ends, naming it. The slowest checkpoint has to be written in this time."""
    watchdog: float = 1800.0
    """Seconds without progress (waiting for images, in one step, in one save) after which the run writes the stacks of
    all its threads to train.log and ends with exit code 124; 0: never. The first step may compile for minutes."""

    def __post_init__(self) -> None:
        _check_period("engine.checkpoint_every", self.checkpoint_every)
        _check(self.keep_checkpoints >= 1, f"engine.keep_checkpoints must be at least 1, got {self.keep_checkpoints}")
        _check(0 <= self.ema < 1, f"engine.ema must lie in [0, 1), got {self.ema}")
        _check(0 < self.timeout < math.inf, f"engine.timeout must be a positive number of seconds, got {self.timeout}")
        _check(0 <= self.watchdog < math.inf, f"engine.watchdog must be a number of seconds, or 0, got {self.watchdog}")
        _check(self.max_skips >= 0, f"engine.max_skips must not be negative, got {self.max_skips}")


@dataclass
class LogConfig:
    """What a run writes down, and how often."""

    every: Period = 10
    """Steps ("10") or epochs ("1ep") between lines of metrics.jsonl, TensorBoard points and progress."""
    pictures_every: Period = "10ep"
    """Steps or epochs between reconstruction pictures; one is drawn at the end in any case; 0: only that one."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """A progress bar, plain lines, or nothing; auto draws the bar on a terminal."""

    def __post_init__(self) -> None:
        _check_period("log.every", self.every)
        _check_period("log.pictures_every", self.pictures_every)
        _check(in_steps(self.every, 1) > 0, "log.every must not be 0: the loss is looked at when it is logged")


def _check_period(key: str, period: Period) -> None:
    try:
        in_steps(period, 1)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
