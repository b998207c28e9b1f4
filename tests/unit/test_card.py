"""What a model's card says, and what it refuses to say."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from muse_maskgit_pytorch import MaskGit, Muse, save_png, testing
from muse_maskgit_pytorch.card import write_card
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.evaluation import Metric
from muse_maskgit_pytorch.watching.run_file import RunFile
from tests.unit.test_hub import Api, calls  # noqa: F401

TEXTS = ["a | cat", "two owls"]


@pytest.fixture(scope="module")
def muse(t5: str) -> Muse:
    transformer = testing.transformer(t5_name=t5, text_embed_dim=16, max_text_len=9)
    return Muse(testing.maskgit(transformer)).eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, muse: Muse) -> Path:
    """A model's file, its run, its figures and a picture."""
    root = tmp_path_factory.mktemp("card")
    muse.save(root / "muse.safetensors")
    write_run(root / "run", muse.base)
    (root / "figures.json").write_text(json.dumps(figures(muse.fingerprint)))
    save_png(muse(TEXTS, seeds=[5, 6], timesteps=2)[1], root / "owls.png")
    return root


def write_run(folder: Path, model: Any) -> None:
    stated = {"kind": type(model).__name__, "config": model.config}
    description = dict(
        recipe={"trainer": {"folder": "/home/me/secret/owls", "lr": 0.1, "results_folder": "x"}},
        settings=dict(batch_size=4, grad_accum_every=2),
        model=stated,
        data=dict(source="/home/me/secret/owls", items=1234, fingerprint="ab12", held_back=7),
        device=dict(kind="cpu (x86_64)", processes=2, threads=1),
        versions={"torch": "2.7"},
    )
    RunFile(folder, "base").write(description, 0, {})
    lines = [dict(step=1800, loss=3.5, steps_per_s=0.5), dict(step=1800, valid_loss=3.25)]
    text = "".join(json.dumps({"stage": "base", **line}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


def figures(fingerprint: str, **changes: Any) -> dict:
    metric = asdict(Metric(12.5, 640, "lower is better", (11.0, 14.0)))
    setup = dict(part="model", model=fingerprint, prompts=320, seeds=2, seed=0)
    return dict(setup=setup, data="/home/me/owls", metrics={"net": {"fid": metric}}) | changes


def test_what_a_card_says(root: Path, muse: Muse, capsys: pytest.CaptureFixture):
    out = root / "out"
    command = [
        "push", "--model", root / "muse.safetensors", "--out", out, "--license", "mit",
        "--runs", root / "run", "--figures", root / "figures.json", "--pictures", root / "owls.png",
        "--limits", "It draws owls alone.",
    ]  # fmt: skip
    assert main([*map(str, command)]) == 0, capsys.readouterr().err
    text = (out / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "mit"
    for said in (
        "| base | owls | 1,234 | 7 | ab12 |",
        "| base | 1,800 x 16 | 1.00 h | 2 x cpu (x86_64), threads: 1 |"
        " valid_loss 3.25 (step 1,800), loss 3.5 (step 1,800) |",
        "lr: 0.1",
        "`owls`, 320 prompts, 2 pictures each, seeds from 0",
        "| fid | 12.5 | 11 to 14 |  | 640 | lower is better |",
        "![](pictures/owls.png)",
        "| two owls | 6 |",
        "- It draws owls alone.",
        "reads 9 tokens of a text at most",
        "- weights: mit\n- text encoder: not stated\n",
    ):
        assert said in text
    assert "secret" not in text  # where things lay is nobody's affair
    assert "results_folder" not in text
    assert (out / "pictures" / "owls.png").read_bytes() == (root / "owls.png").read_bytes()
    assert Muse.from_pretrained(out).fingerprint == muse.fingerprint


def test_push(root: Path, calls: list, capsys: pytest.CaptureFixture):  # noqa: F811
    command = ["push", "--model", str(root / "muse.safetensors"), "--repo", "me/owls"]
    assert main([*command, "--private", "true", "--message", "Owls"]) == 0, capsys.readouterr().err
    assert "https://hub/me/owls/commit/1" in capsys.readouterr().out
    assert ("create_repo", {"name": "me/owls", "private": True, "exist_ok": True}) in calls
    assert calls[-1][1]["commit_message"] == "Owls"
    assert b'Muse.from_pretrained("me/owls")' in calls[-1][1]["files"]["README.md"]
    assert main(command[:3]) == 2
    assert "--out FOLDER, --repo OWNER/NAME" in capsys.readouterr().err
    assert main([*command[:3], "--repo", "a/b/c"]) == 2
    assert Api.calls == calls


def test_what_is_refused_leaves_nothing_behind(root: Path, tmp_path: Path, calls: list):  # noqa: F811
    (tmp_path / "bad.json").write_text("[")
    out = tmp_path / "out"
    command = ["push", "--model", str(root / "muse.safetensors"), "--repo", "me/owls"]
    assert main([*command, "--out", str(out), "--figures", str(tmp_path / "bad.json")]) == 2
    assert not out.exists()
    assert not calls


def test_cards_of_parts(root: Path, muse: Muse):
    stage = MaskGit.from_pretrained(muse.base.save_pretrained(root / "stage"))
    text = write_card(stage, root / "stage", pictures=[root / "owls.png"]).read_text()
    assert "| two owls | 6 |" in text
    vae = muse.base.vae
    vae.save_pretrained(root / "vae")
    text = write_card(vae, root / "vae").read_text()
    assert "4 pixels a token, 60 codes" in text
    assert "- weights: not stated" in text
    with pytest.raises(ValueError, match="a VQGanVAE alone does not draw"):
        write_card(vae, root / "vae", pictures=[root / "owls.png"])


def test_what_another_model_made_is_refused(root: Path, muse: Muse, tmp_path: Path):
    other = Muse(testing.maskgit(testing.transformer(dim=24)))
    with pytest.raises(ValueError, match=r"owls\.png was drawn by the model"):
        write_card(other, tmp_path, pictures=[root / "owls.png"])
    with pytest.raises(ValueError, match=r"figures\.json has figures of the model"):
        write_card(other, tmp_path, figures=[root / "figures.json"])
    with pytest.raises(
        ValueError, match=r"base-run\.json is of another model's training: .*dim 16"
    ):
        write_card(other, tmp_path, runs=[root / "run"])
    write_run(tmp_path / "vae", testing.vae(codebook_size=90))
    with pytest.raises(ValueError, match="has codebook_size 90, this one's has 60"):
        write_card(muse, tmp_path, runs=[tmp_path / "vae"])
    write_run(tmp_path / "vae", testing.vae(decoder_dim=16))
    write_card(muse, tmp_path, runs=[tmp_path / "vae"])  # ids of before, another decoder since


def test_files_of_another_kind(muse: Muse, tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no NAME-run\.json"):
        write_card(muse, tmp_path, runs=[tmp_path])
    for text in ("[", "[]", "{}", '{"metrics": {"a": 1}}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json cannot be read as figures"):
            write_card(muse, tmp_path, figures=[tmp_path / "a.json"])
    (tmp_path / "a.json").write_text('{"metrics": {"fid": {"value": 1}}}')
    with pytest.raises(ValueError, match="of how many images"):
        write_card(muse, tmp_path, figures=[tmp_path / "a.json"])
    assert not (tmp_path / "README.md").exists()
