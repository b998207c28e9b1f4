"""Averages chosen after a training: of any length from its snapshots, and over saved models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import CheckpointError, MaskGit, MaskGitTrainer
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.testing import maskgit
from muse_maskgit_pytorch.training.averages import (
    offline_average,
    posthoc_average,
    profile_weights,
)
from muse_maskgit_pytorch.training.checkpoints import KEPT, Snapshots
from muse_maskgit_pytorch.training.ema import EMA, gamma_of, power
from tests.runs import assert_same, interrupt, make_maskgit, maskgit_trainer, metrics, poison


def test_the_lengths_are_the_papers():
    """Karras et al. 2024, section 3.1: 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(12**-0.5) == pytest.approx(0, abs=1e-6)
    for length in (0, 0.3, -1, math.nan):
        with pytest.raises(ValueError, match="length of an average"):
            gamma_of(length)


@pytest.mark.parametrize("length", [*KEPT, 12**-0.5])
def test_the_average_has_the_powers_profile(length: float):
    weight = torch.zeros((), dtype=torch.float64)
    ema = EMA({"w": weight}, {"w"}, power(length))
    values = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step, value in enumerate(values, 1):
        weight.copy_(value)
        ema.update(step)
    ends = (torch.arange(31, dtype=torch.float64) / 30) ** (gamma_of(length) + 1)
    assert torch.allclose(ema.average["w"], (ends.diff() * values).sum())


@pytest.mark.parametrize("length", [0.03, 0.05, 0.08, 0.1, 0.15, 0.25])
def test_an_average_of_another_length_is_reconstructed(length: float):
    """Against the one that was tracked: from 20 snapshots of a random walk of 1,000 numbers."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(1000, generator=draw, dtype=torch.float64)
    kept = {of: EMA({"w": weight}, {"w"}, power(of)) for of in KEPT}
    tracked = EMA({"w": weight}, {"w"}, power(length))
    snapshots = {}
    for step in range(1, 401):
        weight.add_(torch.randn(1000, generator=draw, dtype=torch.float64))
        for ema in (*kept.values(), tracked):
            ema.update(step)
        if step % 20 == 0:
            snapshots |= {(step, of): ema.average["w"].clone() for of, ema in kept.items()}
    weights, error = profile_weights(list(snapshots), 400, length)
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    made = sum(share * value for share, value in zip(weights, snapshots.values(), strict=True))
    apart = float((made - tracked.average["w"]).norm() / (weight - tracked.average["w"]).norm())
    if length in KEPT:
        assert max(weights) == pytest.approx(1, abs=1e-6)
        assert apart < 1e-6
        assert error < 1e-6
    else:
        assert apart < 0.02
        assert error < 0.07


def test_weights_are_the_least_squares():
    """No other weights that sum to 1 make a profile nearer to the wanted one."""
    kept = [(step, of) for step in (50, 80, 100) for of in KEPT]
    found, error = profile_weights(kept, 100, 0.13)
    x = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000

    def profile(step: int, length: float) -> torch.Tensor:
        end, gamma = step / 100, gamma_of(length)
        return torch.where(x < end, (gamma + 1) * x**gamma / end ** (gamma + 1), 0)

    wanted, profiles = profile(100, 0.13), torch.stack([profile(*one) for one in kept])

    def distance(weights: torch.Tensor) -> float:
        return float((weights @ profiles - wanted).norm() / wanted.norm())

    best = torch.tensor(found, dtype=torch.float64)
    assert distance(best) == pytest.approx(error, rel=1e-3)
    for i in range(len(kept)):
        for j in range(i):
            other = best.clone()
            other[i], other[j] = other[i] + 0.02, other[j] - 0.02
            assert distance(other) > distance(best)


@pytest.fixture
def trainer(images: Path, tmp_path: Path, t5: str):
    def make(name: str, seed: int = 0, **changes: Any) -> MaskGitTrainer:
        changes = dict(num_train_steps=7, posthoc_every=2, save_every=4) | changes
        return maskgit_trainer(images, tmp_path / name, make_maskgit(t5, seed), **changes)

    return make


def snapshots_of(folder: Path) -> dict[int, bytes]:
    return {step: path.read_bytes() for step, path in Snapshots(folder, "base").found().items()}


def test_snapshots_outlive_checkpoints_and_a_broken_run(trainer, tmp_path: Path, capsys):
    trainer("whole", keep_checkpoints=1).train()
    whole = snapshots_of(tmp_path / "whole")
    assert list(whole) == [2, 4, 6, 7]
    interrupt(trainer("broken"), step=5)
    # as a process would leave it that was killed beyond its last checkpoint, on another way
    Snapshots(tmp_path / "broken", "base").write(6, {"0.05": {"w": torch.zeros(1)}}, {"w"})
    trainer("broken", seed=1, resume=True).train()
    assert snapshots_of(tmp_path / "broken") == whole
    kept, error = posthoc_average(tmp_path / "whole", 0.1)
    assert error < 1e-6
    for name, value in (
        Snapshots(tmp_path / "whole", "base")
        .read(tmp_path / "whole" / "base-snapshot-00000007.safetensors")[0][0.1]
        .items()
    ):
        assert torch.allclose(kept.state_dict()[name], value, rtol=1e-6, atol=1e-8), name
    out = tmp_path / "average.safetensors"
    main(["average", str(tmp_path / "whole"), "--length", "0.08", "--out", str(out)])
    assert "length 0.08, to within" in capsys.readouterr().out
    made, raw = (MaskGit.from_pretrained(p) for p in (out, tmp_path / "whole/base.safetensors"))
    assert made.generate(["an owl"], seeds=[0]).shape == (1, 3, 16, 16)
    assert_same(dict(made.vae.state_dict()), dict(raw.vae.state_dict()))


def test_snapshots_of_a_run_that_returned_are_those_of_the_way_it_took(trainer, tmp_path: Path):
    """A snapshot of steps that are taken back is written anew; a resume gives the same.

    After the return: a stop before it leaves a checkpoint to which the run would return instead.
    """

    def made(name: str, **changes: Any) -> MaskGitTrainer:
        run = trainer(name, num_train_steps=9, max_skips=2, **changes)
        poison(run, {5: math.nan, 6: math.nan})
        return run

    written: list[tuple[int, bytes]] = []
    first = made("whole")
    original = Snapshots.write

    def seeing(self: Snapshots, step: int, *rest: Any) -> None:
        original(self, step, *rest)
        written.append((step, self.found()[step].read_bytes()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshots, "write", seeing)
        first.train()
    whole = snapshots_of(tmp_path / "whole")
    assert [step for step, _ in written] == [2, 4, 6, 6, 8, 9]
    assert written[2][1] != written[3][1]  # before the return, and after it
    assert whole == dict(written)
    assert first.guard.restarts == 1
    for stop in (7, 8):  # between two checkpoints, and at one
        name = f"broken{stop}"
        interrupt(made(name), step=stop)
        made(name, seed=1, resume=True).train()
        assert snapshots_of(tmp_path / name) == whole, stop
        assert sum("warning" in line for line in metrics(tmp_path / name)) >= 1


def test_snapshots_that_cannot_be_averaged(trainer, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no snapshots"):
        posthoc_average(tmp_path, 0.1)
    trainer("run", num_train_steps=2, posthoc_every=0).train()
    with pytest.raises(CheckpointError, match="begun without posthoc_every"):
        trainer("run", resume=True).train()
    trainer("other", num_train_steps=2).train()
    with pytest.raises(ValueError, match="stage must be one of base, not 'vae'"):
        posthoc_average(tmp_path / "other", 0.1, "vae")
    Snapshots(tmp_path / "other", "base").write(1, {str(of): {} for of in KEPT}, ())
    with pytest.raises(
        CheckpointError, match=r"does not fit base-snapshot-00000002.*missing there"
    ):
        posthoc_average(tmp_path / "other", 0.1)
    first, last = Snapshots(tmp_path / "other", "base").found().values()
    last.replace(first)
    with pytest.raises(CheckpointError, match="is of step 2: give it its own name"):
        posthoc_average(tmp_path / "other", 0.1)
    for path in (tmp_path / "other").glob("base-checkpoint-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"already holds a run .*snapshot"):
        trainer("other").train()


def saved(folder: Path, **changes: Any) -> list[Path]:
    """Three models that differ in all weights of the transformer."""
    model, paths = maskgit(**changes), []
    for place in range(3):
        with torch.no_grad():
            for p in model.transformer.parameters():
                p.fill_(10.0**place)
        paths.append(model.save(folder / f"{place}.safetensors"))
    return paths


@pytest.mark.parametrize(
    ("decay", "expected"), [(None, 111 / 3), (0.5, 52.75), (0.0, 100.0), (0.7, 32.59)]
)
def test_the_average_over_files(tmp_path: Path, decay: float | None, expected: float):
    paths = saved(tmp_path)
    made: Any = offline_average(paths, decay)
    for name, value in made.transformer.named_parameters():
        assert torch.allclose(value, torch.tensor(expected)), name
    assert_same(
        dict(made.vae.state_dict()), dict(MaskGit.from_pretrained(paths[0]).vae.state_dict())
    )


def test_the_average_over_a_runs_checkpoints(trainer, tmp_path: Path):
    trainer("run", num_train_steps=4, save_every=2, posthoc_every=0).train()
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    names = [str(run / f"base-checkpoint-{step:08d}.safetensors") for step in (2, 4)]
    main(["average", *names, "--decay", "uniform", "--out", str(out)])
    made, last = MaskGit.from_pretrained(out), MaskGit.from_pretrained(run / "base.safetensors")
    assert not torch.equal(made.transformer.to_logits.weight, last.transformer.to_logits.weight)
    same = offline_average([names[1], run / "base.safetensors"])
    assert_same(dict(same.state_dict()), dict(last.state_dict()))


def test_files_that_cannot_be_averaged(tmp_path: Path, capsys):
    paths = saved(tmp_path)
    with pytest.raises(ValueError, match="at least two files"):
        offline_average(paths[:1])
    with pytest.raises(ValueError, match="decay must be in"):
        offline_average(paths, 1.0)
    other = maskgit(label_smoothing=0.3).save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"of another model than .* average files of one"):
        offline_average([*paths, other])
    tokenizer = maskgit().vae.save(tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="kind is"):
        offline_average([paths[0], tokenizer])
    for argv, message in (
        ([str(paths[0]), "--stage", "base"], "--stage is of a run"),
        ([*map(str, paths), "--length", "0.1"], "--length is of one run"),
    ):
        assert main(["average", *argv, "--out", str(tmp_path / "out.safetensors")]) == 2
        assert message in capsys.readouterr().err
