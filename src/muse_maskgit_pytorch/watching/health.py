"""Whether a run is healthy: how the codebook is used, and warnings in words.

Nothing here touches the training: `CodeUsage` counts, `Health` reads the lines of the log. After a
resume the counts come from the checkpoint, and `Health` reads the log again.

A false alarm is worse than silence: one bad line never makes a warning, noise is measured and
allowed for, and what is normal during the warm-up or while the learning rate falls is not reported.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..arguments import whole
from ..devices import cores

Curve = list[tuple[int, float]]  # (step, value), steps rising
Curves = dict[str, Curve]

TOKENS_PER_CODE = 20  # at least so many in a full window: an even codebook then shows every code
MIN_USAGE = 0.5
MIN_EVENNESS = 0.02  # perplexity as a share of the codes in use
MAX_FALL = 1.5  # dB of training PSNR below its best
SMOOTH = 20  # lines that a training figure is averaged over before it is compared
WORSE = 2.0  # a warning comes again once its severity has grown by this factor ...
CALM = 10  # ... or when it returns after so many lines without it
SETTLED = 2000  # steps by which a transformer has learnt something, if it learns at all


def add_line(curves: Curves, line: Mapping[str, Any]) -> None:
    """Append a log line's finite numbers to the curves.

    A run that went back (a resume, a return to the last good checkpoint) logs some steps again:
    the curve then goes on from the later line, and what stood beyond it is gone.
    """
    step = line["step"]
    for name, value in line.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "step" or not number or not math.isfinite(value):
            continue
        curve = curves.setdefault(name, [])
        while curve and curve[-1][0] >= step:
            curve.pop()
        curve.append((step, float(value)))


class CodeUsage:
    """Usage and perplexity of a codebook over a sliding window of the latest tokens.

    Two buckets of counts: tokens fall into the new one; once it holds 20 V tokens it becomes the
    old one, and the old one is emptied. Both together are the window: once `full`, always the
    latest 20 V to 40 V tokens (and a step more). Of an evenly used codebook 20 V tokens miss a
    share of e^-20, so a code that is not in a full window is rare or dead.

    Args:
        codebook_size: V.
        device: where the ids are; V integers for each bucket are kept there.
        processes: how many count together; each then keeps its share of the window.
    """

    def __init__(self, codebook_size: int, device: torch.device | str, processes: int = 1):
        if codebook_size < 1:
            raise ValueError(f"codebook_size must be at least 1, not {codebook_size}")
        if processes < 1:
            raise ValueError(f"processes must be at least 1, not {processes}")
        self.processes = processes
        self.bucket_size = math.ceil(TOKENS_PER_CODE * codebook_size / processes)
        self.old = torch.zeros(codebook_size, dtype=torch.long, device=device)
        self.new = torch.zeros_like(self.old)
        self.tokens = 0  # in the new bucket, known without asking the device
        self.full = False

    @torch.no_grad()
    def see(self, ids: Int[Tensor, "..."]) -> None:
        """Count one step's ids, each in [0, V); does not wait for the device."""
        if self.tokens >= self.bucket_size:
            self.old, self.new = self.new, self.old.zero_()
            self.tokens = 0
        flat = ids.reshape(-1)
        self.new.scatter_add_(0, flat, torch.ones_like(flat))
        self.tokens += flat.numel()
        self.full = self.full or self.tokens >= self.bucket_size

    def measure(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Figures of the window, or of what was seen while it is not `full`.

        Args:
            reduce: sums a tensor of (V,) over the processes; all of them must then call this.

        Returns:
            ``codebook_usage``: share of the codes that occur, in [0, 1]; ``codebook_perplexity``:
            exp of the entropy of their distribution, in [1, V]: how many codes used evenly would
            say as much. Empty before the first token.
        """
        counts = self.old + self.new
        counts = (reduce(counts) if reduce else counts).cpu()
        if not counts.any():
            return {}
        share = counts.double() / counts.sum()
        entropy = torch.special.entr(share).sum()  # 0 at 0
        return {
            "codebook_usage": float((counts > 0).double().mean()),
            "codebook_perplexity": float(entropy.exp()),
        }

    def gather(self, reduce: Callable[[Tensor], Tensor], keep: bool) -> None:
        """Bring the counts of all processes to the one that keeps them. All of them must call it.

        A checkpoint is written by one process: so its `state` is that of all.
        """
        for counts in (self.old, self.new):
            counts.copy_(reduce(counts.clone()) * int(keep))

    def state(self) -> dict[str, Any]:
        """The window, for a checkpoint."""
        tokens = self.tokens * self.processes
        return {"old": self.old, "new": self.new, "tokens": tokens, "full": self.full}

    def load(self, state: Mapping[str, Any], device: torch.device | str, keep: bool) -> None:
        """Go on from a `state`; ``keep`` as in `gather`.

        Raises:
            ValueError: counts of another codebook, or that are none.
        """
        for counts in (state["old"], state["new"]):
            if counts.shape != self.old.shape or counts.dtype != self.old.dtype or counts.min() < 0:
                raise ValueError("the window of codes is of another codebook")
        whole("tokens", state["tokens"], 0)
        self.old = state["old"].to(device) * int(keep)
        self.new = state["new"].to(device) * int(keep)
        self.tokens, self.full = state["tokens"] // self.processes, bool(state["full"])


@dataclass(frozen=True)
class Finding:
    """Something wrong. The larger ``severity`` (above 0), the worse."""

    name: str
    severity: float
    text: str


class Health:
    """Reads the log as it is written and says in words what goes wrong.

    Each warning states what was measured, what it means and what to do. It is given once, and
    again only when it has become markedly worse or comes back after it had gone.

    Args:
        stage: "vae" or a name of a transformer's stage.
        history: curves of the run so far, as `add_line` makes them, when it is resumed.
        max_grad_norm: the clipping limit; 0: none.
        codebook_size: V of a tokenizer; without it the codebook is not judged.
        quantizer: its name, so that the advice does not name it again.
        images: how many the run trains on.
        workers: processes that load its data; 0: it does so itself.
        idle_loss: what the discriminator's loss is while it answers 0 to everything: 1 for the
            hinge, log 2 for the logistic loss.
    """

    def __init__(
        self,
        stage: str,
        *,
        history: Curves | None = None,
        max_grad_norm: float = 0.0,
        codebook_size: int | None = None,
        quantizer: str | None = None,
        images: int | None = None,
        workers: int = 0,
        idle_loss: float = 1.0,
    ):
        self.stage, self.max_grad_norm = stage, max_grad_norm
        self.codebook_size, self.quantizer = codebook_size, quantizer
        self.images, self.workers, self.idle_loss = images, workers, idle_loss
        self.curves: Curves = {name: list(curve) for name, curve in (history or {}).items()}
        self._counted = {name: c[-1][1] for name, c in self.curves.items() if c}  # before this run
        self._codes_full = False
        self._smooth: Curve = []  # PSNR over the latest lines
        for end in range(1, len(self.curves.get("psnr", [])) + 1):
            self._smooth_psnr(self.curves["psnr"][max(0, end - SMOOTH) : end])
        self._said: dict[str, float] = {}  # name -> severity when it was said
        self._quiet: dict[str, int] = {}  # name -> lines since it was last found

    def see(self, line: Mapping[str, Any], codes_full: bool = True) -> list[str]:
        """Take in one line of the log; return the warnings that are new.

        Args:
            line: "step" and numbers by name, of training or of validation; None: not finite.
            codes_full: whether the line's codebook figures come from a full window.
        """
        add_line(self.curves, line)
        if "codebook_usage" in line:
            self._codes_full = codes_full
        if line.get("psnr") is not None:
            self._smooth_psnr(self.curves["psnr"][-SMOOTH:])
        texts = []
        found = {finding.name: finding for finding in self._findings()}
        for name, finding in found.items():
            if finding.severity >= WORSE * self._said.get(name, 0.0):
                self._said[name] = finding.severity
                texts.append(finding.text)
        for name in list(self._said):
            self._quiet[name] = 0 if name in found else self._quiet[name] + 1
            if self._quiet[name] >= CALM:
                del self._said[name]
        return texts

    def _findings(self) -> Iterator[Finding]:
        yield from self._guard()
        yield from self._gradients()
        yield from self._plateau()
        yield from self._overfitting()
        yield from self._loader()
        yield from self._knowledge()
        yield from self._one_colour()
        if self.codebook_size:
            yield from self._codebook(self.codebook_size)
        yield from self._discriminator()
        yield from self._fallen_psnr()

    # What any stage can suffer from --------------------------------------------------------------

    def _guard(self) -> Iterator[Finding]:
        """Steps skipped in this process's life; of a return the trainer tells itself."""
        step, skipped = self._new("skipped_steps")
        if skipped:
            yield Finding(
                "skipped",
                skipped,
                f"{_count(skipped, 'step')} left out up to step {step:,}: the loss or the gradient "
                "spiked or was not finite; a few do no harm, but if it goes on, lower lr, or use "
                "mixed_precision bf16 or no",
            )

    def _new(self, name: str) -> tuple[int, int]:
        """Step and growth of a counter since this process began."""
        curve = self.curves.get(name)
        if not curve:
            return 0, 0
        step, value = curve[-1]
        before = self._counted.get(name, 0.0)
        return step, int(value - before if value >= before else value)

    def _gradients(self) -> Iterator[Finding]:
        norms = self._recent("grad_norm", 50)
        if not (self.max_grad_norm and norms and self._lr_settled(50)):
            return
        share = fmean(norm > self.max_grad_norm for norm in norms)
        if share >= 0.95:
            ratio = median(norms) / self.max_grad_norm
            yield Finding(
                "gradients",
                ratio,
                f"the gradient norm is above max_grad_norm={self.max_grad_norm:g} in "
                f"{share:.0%} of the latest {len(norms)} lines (median {median(norms):.3g}): "
                "nearly every step is cut to the same length; lower lr, or raise max_grad_norm",
            )

    def _plateau(self) -> Iterator[Finding]:
        """The latest third of the loss, its halves compared, at a steady learning rate.

        Silent unless the later half is not lower and chance could not hide a fall of 1 %; once
        said, it holds until the loss falls beyond chance.
        """
        loss, lr = self.curves.get("loss", []), self.curves.get("lr", [])
        third = len(loss) // 3
        if third < 60 or loss[-1][0] - loss[-third][0] < 1000:
            return
        start = loss[-third][0]
        rates = [value for step, value in lr if step >= start]
        steady = rates and 0.9 * rates[0] < rates[-1] < 1.01 * rates[0]
        adversary = self.curves.get("generator")
        if not steady or (adversary and adversary[-1][0] >= start):
            return  # an adversary moves the loss for reasons of its own
        values = [value for _, value in loss[-third:]]
        early, late = values[: third // 2], values[third // 2 :]
        fall = fmean(early) - fmean(late)
        error = math.hypot(_error(early), _error(late))
        certain = fall <= 0 and 4 * error < 0.01 * abs(fmean(early))
        if certain or ("plateau" in self._said and fall < 3 * error):
            yield Finding(
                "plateau",
                1.0,
                f"the loss has not fallen since step {start:,} (it is {fmean(late):.4g}) and the "
                "learning rate does not fall either: more steps like these gain nothing; lower lr "
                "(lr_schedule=cosine does), train a larger model, or stop",
            )

    def _overfitting(self) -> Iterator[Finding]:
        """Validation twice in a row worse than its best, the second time clearly and no better.

        All the while training must have improved. Validation sees the same images and masks each
        time, so two in a row are not noise.
        """
        name, sign, unit = ("psnr", 1, " dB") if self.stage == "vae" else ("loss", -1, "")
        valid, train = self.curves.get(f"valid_{name}", []), self.curves.get(name, [])
        if len(valid) < 3:
            return
        best_step, best = max(valid, key=lambda point: sign * point[1])
        margin = 0.3 if self.stage == "vae" else 0.02 * abs(best)
        first, second = (sign * (best - value) for _, value in valid[-2:])
        after = [value for step, value in train if step > best_step][-SMOOTH:]
        before = [value for step, value in train if step <= best_step][-max(2, len(after)) :]
        worsening = valid[-2][0] > best_step and margin / 2 < first <= second and second > margin
        if not worsening or min(len(before), len(after)) < 2:
            return
        gained = sign * (fmean(after) - fmean(before))
        if gained > margin + 2 * math.hypot(_error(before), _error(after)):
            images = f" of {self.images:,} images" if self.images else ""
            yield Finding(
                "overfitting",
                second,
                f"validation {name.upper() if sign > 0 else name} has worsened from {best:.4g} to "
                f"{valid[-1][1]:.4g}{unit} since step {best_step:,} while training's has "
                f"improved: the model learns its training set{images} by heart; stop near step "
                f"{best_step:,}, use more images, or a smaller model",
            )

    def _loader(self) -> Iterator[Finding]:
        waits = self._recent("data_wait", 5, steps=50)
        if not waits or (wait := median(waits)) < 0.3:
            return
        # a load takes as long as the step that waits for it, on each of the workers
        load = max(1, self.workers) * (1 if self.workers else wait)
        wanted, there = math.ceil(load / (1 - min(wait, 0.99))), cores()
        remedy = f"set num_workers={wanted}"
        if wanted > there or wanted <= self.workers:
            remedy = f"{there} cores are too few: make a cache (muse cache), or use smaller images"
        yield Finding(
            "loader",
            wait,
            f"the loader is the limit: the steps wait {wait:.0%} of the time for their data; "
            + remedy,
        )

    # What a transformer can suffer from ----------------------------------------------------------

    def _knowledge(self) -> Iterator[Finding]:
        """By what it says of images that it has not seen; three validations in a row."""
        blind = self.curves.get("valid_nats_100", [])[-3:]
        if len(blind) < 3:
            return
        step, nats = blind[-1]
        chance = self._reference("unigram") or self._reference("uniform")
        right = [value for _, value in self.curves.get("valid_accuracy_100", [])[-3:]]
        if chance and right and min(right) > 0.9 and nats < 0.1 * chance:
            yield Finding(
                "too good",
                right[-1],
                f"the validation is too good to be true: {right[-1]:.0%} of the tokens of images "
                "it should never have seen are guessed from nothing but the caption "
                f"({nats:.2g} nats a token); either training and validation share images "
                "(muse data check finds those that are there twice), or captions name the very "
                "image, or nearly all pictures are alike",
            )
        easiest = [value for _, value in self.curves.get("valid_nats_25", [])[-3:]]
        unigram = self._reference("unigram")
        if unigram and step >= SETTLED and easiest and min(easiest) > 0.995 * unigram:
            yield Finding(
                "nothing learnt",
                1.0,
                f"nothing is learnt: with three quarters of an image shown, a token still costs "
                f"{min(easiest):.4g} nats, and {unigram:.4g} by the frequency of codes alone; "
                "raise lr, or look whether the images are noise or the tokenizer is untrained",
            )
        others = [value for _, value in self.curves.get("valid_nats_other_captions", [])[-3:]]
        if len(others) < 3 or step < SETTLED:
            return
        gains = [(other - own) / own for other, (_, own) in zip(others, blind, strict=True)]
        if max(gains) < 0.001:
            yield Finding(
                "captions",
                1.0,
                "the captions have no effect: held-out images cost "
                f"{nats:.5g} nats a token with their own captions and {others[-1]:.5g} with those "
                "of other images; look whether captions belong to their images and differ, whether "
                "the text encoder is the right one, and whether cond_drop_prob is near 1",
            )

    def _reference(self, name: str) -> float | None:
        curve = self.curves.get(f"reference_{name}")
        return curve[-1][1] if curve else None

    def _one_colour(self) -> Iterator[Finding]:
        real, drawn = (self.curves.get(f"{n}_contrast", [])[-2:] for n in ("real", "drawn"))
        if len(drawn) < 2 or drawn[0][0] < self._warm_up():
            return
        shares = [d / max(r, 1e-9) for (_, d), (_, r) in zip(drawn, real, strict=True)]
        if max(shares) < 0.1 and real[-1][1] > 0.02:
            yield Finding(
                "one colour",
                1.0,
                f"the samples are of one colour: their contrast is {shares[-1]:.0%} of the real "
                "images'; a loss that falls all the same means that drawing goes wrong (look at "
                "cond_scale and temperature), one that stays that nothing is learnt",
            )

    def _warm_up(self) -> int:
        """The step at which the learning rate first stood at its peak so far."""
        rates = self.curves.get("lr", [])
        return max(rates, key=lambda point: point[1])[0] if rates else 0

    # What a tokenizer can suffer from ------------------------------------------------------------

    def _codebook(self, codes: int) -> Iterator[Finding]:
        usages = self._recent("codebook_usage", 10, steps=500)
        perplexities = self._recent("codebook_perplexity", 10, steps=500)
        if not (self._codes_full and usages and perplexities and self._lr_settled(10)):
            return
        usage, perplexity = usages[-1], perplexities[-1]
        if max(usages) < MIN_USAGE and usage <= 1.05 * usages[0]:  # low, and not on its way up
            others = " or ".join(q for q in ("fsq", "simvq") if q != self.quantizer)
            used = max(1.0, usage * codes)
            yield Finding(
                "usage",
                1 / max(usage, 1e-9),
                f"{100 * usage:.2g} % of the codes are in use: the tokenizer spends "
                f"{math.log2(codes):.3g} bits on a token that carries at most "
                f"{math.log2(used):.3g}; try quantizer={others}, fewer codes, or a lower lr",
            )
        limit = MIN_EVENNESS * usage * codes
        if min(usages) >= MIN_USAGE and max(perplexities) < limit:
            yield Finding(
                "perplexity",
                limit / perplexity,
                f"{100 * usage:.2g} % of the codes are in use, but nearly all tokens fall on a few "
                f"(perplexity {perplexity:.3g} of {codes:,}): most patches become the same code; "
                "raise the weight of the entropy or diversity term, use fewer codes, or look for "
                "empty images in the folder",
            )

    def _discriminator(self) -> Iterator[Finding]:
        accuracy = self._recent("discriminator_accuracy", 10, steps=200)
        term = self._recent("generator", 10, steps=200)
        weight = self._recent("gan_weight", 10, steps=200)
        ramping = bool(weight) and (weight[-1] <= 0 or weight[-1] > 1.02 * weight[0])
        if accuracy and term and not ramping and min(accuracy) > 0.95:
            half = len(term) // 2
            if fmean(term[half:]) >= fmean(term[:half]):
                yield Finding(
                    "discriminator wins",
                    1.0,
                    f"the discriminator wins: it tells {fmean(accuracy):.0%} of the patches apart "
                    "and the generator's term does not fall, so its gradient teaches nothing; "
                    "raise lecam_weight or gradient_penalty_weight, lower the discriminator's lr "
                    "or width, or start it later",
                )
        accuracy = self._recent("discriminator_accuracy", 20, steps=500)
        loss = self._recent("discriminator", 20, steps=500)
        if not (accuracy and loss):
            return
        blind = abs(fmean(accuracy) - 0.5) < 0.03 and max(abs(a - 0.5) for a in accuracy) < 0.1
        if blind and abs(fmean(loss) / self.idle_loss - 1) < 0.02:
            yield Finding(
                "discriminator sleeps",
                1.0,
                f"the discriminator sleeps: it tells {fmean(accuracy):.0%} of the patches apart, "
                f"which is chance, and its loss stays at {fmean(loss):.3g}: the adversarial term "
                "adds only noise; lower gradient_penalty_weight or lecam_weight, raise the "
                "discriminator's lr or width, or set gan_weight=0 and save its time",
            )

    def _smooth_psnr(self, points: Curve) -> None:
        """Append the mean of ``points``, the latest lines."""
        while self._smooth and self._smooth[-1][0] >= points[-1][0]:
            self._smooth.pop()
        if len(points) == SMOOTH:
            self._smooth.append((points[-1][0], fmean(value for _, value in points)))

    def _fallen_psnr(self) -> Iterator[Finding]:
        recent = self._recent("psnr", SMOOTH)
        if not recent:
            return
        best_step, best = max(self._smooth, key=lambda point: point[1])
        fall = best - self._smooth[-1][1]
        # the best of many noisy means lies above the curve: a fall must stand out from that
        bad = fall > MAX_FALL + 5 * _error(recent)
        if not (bad or ("psnr" in self._said and fall > 0.5 * MAX_FALL)):
            return
        start = next((step for step, value in self.curves.get("generator", [])), None)
        weights = self.curves.get("gan_weight", [])
        start = next((step for step, value in weights if value > 0), start)
        by_adversary = False
        if start is not None:
            before = [value for step, value in self._smooth if step <= start]
            lines = sum(start < step <= best_step for step, _ in self._smooth)
            by_adversary = bool(before) and best - before[-1] < 0.5 and lines <= SMOOTH
        since, remedy = f"since step {best_step:,}", "lower lr, or go back to a checkpoint before"
        if by_adversary:
            since = f"since the discriminator started at step {start:,}"
            remedy = "it takes more than it sharpens: lower gan_weight, or start or ramp it later"
        yield Finding(
            "psnr",
            fall,
            f"reconstruction has become worse {since}: PSNR is {self._smooth[-1][1]:.1f} dB, "
            f"{fall:.1f} dB below its best; {remedy}",
        )

    # Reading the curves --------------------------------------------------------------------------

    def _recent(self, name: str, lines: int, steps: int = 0) -> list[float]:
        """The latest values, of at least so many lines and steps; [] while there are fewer."""
        curve = self.curves.get(name, [])
        if len(curve) < lines:
            return []
        reach = bisect_right(curve, curve[-1][0] - steps, key=lambda point: point[0]) - 1
        start = min(len(curve) - lines, reach)
        return [value for _, value in curve[start:]] if start >= 0 else []

    def _lr_settled(self, lines: int) -> bool:
        """No warm-up in the latest lines."""
        rates = [value for _, value in self.curves.get("lr", [])[-lines:]]
        return all(later <= earlier for earlier, later in pairwise(rates))


def _error(values: list[float]) -> float:
    """Standard error of the mean; from successive differences, so that a trend is not noise."""
    return math.sqrt(fmean((b - a) ** 2 for a, b in pairwise(values)) / 2 / len(values))


def _count(number: float, noun: str) -> str:
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"
