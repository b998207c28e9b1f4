"""Model files, ours and others', damaged: each loads, or is refused with its path."""

from __future__ import annotations

import contextlib
import json
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from muse_maskgit_pytorch import (
    CheckpointError,
    MaskGit,
    Muse,
    VQGanVAE,
    load_tokenizer,
    open_model,
)
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.loading import open_stage
from muse_maskgit_pytorch.training.checkpoints import Checkpoints
from muse_maskgit_pytorch.training.guard import Diverged
from tests import hub
from tests.fuzz.driver import Random, damaged, damaged_bytes, run
from tests.runs import vae_trainer
from tests.vqgans import ATTENTION, TAMING, lightning


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tried(path: Path, load: Callable[[], Any], *names: Path) -> str:
    """Load it: either it succeeds, with finite weights, or the error has the path on one line.

    Args:
        path: of the file.
        load: what loads it.
        names: further files that the error may name instead.
    """
    model, said = None, None
    try:
        model = load()
    except CheckpointError as error:
        said = str(error)
    if said is not None:
        assert any(str(name) in said for name in (path, *names)), said
        # control characters may be meant for the terminal
        assert re.fullmatch(r"[^\x00-\x1f\x7f\x9b]*", said), repr(said)
        assert len(said) < 1500 + len(str(path)), said
        return "refused"
    if model is not None:
        for name, value in model.state_dict().items():
            assert value.device.type == "cpu", name
            assert not value.is_floating_point() or value.isfinite().all(), name
    return "loaded"


# Ours --------------------------------------------------------------------------------------------


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its numbers."""
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header: Any, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def damaged_safetensors(random: Random, raw: bytes) -> bytes:
    if random.random() < 0.25:
        return damaged_bytes(random, raw)
    header, numbers = parts(raw)
    meta = header.get("__metadata__", {})
    choice = random.random()
    if choice < 0.1:
        return joined(damaged(random, header), numbers)
    if choice < 0.2:
        return joined({**header, "__metadata__": damaged(random, meta)}, numbers)
    if choice < 0.35:  # the numbers: NaN, infinity, or anything
        start = int(random.integers(len(numbers) // 4)) * 4
        odd = [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", random.bytes(4)][random.integers(3)]
        return joined(header, numbers[:start] + odd + numbers[start + 4 :])
    if choice < 0.45:  # another type or shape of the same bytes
        name = list(header)[random.integers(1, len(header))] if len(header) > 1 else ""
        if name and name != "__metadata__":
            entry = dict(header[name])
            if random.random() < 0.5:
                entry["dtype"] = str(random.choice(["I32", "U32", "BF16", "F64", "I8"]))
            entry["shape"] = entry["shape"][::-1]
            header[name] = entry
        return joined(header, numbers)
    if "tree" in meta:
        tree = json.loads(meta["tree"])
        for _ in range(random.integers(1, 3)):
            tree = damaged(random, tree)
        text = json.dumps(tree)
        if random.random() < 0.05:
            text = "[" * int(random.choice([900, 100_000])) + text
        header["__metadata__"] = {**meta, "tree": text}
    return joined(header, numbers)


def make_own(folder: Path) -> dict[str, bytes]:
    vae = tiny.vae()
    base = tiny.maskgit(vae=vae, self_token_critic=True, presets={"fast": {"timesteps": 2}})
    superres = tiny.superres(vae=vae, token_critic=tiny.critic(seq_len=64))
    models = {
        "vae": vae,
        "vq": tiny.vae(quantizer="vq", codebook_size=20),
        "base": base,
        "superres": superres,
        "muse": Muse(base, superres),
    }
    return {
        name: model.save(folder / f"{name}.safetensors").read_bytes()
        for name, model in models.items()
    }


def test_our_files(tmp_path: Path):
    own = make_own(tmp_path)
    target = tiny.vae()

    def one(random: Random) -> str:
        kind = list(own)[random.integers(len(own))]
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(damaged_safetensors(random, own[kind]))
        doors: list[Callable[[], Any]] = {
            "vae": [lambda: VQGanVAE.from_pretrained(path), lambda: target.load(path)],
            "vq": [lambda: VQGanVAE.from_pretrained(path)],
            "base": [lambda: MaskGit.from_pretrained(path), lambda: open_model(path, "cpu")],
            "superres": [lambda: MaskGit.from_pretrained(path), lambda: open_stage(path)],
            "muse": [lambda: Muse.from_pretrained(path), lambda: open_stage(path, "superres")],
        }[kind]
        name = f"{path}:superres" if kind == "muse" else path
        doors.append(lambda: load_tokenizer(name))
        return tried(path, doors[random.integers(len(doors))])

    found = run("our model files", 1, one, default=100)
    assert found["refused"] > found["loaded"] > 0


# Checkpoints of a run ----------------------------------------------------------------------------


def test_checkpoints_of_a_run(tmp_path: Path):
    folder, results = tmp_path / "images", tmp_path / "run"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (i * 60, 0, 0)).save(folder / f"{i}.png")
    vae_trainer(folder, results).train()
    path = results / "vae-checkpoint-00000002.safetensors"
    raw = path.read_bytes()

    def one(random: Random) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)
        path.write_bytes(damaged_safetensors(random, raw))
        if random.random() < 0.7:
            files = Checkpoints(results, "vae", "VQGanVAETrainer checkpoint", 2)
            return tried(path, lambda: files.load(path) and None)

        def resume() -> None:
            trainer = vae_trainer(folder, results, resume=True, num_train_steps=3)
            with contextlib.suppress(Diverged):  # of weights that are finite, and huge
                trainer.train()
                assert trainer.step == 3
            path.with_stem("vae-checkpoint-00000003").unlink(missing_ok=True)

        return tried(path, resume)

    try:
        run("checkpoints of a run", 2, one, default=25)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# Other projects' ---------------------------------------------------------------------------------


def strange(random: Random, state: dict[str, Tensor]) -> dict[str, Any]:
    """A state dict one of whose weights is not as it should be."""
    name = list(state)[random.integers(len(state))]
    value: Any = state[name]
    made: dict[Any, Any] = dict(state)
    match random.integers(12):
        case 0:
            made[name] = torch.full_like(value, float(random.choice([float("nan"), float("inf")])))
        case 1:
            made[name] = value.to([torch.int8, torch.int64, torch.complex64][random.integers(3)])
        case 2:
            made[name] = torch.zeros(1).expand(
                int(random.choice([10**6, 10**12])), *value.shape[1:]
            )
        case 3:
            made[name] = value.new_zeros(()) if random.random() < 0.5 else value[None]
        case 4:
            made[name] = value.new_zeros(0, *value.shape[1:])
        case 5:
            del made[name]
        case 6:
            made[name + str(random.choice([".x", "0", "é\x1b[31m"]))] = made.pop(name)
        case 7:
            part = "encoder.down_blocks.0.resnets" if "encoder.down_blocks.0" in name else None
            part = part or "encoder.down.0.block"
            new = {f"{part}.{i}.conv1.weight": value.new_zeros(1, 1) for i in range(5000)}
            made |= {k: v for k, v in new.items() if k not in made}
        case 8:
            made[name] = value.to_sparse() if value.ndim == 2 else value.to(torch.bfloat16)
        case 9:
            made["quantize.embedding.weight"] = torch.zeros(1, 1).expand(10**9, 8)
        case 10:
            made[name] = torch.empty(value.shape, device="meta")
        case _:
            made[name] = [None, 3, "x", {}][random.integers(4)]
    return made


def squeezed(source: Path, path: Path) -> None:
    """The same archive, compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def test_files_of_other_projects(tmp_path: Path):
    folder = tmp_path / "vqmodel"
    model = hub.make_vqmodel(folder)
    weights, settings = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
    raw, config = weights.read_bytes(), json.loads(settings.read_text())
    content = lightning(hub.make_vqmodel(tmp_path / "attending", **ATTENTION))
    taming, recipe = tmp_path / "model.ckpt", tmp_path / "model.yaml"
    torch.save(content, taming)
    whole = taming.read_bytes()

    def diffusers(random: Random) -> str:
        weights.unlink(missing_ok=True)
        bins = weights.with_suffix(".bin")
        bins.unlink(missing_ok=True)
        settings.write_text(json.dumps(config))
        path = weights
        match random.integers(3):
            case 0:
                settings.write_text(json.dumps(damaged(random, config)))
                weights.write_bytes(raw)
            case 1:
                weights.write_bytes(damaged_safetensors(random, raw))
            case _:
                path = bins
                torch.save(strange(random, model.state_dict()), bins)
        return tried(path, lambda: load_tokenizer(folder), settings)

    def lightnings(random: Random) -> str:
        taming.write_bytes(whole)
        recipe.write_text(TAMING)
        match random.integers(5):
            case 0:
                text = yaml.safe_dump(damaged(random, yaml.safe_load(TAMING)), allow_unicode=True)
                recipe.write_bytes(text.encode("utf-8", "surrogatepass"))
            case 1:
                taming.write_bytes(damaged_bytes(random, whole))
            case 2:
                squeezed(tmp_path / "attending.ckpt", taming)
            case _:
                state = strange(random, content["state_dict"])
                old = random.random() < 0.3
                torch.save(
                    content | {"state_dict": state}, taming, _use_new_zipfile_serialization=not old
                )
        return tried(taming, lambda: load_tokenizer(taming), recipe)

    torch.save(content, tmp_path / "attending.ckpt")
    run("diffusers' tokenizers", 3, diffusers, default=20)
    run("taming's tokenizers", 4, lightnings, default=20)
