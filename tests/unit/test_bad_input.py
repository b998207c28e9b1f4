"""Whatever lies in the folder, or goes wrong around it: the run goes on, or says why in a sentence.

What each single image becomes is in test_images.py; here whole runs meet all of them at once.
"""

from __future__ import annotations

import json
import resource
import shutil
import struct
import subprocess
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from muse_maskgit_pytorch import CheckpointError, VQGanVAE, VQGanVAETrainer
from muse_maskgit_pytorch.checkpoint import load_tree
from muse_maskgit_pytorch.cli.main import main


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def noise(mode: str = "RGB", width: int = 37, height: int = 23, seed: int = 0) -> Image.Image:
    """A picture of a size that nothing divides."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (height, width, 3), generator=generator).to(torch.uint8)
    return Image.fromarray(pixels.numpy()).convert(mode)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        noise(seed=i).save(folder / f"{i}.png")
    return folder


def command(folder: Path, results: Path, *options: str) -> list[str]:
    """`muse train vae` on a tiny tokenizer of factor 4."""
    vae = dict(dim=8, layers=2, num_res_blocks=1, codebook_size=16)
    trainer = dict(
        folder=folder, results_folder=results, image_size=16, batch_size=4, num_train_steps=2,
        log_every=1, perceptual_weight=0, gan_weight=0, discriminator_dim=8, valid_fraction=0.2,
    )  # fmt: skip
    given = [f"--vae.{key}={value}" for key, value in vae.items()]
    given += [f"--trainer.{key}={value}" for key, value in trainer.items()]
    return ["train", "vae", *given, *options]


def fails(argv: list[str], capsys) -> str:
    """Run; check that it fails as a mistake in the input; return its one sentence."""
    assert main(argv) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("muse: error: ")]
    assert len(errors) == 1
    return errors[0]


def make_trainer(folder: Path, results: Path, seed: int = 0, **changes: Any) -> VQGanVAETrainer:
    torch.manual_seed(seed)
    vae = VQGanVAE(dim=8, codebook_size=16, layers=2, num_res_blocks=1)
    settings: dict[str, Any] = dict(
        image_size=16, batch_size=2, num_train_steps=6, lr=1e-3, warmup_steps=2, log_every=1,
        sample_every=2, save_every=2, perceptual_weight=0, gan_weight=0.1, gan_start=1,
        discriminator_dim=8, valid_fraction=0.2,
    )  # fmt: skip
    return VQGanVAETrainer(
        vae, folder=str(folder), results_folder=str(results), **(settings | changes)
    )


def losses(results: Path) -> dict[int, float]:
    """Loss by step; of a step that was trained twice the later one."""
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_end(results: Path, other: Path) -> None:
    """Both runs have ended with the same weights, to the last bit."""
    for name in ("vae.safetensors", "vae-ema.safetensors"):
        a, b = (load_tree(folder / name)[0]["state"] for folder in (results, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert losses(results) == losses(other)


# Images ------------------------------------------------------------------------------------------


def deep(path: Path) -> None:
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(path)


def see_through_palette(path: Path) -> None:
    noise("P").save(path, transparency=3)


def rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise().save(path, exif=exif)


def moving(path: Path) -> None:
    noise().save(path, save_all=True, append_images=[noise(seed=1), noise(seed=2)])


def of(mode: str, **size: int) -> Callable[[Path], None]:
    return lambda path: noise(mode, **size).save(path)


def half(path: Path) -> None:
    noise(width=200, height=200).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path: Path) -> None:
    """A few bytes that say they are 10 gigapixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 1, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)


def containing(content: bytes) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(content)


GOOD: dict[str, Callable[[Path], Any]] = {
    "rgb.png": of("RGB"), "rgba.png": of("RGBA"), "grey.png": of("L"), "grey-alpha.png": of("LA"),
    "palette.png": of("P"), "palette-clear.png": see_through_palette, "bit.png": of("1"),
    "deep.png": deep, "int.tif": of("I"), "float.tif": of("F"), "cmyk.jpg": of("CMYK"),
    "CAPITALS.JPG": of("RGB"), "rotated.jpg": rotated, "moving.gif": moving, "moving.png": moving,
    "moving.webp": moving, "plain.bmp": of("RGB"), "strip.png": of("RGB", width=900, height=1),
    "dot.png": of("RGB", width=1, height=1), "large.jpg": of("L", width=5000, height=3000),
    "below/below/rgb.png": of("RGB"), "jpeg named.png": lambda path: noise().save(path, "JPEG"),
}  # fmt: skip
BAD: dict[str, Callable[[Path], Any]] = {
    "empty.png": containing(b""), "half.png": half, "half.jpg": half, "half.gif": half,
    "half.webp": half, "bomb.png": bomb, "text.jpg": containing(b"no image at all"),
    "page.png": containing(b"<html>404 Not Found</html>"),
}  # fmt: skip


@pytest.mark.parametrize("cache", [False, True])
def test_one_folder_of_everything(tmp_path: Path, cache: bool, capsys):
    folder, results = tmp_path / "images", tmp_path / "results"
    for name, make in (GOOD | BAD).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make(folder / name)
    (folder / "a folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    steps = 14  # two epochs
    options = [f"--trainer.num_train_steps={steps}", f"--trainer.cache_images={cache}"]
    assert main(command(folder, results, *options)) == 0
    said = capsys.readouterr().err
    assert [name for name in BAD if said.count(name) != 1] == []
    assert [name for name in GOOD if name in said] == []
    assert len(losses(results)) == steps
    assert all(loss < 10 for loss in losses(results).values())
    assert (results / "samples" / f"vae-{steps:08d}.png").is_file()
    assert VQGanVAE.from_pretrained(results / "vae-ema.safetensors")


def before_step(trainer: VQGanVAETrainer, step: int, do: Callable[[], Any]) -> None:
    """Do something between two steps of the training."""
    train_step = trainer.train_step

    def changed(batches: Iterator[Any]) -> Any:
        if trainer.step == step:
            do()
        return train_step(batches)

    trainer.train_step = changed  # type: ignore[method-assign]


def test_a_folder_that_changes_under_the_run(images: Path, tmp_path: Path):
    trainer = make_trainer(images, tmp_path / "r", num_train_steps=12)
    (images / "4.png").rename(tmp_path / "kept.png")

    def change() -> None:
        (images / "0.png").unlink()
        half(images / "1.png")
        noise("RGBA", width=5, height=90).save(images / "2.png")
        (images / "3.png").unlink()
        (images / "3.png").mkdir()
        noise().save(images / "new.png")

    before_step(trainer, 3, change)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = " ".join(str(warning.message) for warning in caught)
    assert [said.count(f"{i}.png") > 0 for i in range(5)] == [True, True, False, True, True]
    assert len(losses(tmp_path / "r")) == 12
    assert all(loss < 10 for loss in losses(tmp_path / "r").values())


def test_a_folder_that_goes_and_comes_back(images: Path, tmp_path: Path):
    make_trainer(images, tmp_path / "whole").train()
    trainer = make_trainer(images, tmp_path / "r")
    before_step(trainer, 5, lambda: images.rename(tmp_path / "elsewhere"))
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ValueError, match="holds no image that can be read"),
    ):
        trainer.train()
    with pytest.raises(ValueError, match="does not exist"):
        make_trainer(images, tmp_path / "r", resume=True)
    (tmp_path / "elsewhere").rename(images)
    make_trainer(images, tmp_path / "r", seed=1, resume=True).train()
    assert_same_end(tmp_path / "r", tmp_path / "whole")


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, says",
    [
        (["vae.codebook_size=1"], "must be at least 2"),
        (["vae.codebook_size=1_000_000_000_000"], "take fewer"),
        (["vae.quantizer=lfq", "vae.codebook_size=100"], "the next one is 128"),
        (["vae.quantizer=bsq", "vae.codebook_size=100"], "the next one is 128"),
        (["vae.quantizer=fsq", "vae.codebook_size=1009"], "[1008, 1024]"),
        (["vae.quantizer=fsq", "vae.fsq_levels=[2,8]"], "at least 3 each"),
        (["vae.quantizer=fsq", "vae.fsq_levels=[5,5]"], "leave one of them out"),
        (["vae.quantizer=simvq", "vae.fsq_levels=[4,4]"], "leave them out"),
        (["trainer.image_size=18"], "use 16"),
        (["trainer.image_size=0"], "image_size must be at least 1"),
    ],
)
def test_geometry_that_cannot_be(images: Path, tmp_path: Path, options, says: str, capsys):
    argv = command(images, tmp_path / "r", *[f"--{option}" for option in options])
    assert says in fails(argv, capsys)
    assert not (tmp_path / "r").exists()


def test_a_run_of_another_geometry(images: Path, tmp_path: Path, capsys):
    results = tmp_path / "r"
    argv = command(images, results, "--trainer.gan_weight=0.1", "--trainer.gan_start=0")
    assert main(argv) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in results.rglob("*.*")}
    for other in ("vae.dim=12", "vae.codebook_size=32", "vae.quantizer=simvq", "vae.layers=1",
                  "vae.l2_norm=false", "trainer.discriminator_dim=12"):  # fmt: skip
        error = fails([*argv, "--trainer.resume=true", f"--{other}"], capsys)
        assert "of another model" in error or "does not fit this discriminator" in error
        assert "resume with the settings it was made with, or choose another" in error
    init = [f"--init_from={results}/vae.safetensors", f"--trainer.results_folder={tmp_path}/new"]
    error = fails([*argv, *init, "--vae.dim=12"], capsys)
    assert "make the model with the arguments it was saved with" in error
    assert {path: path.read_bytes() for path in results.rglob("*.*")} == before
    assert not (tmp_path / "new").exists()


# A full disk -------------------------------------------------------------------------------------

ROOM = 50_000  # bytes: less than a checkpoint or the weights


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB of its own, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def full_disk(folder: Path, room: int) -> Iterator[None]:
    ballast = folder / "ballast"
    with open(ballast, "wb") as file:
        free = shutil.disk_usage(folder).free
        file.write(bytes(max(0, free - room)))
    yield
    ballast.unlink()


@contextmanager
def no_large_files(folder: Path, room: int) -> Iterator[None]:
    """The kernel refuses to write a file beyond this size: a quota that needs no mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def starve(images: Path, results: Path, starving: Any, method: str, call: int, room: int) -> None:
    """Take the room away at a call of a method of the trainer, see it fail; make room, resume."""
    trainer = make_trainer(images, results)
    original, calls = getattr(trainer, method), iter(range(100))

    def starved(*args: Any) -> Any:
        if next(calls) == call:
            shortage.enter_context(starving(results.parent, room))
        return original(*args)

    setattr(trainer, method, starved)
    with ExitStack() as shortage, pytest.raises(CheckpointError) as caught:
        trainer.train()
    assert "could not be written (" in str(caught.value)
    assert "make room and resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    checkpoints = list(results.glob("vae-checkpoint-*"))
    assert checkpoints
    for path in checkpoints:
        load_tree(path)
    assert list(results.glob(".*")) == []
    make_trainer(images, results, seed=1, resume=True).train()


@pytest.mark.parametrize(
    "method, call, room", [("_save_checkpoint", 1, ROOM), ("save", 0, ROOM), ("draw", 1, 0),
                           ("measures", 3, 0)]
)  # fmt: skip
def test_a_full_disk(images: Path, disk: Path, tmp_path: Path, method: str, call: int, room: int):
    make_trainer(images, tmp_path / "whole").train()
    starve(images, disk / "r", full_disk, method, call, room)
    assert_same_end(disk / "r", tmp_path / "whole")


@pytest.mark.parametrize("method, call", [("_save_checkpoint", 1), ("save", 0)])
def test_a_quota(images: Path, tmp_path: Path, method: str, call: int):
    make_trainer(images, tmp_path / "whole").train()
    starve(images, tmp_path / "r", no_large_files, method, call, ROOM)
    assert_same_end(tmp_path / "r", tmp_path / "whole")
