"""Other people's tokenizers: against diffusers' own VQModel, and against slow references."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muse_maskgit_pytorch import CheckpointError, MaskGit, Muse, VQGanVAE
from muse_maskgit_pytorch.foreign import ForeignVQGAN, load_tokenizer
from tests import hub, tiny

ATTENTION = dict(
    down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    up_block_types=["AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    mid_block_add_attention=True,
    lookup_from_codebook=False,
)
CONFIGS: dict[str, dict[str, Any]] = {
    # aMUSEd's five levels, two blocks, latents as codes; fewer channels
    "amused": dict(block_out_channels=[32, 32, 64, 64, 96], layers_per_block=2),
    "mid attention": dict(mid_block_add_attention=True),
    "attention": ATTENTION,
    "width of codes": dict(vq_embed_dim=4, lookup_from_codebook=False),
    "groups": dict(norm_num_groups=8, block_out_channels=[8, 24], layers_per_block=3),
    "one level": dict(block_out_channels=[32]),
}


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def diffusers_ids(model: Any, pixels: Tensor) -> Tensor:
    """As diffusers' pipelines do: aMUSEd's do not normalise the pixels, the others do."""
    pixels = pixels if model.config.lookup_from_codebook else pixels * 2 - 1
    latents = model.encode(pixels).latents
    return model.quantize(latents)[2][2].view(len(pixels), *latents.shape[-2:])


@torch.no_grad()
def diffusers_pixels(model: Any, ids: Tensor) -> Tensor:
    shape = (*ids.shape, model.quantize.vq_embed_dim)
    if model.config.lookup_from_codebook:
        return model.decode(ids, force_not_quantize=True, shape=shape).sample.clamp(0, 1)
    codes = model.quantize.get_codebook_entry(ids.flatten(), shape)
    return (model.decode(codes).sample / 2 + 0.5).clamp(0, 1)


def check_equal(tokenizer: Any, model: Any, pixels: Tensor) -> None:
    """Equal ids, pixels equal to 1e-5; in double precision, which shows more, to 1e-10."""
    ids = tokenizer.encode_to_ids(pixels)
    assert torch.equal(ids, diffusers_ids(model, pixels))
    decoded = tokenizer.decode_from_ids(ids)
    torch.testing.assert_close(decoded, diffusers_pixels(model, ids), rtol=0, atol=1e-5)
    assert decoded.shape == pixels.shape
    assert len(ids.unique()) > min(8, ids.numel() // 4)  # or equality would say little
    assert decoded.std() > 0.01
    exact, expected = tokenizer.double().decode_from_ids(ids), diffusers_pixels(model.double(), ids)
    tokenizer.float(), model.float()
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-10)


# diffusers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_and_pixels_are_those_of_diffusers(name: str, tmp_path: Path):
    model = hub.make_vqmodel(tmp_path, **CONFIGS[name])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.factor == 2 ** (len(model.config["block_out_channels"]) - 1)
    assert tokenizer.codebook_size == 50
    check_equal(tokenizer, model, images(2, 3, 32, 48))
    check_equal(tokenizer, model, images(1, 3, 16, 16))
    check_equal(tokenizer, model, images(3, 3, 64, 32))


def test_pixels_are_0_to_1_for_amused_and_signed_for_the_others(tmp_path: Path):
    hub.make_vqmodel(tmp_path / "signed", lookup_from_codebook=False)
    hub.make_vqmodel(tmp_path / "unit", lookup_from_codebook=True)
    signed, unit = load_tokenizer(tmp_path / "signed"), load_tokenizer(tmp_path / "unit")
    assert torch.equal(
        signed.encode_to_ids(images(2, 3, 16, 16) / 2 + 0.5),
        unit.encode_to_ids(images(2, 3, 16, 16)),
    )


def test_old_names_of_the_attention_and_bin_files(tmp_path: Path):
    """Before diffusers 0.14 attention had other names, and its weights were pickled."""
    model = hub.make_vqmodel(tmp_path, **ATTENTION)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = model.state_dict()
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    check_equal(load_tokenizer(tmp_path), model, images(2, 3, 16, 24))


def test_half_precision_files_compute_in_float32(tmp_path: Path):
    model = hub.make_vqmodel(tmp_path).half()
    model.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert {value.dtype for value in tokenizer.state_dict().values()} == {torch.float32}
    check_equal(tokenizer, model.float(), images(1, 3, 16, 16))


def test_autocast_changes_no_id(tmp_path: Path):
    hub.make_vqmodel(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    expected = tokenizer.encode_to_ids(images(2, 3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode_to_ids(images(2, 3, 32, 32)), expected)


def test_quantisation_is_float32_in_a_bfloat16_model(tmp_path: Path):
    hub.make_vqmodel(tmp_path)
    tokenizer: Any = load_tokenizer(tmp_path).bfloat16()
    pixels = images(4, 3, 32, 32).bfloat16()
    latents = tokenizer.quant_conv(tokenizer.encoder(pixels)).movedim(1, -1)
    codes = tokenizer.quantize["embedding"].weight

    def nearest(a: Tensor, b: Tensor) -> Tensor:
        return (a[..., None, :] - b).square().sum(-1).argmin(-1)

    assert torch.equal(tokenizer.encode_to_ids(pixels), nearest(latents.double(), codes.double()))
    assert not torch.equal(nearest(latents.double(), codes.double()), nearest(latents, codes))


def test_a_whole_pipeline_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = hub.make_vqmodel(tmp_path / "model" / "vqvae")
    hub.make_hub(tmp_path / "home", {"amused/amused-256": tmp_path / "model"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    for name in (f"{tmp_path}/model:vqvae", "amused/amused-256:vqvae"):
        check_equal(load_tokenizer(name), model, images(1, 3, 16, 16))
    with pytest.raises(CheckpointError, match="model:vqvae"):
        load_tokenizer(tmp_path / "model")
    with pytest.raises(CheckpointError, match="amused/amused-256:unet has no weights"):
        load_tokenizer("amused/amused-256:unet")


# taming -----------------------------------------------------------------------------------------


def taming_state(model: Any) -> dict[str, Tensor]:
    """A VQModel's weights in the layout of taming-transformers, which has the same parts."""
    found: dict[str, Tensor] = {}

    def put(name: str, module: Any, kernel: bool = False) -> None:
        for key, value in module.state_dict().items():
            found[f"{name}.{key}"] = value[..., None, None] if kernel and value.ndim == 2 else value

    def block(name: str, module: Any) -> None:
        for part in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{name}.{part}", getattr(module, part))
        if module.conv_shortcut is not None:
            put(f"{name}.nin_shortcut", module.conv_shortcut)

    def attention(name: str, module: Any) -> None:
        put(f"{name}.norm", module.group_norm)
        parts = dict(q=module.to_q, k=module.to_k, v=module.to_v, proj_out=module.to_out[0])
        for part, linear in parts.items():
            put(f"{name}.{part}", linear, kernel=True)

    def level(name: str, module: Any) -> None:
        for j, resnet in enumerate(module.resnets):
            block(f"{name}.block.{j}", resnet)
        for j, attn in enumerate(getattr(module, "attentions", [])):
            attention(f"{name}.attn.{j}", attn)
        for change in ("downsample", "upsample"):
            if getattr(module, f"{change}rs", None):
                put(f"{name}.{change}.conv", getattr(module, f"{change}rs")[0].conv)

    for half in ("encoder", "decoder"):
        network = getattr(model, half)
        put(f"{half}.conv_in", network.conv_in)
        put(f"{half}.norm_out", network.conv_norm_out)
        put(f"{half}.conv_out", network.conv_out)
        block(f"{half}.mid.block_1", network.mid_block.resnets[0])
        block(f"{half}.mid.block_2", network.mid_block.resnets[1])
        if network.mid_block.attentions[0] is not None:
            attention(f"{half}.mid.attn_1", network.mid_block.attentions[0])
    for i, module in enumerate(model.encoder.down_blocks):
        level(f"encoder.down.{i}", module)
    for i, module in enumerate(reversed(model.decoder.up_blocks)):
        level(f"decoder.up.{i}", module)
    for part in ("quant_conv", "post_quant_conv", "quantize"):
        put(part, getattr(model, part))
    return found


TAMING = """
model:
  target: taming.models.vqgan.VQModel
  params:
    embed_dim: 8
    n_embed: 50
    ddconfig: {double_z: false, z_channels: 8, resolution: 32, in_channels: 3, out_ch: 3, ch: 32,
      ch_mult: [1, 2, 2], num_res_blocks: 1, attn_resolutions: [16, 8], dropout: 0.0}
"""


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hub.make_vqmodel(tmp_path_factory.mktemp("models") / "attending", **ATTENTION)


def lightning(model: Any) -> dict[str, Any]:
    """What Lightning writes around the weights, the discriminator among them."""
    state = taming_state(model) | {"loss.discriminator.main.0.weight": torch.ones(2, 2)}
    return {"epoch": 3, "global_step": 7, "state_dict": state, "optimizer_states": []}


@pytest.fixture
def foreign_class() -> Iterator[type]:
    """Classes of a package that is there when a checkpoint is written, and not when it is read."""
    module: Any = ModuleType("pytorch_lightning")
    module.Callback = type("Callback", (), {"__module__": "pytorch_lightning"})
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": "pytorch_lightning"})
    sys.modules["pytorch_lightning"] = module
    yield module
    sys.modules.pop("pytorch_lightning", None)


@pytest.mark.parametrize("place", ["model.yaml", "last.yaml", "configs/model.yaml", None])
def test_taming_checkpoints(place: str | None, attending: Any, tmp_path: Path):
    torch.save(lightning(attending), tmp_path / "last.ckpt")
    if place is not None:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(TAMING)
    pixels = images(2, 3, 24, 32)
    for name in (tmp_path, tmp_path / "last.ckpt"):
        check_equal(load_tokenizer(name), attending, pixels)


def test_the_folder_that_taming_training_leaves(attending: Any, tmp_path: Path):
    for folder in ("checkpoints", "configs"):
        (tmp_path / folder).mkdir()
    torch.save(lightning(attending), tmp_path / "checkpoints" / "last.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "checkpoints" / "epoch=000001.ckpt")
    config = tmp_path / "configs" / "2021-01-01T00-00-00-project.yaml"
    config.write_text(TAMING)
    check_equal(load_tokenizer(tmp_path), attending, images(1, 3, 16, 16))
    config.write_text(TAMING.replace("[16, 8]", "[8]"))
    with pytest.raises(
        CheckpointError, match=r"project.yaml says encoder_attention \[False, False"
    ):
        load_tokenizer(tmp_path)


def test_a_checkpoint_with_objects_of_an_absent_package(
    attending: Any, tmp_path: Path, foreign_class: Any
):
    callback = foreign_class.Callback()
    callback.best_model_score = torch.tensor(0.5)
    content = lightning(attending) | {
        "callbacks": {foreign_class.Callback: {"best": 1.0}, "other": callback},
        "hyper_parameters": foreign_class.AttributeDict(learning_rate=1e-4),
    }
    torch.save(content, tmp_path / "model.ckpt")
    del sys.modules["pytorch_lightning"]
    check_equal(load_tokenizer(tmp_path / "model.ckpt"), attending, images(1, 3, 16, 16))
    assert "pytorch_lightning" not in sys.modules


class Hostile:
    """Pickled, it is a call."""

    def __init__(self, call: Any, *arguments: Any):
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("how", ["system", "exec", "open", "call"])
def test_a_hostile_checkpoint_runs_nothing(how: str, zipped: bool, attending: Any, tmp_path: Path):
    mark = tmp_path / "was-here"
    hostile = {
        "system": Hostile(os.system, f"touch {mark}"),
        "exec": Hostile(exec, f"open({str(mark)!r}, 'w')"),
        "open": Hostile(open, str(mark), "w"),
        "call": Hostile(subprocess.check_output, ["touch", str(mark)]),
    }[how]
    path = tmp_path / "model.ckpt"
    torch.save(lightning(attending) | {"x": hostile}, path, _use_new_zipfile_serialization=zipped)
    if zipped and how != "system":  # read, and the call left out
        check_equal(load_tokenizer(path), attending, images(1, 3, 16, 16))
    else:
        with pytest.raises(CheckpointError, match="would have to be executed, which is refused"):
            load_tokenizer(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the same file, read carelessly
    assert mark.exists()


def test_plain_tensors_in_the_format_before_torch_1_6(attending: Any, tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save(lightning(attending), path, _use_new_zipfile_serialization=False)
    check_equal(load_tokenizer(path), attending, images(1, 3, 16, 16))


def test_pooling_and_repeating_instead_of_convolutions(attending: Any, tmp_path: Path):
    """Taming's resamp_with_conv: false; a convolution that does the same is the reference."""
    state = taming_state(attending)
    model = hub.make_vqmodel(tmp_path / "reference", **ATTENTION)
    with torch.no_grad():
        for level in model.encoder.down_blocks[:-1]:
            conv = level.downsamplers[0].conv
            width = conv.weight.shape[0]
            conv.bias.zero_()
            conv.weight.zero_()[:, :, :2, :2] = torch.eye(width)[..., None, None] / 4
        for level in model.decoder.up_blocks[:-1]:
            conv = level.upsamplers[0].conv
            conv.bias.zero_()
            conv.weight.zero_()[:, :, 1, 1] = torch.eye(conv.weight.shape[0])
    state = {k: v for k, v in taming_state(model).items() if "sample.conv" not in k}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    check_equal(load_tokenizer(tmp_path / "model.ckpt"), model, images(2, 3, 16, 16))


# MaskGIT ----------------------------------------------------------------------------------------

MASKGIT = dict(
    resolution=256,
    num_channels=3,
    hidden_channels=32,
    channel_mult=[1, 2, 2],
    num_res_blocks=2,
    attn_resolutions=[16],
    z_channels=8,
    num_embeddings=50,
    quantized_embed_dim=8,
)


class Reference:
    """The published network, slowly: every weight is made where it is first used."""

    def __init__(self, state: dict[str, Tensor] | None = None):
        self.state: dict[str, Tensor] = {} if state is None else state
        self.generator = torch.Generator().manual_seed(0)

    def weight(self, name: str, *shape: int) -> Tensor:
        if name not in self.state:
            fan = max(1, torch.Size(shape[1:]).numel()) if len(shape) > 1 else 25
            noise = torch.randn(shape, generator=self.generator) * fan**-0.5
            self.state[name] = noise + 1 if "norm" in name and "weight" in name else noise
        assert self.state[name].shape == shape
        return self.state[name]

    def conv(self, x: Tensor, name: str, width: int, kernel: int = 3, bias: bool = False) -> Tensor:
        weight = self.weight(f"{name}.weight", width, x.shape[1], kernel, kernel)
        return F.conv2d(
            x, weight, self.weight(f"{name}.bias", width) if bias else None, padding="same"
        )

    def act(self, x: Tensor, name: str) -> Tensor:
        grouped = x.reshape(len(x), 32, -1)
        mean = grouped.mean(-1, keepdim=True)
        scale = (grouped.var(-1, unbiased=False, keepdim=True) + 1e-6).rsqrt()
        x = ((grouped - mean) * scale).view(x.shape)
        width = x.shape[1]
        weight = self.weight(f"{name}.weight", width).view(-1, 1, 1)
        x = x * weight + self.weight(f"{name}.bias", width).view(-1, 1, 1)
        return x * torch.sigmoid(x)

    def block(self, x: Tensor, name: str, width: int) -> Tensor:
        h = self.conv(self.act(x, f"{name}.norm1"), f"{name}.conv1", width)
        h = self.conv(self.act(h, f"{name}.norm2"), f"{name}.conv2", width)
        if x.shape[1] != width:  # MaskGIT's own: the skip starts from the result
            x = self.conv(h, f"{name}.nin_shortcut", width, kernel=1)
        return x + h

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(x, "encoder.conv_in", 32)
        for i, width in enumerate([32, 64, 64]):
            for j in range(2):
                x = self.block(x, f"encoder.down.{i}.block.{j}", width)
            if i < 2:
                x = (
                    x[:, :, ::2, ::2]
                    + x[:, :, 1::2, ::2]
                    + x[:, :, ::2, 1::2]
                    + x[:, :, 1::2, 1::2]
                ) / 4
        for j in range(2):
            x = self.block(x, f"encoder.mid.{j}", 64)
        z = self.conv(self.act(x, "encoder.norm_out"), "encoder.conv_out", 8, kernel=1, bias=True)
        codes = self.weight("quantize.embedding.weight", 50, 8)
        return (z[:, None] - codes[None, :, :, None, None]).square().sum(2).argmin(1)

    def decode(self, ids: Tensor) -> Tensor:
        x = self.weight("quantize.embedding.weight", 50, 8)[ids].permute(0, 3, 1, 2)
        x = self.conv(x, "decoder.conv_in", 64, bias=True)
        for j in range(2):
            x = self.block(x, f"decoder.mid.{j}", 64)
        for i, width in reversed(list(enumerate([32, 64, 64]))):
            for j in range(2):
                x = self.block(x, f"decoder.up.{i}.block.{j}", width)
            if i > 0:
                x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
                x = self.conv(x, f"decoder.up.{i}.upsample_conv", width, bias=True)
        return self.conv(self.act(x, "decoder.norm_out"), "decoder.conv_out", 3, bias=True)


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.safetensors"])
def test_maskgit_against_the_published_architecture(file: str, configured: bool, tmp_path: Path):
    from safetensors.torch import save_file

    reference, pixels = Reference(), images(2, 3, 16, 24)
    expected = reference.encode(pixels)
    decoded = reference.decode(expected)
    if file.endswith(".bin"):
        torch.save(reference.state, tmp_path / file)
    else:
        save_file(reference.state, tmp_path / file)
    if configured:
        config = {"_class_name": "MaskGitVQGAN", **MASKGIT}
        (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.codebook_size, tokenizer.factor) == (50, 4)
    ids = tokenizer.encode_to_ids(pixels)
    assert torch.equal(ids, expected)
    assert len(ids.unique()) > 5
    ours = tokenizer.decode_from_ids(ids)
    torch.testing.assert_close(ours, decoded.clamp(0, 1), rtol=0, atol=1e-5)
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.2  # clamping hides not all


# This package's files ---------------------------------------------------------------------------


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
    assert load_tokenizer("emoji:base").fmap_size(64) == 8
    assert isinstance(load_tokenizer("emoji:superres"), VQGanVAE)


# What cannot be loaded --------------------------------------------------------------------------


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
            "conv2.bias is missing, and would be .* incomplete",
        ),
        (without("decoder."), "decoder.conv_in.bias is missing"),
        (without("encoder.conv_out"), "incomplete: encoder.conv_out.weight is missing"),
        (whole | {"encoder.conv_in.weight": torch.ones(32, 4, 3, 3)}, r"is \[32, 4, 3, 3\], and"),
        (whole | {"quantize.used": torch.ones(9)}, "quantize.used is .*, and would be missing"),
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
        tmp_path / "absent.ckpt": "unknown model",
        "./absent/absent.safetensors": "unknown model",
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
