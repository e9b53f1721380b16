"""The training loop: data, step, log, picture, checkpoint, and how to start and stop in between."""

import json
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from fastmim.data import Loader
from fastmim.data.loader_states import state_of
from fastmim.engine.capture import choose_runner
from fastmim.engine.compiling import compile_blocks
from fastmim.engine.data_parallel import tell_of_local_statistics
from fastmim.engine.ema import Ema
from fastmim.engine.errors import Interrupted
from fastmim.engine.fit_result import FitResult, Interval
from fastmim.engine.fully_sharded import FullySharded, choose_parallel
from fastmim.engine.health import FiniteWatch
from fastmim.engine.injector import inject
from fastmim.engine.inputs import ToDevice
from fastmim.engine.metrics import MetricsFile
from fastmim.engine.optimizer import create_optimizer, set_lr, set_weight_decay
from fastmim.engine.pictures import draw
from fastmim.engine.precision import choose_device, choose_precision
from fastmim.engine.progress import create_progress
from fastmim.engine.rng import make_deterministic, rng_states, seed_step, set_rng_states
from fastmim.engine.run_folder import RunFolder
from fastmim.engine.saver import Saver
from fastmim.engine.schedule import Schedule
from fastmim.engine.settings import EngineConfig, LogConfig, OptimConfig, in_steps
from fastmim.engine.signals import CODES, StopSignals
from fastmim.engine.spikes import SpikeWatch
from fastmim.engine.step import StepOutput, TrainStep
from fastmim.engine.tensorboard import TensorBoard, create_board
from fastmim.engine.training_state import TrainingState
from fastmim.engine.waiting import DataWait, WaitHint
from fastmim.engine.watchdog import Watchdog
from fastmim.methods import Method, Pictures
from fastmim.models.norms import synchronise_batch_norms

logger = logging.getLogger(__name__)


class Trainer:
    """Pre-trains a method.

    Args:
        method: the `fastmim.methods.Method` to train, on any device; moved to the one the settings name.
        loader: called with the step to start at (0, or the step resumed from), returns the loader that gives the batch
            of that step first; it is closed at the end.
        run: the open run folder; its `world` says which process of the run this is.
        batch_size: images per step (the global batch), those of all processes and micro-batches together.
        total_steps: steps of the whole run; a run resumed at step k does total_steps - k.
        mean, std: per channel, of the normalised images; for uint8 batches and pictures.
        meta: JSON-able facts stored in every checkpoint (method, model, img_size, ...), for whoever loads it.
        resume: "auto" (newest good checkpoint of `run`, if any), "never", or the path of a checkpoint or run folder.

    Raises:
        ValueError: settings that do not fit each other.
        RunError: with the exit code of the command; see `fastmim.engine.errors`.
    """

    def __init__(
        self,
        method: Method,
        loader: Callable[[int], Loader],
        run: RunFolder,
        optim: OptimConfig,
        engine: EngineConfig,
        log: LogConfig,
        *,
        batch_size: int,
        total_steps: int,
        steps_per_epoch: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        meta: Mapping[str, Any],
        resume: str | Path = "auto",
    ) -> None:
        world = self.world = run.world
        micro_batch = world.share(batch_size, optim.accumulate)
        self.loader, self.run, self.engine, self.log = loader, run, engine, log
        self.batch_size, self.total_steps, self.steps_per_epoch = batch_size, total_steps, steps_per_epoch
        self.seed, self.mean, self.std = seed, mean, std
        self.device = choose_device(engine.device, world.local_rank if world.size > 1 else None)
        self.precision, why = choose_precision(engine.precision, self.device)
        torch.backends.cudnn.benchmark = not engine.deterministic  # shapes never change
        if engine.deterministic:
            make_deterministic()
        self.to_device = ToDevice(self.device, mean, std)
        self.method = method.to(self.device).train()
        if engine.sync_bn:
            synchronise_batch_norms(self.method)
        parallel = choose_parallel(self.method, engine, optim.accumulate, world.size)
        add_up = None if parallel is None else parallel.add_up
        self.optimizer = create_optimizer(self.method, optim, add_up=add_up)
        peak = optim.peak_lr(batch_size)
        self.schedule = Schedule.of(optim, peak=peak, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        ema = Ema(self.method, engine.ema) if engine.ema else None
        self.state = TrainingState(self.method, self.optimizer, ema)
        self.train_step = TrainStep(
            self.method,
            self.optimizer,
            optim,
            precision=self.precision,
            device=self.device,
            seed=seed,
            micro_batch=micro_batch,
            stop=engine.nonfinite == "stop",
            ema=ema,
            first=world.rank * micro_batch * optim.accumulate,
            parallel=parallel,
            agree=world.agree if world.size > 1 else None,
            schedules=self.method.schedules(total_steps, steps_per_epoch),
        )
        if engine.compile:
            logger.info("torch.compile: %d blocks", compile_blocks(self.method))
        gathers = isinstance(parallel, FullySharded)
        self.do_step = choose_runner(self.train_step, engine.graph, processes=world.size, gathers=gathers)
        self.log_every = in_steps(log.every, steps_per_epoch)
        self.pictures_every = in_steps(log.pictures_every, steps_per_epoch)
        self.checkpoint_every = in_steps(engine.checkpoint_every, steps_per_epoch)
        self.facts = {
            "seed": seed,
            "batch_size": batch_size,
            "steps_per_epoch": steps_per_epoch,
            "total_steps": total_steps,
            "precision": self.precision,
            "device": self.device.type,
            "processes": world.size,
            "parallel": "none" if parallel is None else parallel.name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "meta": json.loads(json.dumps(dict(meta), default=str)),
        }
        self.result = FitResult(step=0, picture=max(run.pictures.glob("step-*.png"), default=None))
        self.batches: Loader | None = None
        self.data_wait = DataWait(self.device)
        self.replaced = 0  # unreadable images that this process met, since the start of the run
        self.watchdog = Watchdog(engine.watchdog, run.path / "train.log", run.end)
        self.watch = FiniteWatch(self.train_step, run, engine, seed)
        self.saver = Saver(run, self.state, engine, self.facts)
        self._resumed = self.saver.start(str(resume), total_steps)  # state.json of the checkpoint started from
        if self._resumed is not None:
            self.watch.skipped = self._resumed["skipped_steps"]
            self.result.step = self.result.resumed_from = self._resumed["step"]
            self.result.checkpoint = self.saver.newest
        if world.size > 1:
            logger.info(
                "%d processes x %d micro-batches x %d images are the batch of %d.",
                *(world.size, optim.accumulate, micro_batch, batch_size),
            )
            tell_of_local_statistics(self.method)
        logger.info(
            "%s, %s (%s), batch size %d, peak learning rate %.3g, %d steps (%.4g epochs)",
            *(self.device, self.precision, why, batch_size, peak, total_steps, total_steps / steps_per_epoch),
        )

    def fit(self) -> FitResult:
        """Train up to `total_steps`, from wherever the run stands."""
        result, main = self.result, self.world.is_main
        if result.step >= self.total_steps:
            logger.info("The run is complete at step %d: nothing is left to train.", result.step)
            return result
        with ExitStack() as stack:
            stack.callback(self.saver.close)
            signals = stack.enter_context(StopSignals(alone=self.world.size == 1))
            metrics = stack.enter_context(closing(MetricsFile(self.run.metrics if main else None)))
            tensorboard, shown = self.log.tensorboard and main, self.log.progress if main else "none"
            board = stack.enter_context(closing(create_board(tensorboard, self.run.tensorboard, result.step)))
            progress = stack.enter_context(closing(create_progress(shown, result.step, self.total_steps)))
            batches = self.batches = stack.enter_context(closing(self.loader(result.step)))
            if self._resumed is not None:
                batches.load_state(state_of(self._resumed["data"], self.world.rank, self.world.size))
                set_rng_states(self._resumed["rng"], self.device)
            spikes = SpikeWatch(self.run.metrics)
            hint = WaitHint(batches.advice)
            interval = Interval()
            stack.enter_context(self.watchdog)
            if self.world.heartbeat is not None:
                self.world.heartbeat.where = lambda: self.watchdog.where
            while result.step < self.total_steps:
                inject("step", result.step + 1)
                asked = self.world.largest(signals.received or 0)
                if asked:
                    raise self._stopped(signal.Signals(asked))
                output = self._one_step(batches, interval)
                step, last = result.step, result.step == self.total_steps
                if last or step % self.log_every == 0:
                    self.watchdog.at(step, "reading the loss")
                    values = self._read(output, interval)
                    values |= spikes.look(step, values["loss"]) if main else {}
                    interval = Interval()
                    metrics.write(values)
                    board.scalars(values, step)
                    progress.update(step, values)
                    if main:
                        hint.update(values)
                elif self.device.type == "cpu":
                    self.watch.check()  # costs nothing there
                paused = time.perf_counter()
                if output.pictures is not None:
                    self._draw(output.pictures, board)
                if last or (self.checkpoint_every and step % self.checkpoint_every == 0):
                    self.watch.check()
                    self.watchdog.at(step, "saving")
                    self._save(must=last)
                interval.paused += time.perf_counter() - paused
        result.skipped = self.watch.skipped
        return result

    def _one_step(self, batches: Loader, interval: Interval) -> StepOutput:
        step = self.result.step
        self.watchdog.at(step + 1, "waiting for images")
        self.data_wait.ask()
        inject("loader", step + 1)
        raw = next(batches)
        self.data_wait.begin()
        interval.images += len(raw.images) * self.world.size
        self.replaced = raw.replaced
        self.watch.add(step, raw.indices)
        seed_step(self.seed, step, self.device, self.world.rank)
        set_lr(self.optimizer, self.schedule.lr(step))
        set_weight_decay(self.optimizer, self.schedule.weight_decay(step))
        done = step + 1
        wanted = done == self.total_steps or bool(self.pictures_every and done % self.pictures_every == 0)
        self.watchdog.at(step + 1, "training")
        images, labels, indices, views = self.to_device(raw)
        output = self.do_step(images, labels, indices, step, views=views, pictures=wanted and self.world.is_main)
        self.data_wait.end()
        self.result.step += 1
        self.result.steps += 1
        return output

    def _read(self, output: StepOutput, interval: Interval) -> dict[str, Any]:
        """The line of a logged step, over all processes: the one place where the host waits for the device."""
        names = ["loss", *output.parts, "grad_norm"]
        tensors = [output.loss, *output.parts.values(), output.grad_norm]
        means = self.world.mean(torch.stack([t.float() for t in tensors]))
        numbers = dict(zip(names, means.tolist(), strict=True))
        waited, replaced = self.world.sums([self.data_wait.read(), self.replaced])
        self.watch.check()
        result, seconds = self.result, interval.seconds
        result.last_values = {name: numbers[name] for name in names[:-1]}
        result.first_values = result.first_values or result.last_values
        interval.waited = waited / self.world.size
        result.add(interval, seconds)
        return {
            "step": result.step,
            "epoch": round(result.step / self.steps_per_epoch, 4),
            **{name: numbers[name] for name in names[:-1]},
            "lr": self.schedule.lr(result.step - 1),
            "grad_norm": numbers["grad_norm"],
            "images_per_second": round(interval.images / seconds, 2),
            "data_wait": round(interval.waited / seconds, 4),
            "replaced_images": int(replaced),
            **({"skipped_steps": self.watch.skipped} if self.watch.skipped else {}),
        }

    def _draw(self, pictures: Callable[[], Pictures], board: TensorBoard) -> None:
        step = self.result.step
        path = self.run.pictures / f"step-{step:08d}.png"
        board.picture("reconstruction", draw(path, pictures, self.mean, self.std), step)
        self.result.picture = path if path.exists() else self.result.picture

    def _stopped(self, asked: signal.Signals) -> Interrupted:
        """Save, and say how to go on."""
        step = self.result.step
        if self.result.steps:  # else there is nothing that the newest checkpoint lacks
            self.watch.check()
            self._save(must=True)
        saved = f"saved in {self.result.checkpoint}" if self.result.checkpoint else "nothing to save yet"
        return Interrupted(
            f"Stopped by {asked.name} after step {step} of {self.total_steps}; {saved}. "
            f"The same command with --resume auto goes on from there.",
            CODES[asked],
        )

    def _save(self, must: bool) -> None:
        """Write a checkpoint, if there is none of this step yet; `must`: the run ends here."""
        assert self.batches is not None
        result = self.result
        if self.saver.holds(result.step):
            return
        course = {
            "epoch": result.step / self.steps_per_epoch,
            "skipped_steps": self.watch.skipped,
            "data": self.world.collect(self.batches.state()),
            "rng": rng_states(self.device),
        }
        self.saver.save(result.step, course, must=must)
        result.checkpoint = self.saver.newest
