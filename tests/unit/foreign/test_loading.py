"""Tokenizers by name, and what cannot be loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muse_maskgit_pytorch import CheckpointError, MaskGit, Muse, VQGanVAE
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.foreign import ForeignVQGAN, load_tokenizer
from tests import hub
from tests.vqgans import (
    images,
    lightning,
    taming_state,
)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models") / "vqmodel"
    hub.make_vqmodel(folder)
    return load_tokenizer(folder)


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_foreign_tokenizer_saves_as_one_of_our_files(foreign: Any, tmp_path: Path):
    path = foreign.save(tmp_path / "tokenizer.safetensors")
    for again in (load_tokenizer(path), ForeignVQGAN.from_pretrained(path)):
        assert same(again, foreign)
        assert not again.training
        pixels = images(2, 3, 16, 16)
        assert torch.equal(again.encode_to_ids(pixels), foreign.encode_to_ids(pixels))
        ids = again.encode_to_ids(pixels)
        assert torch.equal(again.decode_from_ids(ids), foreign.decode_from_ids(ids))


def stage(vae: Any) -> MaskGit:
    codes = vae.codebook_size
    return tiny.maskgit(vae=vae, model=tiny.transformer(num_tokens=codes, seq_len=16))


def test_a_maskgit_trains_on_it_and_reloads_in_a_new_process(foreign: Any, tmp_path: Path):
    model = stage(foreign)
    before = {name: value.clone() for name, value in foreign.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = foreign.encode_to_ids(tiny.images()).flatten(1)
    torch.manual_seed(0)
    loss = model(tiny.images(), text_embeds=tiny.text())
    torch.manual_seed(0)
    assert torch.equal(loss, model(ids, text_embeds=tiny.text()))
    loss.backward()
    optimizer.step()
    torch.manual_seed(0)
    assert model(ids, text_embeds=tiny.text()) < loss
    assert all(torch.equal(before[name], value) for name, value in foreign.state_dict().items())

    path = model.save(tmp_path / "base.safetensors")
    script = (
        "import sys; from muse_maskgit_pytorch import MaskGit;"
        f"model = MaskGit.from_pretrained({str(path)!r});"
        "assert 'diffusers' not in sys.modules;"
        "print(type(model.vae).__name__, float(sum(v.sum() for v in model.state_dict().values())))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    total = float(sum(value.sum() for value in model.state_dict().values()))
    assert done.stdout.split() == ["ForeignVQGAN", str(total)], done.stderr
    assert same(load_tokenizer(path), foreign)


def test_tokenizers_of_this_package_by_name(tmp_path: Path):
    small, large = tiny.vae(), tiny.vae(num_res_blocks=2)
    assert same(load_tokenizer(small.save(tmp_path / "vae.safetensors")), small)
    base = tiny.maskgit(vae=small)
    assert same(load_tokenizer(base.save(tmp_path / "base.safetensors")), small)
    muse = Muse(base, tiny.superres(vae=large, cond_vae=small))
    path = muse.save(tmp_path / "muse.safetensors")
    assert same(load_tokenizer(f"{path}:base"), small)
    assert same(load_tokenizer(f"{path}:superres", device="cpu"), large)
    alone = Muse(base).save(tmp_path / "alone.safetensors")
    assert same(load_tokenizer(f"{alone}:base"), small)
    for name, words in {
        f"{path}": "add :base or :superres",
        f"{path}:vae": "add :base or :superres",
        f"{alone}:superres": "add :base$",
        f"{tmp_path}/base.safetensors:base": "leave out ':base'",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            load_tokenizer(name)
    transformer = tiny.transformer().save(tmp_path / "transformer.safetensors")
    with pytest.raises(CheckpointError, match="holds a MaskGitTransformer, not a tokenizer"):
        load_tokenizer(transformer)


def test_the_shipped_tokenizers():
    assert load_tokenizer("scenes:base").fmap_size(128) == 16
    assert isinstance(load_tokenizer("scenes:superres"), VQGanVAE)


# What cannot be loaded ----------------------------------------------------------------------------


def test_a_configuration_of_another_model(tmp_path: Path):
    hub.make_vqmodel(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    wrong: dict[str, tuple[Any, str]] = {
        "num_vq_embeddings": (64, "says codebook_size 64, the weights in .* have 50"),
        "block_out_channels": ([32, 64], r"says channels \[32, 64\], .* have \[32, 64, 64\]"),
        "vq_embed_dim": (4, "says code_dim 4, .* have 8"),
        "mid_block_add_attention": (True, "says mid_attention True, .* have False"),
        "norm_num_groups": (5, "32 are not divisible by the norms' 5 groups"),
        "norm_type": ("spatial", "norm_type: spatial.* not supported"),
        "act_fn": ("relu", "act_fn: relu.* not supported"),
        "up_block_types": (["UpBlock2D"] * 3, "UpBlock2D.* not supported"),
    }
    for key, (value, words) in wrong.items():
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=words):
            load_tokenizer(tmp_path)
    for groups in (0, None, -1, "32"):
        file.write_text(json.dumps(config | {"norm_num_groups": groups}))
        with pytest.raises(CheckpointError, match=r"config.json: norm_num_groups must be"):
            load_tokenizer(tmp_path)
    del config["latent_channels"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'latent_channels' is missing"):
        load_tokenizer(tmp_path)
    for damaged in ("{", "[1]", "3"):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"config.json is not the configuration"):
            load_tokenizer(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        load_tokenizer(tmp_path)


def test_incomplete_and_strange_weights(attending: Any, tmp_path: Path):
    whole, path = taming_state(attending), tmp_path / "model.ckpt"

    def without(*parts: str) -> dict[str, Tensor]:
        return {k: v for k, v in whole.items() if not any(part in k for part in parts)}

    gumbel = without("quantize.") | {"quantize.embed.weight": torch.ones(50, 8)}
    for content, words in (
        (
            without("decoder.up.1.block.1.conv2"),
            "conv2.bias is missing there; the file is incomplete",
        ),
        (without("decoder."), "decoder.conv_in.bias is missing"),
        (without("encoder.conv_out"), "incomplete: encoder.conv_out.weight is missing"),
        (
            whole | {"encoder.conv_in.weight": torch.ones(32, 4, 3, 3)},
            r"is \(32, 4, 3, 3\) there and \(32, 3, 3, 3\) here",
        ),
        (whole | {"quantize.used": torch.ones(9)}, "quantize.used is unknown here"),
        (gumbel, "Gumbel VQGAN.* not supported"),
        (without("quantize."), "no codebook.*; understood are"),
        ({"layer.weight": torch.ones(2)}, "unknown kind; understood are"),
        ({}, "unknown kind; understood are"),
        ([1, 2], "no state dict.*; understood are"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=words) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)


def test_a_yaml_of_something_else(attending: Any, tmp_path: Path):
    torch.save(lightning(attending), tmp_path / "model.ckpt")
    for text in ("model: {params: {}}", "a: 1", "[1]", "{", ""):
        (tmp_path / "model.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=r"model.yaml"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "pytorch_model.bin"])
def test_damaged_files(file: str, tmp_path: Path):
    model = hub.make_vqmodel(tmp_path)
    path = tmp_path / file
    if file.endswith(".bin"):
        (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(model.state_dict(), path)
    raw = path.read_bytes()
    for damaged in (raw[: len(raw) // 2], b"", b"\x80\x02garbage", b"PK\x03\x04"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_tokenizer(tmp_path)


def test_names_that_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, words in {
        tmp_path: "no weights of a tokenizer, or several.*; understood are",
        f"{tmp_path}:vqvae": "no weights of a tokenizer, or several.*; understood are",
        "nothing": "unknown model 'nothing'",
        tmp_path / "absent.ckpt": "no such model file",
        "./absent/absent.safetensors": "no such model file",
        "nobody/nothing": "nobody/nothing has no weights .*, or the hub is out of reach",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            load_tokenizer(name)
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="or several: name the file"):
        load_tokenizer(tmp_path)


def test_images_and_arguments_that_do_not_fit(foreign: Any):
    with pytest.raises(ValueError, match="image size 18 is not a positive multiple"):
        foreign.encode_to_ids(images(1, 3, 18, 16))
    arguments = foreign.config
    with pytest.raises(ValueError, match="one entry for each resolution"):
        ForeignVQGAN(**arguments | {"channels": [32, 32]})
    with pytest.raises(ValueError, match="code_dim 4 must equal latent_channels 8"):
        ForeignVQGAN(**arguments | {"family": "maskgit", "code_dim": 4})
