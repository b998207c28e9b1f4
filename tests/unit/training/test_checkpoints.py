"""Checkpoints and resume."""

from __future__ import annotations

import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import (
    CheckpointError,
    MaskGit,
    MaskGitTrainer,
    VQGanVAE,
    VQGanVAETrainer,
)
from muse_maskgit_pytorch.checkpoint import load_tree, save_tree
from muse_maskgit_pytorch.training.checkpoints import Checkpoints
from tests.runs import (
    assert_same,
    checkpoints,
    first_weight,
    interrupt,
    last_checkpoint,
    last_state,
    make_maskgit,
    make_vae,
    maskgit_trainer,
    snapshot,
    vae_trainer,
)


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_an_interrupted_tokenizer_run_ends_as_an_unbroken_one(
    images: Path, tmp_path: Path, resnet: str, quantizer: str
):
    def trainer(name: str, seed: int, **changes: Any) -> VQGanVAETrainer:
        vae = make_vae(seed, quantizer=quantizer)
        return vae_trainer(
            images, tmp_path / name, vae, num_train_steps=6, gan_weight=0.1, gan_start=1,
            gradient_penalty_weight=1.0, perceptual_weight=0.1, perceptual_model=resnet, **changes,
        )  # fmt: skip

    trainer("unbroken", 0).train()
    torch.manual_seed(0)
    interrupt(trainer("broken", 0), step=3)
    assert last_checkpoint(tmp_path / "broken")["step"] == 3
    trainer("broken", seed=1, resume=True).train()
    assert_same(last_state(tmp_path / "broken"), last_state(tmp_path / "unbroken"))
    assert_same(
        load_tree(tmp_path / "broken" / "vae-ema.safetensors")[0]["state"],
        load_tree(tmp_path / "unbroken" / "vae-ema.safetensors")[0]["state"],
    )


@pytest.mark.parametrize("cached", [True, False])
def test_an_interrupted_transformer_run_ends_as_an_unbroken_one(
    images: Path, tmp_path: Path, t5: str, cached: bool
):
    def trainer(name: str, seed: int, **changes: Any) -> MaskGitTrainer:
        maskgit = make_maskgit(t5, seed, critic=True)
        changes |= dict(cache_tokens=cached, num_train_steps=6, grad_accum_every=2)
        return maskgit_trainer(images, tmp_path / name, maskgit, **changes)

    trainer("unbroken", 0).train()
    interrupt(trainer("broken", 0), step=3)
    trainer("broken", seed=1, resume=True).train()
    whole = last_state(tmp_path / "unbroken")
    assert_same(last_state(tmp_path / "broken"), whole)
    assert whole["step"] == 6
    steps = {float(s["step"]) for s in whole["optimizers"]["model"].values()}
    assert steps == {6.0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_saves(images: Path, tmp_path: Path, number: int):
    before = signal.getsignal(number)
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=9)
    interrupt(trainer, step=2, number=number)
    assert trainer.step == 2
    assert last_checkpoint(tmp_path / "r")["step"] == 2
    assert signal.getsignal(number) is before


def test_resuming_a_finished_run_changes_nothing(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    before = load_tree(results / "vae.safetensors")[0]
    vae_trainer(images, results, make_vae(1), resume=True).train()
    assert_same(load_tree(results / "vae.safetensors")[0], before)


def test_a_folder_with_a_run_is_refused_and_left_alone(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    before = snapshot(results)
    with pytest.raises(CheckpointError, match="resume=True") as caught:
        vae_trainer(images, results).train()
    assert "\n" not in str(caught.value)
    assert snapshot(results) == before


@pytest.mark.parametrize(
    "other", [dict(dim=12), dict(quantizer="fsq"), dict(num_res_blocks=2), dict(layers=1)]
)
def test_a_checkpoint_of_another_model_is_refused(
    images: Path, tmp_path: Path, other: dict[str, Any]
):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    before = snapshot(results)
    vae = make_vae(**other)
    weights = {k: v.clone() for k, v in vae.state_dict().items()}
    with pytest.raises(CheckpointError, match="another model"):
        vae_trainer(images, results, vae, resume=True).train()
    assert snapshot(results) == before
    assert_same(dict(vae.state_dict()), weights)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_names_the_next_good_one(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    settings: dict[str, Any] = dict(num_train_steps=4, save_every=1, keep_checkpoints=3)
    vae_trainer(images, results, **settings).train()
    third, second = (results / f"vae-checkpoint-0000000{step}.safetensors" for step in (4, 3))
    halve(third)
    halve(second)
    with pytest.raises(CheckpointError, match=third.name) as caught:
        vae_trainer(images, results, resume=True, **settings).train()
    assert "next good one, vae-checkpoint-00000002.safetensors, move it" in str(caught.value)
    for path in (third, second):
        path.rename(tmp_path / path.name)  # as it says
    vae_trainer(images, results, resume=True, **settings).train()
    assert checkpoints(results) == [2, 3, 4]

    for path in results.glob("*checkpoint*"):
        halve(path)
    with pytest.raises(CheckpointError, match="no other to go on from"):
        vae_trainer(images, results, resume=True, **settings).train()


def change(path: Path, names: list[str], value: Any) -> None:
    """Put a value into a checkpoint's tree; Ellipsis takes out what is there."""
    tree, kind = load_tree(path)
    *outer, last = names
    inner = tree
    for name in outer:
        inner = inner[name]
    inner.pop(last) if value is ... else inner.update({last: value})
    save_tree(path, tree, kind)


NONSENSE: list[tuple[list[str], Any, str]] = [
    (["step"], ..., "step must be a whole number, not None"),
    (["samples"], -1, "samples must be at least 0"),
    (["frozen"], 3, "frozen must be a string"),
    (["written"], {}, "written must be a list"),
    (["modules", "vae"], {}, "is missing there"),
    (["modules", "vae", "encoder.0.weight"], torch.full((16, 3, 3, 3), math.nan), "not finite"),
    (["ema"], {}, "does not fit these averages"),
    (["ema", "encoder.0.weight"], torch.zeros(1), "does not fit these averages"),
    (["guard", "allows"], 3, "allows"),
    (["guard", "restarts"], -40, "restarts must be"),
    (["guard", "_average"], {"vae": "1"}, "_average"),
    (["optimizers"], {}, "holds what cannot be used"),
    (["optimizers", "vae", "encoder.0.weight", "exp_avg"], torch.zeros(2), "exp_avg of encoder"),
    (["optimizers", "vae", "encoder.0.weight", "exp_avg"], 3, "holds what cannot be used"),
    (["windows", "usage", "old"], torch.zeros(2, dtype=torch.long), "another codebook"),
    (["windows", "interval"], [{"names": ["a"], "sums": torch.zeros(2, 2)}], "one for each"),
    (["config"], [], "config must be a dict"),
]  # fmt: skip


def test_a_checkpoint_of_nonsense_is_refused(images: Path, tmp_path: Path):
    """Whatever in it is not as a run leaves it, the error has its path."""
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    [path] = results.glob("*checkpoint*")
    good = path.read_bytes()
    for names, value, said in NONSENSE:
        path.write_bytes(good)
        change(path, names, value)
        with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
            vae_trainer(images, results, resume=True, num_train_steps=3).train()
        assert str(path) in str(caught.value)


def test_a_compiled_part_leaves_no_trace_in_a_run(images: Path, tmp_path: Path):
    """Its checkpoints and models are those of the bare one, which may go on from them."""

    def trainer(name: str, compiled: bool, **changes: Any) -> VQGanVAETrainer:
        vae: Any = make_vae()
        changes = {"num_train_steps": 4} | changes
        if compiled:
            vae.decoder[0] = torch.compile(vae.decoder[0], backend="eager")
            vae.encoder = torch.compile(vae.encoder, backend="eager")
        return vae_trainer(images, tmp_path / name, vae, **changes)

    trainer("bare", False).train()
    interrupt(trainer("compiled", True), step=2)
    trainer("compiled", False, resume=True, num_train_steps=3).train()
    trainer("compiled", True, resume=True).train()
    assert_same(last_state(tmp_path / "compiled"), last_state(tmp_path / "bare"))
    models = [
        (tmp_path / name / "vae-ema.safetensors").read_bytes() for name in ("compiled", "bare")
    ]
    assert models[0] == models[1]


def test_the_step_decides_which_checkpoint_is_newest(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Copies of a user's have any name: they are mentioned, and stay."""
    results = tmp_path / "r"
    interrupt(vae_trainer(images, results, num_train_steps=6), step=3)
    content = next(results.glob("*checkpoint*")).read_bytes()
    copies = ["00000099", "0000000000000000004", "best", "9", "00000003 (1)"]
    names = sorted(f"vae-checkpoint-{copy}.safetensors" for copy in copies)
    for name in names:
        (results / name).write_bytes(content)
    interrupt(vae_trainer(images, results, num_train_steps=6, resume=True), step=5)
    printed = capsys.readouterr().out
    assert "going on from step 3 of 6" in printed
    assert f"did not name it so: {', '.join(names)}" in printed
    assert last_step(results) == 5
    assert all((results / name).read_bytes() == content for name in names)


def last_step(results: Path) -> int:
    newest = Checkpoints(results, "vae", "VQGanVAETrainer checkpoint", 1).newest()
    assert newest is not None
    return load_tree(newest)[0]["step"]


def test_the_run_keeps_its_last_checkpoints_and_removes_nothing_else(images: Path, tmp_path: Path):
    """What it wrote before a resume counts; a checkpoint of another run is not its to delete."""
    results = tmp_path / "r"
    settings: dict[str, Any] = dict(num_train_steps=9, save_every=2, keep_checkpoints=2)
    interrupt(vae_trainer(images, results, **settings), step=5)
    assert checkpoints(results) == [4, 5]
    (results / "mine.safetensors").write_bytes(b"mine")
    (results / "vae-checkpoint-notes.txt").write_text("mine")
    (results / "vae-checkpoint-00000003.safetensors").write_bytes(b"another run's")
    (results / "base-checkpoint-00000002.safetensors").write_bytes(b"another stage's")
    vae_trainer(images, results, resume=True, **settings).train()
    left = sorted(path.name for path in results.iterdir() if path.is_file())
    assert left == [
        "base-checkpoint-00000002.safetensors",
        "metrics.jsonl",
        "mine.safetensors",
        "report.html",
        "vae-best.safetensors",
        "vae-checkpoint-00000003.safetensors",
        "vae-checkpoint-00000008.safetensors",
        "vae-checkpoint-00000009.safetensors",
        "vae-checkpoint-notes.txt",
        "vae-ema.safetensors",
        "vae-run.json",
        "vae.safetensors",
    ]


def test_a_stopped_run_leaves_weights(images: Path, tmp_path: Path):
    """At the end, after a stop, and beside every checkpoint: always those of the same step."""
    results, seen = tmp_path / "r", []
    trainer = vae_trainer(images, results, num_train_steps=9, save_every=2)
    train_step = trainer.train_step

    def looking(batches: Any) -> Any:
        if trainer.step == 2:
            seen.append(VQGanVAE.from_pretrained(results / "vae.safetensors"))
            assert_same(dict(seen[0].state_dict()), dict(trainer.vae.state_dict()))
        return train_step(batches)

    trainer.train_step = looking  # type: ignore[method-assign]
    interrupt(trainer, step=5)
    assert len(seen) == 1
    for name, state in (("vae", trainer.vae.state_dict()), ("vae-ema", trainer.ema.average)):
        model = VQGanVAE.from_pretrained(results / f"{name}.safetensors")
        assert_same(dict(model.state_dict()), dict(state))


def test_the_best_weights_stay_beside_the_newest(images: Path, tmp_path: Path):
    """Best is judged over the whole run, also where it was resumed."""
    settings: dict[str, Any] = dict(num_train_steps=6, sample_every=1, valid_fraction=0.3)
    figures, kept = iter([1.0, 3.0, 2.0, 2.5, 4.0, math.nan]), {}

    def judged(**changes: Any) -> VQGanVAETrainer:
        trainer = vae_trainer(images, tmp_path / "r", **settings, **changes)

        def validate(loader: Any) -> dict[str, float]:
            kept[trainer.step] = {k: v.clone() for k, v in trainer.vae.state_dict().items()}
            return {"psnr": next(figures)}

        trainer.validate = validate  # type: ignore[method-assign]
        return trainer

    def best() -> dict[str, Any]:
        path = tmp_path / "r" / "vae-best.safetensors"
        return dict(VQGanVAE.from_pretrained(path).state_dict())

    interrupt(judged(), step=3)
    assert_same(best(), kept[2])
    interrupt(judged(resume=True), step=4)
    assert_same(best(), kept[2])  # 2.5 is better than what this life has seen, not than 3
    judged(resume=True).train()
    assert_same(best(), kept[5])


def test_saved_weights_load_as_models(images: Path, tmp_path: Path, t5: str):
    vae_results, results = tmp_path / "vae", tmp_path / "base"
    trainer = vae_trainer(images, vae_results)
    trainer.train()
    averaged = VQGanVAE.from_pretrained(vae_results / "vae-ema.safetensors")
    assert_same(dict(averaged.state_dict()), dict(trainer.ema.average))
    raw = VQGanVAE.from_pretrained(vae_results / "vae.safetensors")
    assert_same(dict(raw.state_dict()), dict(trainer.vae.state_dict()))
    assert not torch.equal(first_weight(raw), first_weight(averaged))
    make_vae(3).load(vae_results / "vae-ema.safetensors")

    maskgit = make_maskgit(t5)
    trainer = maskgit_trainer(images, results, maskgit)
    trainer.train()
    averaged = MaskGit.from_pretrained(results / "base-ema.safetensors")
    for name, value in trainer.ema.average.items():
        assert torch.equal(averaged.state_dict()[name], value)
    assert not any(name.startswith("vae.") for name in trainer.ema.average)
