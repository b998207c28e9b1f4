"""Health: exact figures of the codebook; healthy runs are silent, each sick one says its one thing.

The histories are synthetic: curves of the shapes that trainings have, with noise from a seed.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch.watching.health import CodeUsage, Health, add_line

CODES = 1024
Line = dict[str, float]

# The codebook ------------------------------------------------------------------------------------


def test_usage_and_perplexity_of_known_distributions():
    usage = CodeUsage(8, "cpu")
    assert usage.measure() == {}
    usage.see(torch.tensor([[0, 1], [2, 3]]))
    assert usage.measure() == pytest.approx({"codebook_usage": 0.5, "codebook_perplexity": 4.0})
    usage.see(torch.full((4,), 7))  # now 1/8 four times and 1/2: entropy 4/8 log 8 + 1/2 log 2
    expected = {"codebook_usage": 5 / 8, "codebook_perplexity": math.exp(2 * math.log(2))}
    assert usage.measure() == pytest.approx(expected)


def test_the_window_slides_and_holds_20_to_40_tokens_a_code():
    usage = CodeUsage(4, "cpu")
    for _ in range(7):
        assert not usage.full
        usage.see(torch.zeros(10, dtype=torch.long))
    usage.see(torch.zeros(10, dtype=torch.long))
    assert usage.full  # 80 tokens
    sizes = []
    for _ in range(40):
        usage.see(torch.tensor([1, 2] * 5))
        sizes.append(int((usage.old + usage.new).sum()))
    assert min(sizes) >= 80
    assert max(sizes) <= 160
    # code 0 has slid out; 1 and 2 are used evenly
    assert usage.full
    assert usage.measure() == pytest.approx({"codebook_usage": 0.5, "codebook_perplexity": 2.0})


def test_an_even_codebook_is_seen_whole_in_a_full_window():
    usage = CodeUsage(1000, "cpu")
    while not usage.full:
        usage.see(torch.randint(1000, (4, 8, 8)))
    figures = usage.measure()
    assert figures["codebook_usage"] == 1
    assert 960 < figures["codebook_perplexity"] < 1000


def test_processes_together_measure_what_one_would():
    ids = torch.randint(50, (2, 30))
    alone, shares = CodeUsage(50, "cpu"), [CodeUsage(50, "cpu", processes=2) for _ in range(2)]
    alone.see(ids)
    for share, own in zip(shares, ids, strict=True):
        share.see(own)
    other = shares[1].old + shares[1].new
    assert shares[0].measure(lambda counts: counts + other) == alone.measure()
    for _ in range(10):
        shares[0].see(ids)
    assert shares[0].full  # 10 x 60 tokens are its half of 20 x 50 and more
    assert not alone.full


@pytest.mark.parametrize("arguments", [(0, "cpu"), (4, "cpu", 0)])
def test_codebook_of_no_size(arguments):
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        CodeUsage(*arguments)


# Histories ---------------------------------------------------------------------------------------


def tokenizer_run(
    change: Callable[[int, Line], None] = lambda step, line: None,
    *,
    seed: int = 0,
    lines: int = 400,
    every: int = 50,
    gan_start: int = 10_000,
    constant_lr: bool = False,
) -> list[Line]:
    """A tokenizer's healthy history, changed line by line; a validation every tenth line."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> float:
        return scale * float(torch.randn((), generator=generator))

    history: list[Line] = []
    total = lines * every
    for step in range(every, total + 1, every):
        done = step / total
        clean = 28 - 14 * math.exp(-step / 1500) - 6 * math.exp(-step / 8000)
        on = step >= gan_start
        clean -= 0.7 * min(1.0, max(0, step - gan_start) / 1000)  # an adversary's usual price
        psnr = clean + noise(0.8)
        recon = 10 ** (-psnr / 10)
        factor = 1.0 if constant_lr else 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
        line = dict(
            step=step,
            loss=recon + 0.05 + 0.5 / step**0.5 + noise(0.003),
            recon=recon,
            commitment=0.01 + 0.02 * math.exp(-step / 3000),
            grad_norm=0.6 * math.exp(noise(0.4)),
            psnr=psnr,
            codebook_usage=min(1.0, 0.93 - 0.75 * math.exp(-step / 2500) + noise(0.005)),
            codebook_perplexity=CODES * (0.5 - 0.45 * math.exp(-step / 2500)) + noise(3),
            skipped_steps=0,
            restarts=0,
            lr=1e-4 * min(1.0, step / 1000) * factor,
            steps_per_s=3.0,
        )
        if on:
            line["generator"] = 0.1 + noise(0.15)
            line["gan_weight"] = 0.1 * min(1.0, (step - gan_start + 1) / 2000)
            early = math.exp(-(step - gan_start) / 300)  # at first it wins, as it should
            line["discriminator_accuracy"] = min(1.0, 0.68 + 0.3 * early + noise(0.04))
            line["discriminator"] = 0.85 - 0.3 * early + noise(0.04)
            line["discriminator_grad_norm"] = 0.5 * math.exp(noise(0.4))
            line["loss"] += line["gan_weight"] * line["generator"]
        change(step, line)
        history.append(line)
        if step % (10 * every) == 0:
            valid = dict(step=step, valid_psnr=clean - 0.4 + noise(0.03))
            change(step, valid)
            history.append(valid)
    return history


def transformer_run(
    change: Callable[[int, Line], None] = lambda step, line: None,
    *,
    seed: int = 0,
    lines: int = 600,
    constant_lr: bool = False,
) -> list[Line]:
    generator = torch.Generator().manual_seed(seed)
    references = dict(reference_uniform=7.6, reference_unigram=6.9, reference_bigram=6.2)
    history: list[Line] = [{"step": 0, **references}]
    for number in range(1, lines + 1):
        step, done = 50 * number, number / lines
        clean = 2.8 + 4 * math.exp(-step / 2000) + 8 * step**-0.3
        noise = torch.randn(2, generator=generator).tolist()
        factor = 1.0 if constant_lr else 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2
        line = dict(step=step, loss=clean + 0.1 * noise[0], lr=1e-4 * min(1, step / 500) * factor)
        line |= dict(grad_norm=0.7 * math.exp(0.4 * noise[1]), skipped_steps=0, restarts=0)
        line |= dict(data_wait=min(1.0, 0.1 * math.exp(0.5 * noise[0])))
        change(step, line)
        history.append(line)
        if number % 20 == 0:
            valid = dict(step=step, valid_loss=clean + 0.05, real_contrast=0.3)
            valid |= dict(drawn_contrast=0.25 * (1 - math.exp(-step / 1000)))
            learnt = 1 - math.exp(-step / 5000)
            valid |= dict(valid_nats_25=6.9 - 3 * learnt, valid_nats_100=6.9 - learnt)
            valid |= dict(valid_accuracy_100=0.1 + 0.3 * learnt)
            valid |= dict(valid_nats_other_captions=6.9 - 0.8 * learnt**2)
            change(step, valid)
            history.append(valid)
    return history


def warnings(history: list[Line], stage: str = "vae", **settings) -> list[tuple[int, str]]:
    defaults: dict[str, Any] = dict(max_grad_norm=1.0, images=1000)
    if stage == "vae":
        defaults |= dict(codebook_size=CODES)
    health = Health(stage, **{**defaults, **settings})
    return [(int(line["step"]), text) for line in history for text in health.see(line)]


# Silence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant_lr", [False, True])
@pytest.mark.parametrize("every", [5, 50])
@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_tokenizer_run_is_silent(seed: int, every: int, constant_lr: bool):
    # with a line every 5 steps the run is 2,000 steps long, still far from converged
    gan_start = 200 * every
    history = tokenizer_run(seed=seed, every=every, gan_start=gan_start, constant_lr=constant_lr)
    assert warnings(history) == []


@pytest.mark.parametrize("constant_lr", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_transformer_run_is_silent(seed: int, constant_lr: bool):
    assert warnings(transformer_run(seed=seed, constant_lr=constant_lr), "base") == []


def test_the_flat_end_of_a_cosine_is_no_plateau():
    def flat(step: int, line: Line) -> None:
        if "loss" in line:
            line["loss"] = 3 + max(0, 1 - step / 15_000)

    assert warnings(transformer_run(flat), "base") == []


def test_warm_up_and_noise_are_no_news():
    """Large gradients while lr rises, and a PSNR so noisy that its best means nothing."""

    def warming(step: int, line: Line) -> None:
        if "grad_norm" in line and step <= 1000:
            line["grad_norm"] = 20.0

    assert warnings(tokenizer_run(warming)) == []

    noise = (3 * torch.randn(1000)).tolist()
    wild = [dict(step=10 * i, psnr=22 + value) for i, value in enumerate(noise)]
    assert warnings(wild) == []


def test_while_the_window_is_not_full_the_codebook_is_not_judged():
    lines = [dict(step=50 * i, codebook_usage=0.1, codebook_perplexity=9.0) for i in range(60)]
    health = Health("vae", codebook_size=CODES)
    assert not any(health.see(line, codes_full=False) for line in lines)
    assert warnings(lines, codebook_size=None) == []
    assert len(warnings(lines)) == 1


def test_lines_without_figures():
    health = Health("vae", codebook_size=CODES, max_grad_norm=1)
    for step in range(100):
        assert health.see({"step": step, "loss": None, "psnr": None, "grad_norm": None}) == []
        assert health.see({"step": step, "loss": math.nan, "grad_norm": math.inf}) == []


# One illness, one warning ------------------------------------------------------------------------


def only(found: list[tuple[int, str]], *words: str) -> int:
    """The step of the one warning there is, which contains these words."""
    assert len(found) == 1, found
    step, text = found[0]
    assert all(word in text for word in words), text
    assert len(text) < 400
    assert ": " in text  # what was measured: what it means ...
    assert ";" in text or "gan_weight" in text  # ... and what to do
    return step


def test_unused_codes():
    def collapse(step: int, line: Line) -> None:
        if "codebook_usage" in line:
            line["codebook_usage"] = max(0.09, 0.9 * math.exp(-step / 4000))
            line["codebook_perplexity"] = CODES * line["codebook_usage"] / 2

    found = warnings(tokenizer_run(collapse), quantizer="fsq")
    # said when it had long been below a half, and again when it had halved, not at every line
    shares = [int(text.partition(" % of the codes are in use: ")[0]) for _, text in found]
    assert 40 <= shares[0] <= 49
    assert shares[1:] == [shares[0] // 2, shares[0] // 4]
    assert "10 bits" in found[-1][1]
    assert "quantizer=simvq" in found[-1][1]
    assert "fsq or" not in found[-1][1]


def test_one_code_takes_all():
    def lopsided(step: int, line: Line) -> None:
        if "codebook_perplexity" in line and step > 5000:
            line["codebook_perplexity"] = 12.0

    assert 5000 < only(warnings(tokenizer_run(lopsided)), "a few", "perplexity 12 of 1,024") < 6000


def test_the_discriminator_wins():
    def winning(step: int, line: Line) -> None:
        if "generator" in line and step > 13_000:
            line["discriminator_accuracy"] = 0.99
            line["generator"] = 1.0 + (step - 13_000) / 5000
            line["discriminator"] = 0.05

    step = only(warnings(tokenizer_run(winning)), "the discriminator wins", "99%")
    assert 13_000 < step < 14_000


def test_a_winning_discriminator_whose_gradient_teaches_is_no_news():
    def teaching(step: int, line: Line) -> None:
        if "generator" in line:
            line["discriminator_accuracy"] = 0.97
            line["generator"] = 2 - (step - 10_000) / 5000

    assert warnings(tokenizer_run(teaching)) == []


@pytest.mark.parametrize(("loss", "idle"), [(1.0, 1.0), (math.log(2), math.log(2))])
def test_the_discriminator_sleeps(loss: float, idle: float):
    def asleep(step: int, line: Line) -> None:
        if "generator" in line:
            line["discriminator_accuracy"] = 0.5
            line["discriminator"] = loss
            line["generator"] = 0.0

    found = warnings(tokenizer_run(asleep), idle_loss=idle)
    assert 10_500 <= only(found, "the discriminator sleeps", "chance", f"{loss:.3g}") < 12_000


def test_the_adversary_ruins_the_reconstruction():
    def ruin(step: int, line: Line) -> None:
        for name in line.keys() & {"psnr", "valid_psnr"}:
            line[name] -= 3 * min(1.0, max(0, step - 10_000) / 2000)

    step = only(warnings(tokenizer_run(ruin)), "since the discriminator started at step 10,0")
    assert 10_500 < step < 12_500


def test_the_reconstruction_falls_for_another_reason():
    def fall(step: int, line: Line) -> None:
        for name in line.keys() & {"psnr", "valid_psnr"}:
            line[name] -= 6 * (step > 5000)

    found = warnings(tokenizer_run(fall))
    assert 5000 < only(found[:1], "become worse since step", "checkpoint") < 6000
    assert all("become worse" in text for _, text in found)  # again when the fall had doubled


def test_gradients_always_cut():
    def steep(step: int, line: Line) -> None:
        if "grad_norm" in line and step > 4000:
            line["grad_norm"] *= 8

    step = only(warnings(tokenizer_run(steep)), "max_grad_norm=1 ", "cut")
    assert 4000 < step <= 7000
    assert warnings(tokenizer_run(steep), max_grad_norm=0) == []  # no limit, nothing cut


@pytest.mark.parametrize(
    "workers, wait, remedy",
    [(0, 0.75, "set num_workers=3"), (2, 0.5, "set num_workers=4"), (0, 0.95, "muse cache")],
)
def test_the_loader_is_the_limit(
    monkeypatch: pytest.MonkeyPatch, workers: int, wait: float, remedy: str
):
    """Of three seconds of loading to one of work, three processes keep up; of 19 eight do not."""
    monkeypatch.setattr("muse_maskgit_pytorch.watching.health.cores", lambda: 8)

    def waiting(step: int, line: Line) -> None:
        if "data_wait" in line and step > 1000:
            line["data_wait"] = wait

    found = warnings(transformer_run(waiting), "base", workers=workers)
    assert only(found, "the loader is the limit", f"{wait:.0%} of the time", remedy) < 1500


def test_a_validation_too_good_to_be_true():
    def leaking(step: int, line: Line) -> None:
        if "valid_nats_100" in line and step > 5000:
            line |= dict(valid_nats_100=0.05, valid_accuracy_100=0.99)
            line |= dict(valid_nats_other_captions=4.0)

    found = warnings(transformer_run(leaking), "base")
    assert only(found, "too good to be true", "99%", "muse data check") == 8000  # the third


def test_a_transformer_that_learns_nothing():
    def noise(step: int, line: Line) -> None:
        if "valid_nats_25" in line:
            line |= dict(valid_nats_25=6.9, valid_nats_100=6.9, valid_nats_other_captions=7.0)

    assert only(warnings(transformer_run(noise), "base"), "nothing is learnt", "6.9") == 3000


def test_captions_without_effect():
    def deaf(step: int, line: Line) -> None:
        if "valid_nats_100" in line:
            line["valid_nats_other_captions"] = line["valid_nats_100"] * 1.0002

    found = warnings(transformer_run(deaf), "base")
    assert only(found, "captions have no effect", "cond_drop_prob") == 3000
    without = [
        {name: value for name, value in line.items() if name != "valid_nats_other_captions"}
        for line in transformer_run(deaf)
    ]
    assert warnings(without, "superres") == []


def test_samples_of_one_colour():
    def grey(step: int, line: Line) -> None:
        if "drawn_contrast" in line:
            line["drawn_contrast"] = 0.01

    found = warnings(transformer_run(grey), "base")
    assert only(found, "samples are of one colour", "3%", "cond_scale") == 2000

    def plain(step: int, line: Line) -> None:  # so are the images
        if "drawn_contrast" in line:
            line |= dict(drawn_contrast=0.0, real_contrast=0.01)

    assert warnings(transformer_run(plain), "base") == []


def test_skipped_steps():
    def guard(step: int, line: Line) -> None:
        if "skipped_steps" in line:
            line["skipped_steps"] = max(0, min(9, (step - 7000) // 50))

    found = warnings(transformer_run(guard), "superres")
    skipped = [text.split(" left out")[0] for _, text in found if "left out" in text]
    assert skipped == ["1 step", "2 steps", "4 steps", "8 steps"]
    assert len(found) == len(skipped)


def test_counters_of_before_a_resume_are_no_news():
    curves = {"skipped_steps": [(100, 5.0)]}
    health = Health("vae", history=curves)
    assert health.see({"step": 150, "skipped_steps": 5}) == []
    assert len(health.see({"step": 200, "skipped_steps": 6})) == 1
    fresh = Health("vae", history=curves)  # a trainer that counts anew
    assert fresh.see({"step": 150, "skipped_steps": 0}) == []
    assert len(fresh.see({"step": 150, "skipped_steps": 1})) == 1


def test_a_plateau():
    def flat(step: int, line: Line) -> None:
        if "loss" in line:
            clean = 2.8 + 4 * math.exp(-step / 2000) + 8 * step**-0.3
            line["loss"] = 3.2 + 4 * max(0, 1 - step / 10_000) + (line["loss"] - clean) / 2

    found = warnings(transformer_run(flat, constant_lr=True), "base")
    assert 15_000 < only(found, "has not fallen since step", "3.2") < 30_000


def test_overfitting():
    def by_heart(step: int, line: Line) -> None:
        if "valid_psnr" in line and step > 12_000:
            line["valid_psnr"] = 26 - (step - 12_000) / 4000
        if "psnr" in line:
            line["psnr"] = 20 + step / 2500

    found = warnings(tokenizer_run(by_heart, gan_start=10**9))
    words = ("validation PSNR", "of 1,000 images", "by heart")
    assert 12_500 < only(found[:1], *words) < 16_000
    assert all("by heart" in text for _, text in found)

    def transformer_by_heart(step: int, line: Line) -> None:
        if "valid_loss" in line and step > 15_000:
            line["valid_loss"] = 3.4 + (step - 15_000) / 20_000
        if "loss" in line:
            line["loss"] -= 0.8 * step / 30_000

    found = warnings(transformer_run(transformer_by_heart), "base")
    only(found[:1], "validation loss", "by heart")


@pytest.mark.parametrize("lines", [1, 20])  # of training, to a validation
def test_overfitting_is_named_after_the_second_worse_validation(lines: int):
    def run(*valid: float, fall: float = 0.2) -> list[int]:
        history: list[Line] = [dict(step=1, loss=9.0)]
        for number, value in enumerate(valid):
            for i in range(lines):
                step = 1000 * number + 1000 * (i + 1) // lines
                history.append(dict(step=step, loss=4 - fall * step / 1000))
            history.append(dict(step=1000 * (number + 1), valid_loss=value))
        return [step for step, _ in warnings(history, "base")]

    assert run(4.0, 3.7, 3.6, 3.65, 3.8, 3.9) == [5000]
    assert run(4.0, 3.7, 3.6, 3.8, 3.7, 3.6) == []  # it has come back
    assert run(4.0, 3.7, 3.6, 3.61, 3.62) == []  # too little to tell
    assert run(4.0, 3.7, 3.6, 3.65, 3.8, 3.9, fall=0.0) == []  # training does not improve either


# Saying it once ----------------------------------------------------------------------------------


def test_a_warning_comes_again_after_it_had_gone():
    def asleep_twice(step: int, line: Line) -> None:
        if "generator" in line and (step < 13_000 or step > 16_000):
            line["discriminator_accuracy"], line["discriminator"] = 0.5, 1.0

    found = warnings(tokenizer_run(asleep_twice))
    assert len(found) == 2
    assert found[0][1] == found[1][1]
    assert found[1][0] > 16_000


def test_a_resumed_run_judges_by_the_whole_history():
    """What an uninterrupted run would say after the interruption, a resumed one says."""

    def fall(step: int, line: Line) -> None:
        if "psnr" in line:
            line["psnr"] -= 5 * (step > 15_000)

    history = tokenizer_run(fall)
    cut = next(i for i, line in enumerate(history) if line["step"] == 14_000)
    curves: dict = {}
    for line in history[: cut + 20]:  # the log reaches beyond the checkpoint
        add_line(curves, line)
    resumed = Health("vae", history=curves, max_grad_norm=1.0, codebook_size=CODES, images=1000)
    later = [(int(line["step"]), text) for line in history[cut:] for text in resumed.see(line)]
    assert later == warnings(history)
    assert "become worse" in later[0][1]


def test_lines_that_come_again_replace_what_was():
    curves: dict = {}
    for step, value in ((10, 1.0), (20, 2.0), (30, 3.0), (20, 5.0)):
        add_line(curves, {"stage": "vae", "step": step, "loss": value, "psnr": None})
    assert curves == {"loss": [(10, 1.0), (20, 5.0)]}
