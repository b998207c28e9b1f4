"""What a run says of how it was made, and what a resume says of what is other now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import muse_maskgit_pytorch as muse
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.watching.run_file import RunFile, changes_in_words
from tests.runs import (
    GAN,
    interrupt,
    last_checkpoint,
    logged,
    make_maskgit,
    make_vae,
    maskgit_trainer,
    metrics,
    snapshot,
    vae_trainer,
)


def described(results: Path, stage: str = "vae") -> dict[str, Any]:
    return json.loads((results / f"{stage}-run.json").read_text())


def test_the_folder_says_how_the_run_was_made(images: Path, tmp_path: Path, t5: str):
    interrupt(vae_trainer(images, tmp_path, lr=np.float32(0.5), num_train_steps=9, **GAN), step=1)
    run = described(tmp_path)
    assert run["stage"] == "vae"
    assert run["settings"]["lr"] == 0.5
    assert run["settings"]["betas"] == [0.9, 0.99]  # the subclass's default
    assert run["settings"]["perceptual_model"] == "microsoft/resnet-50"
    assert run["settings"]["grad_accum_every"] == 1
    assert run["model"]["config"]["dim"] == 8
    assert run["data"]["source"] == f"image folder {str(images)!r}"
    assert run["data"]["items"] == 7
    assert run["data"]["held_back"] == 1
    assert run["versions"]["torch"] == torch.__version__
    assert run["device"]["processes"] == 1
    vae = make_vae()
    trained = run["parameters"]["trained"]
    assert trained["encoder"] == sum(p.numel() for p in vae.encoder.parameters())
    assert trained.keys() >= {"encoder", "decoder", "discriminator"}
    assert run["parameters"]["frozen"] == {}
    assert [sitting["step"] for sitting in run["sittings"]] == [0]

    maskgit = make_maskgit(t5)
    maskgit_trainer(images, tmp_path, maskgit, num_train_steps=1).train()
    run = described(tmp_path, "base")
    assert run["settings"]["part"] == "all"
    assert run["parameters"]["frozen"] == {"vae": sum(p.numel() for p in maskgit.vae.parameters())}


def test_it_is_there_before_the_first_step(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path)
    train_step = trainer.train_step

    def looking(batches: Any) -> Any:
        assert described(tmp_path)["data"]["items"] == 7
        return train_step(batches)

    trainer.train_step = looking  # type: ignore[method-assign]
    trainer.train()


def test_a_recipe_is_kept_whole(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    arguments = [
        "--vae.dim=8",
        "--vae.layers=2",
        "--vae.num_res_blocks=1",
        "--vae.codebook_size=16",
    ]
    settings = dict(folder=images, results_folder=results, image_size=16, num_train_steps=1,
                    batch_size=2, perceptual_weight=0, gan_weight=0)  # fmt: skip
    arguments += [f"--trainer.{name}={value}" for name, value in settings.items()]
    assert main(["train", "vae", *arguments]) == 0
    recipe = described(results)["recipe"]
    assert recipe["vae"]["dim"] == 8
    assert recipe["trainer"]["warmup_steps"] == 1000
    assert "config" not in recipe


def resumed(images: Path, results: Path, capsys: pytest.CaptureFixture, **changes: Any) -> str:
    """What a run of 4 steps says that goes on with other settings."""
    if not results.exists():
        vae_trainer(images, results, num_train_steps=4).train()
    capsys.readouterr()
    settings: dict[str, Any] = {"num_train_steps": 4, **changes}
    vae_trainer(images, results, resume=True, **settings).train()
    return capsys.readouterr().out


def test_other_settings_are_named_with_both_values(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    results = tmp_path / "r"
    assert "otherwise" not in resumed(images, results, capsys)
    printed = resumed(images, results, capsys, batch_size=3, seed=5, num_train_steps=5)
    assert "going on from step 4 of 5" in printed
    warned = [line["warning"] for line in metrics(results) if "warning" in line]
    assert len(warned) == 1
    assert warned[0] in printed
    for words in ("batch_size was 2 and is 3", "seed was 0 and is 5", "not, bit for bit"):
        assert words in warned[0]
    sittings = described(results)["sittings"]
    assert [sitting["step"] for sitting in sittings] == [0, 4, 4]
    assert sittings[2]["changed"] == {
        "batch_size": [2, 3], "num_train_steps": [4, 5], "seed": [0, 5]
    }  # fmt: skip


def test_settings_that_touch_no_step_leave_the_run_exact(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    results = tmp_path / "r"
    printed = resumed(images, results, capsys, log_every=3, save_every=7)
    assert "log_every was 1 and is 3, save_every was 1000 and is 7" in printed
    assert "stays exact" in printed
    assert not any("warning" in line for line in metrics(results))


def test_a_cosine_ends_with_the_run(images: Path, tmp_path: Path):
    for schedule, exact in (("cosine", False), ("constant", True)):
        before = {"settings": {"num_train_steps": 4, "lr_schedule": schedule}}
        now = {"settings": {"num_train_steps": 8, "lr_schedule": schedule}}
        assert changes_in_words(before, now)[1] is exact


def test_data_that_changed_are_noticed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    results = tmp_path / "r"
    assert "otherwise" not in resumed(images, results, capsys)
    (images / "0.png").rename(images / "another.png")
    assert "data fingerprint was" in resumed(images, results, capsys)
    (images / "another.png").unlink()
    assert "data items was 7 and is 6" in resumed(images, results, capsys)
    moved = images.rename(tmp_path / "elsewhere")
    printed = resumed(moved, results, capsys)
    assert "data source was" in printed
    assert "stays exact" in printed


def test_fewer_steps_than_are_done_change_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    results = tmp_path / "r"
    vae_trainer(images, results, num_train_steps=4).train()
    before = snapshot(results)
    printed = resumed(images, results, capsys, num_train_steps=3)
    assert "reached step 4, so num_train_steps 3 changes nothing" in printed
    assert snapshot(results) == before


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"settings": 3, "sittings": 4}', "[" * 100_000])
def test_a_damaged_description_costs_no_run(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, text: str
):
    file = RunFile(tmp_path, "vae")
    file.path.write_text(text)
    before = file.read()
    assert changes_in_words(before, {"settings": {"lr": 1}}) == ("", True)
    file.write({"settings": {"lr": 1}}, 7, before)
    assert file.read()["sittings"][0]["step"] == 7


def test_no_step_stands_in_the_log_twice(images: Path, tmp_path: Path):
    """Killed after step 5, with a checkpoint at step 4: its lines of step 5 come again."""
    results = tmp_path / "r"
    interrupt(vae_trainer(images, results, num_train_steps=6, save_every=2), step=5)
    (results / "vae-checkpoint-00000005.safetensors").unlink()
    with (results / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "base", "step": 5}\n{"stage": "vae", "st')
    vae_trainer(images, results, num_train_steps=6, resume=True).train()
    lines = (results / "metrics.jsonl").read_text().splitlines()
    assert lines.pop(5) == '{"stage": "vae", "st'
    assert lines.pop(4) == '{"stage": "base", "step": 5}'
    read = [json.loads(line) for line in lines]
    assert [line["step"] for line in read if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_windows_go_on_after_a_resume(images: Path, tmp_path: Path):
    """Codes that were seen before the break count as in the unbroken run."""
    settings: dict[str, Any] = dict(num_train_steps=6, batch_size=1)
    vae_trainer(images, tmp_path / "whole", **settings).train()
    interrupt(vae_trainer(images, tmp_path / "broken", **settings), step=4)
    vae_trainer(images, tmp_path / "broken", make_vae(1), resume=True, **settings).train()
    kept = ("step", "codebook_usage", "codebook_perplexity")
    figures = [
        [[line[name] for name in kept] for line in logged(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    assert figures[0] == figures[1]
    assert last_checkpoint(tmp_path / "broken")["windows"]["usage"]["tokens"] == 6 * 16


def test_every_release_is_named(images: Path, tmp_path: Path):
    vae_trainer(images, tmp_path, num_train_steps=1).train()
    assert described(tmp_path)["versions"]["muse-maskgit-pytorch"] == muse.__version__
