"""The training loop that every trainer shares, top to bottom.

Exact resume by construction: all randomness of a step comes from (seed, step, process), and the
data position is a function of the step, so that a checkpoint needs no generator states.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..arguments import fitting, one_of, plain, real, shown, whole
from ..checkpoint import (
    CheckpointError,
    Saveable,
    check_undivided,
    plain_names,
    plain_state,
    state_of,
    unwrapped,
)
from ..data.order import EndlessBatches, Shares, buckets_of
from ..data.rows import Filter
from ..data.source import few
from ..data.stream import Held, RowStream, Stream, StreamError
from ..data.workers import leave_signals_to_the_run, starting_processes
from ..devices import cores
from ..files import check_output, digest_state
from ..images import image_grid
from ..watching.health import Health
from ..watching.interval import Interval
from ..watching.log import Log, drop_lines_after, writing
from ..watching.pace import Pace
from ..watching.progress import Progress
from ..watching.report import read_curves
from ..watching.run_file import (
    RunFile,
    changes_in_words,
    describe_device,
    leaves,
    settings_of,
    versions,
)
from ..watching.start import count_parameters, defeats, summary
from ..weights import check_weights, reading
from .checkpoints import KEPT, Checkpoints, Snapshots
from .ema import EMA, power, warmed_up
from .guard import MAX_RESTARTS, Diverged, Guard
from .lock import locked
from .optimizers import (
    OptimizerName,
    check_optimizer,
    load_named_state,
    make_optimizer,
    named_state,
    trained_state,
)
from .parallel import Parallel, Precision, is_sharded, own_part, placed_as
from .stop import Stop
from .trackers import TrackerName, Trackers, check_trackers

LrSchedule = Literal["cosine", "constant", "linear", "cooldown"]
SAMPLING = ("sample_options", "presets")  # parts of a model's arguments that training ignores


def _share(name: str, value: Any) -> float:
    """A number in [0, 1)."""
    number = real(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1), not {shown(value)}")
    return number


def _pair(name: str, value: Any) -> Any:
    """Two of something."""
    pair = plain(value)
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError(f"{name} must be a pair of numbers, not {shown(value)}")
    return pair


class Trainer:
    """Base of the trainers: everything but the losses.

    Args:
        model: what is trained and saved.
        batch_size: examples per process and forward pass.
        grad_accum_every: forward passes per optimizer step.
        num_train_steps: optimizer steps in all.
        lr: peak learning rate.
        optimizer: "adamw"; "adafactor", the paper's, which remembers half as much; "muon" for the
            matrices of transformer blocks, with AdamW for the rest; or "adamw8bit", torchao's,
            which remembers a quarter.
        betas: of AdamW and Adafactor.
        weight_decay: on matrices and convolutions (not on norms, biases, embeddings, position
            tables and null keys).
        warmup_steps: linear rise of the learning rate.
        lr_schedule: after the warm-up "cosine" (to 1 % of the peak), "linear" (to 0), "constant",
            or "cooldown": constant, then linear to 0.
        cooldown_share: share of the steps after the warm-up in which a "cooldown" falls.
        max_grad_norm: gradient clipping; 0 switches it off.
        max_spike: the guard: a step is skipped, and counted, if its gradient is not finite or its
            norm more than this many times the moving average. 0 switches the guard off: then a
            loss that is not finite ends the run.
        max_skips: after this many skipped steps in a row the run returns to its last checkpoint
            and goes on with the data that follow, other random numbers and half the learning rate.
        ema_decay: of the averaged weights, saved next to the raw ones.
        posthoc_every: optimizer steps between snapshots of two further averages, which stay in
            ``results_folder``: from them `averages.posthoc_average` makes an average of any length
            afterwards. They take as much memory as the weights twice, and each snapshot as much on
            the disk. 0: none.
        mixed_precision: "no", "fp16" or "bf16" (autocast; weights stay float32).
        seed: of everything random in the training.
        num_workers: data loading processes, at most one for each core.
        results_folder: where checkpoints, weights, metrics and pictures go.
        resume: continue from the newest checkpoint in ``results_folder``; without one, start.
        log_every: optimizer steps between lines in ``metrics.jsonl``, whose figures are means over
            these steps; the first step has a line of its own.
        sample_every: optimizer steps between validations with a picture; 0: only at the end.
        save_every: optimizer steps between checkpoints, each with the weights as models; one is
            always written at the end and on Ctrl-C or SIGTERM, after the step in progress.
        keep_checkpoints: how many of the checkpoints that this run wrote to keep.
        valid_fraction: share of the data held back for validation.
        max_valid: of these, how many each validation looks at; the processes share them out.
        trackers: "tensorboard", "wandb", "trackio" or "mlflow", or several of them, which are given
            the figures of ``metrics.jsonl`` and the pictures too.
        max_minutes: stop (and save) after this time; the learning rate then follows the clock
            where that is ahead of the steps. A resumed run starts the clock anew. None: no limit.
        image_column: of data with columns: where the images stand; by default the first that there
            is of image, jpg, jpeg, png and webp.
        text_column: where the captions stand; by default text, caption or txt, and of a model
            with classes label. Of a folder it is a column of its metadata tables.
        streaming: read ``data`` that are named by a text as the training goes on.
        shuffle_buffer: rows of a stream that each loading process reads and shuffles together.
        min_size: leave out images whose shorter side has fewer pixels.
        where: leave out images whose number in a column is not in a range, such as
            ``{aesthetic: [5, 10]}``: columns of the data, or of a folder's metadata tables.
    """

    name = "model"
    judged_by: tuple[str, int] = (
        "loss",
        -1,
    )  # the validation's figure, and whether more of it is better (1)
    shown: tuple[str, ...] = ("loss",)  # figures next to the progress bar
    divisible = True  # whether FSDP may divide the weights among the processes

    def __init__(
        self,
        model: Saveable,
        *,
        batch_size: int = 16,
        grad_accum_every: int = 1,
        num_train_steps: int = 100_000,
        lr: float = 1e-4,
        optimizer: OptimizerName = "adamw",
        betas: tuple[float, float] = (0.9, 0.96),
        weight_decay: float = 0.045,
        warmup_steps: int = 1000,
        lr_schedule: LrSchedule = "cosine",
        cooldown_share: float = 0.2,
        max_grad_norm: float = 1.0,
        max_spike: float = 10.0,
        max_skips: int = 5,
        ema_decay: float = 0.999,
        posthoc_every: int = 0,
        mixed_precision: Precision = "no",
        seed: int = 0,
        num_workers: int = 0,
        results_folder: str = "./results",
        resume: bool = False,
        log_every: int = 50,
        sample_every: int = 1000,
        save_every: int = 1000,
        keep_checkpoints: int = 2,
        valid_fraction: float = 0.02,
        max_valid: int = 1000,
        trackers: TrackerName | list[str] | None = None,
        max_minutes: float | None = None,
        image_column: str | None = None,
        text_column: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        min_size: int = 0,
        where: dict[str, tuple[float, float]] | None = None,
    ):
        self.settings = settings_of(locals())
        check_undivided(model, "model")
        self.model: Saveable = fitting("model", unwrapped(model), Saveable)
        self.model.check_saveable()
        # before any work: reading and encoding a data set takes long
        self.results_folder = check_output("results_folder", results_folder, folder=True)
        self.resume = bool(resume)
        self.recipe: dict[str, Any] | None = None  # the command line's, for the run's description
        self.parallel = Parallel(one_of("mixed_precision", mixed_precision, Precision))
        if self.parallel.wants_shards and self.divisible and optimizer != "adamw":
            raise ValueError(
                f"optimizer {shown(optimizer)} does not go with FSDP, which divides matrices that "
                "it must see whole: use adamw"
            )
        self.batch_size = whole("batch_size", batch_size, 1)
        self.grad_accum_every = whole("grad_accum_every", grad_accum_every, 1)
        self.num_train_steps = whole("num_train_steps", num_train_steps, 1)
        self.lr = real("lr", lr, 0)
        self.optimizer = one_of("optimizer", optimizer, OptimizerName)
        check_optimizer(self.optimizer)
        first, second = (_share("betas", beta) for beta in _pair("betas", betas))
        self.betas = first, second
        self.weight_decay = real("weight_decay", weight_decay, 0)
        self.warmup_steps = whole("warmup_steps", warmup_steps, 0)
        self.lr_schedule = one_of("lr_schedule", lr_schedule, LrSchedule)
        self.cooldown_share = real("cooldown_share", cooldown_share, 0, 1)
        self.max_grad_norm = real("max_grad_norm", max_grad_norm, 0)
        self.guard = Guard(real("max_spike", max_spike, 0), whole("max_skips", max_skips, 1))
        self.ema_decay = _share("ema_decay", ema_decay)
        self.posthoc_every = whole("posthoc_every", posthoc_every, 0)
        self.seed = whole("seed", seed, 0, 2**32 - 1)
        self.num_workers = min(whole("num_workers", num_workers, 0, 1024), cores())
        self.log_every = whole("log_every", log_every, 1)
        self.sample_every = whole("sample_every", sample_every, 0)
        self.save_every = whole("save_every", save_every, 1)
        self.keep_checkpoints = whole("keep_checkpoints", keep_checkpoints, 1)
        self.valid_fraction = _share("valid_fraction", valid_fraction)
        self.max_valid = whole("max_valid", max_valid, 1)
        self.trackers = check_trackers(trackers)
        self.max_minutes = None if max_minutes is None else real("max_minutes", max_minutes)
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes must be above 0, not {max_minutes}")
        self.reading = dict(
            image_column=image_column, text_column=text_column, streaming=bool(streaming),
            min_size=min_size, where=where,
        )  # fmt: skip
        self.shuffle_buffer = whole("shuffle_buffer", shuffle_buffer, 1)
        Filter(min_size, where)
        self.stream: Stream | None = None  # what is trained on, where the data have no length
        self._streams: list[str] = []  # its state in every process, at the last checkpoint
        self.stop = Stop(shown=self.parallel.is_main)
        self.step = 0
        self.samples = 0  # consumed by all processes: the position in the data
        self._saved_at = self._looked_at = -1  # steps
        self._changing = False  # within a step that has begun to change what is trained
        self._minutes = 0.0
        self._loss = torch.zeros(())
        self.interval = Interval()
        self._losses: list[Tensor] = []  # of the micro batches since the last optimizer step

    # What a trainer adds ---------------------------------------------------------------------

    dataset: Any  # an ImageDataset or a TokenCache: all the images, for training and validation

    def make_datasets(self) -> tuple[Any, Any]:
        """Training data, and validation data or None."""
        raise NotImplementedError

    def ready(self, dataset: Any, say: Callable[[str], None] | None) -> Dataset:
        """The data as the steps want them: what is done once is done here, and said."""
        return dataset

    def modules(self) -> dict[str, nn.Module]:
        """Trained modules, each with an optimizer of its own; the first is averaged (EMA)."""
        return {"model": self.model}

    def train_step(self, batches: Iterator[Any]) -> dict[str, Tensor]:
        """One optimizer step over ``grad_accum_every`` batches; the loss terms by name."""
        raise NotImplementedError

    def validate(self, shares: Shares) -> dict[str, float]:
        """Figures on the validation data of all processes, with the averaged weights.

        Every process must call it, and as often call the model as the others.
        """
        raise NotImplementedError

    def draw(self, path: Path) -> dict[str, float]:
        """Write a picture of what the model does now; figures of it. Every process must call it."""
        raise NotImplementedError

    prompts: list[str] = []  # noqa: RUF012  # that are drawn at each look, besides
    counting = True  # whether the operations of a step can be counted

    def draw_prompts(self) -> Tensor:
        """Pictures (B,3,H,W) of ``prompts``, with the same seeds each time.

        Every process must call it.
        """
        raise NotImplementedError

    def references(self, train: Any, valid: Any) -> dict[str, float]:
        """Figures that need no model, for the validation's to be held against."""
        return {}

    def measures(self) -> dict[str, float]:
        """Further figures for a line of the log. Every process must call it."""
        return {}

    def health_facts(self) -> dict[str, Any]:
        """What `Health` should know of the model."""
        return {}

    def codes_full(self) -> bool:
        """Whether the codebook's figures of `measures` are of enough tokens to judge."""
        return False

    def windows(self) -> dict[str, Any]:
        """What the log's figures remember of earlier steps, by name: it goes into checkpoints."""
        return {"interval": self.interval}

    def lr_of(self, module: str) -> float:
        """Peak learning rate of one of `modules`."""
        return self.lr

    def collate(self, items: list[Any]) -> Any:
        return torch.utils.data.default_collate(items)

    # The loop --------------------------------------------------------------------------------

    def cuda(self) -> Self:
        """Accepted for habit's sake: accelerate chooses the device."""
        return self

    @property
    def device(self) -> torch.device:
        return self.parallel.device

    def train(self) -> None:
        """Train to ``num_train_steps``.

        With every checkpoint the weights are written: raw (``NAME.safetensors``), averaged
        (``NAME-ema.safetensors``), and of the best validation so far (``NAME-best.safetensors``,
        averaged).

        Raises:
            CheckpointError: ``results_folder`` holds a run and ``resume`` is off, or its
                checkpoint does not fit this model.
            Diverged: the loss or the weights are not finite.
        """
        # one process stands for all of them
        lock = locked(self.results_folder) if self.parallel.is_main else nullcontext()
        trackers = self.trackers if self.parallel.is_main else []
        self._trackers = Trackers(
            trackers, self.parallel, self.results_folder, self.name,
            warn=lambda text: self.log.warn(self.step, text),
        )  # fmt: skip
        with lock, self.stop.listening(), closing(self._trackers):
            self._train()

    def _train(self) -> None:
        kind = f"{type(self).__name__} checkpoint"
        self.checkpoints = Checkpoints(self.results_folder, self.name, kind, self.keep_checkpoints)
        self.snapshots = Snapshots(self.results_folder, self.name)
        newest = self.checkpoints.newest()
        main = self.parallel.is_main
        held = [*filter(None, [newest]), *self.snapshots.found().values()]
        if held and not self.resume:
            raise CheckpointError(
                f"{self.results_folder} already holds a run ({held[0].name}): set resume=True to "
                "continue it, or choose another results_folder"
            )
        train_set, valid_set = self.make_datasets()
        self._prepare()
        if newest:
            self._load_checkpoint(newest)
        if main:
            self.checkpoints.sweep()
            if self.resume:  # what a killed process wrote beyond its last checkpoint comes again
                drop_lines_after(self.results_folder, self.name, self.step)
                self.snapshots.drop_after(self.step)
        health = Health(
            self.name,
            history=read_curves(self.results_folder, self.name) if newest else None,
            max_grad_norm=self.max_grad_norm,
            images=None if self.stream else len(train_set),
            workers=self.num_workers,
            **self.health_facts(),
        )
        self.progress = Progress(self.name, self.num_train_steps, shown=main)
        self.log = Log(
            self.results_folder, self.name, health, self.progress.say, self._trackers.log
        )
        if self.num_train_steps < self.step:
            self.progress.say(
                f"the run has reached step {self.step:,}, so num_train_steps "
                f"{self.num_train_steps:,} changes nothing: give more than that to go on"
            )
            return
        if main:
            self._describe(newest is not None, len(valid_set or ()))
        say = self.progress.say if main else None
        self._shares = None
        if valid_set is not None:
            count = min(len(valid_set), self.max_valid)
            valid_set = valid_set.select([i * len(valid_set) // count for i in range(count)])
            self._shares = Shares(
                self.ready(valid_set, say),
                self.batch_size,
                self.collate,
                self.parallel.rank,
                self.parallel.world,
            )
        ready = self.ready(train_set, say)
        if main and self._shares is not None and self.step == 0:
            known = self.references(ready, self._shares.dataset)
            if known:
                self.log.add(0, known)
        batches = self._batches(ready)
        images = self.batch_size * self.grad_accum_every * self.parallel.world
        precision = self.settings["mixed_precision"]
        counting = self.counting and not self.sharded
        pace = Pace(images, self.step, self.num_train_steps, self.device, precision, counting)
        self.progress.start(self.step)
        self._started = time.monotonic()
        self.interval.start(self.step)
        self.stop.begin()
        with closing(self.progress), self._saved_on_failure():
            while self.step < self.num_train_steps and not self._out_of_time():
                self._seed_step()
                factor = self._lr_factor() * self.guard.lr_factor
                for name, optimizer in self.optimizers.items():
                    for group in optimizer.param_groups:
                        group["lr"] = self.lr_of(name) * factor
                with self.stop.free(), pace.step():
                    terms = self.train_step(self.interval.timed(batches))
                self.samples += images
                if self.stream:
                    self.stream.settle()
                if self.guard.must_return():
                    self._return_to_checkpoint()
                    self._changing = False
                    batches = self._batches(ready)
                    continue
                self.interval.add(terms)
                if self.guard.in_a_row == 0:  # what the guard skips has done no harm
                    self._loss = terms["loss"]
                self.step += 1
                for average in (self.ema, *self.posthoc.values()):
                    average.update(self.step)
                self._changing = False
                self.progress.step_to(self.step)
                if self.step % self.log_every == 0 or self.step in (1, self.num_train_steps):
                    values = self.interval.line(self.step, self.parallel.reduce)
                    values |= pace.figures(self.step, values["steps_per_s"])
                    values |= self.measures() | self.guard.counts() | {"lr": self.lr * factor}
                    if self.parallel.is_main:
                        self.log.add(self.step, values, self.codes_full())
                    self.progress.figures(
                        {k: f"{values[k]:.4g}" for k in self.shown if k in values}
                    )
                    self._check_loss()
                if self.step == self.num_train_steps:
                    break  # saved, validated and drawn below
                if self.sample_every and self.step % self.sample_every == 0:
                    self._look()
                if self.posthoc_every and self.step % self.posthoc_every == 0:
                    self._save_snapshot()
                # weights whose gradients are being skipped may be at fault
                if self.step % self.save_every == 0 and self.guard.in_a_row == 0:
                    self._check_loss()
                    self._save_checkpoint()
                if self.parallel.agreed(self.stop.asked):
                    self.progress.say(f"stopped after step {self.step}: saving")
                    self._check_loss()
                    self._save_checkpoint()
                    self.checkpoints.finish()
                    self._report()
                    raise KeyboardInterrupt
        self._check_loss()
        self._save_snapshot()
        self._save_checkpoint()  # first: nothing that fails below may cost the last steps
        self._look()
        self.checkpoints.finish()
        self._report()
        self.parallel.wait()  # what follows may read the files

    def _describe(self, resumed: bool, held_back: int) -> None:
        """Write how the run is made; on a resume say where it goes on, and what is other now."""
        now = {
            "stage": self.name,
            "trainer": type(self).__name__,
            "recipe": self.recipe,
            "settings": self.settings,
            "model": {"kind": type(self.model).__name__, "config": self.model.config},
            "parameters": count_parameters(self.modules()),
            "data": self.dataset.summary() | {"held_back": held_back},
            "device": describe_device(self.device, self.parallel.world),
            "versions": versions(),
        }
        file = RunFile(self.results_folder, self.name)
        before = file.read() if resumed else {}
        with writing(file.path):
            file.write(now, self.step, before)
        size, sides = self.dataset.view.size, self.dataset.sides()
        lines = summary(now, size, sides)
        if self.dataset.view.buckets:
            shapes = self.dataset.buckets.items()
            each = (f"{len(rows):,} of {w} x {h} px" for (h, w), rows in shapes)
            lines.append(f"shapes: {', '.join(each)}")
        if resumed:
            lines.append(f"going on from step {self.step:,} of {self.num_train_steps:,}")
            if strangers := self.checkpoints.strangers():
                lines.append(f"left alone, since this run did not name it so: {few(strangers)}")
        self.log.begin(lines, defeats(now, size, sides), self.step)
        self._trackers.start(now)
        text, exact = changes_in_words(before, now)
        if resumed and text:
            self.progress.say(text) if exact else self.log.warn(self.step, text)

    def _take_stream(self, rows: RowStream, *settings: Any, **more: Any) -> Held:
        """Train on a stream, and hold back its validation share."""
        self.stream = Stream(rows, *settings, **more, block=self.shuffle_buffer, seed=self.seed)
        return self.stream.held(self.valid_fraction, self.max_valid)

    def _batches(self, train_set: Dataset) -> Iterator[Any]:
        """Training batches from here on: what comes depends on seed, step and returns alone."""
        if self.stream:
            return self.stream.batches_from(
                self.samples,
                self.collate,
                batch_size=self.batch_size,
                rank=self.parallel.rank,
                world=self.parallel.world,
                workers=self.num_workers,
                pin_memory=self.device.type == "cuda",
            )
        loader = DataLoader(
            train_set,
            batch_sampler=EndlessBatches(
                list(buckets_of(train_set).values()),
                self.batch_size,
                self.seed,
                self.samples,
                self.parallel.rank,
                self.parallel.world,
            ),
            num_workers=self.num_workers,
            worker_init_fn=leave_signals_to_the_run,
            collate_fn=self.collate,
            pin_memory=self.device.type == "cuda",
        )
        with starting_processes():
            return iter(loader)

    def _return_to_checkpoint(self) -> None:
        """Go on from the last good weights; what the same data would do again is known."""
        failed = self.step
        self.checkpoints.finish()
        self.parallel.wait()
        newest = self.checkpoints.newest()
        if newest is None or self.guard.restarts == MAX_RESTARTS:
            why = "there is no checkpoint yet" if newest is None else "as before"
            raise Diverged(
                f"{self.guard.max_skips} steps in a row had to be skipped at step {failed}, {why}: "
                "lower lr, or use mixed_precision bf16 or no"
            )
        history, samples = self.guard.state(), self.samples
        marks = self.stream.marks if self.stream else {}
        self._load_checkpoint(newest)
        if self.stream:
            self.stream.marks = marks
        self.samples, self._looked_at = samples, -1
        self.guard.returned(history, failed - self.step)
        self.interval.start(self.step)
        self.progress.step_to(self.step)
        if self.parallel.is_main:
            self.snapshots.drop_after(self.step)
            self.log.warn(
                self.step,
                f"{self.guard.max_skips} steps in a row were skipped at step {failed}: back to "
                f"{newest.name}, with half the learning rate and the data that follow",
            )

    def _report(self) -> None:
        if self.parallel.is_main:
            self.log.report()

    def _check_loss(self) -> None:
        """Refuse to go on, and to save, once the loss of any process is not finite."""
        if self.parallel.agreed(not math.isfinite(float(self._loss))):
            raise Diverged(
                f"the loss is {float(self._loss)} at step {self.step}: lower lr, or use "
                "mixed_precision bf16 or no; resume goes on from the last checkpoint"
            )

    def _is_finite(self) -> bool:
        """Whether all weights of this process are."""
        tensors = [t for m in self.modules().values() for t in trained_state(m).values()]
        tensors += self.ema.average.values()
        return all(bool(own_part(tensor).isfinite().all()) for tensor in tensors)

    def _check_weights(self) -> None:
        """Refuse to save weights that are not finite. Every process must call it."""
        if self.parallel.agreed(not self._is_finite()):
            raise Diverged(
                f"the weights are not finite at step {self.step}, and are not saved: lower lr, or "
                "use mixed_precision bf16 or no; resume goes on from the last checkpoint"
            )

    @contextmanager
    def _saved_on_failure(self) -> Iterator[None]:
        """Whatever ends the run within the block, the steps that are done are saved first.

        A failure may be that of one process, so nothing here waits for the others; weights that
        are divided can only be saved by all of them, and are not.
        """
        try:
            yield
        except (Diverged, CheckpointError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            good = self.guard.in_a_row == 0 and math.isfinite(float(self._loss))
            if self.step and good and not self.sharded and self._is_finite():
                try:
                    self._write_checkpoint()
                    if self._changing and self.parallel.is_main:
                        self.log.warn(
                            self.step,
                            "the next step failed while it changed the weights: what is saved is "
                            "good to go on from, but no longer exact",
                        )
                except CheckpointError as failure:
                    error.add_note(str(failure))
            if isinstance(error, StreamError) and self._saved_at == self.step:
                raise StreamError(
                    f"{error}; step {self.step} is saved, and once the data are whole again "
                    "resume=True goes on from there as if nothing had happened"
                ) from error
            raise

    def changing(self) -> None:
        """From here on this step changes what is trained, and must come to its end."""
        self.stop.hold()
        self._changing = True

    def save(self) -> None:
        """Write ``NAME.safetensors`` (raw weights) and ``NAME-ema.safetensors`` (averaged).

        Once training has begun; of weights that are divided by all processes, else by the main
        process alone.
        """
        self._write_model("")
        with self.ema.applied():
            self._write_model("-ema")

    def _write_model(self, which: str) -> None:
        path = self.results_folder / f"{self.name}{which}.safetensors"
        state = self.parallel.whole_state(plain_state(self.model))
        if self.parallel.is_main:
            with writing(path):
                self.model.save(path, state=state)

    def autocast(self) -> AbstractContextManager:
        """Half precision where it is safe, if ``mixed_precision`` says so."""
        return self.parallel.autocast()

    def accumulating(self, wrapped: nn.Module, micro: int) -> AbstractContextManager:
        """Around forward and backward of one of ``grad_accum_every`` micro batches.

        Gradients are exchanged between processes with the last one only.
        """
        last = micro == self.grad_accum_every - 1
        return nullcontext() if last else self.parallel.no_sync(wrapped)

    def backward(self, loss: Tensor) -> None:
        """Add this micro batch's share to the gradients."""
        self._losses.append(loss.detach())
        self.parallel.backward(loss / self.grad_accum_every)

    def optimizer_step(self, name: str) -> Tensor:
        """Clip this module's gradients alone, step unless the guard objects, clear.

        Returns:
            the gradient norm before clipping: the same on all processes.
        """
        self.changing()
        parameters = [p for p in self.wrapped[name].parameters() if p.requires_grad]
        norm = self.parallel.clip(parameters, self.max_grad_norm)
        # fp16's scaler skips its own overflows, which are no fault unless the loss was one before
        overflow = self.parallel.scaler is not None and not norm.isfinite()
        overflow = overflow and not self.parallel.agreed(
            not torch.stack(self._losses).isfinite().all()
        )
        self._losses.clear()
        if overflow or self.guard.allows(name, float(norm)):
            self.optimizers[name].step()
        elif self.parallel.scaler is not None:
            self.parallel.scaler.update()  # or it would refuse the next gradients
        self.optimizers[name].zero_grad(set_to_none=True)
        return norm

    def _prepare(self) -> None:
        """Wrap the modules; one optimizer each, its parameters in the module's own order."""
        self.wrapped: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        for name, module in self.modules().items():
            self.wrapped[name] = self.parallel.prepare(module, self.divisible)
            settings = self.lr, self.betas, self.weight_decay
            optimizer = make_optimizer(self.optimizer, module, *settings)
            self.optimizers[name] = self.parallel.prepare_optimizer(optimizer)
        self.sharded = any(is_sharded(module) for module in self.modules().values())
        first = next(iter(self.modules().values()))
        names = [name for name, _ in first.named_parameters(remove_duplicate=False)]
        averaged = set(plain_names(first, names).values())
        tensors = trained_state(first)
        self.ema = EMA(tensors, averaged, warmed_up(self.ema_decay))
        lengths = KEPT if self.posthoc_every else ()
        self.posthoc = {str(of): EMA(tensors, averaged, power(of)) for of in lengths}
        self._frozen = digest_state(
            {k: v for k, v in plain_state(first).items() if k not in self.ema.tensors}
        )

    def _seed_step(self) -> None:
        world, rank = self.parallel.world, self.parallel.rank
        steps = self.step + self.guard.lost_steps
        torch.manual_seed((self.seed * 1_000_003 + steps) * world + rank)

    def _lr_factor(self) -> float:
        if self.step < self.warmup_steps:
            return (self.step + 1) / self.warmup_steps
        done = (self.step - self.warmup_steps) / max(1, self.num_train_steps - self.warmup_steps)
        if self.max_minutes:
            done = max(done, min(1.0, self._minutes / self.max_minutes))
        if self.lr_schedule == "cosine":
            return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
        falling = {"constant": 0.0, "linear": 1.0, "cooldown": self.cooldown_share}
        share = falling[self.lr_schedule]
        return min(1.0, (1 - done) / share) if share else 1.0

    def _out_of_time(self) -> bool:
        if self.max_minutes is None:
            return False
        # the main process's clock for all: they must slow down and stop as one
        self._minutes = self.parallel.broadcast(time.monotonic() - self._started) / 60
        return self._minutes > self.max_minutes

    def _look(self) -> None:
        """Validate and draw, leaving the randomness untouched."""
        if self._looked_at == self.step:
            return
        self._looked_at = self.step
        modules = list(self.modules().values())
        model = next(iter(self.wrapped.values()))
        name = f"{self.name}-prompts"
        path = self.results_folder / "samples" / f"{name}-{self.step:08d}.png"
        rows = []
        with torch.no_grad(), torch.random.fork_rng(self._gpus()):
            for module in modules:
                module.eval()
            torch.manual_seed(self.seed)
            with self.ema.applied():
                self._look_averaged(model)
                if self.prompts:
                    with self.stop.free():
                        rows.append(self.parallel.with_weights(model, self.draw_prompts))
            if self.prompts:
                with self.stop.free():
                    rows.append(self.parallel.with_weights(model, self.draw_prompts))
                if self.parallel.is_main:
                    pairs = torch.stack(rows, dim=1).flatten(0, 1)
                    labels = [text for prompt in self.prompts for text in (prompt, "raw weights")]
                    with writing(path):
                        image_grid(pairs, min(len(pairs), 8), labels).save(path)
                    self._trackers.picture(self.step, name, path)
            for module in modules:
                module.train()

    def _look_averaged(self, model: nn.Module) -> None:
        """The validation, with the weights of it if it is the best one, and the picture."""
        main = self.parallel.is_main
        line: dict[str, float] = {}
        if (shares := self._shares) is not None:
            with self.autocast(), self.stop.free():
                figures = self.parallel.with_weights(model, lambda: self.validate(shares))
            if self.parallel.agreed(main and self._is_best(figures)):
                self._write_model("-best")
            line = {f"valid_{k}": v for k, v in figures.items()}
        path = self.results_folder / "samples" / f"{self.name}-{self.step:08d}.png"
        try:
            with writing(path), self.stop.free():
                line |= self.parallel.with_weights(model, lambda: self.draw(path))
        finally:
            if main and line:
                self.log.add(self.step, line, self.codes_full())
        self._trackers.picture(self.step, self.name, path)

    def _is_best(self, figures: dict[str, float]) -> bool:
        """Whether a validation is better than all before it, which stand in the log."""
        name, sign = self.judged_by
        value, earlier = (
            figures.get(name, math.nan),
            self.log.health.curves.get(f"valid_{name}", []),
        )
        return math.isfinite(value) and all(sign * value > sign * past for _, past in earlier)

    def _gpus(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    # Checkpoints -----------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        self._check_weights()
        for window in self.windows().values():
            window.gather(self.parallel.reduce, keep=self.parallel.is_main)
        if self.stream:
            self._streams = self.parallel.gathered(self.stream.state())
        self._write_checkpoint()

    def _save_snapshot(self) -> None:
        """Write the further averages, if there are any. Every process must call it."""
        states = {
            length: self.parallel.whole_state(ema.average) for length, ema in self.posthoc.items()
        }
        if states and self.parallel.is_main:
            self.snapshots.write(self.step, states, self.ema.averaged)

    def _write_checkpoint(self) -> None:
        if self._saved_at == self.step or not (self.parallel.is_main or self.sharded):
            return
        tree = {
            "step": self.step,
            "samples": self.samples,
            "modules": {n: trained_state(m) for n, m in self.modules().items()},
            "optimizers": {
                n: named_state(m, self.optimizers[n]) for n, m in self.modules().items()
            },
            "ema": self.ema.average,
            "posthoc": {length: ema.average for length, ema in self.posthoc.items()},
            "scaler": self.parallel.scaler_state(),
            "guard": self.guard.state(),
            "windows": {name: window.state() for name, window in self.windows().items()},
            "config": self.model.config,
            "frozen": self._frozen,
            "streams": self._streams,
        }
        if self.sharded:
            self.checkpoints.save_sharded(tree, self.step, self.parallel)
        else:
            self.checkpoints.save(tree, self.step)
        self._saved_at = self.step
        self.save()

    def _load_checkpoint(self, path: Path) -> None:
        like = self._like()
        tree = self.checkpoints.load(path, like.get)
        with reading(path):
            self._take(placed_as(tree, like.get), path)
        self.checkpoints.resumed(path, tree)

    def _like(self) -> dict[str, Tensor]:
        """How what is divided among processes is so, by its place in a checkpoint's tree.

        Of an optimizer's state by the place of the parameter.
        """
        like = {f"ema/{name}": value for name, value in self.ema.average.items()}
        for length, ema in self.posthoc.items():
            like |= {f"posthoc/{length}/{name}": value for name, value in ema.average.items()}
        for module, inner in self.modules().items():
            for name, value in trained_state(inner).items():
                like[f"modules/{module}/{name}"] = like[f"optimizers/{module}/{name}"] = value
        return like

    def _take(self, tree: dict[str, Any], path: Path) -> None:
        """Go on from what a checkpoint holds, once all of its weights have been checked."""
        self._check_config(tree["config"], path)
        if tree["frozen"] != self._frozen:
            raise CheckpointError(
                f"{path} was trained on other frozen weights (a tokenizer) than it has now: "
                "resume with those it was begun with, or choose another results_folder"
            )
        advice = "resume with the settings it was made with, or choose another results_folder"
        saved_of = {n: state_of(tree["modules"].get(n, {}), path) for n in self.modules()}
        for name, module in self.modules().items():
            check_weights(trained_state(module), saved_of[name], path, f"this {name}", advice)
        averages = state_of(tree["ema"], path)
        check_weights(self.ema.average, averages, path, "these averages", advice)
        posthoc = tree.get("posthoc", {})
        if self.posthoc.keys() - posthoc.keys():
            raise CheckpointError(
                f"{path} is of a run that was begun without posthoc_every, and averages that reach "
                "back to the first step cannot begin now: leave it at 0"
            )
        kept = {length: state_of(posthoc[length], path) for length in self.posthoc}
        for state in kept.values():
            check_weights(self.ema.average, state, path, "these averages", advice)
        for name, module in self.modules().items():
            saved = saved_of[name]
            names = plain_names(module)
            given = {name: saved[short] for name, short in names.items() if short in saved}
            module.load_state_dict(given, strict=False)
            load_named_state(module, self.optimizers[name], tree["optimizers"][name])
        self.parallel.load_scaler(tree["scaler"])
        self.ema.load(averages)
        for length, state in kept.items():
            self.posthoc[length].load(state)
        self.guard.load(tree["guard"])
        for name, window in self.windows().items():
            if name in tree.get("windows", {}):
                window.load(tree["windows"][name], self.device, keep=self.parallel.is_main)
        self.step = tree["step"]
        share = self.batch_size * self.grad_accum_every * self.parallel.world
        # older checkpoints count no samples: they are taken to have had today's batches
        self.samples = tree.get("samples", (self.step + self.guard.lost_steps) * share)
        if self.stream and (states := tree.get("streams")):
            layout = dict(batch_size=self.batch_size, world=self.parallel.world)
            try:
                self.stream.load(states[self.parallel.rank % len(states)], layout)
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error
            self._streams = states

    def _check_config(self, saved: dict[str, Any], path: Path) -> None:
        """Refuse a checkpoint of a model made with other arguments: shapes do not tell them all."""
        own = leaves(json.loads(json.dumps(self.model.config)), skip=SAMPLING)
        saved = leaves(json.loads(json.dumps(saved)), skip=SAMPLING)
        for key in sorted(own.keys() & saved.keys()):  # another release may have others
            if own[key] != saved[key]:
                raise CheckpointError(
                    f"{path} is of another model than this one ({key} was {saved.get(key)} and is "
                    f"{own.get(key)}): resume with the settings it was made with, or choose "
                    "another results_folder"
                )
