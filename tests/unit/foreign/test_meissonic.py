"""Meissonic against its published network and scheduler (tests/meissonic.py); random weights."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from muse_maskgit_pytorch import CheckpointError, Muse
from muse_maskgit_pytorch.editing import inpaint, outpaint, white
from muse_maskgit_pytorch.images import save_png
from muse_maskgit_pytorch.inference.precision import _copy
from muse_maskgit_pytorch.onnx_export import export_onnx
from muse_maskgit_pytorch.sampling import SampleOptions, make_plan
from muse_maskgit_pytorch.structures import Conditioning
from muse_maskgit_pytorch.words import emphasise
from tests import hub, meissonic

TEXTS = ["a cat", "two dogs"]
LARGE = dict(downsample=True, upsample=True)
MASK = 63
SIZE = 32  # pixels of most of the pictures here: 8 x 8 tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a model whose sides are halved, and its parts."""
    folder = tmp_path_factory.mktemp("meissonic") / "model"
    return folder, hub.make_meissonic(folder, **LARGE)


@pytest.fixture(scope="module")
def muse(made: tuple[Path, Any]) -> Muse:
    return Muse.from_pretrained(made[0])


@torch.no_grad()
def texts_of(parts: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """CLIP's pooled embedding and its states, as the pipeline computes them."""
    tokens = parts.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    output = parts.text_encoder(tokens.input_ids, output_hidden_states=True)
    return output.text_embeds, output.hidden_states[-2]


def branches_of(model: Any, grid: tuple[int, int]) -> list[Conditioning]:
    seen = torch.ones(2, dtype=torch.bool)
    texts = model.text_reader().encode(TEXTS)
    return [Conditioning(text, None, seen, grid) for text in (texts, None)]


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, context: Any, **given: Any) -> Tensor:
    return model.to_logits(model(ids, context, **given))


@pytest.mark.parametrize("kind", [{}, LARGE, dict(num_attention_heads=1, axes_dims_rope=[0, 8, 8])])
def test_logits_are_those_of_the_published_network(kind: dict[str, Any], tmp_path: Path):
    """For squares and other shapes, rows at different steps, no text, and single positions."""
    kind = kind | dict(pooled_projection_dim=16 * kind.get("num_attention_heads", 2))
    parts = hub.make_meissonic(tmp_path / "model", **kind)
    model: Any = Muse.from_pretrained(tmp_path / "model").base.transformer
    states = texts_of(parts, [*TEXTS, "", ""])[::-1]
    left = torch.tensor([47, 3])
    for grid in ((8, 8), (4, 10)):
        ids = torch.randint(64, (2, math.prod(grid)))
        micro = torch.tensor([[4.0 * grid[1], 4.0 * grid[0], 0, 0, 6]]).expand(4, -1)
        rows = ids.repeat(2, 1).view(4, *grid)
        with torch.no_grad():
            expected = parts.transformer(rows, *states, micro, left.repeat(2))
        expected = expected.flatten(2).transpose(1, 2).unflatten(0, (2, 2))
        context = model.encode_context(*branches_of(model, grid))
        found = logits_of(model, ids, context, left=left)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.1
        assert (expected[0] - expected[1]).abs().max() > 1e-2  # the text matters
        at = torch.tensor([[3, 0], [7, 9]])
        some = logits_of(model, ids, context, at=at, left=left)
        wanted = expected.gather(2, at[None, :, :, None].expand(2, -1, -1, 50))
        torch.testing.assert_close(some, wanted, rtol=0, atol=1e-5)


def test_the_time_is_the_steps_that_follow_or_in_training_the_share_masked(
    made: tuple[Path, Any], muse: Muse
):
    model: Any = muse.base.transformer
    context = model.encode_context(*branches_of(model, (8, 8)))
    ids = torch.randint(50, (2, 64)).masked_fill(torch.arange(64) % 4 == 0, MASK)
    first, last = (logits_of(model, ids, context, left=torch.full((2,), left)) for left in (47, 0))
    assert (first - last).abs().max() > 1e-2
    learning = logits_of(model, ids, context)
    assert torch.equal(learning, logits_of(model, ids, context, left=torch.full((2,), 250)))
    loss = muse.base(torch.rand(2, 3, SIZE, SIZE), TEXTS, image_size=SIZE)
    loss.backward()
    assert loss.isfinite()
    model.zero_grad()


def test_contexts_are_taken_apart_and_joined(muse: Muse):
    model: Any = muse.base.transformer
    ids, left = torch.randint(50, (2, 64)), torch.tensor([5, 2])
    whole = model.encode_context(*branches_of(model, (8, 8)))
    expected = logits_of(model, ids, whole, left=left)
    parts = [whole.rows(slice(0, 1)), whole.rows(torch.tensor([1]))]
    assert torch.equal(logits_of(model, ids, parts[0].cat(parts[1]), left=left), expected)
    joined = parts[0].branches(1).cat(parts[1])  # the first has no guidance
    found = logits_of(model, ids, joined, left=left)
    torch.testing.assert_close(found[:, 1], expected[:, 1])
    torch.testing.assert_close(found[1, 0], expected[0, 0])


@torch.no_grad()
def published(
    parts: Any, ids: Tensor, options: SampleOptions, texts: list[str], negative: str, schedule: str
) -> list[Tensor]:
    """The ids after each step of its pipeline's loop, with the options' noise and numbers."""
    steps: Any = options.timesteps
    scale: Any = options.cond_scale
    plan, batch = make_plan(ids == MASK, options), len(ids)
    pooled, states = texts_of(parts, [negative] * batch + texts)
    micro = torch.tensor([[SIZE, SIZE, 0, 0, 6.0]]).expand(2 * batch, -1)
    start = (ids == MASK).float().mean()
    seen = []
    for number in range(steps):
        rows = ids.view(batch, 8, 8).repeat(2, 1, 1)
        left = torch.tensor([steps - 1 - number])
        logits = parts.transformer(rows, states, pooled, micro, left)
        without, with_text = logits.flatten(2).transpose(1, 2).chunk(2)
        ids = meissonic.step(
            without + scale * (with_text - without), ids, mask_id=MASK, number=number, steps=steps,
            schedule=schedule, start=start, uniform=plan.uniform[:, number],
            gumbel=plan.gumbel[:, number],
        )  # fmt: skip
        seen.append(ids)
    return seen


@pytest.mark.parametrize("steps, scale, negative", [(48, 9.0, ""), (7, 3.0, "blurry")])
def test_the_pipeline_draws_the_same(
    steps: int, scale: float, negative: str, made: tuple[Path, Any], muse: Muse
):
    """Token for token in every step, and the pictures."""
    options = muse.base.default_options
    assert (options.timesteps, options.cond_scale) == (48, 9)
    options = options.replace(timesteps=steps, cond_scale=scale, seeds=[5, 6])
    seen: list[Tensor] = []
    drawn = muse.draw(
        muse.request(TEXTS, negative_texts=negative, base_options=options, image_size=SIZE),
        lambda step: seen.append(step.ids),
    )
    canvas = torch.full((2, 64), MASK)
    theirs = published(made[1], canvas, options, TEXTS, negative, "cosine")
    assert len(seen) == len(theirs) == steps
    for now, (ours, their) in enumerate(zip(seen, theirs, strict=True)):
        assert torch.equal(ours, their), now
    assert len(seen[-1].unique()) > 3
    with torch.no_grad():
        shape = (2, 8, 8, 8)  # rows, height, width, channels of the latents
        picture = made[1].vqvae.decode(theirs[-1], force_not_quantize=True, shape=shape).sample
    torch.testing.assert_close(drawn.images, picture.clip(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("hole", [(0, 8), (3, 7)])
def test_inpainting_is_that_of_the_pipeline(
    hole: tuple[int, int], made: tuple[Path, Any], muse: Muse
):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[slice(*hole), 2:] = True
    ids = torch.randint(50, (1, 64))
    canvas = ids.masked_fill(mask.flatten(), MASK)
    options = muse.base.preset("inpaint")
    assert (options.timesteps, options.cond_scale) == (64, 9)
    options = options.replace(seeds=[3], timesteps=12)
    ours = muse.base.generate_ids(["a cat"], canvas=canvas, options=options, image_size=SIZE)
    theirs = published(made[1], canvas, options, ["a cat"], "", "linear")[-1]
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[~mask.view(1, -1)], ids[~mask.view(1, -1)])


def test_it_draws_and_is_saved_as_others_are(muse: Muse, tmp_path: Path):
    options: dict[str, Any] = dict(seeds=1, timesteps=3, image_size=SIZE)
    assert muse.image_size == 256  # 64 x 64 tokens, computed at 32 x 32 positions
    [picture] = muse("a cat", **options)
    path = save_png(picture, tmp_path / "cat.png")
    assert muse.like(path)[0].tobytes() == picture.tobytes()
    again = Muse.from_pretrained(muse.save(tmp_path / "meissonic.safetensors"))
    assert again.fingerprint == muse.fingerprint
    assert again("a cat", **options)[0].tobytes() == picture.tobytes()
    with pytest.raises(ValueError, match=r"odd side|multiple"):
        muse("a cat", **options | dict(image_size=(32, 36)))


def test_what_it_cannot_do_is_said(muse: Muse, tmp_path: Path):
    with pytest.raises(ValueError, match="reads no low-resolution tokens"):
        muse.base.transformer.with_low_resolution(50, 16)
    with pytest.raises(ValueError, match="a MeissonicTransformer does not"):
        emphasise(muse, "a cat", {"cat": 2.0})
    with pytest.raises(ValueError, match=r"text_embeds are .*this transformer reads"):
        muse(text_embeds=torch.rand(1, 12, 32), image_size=SIZE)
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="reads how many steps follow"):
        export_onnx(muse, tmp_path / "onnx")


def test_edits(tmp_path: Path):
    """Without the halving: 32 x 32 tokens."""
    hub.make_meissonic(tmp_path / "model")
    muse = Muse.from_pretrained(tmp_path / "model")
    options: dict[str, Any] = dict(seeds=1, timesteps=2)
    [picture] = muse("a cat", **options)
    assert picture.size == (128, 128)
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 64, 128))
    [left] = inpaint(muse, picture, "a dog", white(mask), **options)
    kept = (96, 0, 128, 128)
    assert left.crop(kept).tobytes() == picture.crop(kept).tobytes()
    assert left.tobytes() != picture.tobytes()
    assert outpaint(muse, picture, "a lake", right=64, **options)[0].size == (192, 128)


def test_rows_do_not_depend_on_their_neighbours(muse: Muse):
    """Also with other numbers of steps, whose times differ at each step."""
    options = muse.base.default_options.replace(timesteps=[3, 6], seeds=[1, 2])
    both = muse.base.generate_ids(TEXTS, options=options, image_size=SIZE)
    for row, text in enumerate(TEXTS):
        alone = options.with_rows(2).take([row])
        [ids] = muse.base.generate_ids([text], options=alone, image_size=SIZE)
        assert torch.equal(ids, both[row])
    same = options.replace(seeds=[1, 1])
    different = muse.base.generate_ids(["a cat"] * 2, options=same, image_size=SIZE)
    assert not torch.equal(different[0], different[1])


def test_bfloat16_moves_logits_a_little(muse: Muse):
    """The copy of `inference.precision`, which follows the same code."""
    plain: Any = muse.base.transformer
    ids, left = torch.randint(50, (2, 64)), torch.tensor([5, 2])
    context = plain.encode_context(*branches_of(plain, (8, 8)))
    expected = logits_of(plain, ids, context, left=left)
    found = logits_of(_copy(plain, "bfloat16"), ids, context, left=left)
    assert 0 < (found - expected).std() / expected.std() < 0.05


def test_adapters(muse: Muse, made: tuple[Path, Any], tmp_path: Path):
    """Put beside the layers of the blocks, kept in a folder, and added to the weights."""
    pytest.importorskip("peft")
    from muse_maskgit_pytorch.lora import add_lora, save_lora

    trained: Any = Muse.from_pretrained(made[0]).base.transformer
    add_lora(trained, 2, targets=["attn.to_q", "attn.to_k", "attn.to_v"])
    with torch.no_grad():
        for name, value in trained.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.3)
    save_lora(trained, tmp_path / "lora", "base")
    drawing = Muse.from_pretrained(made[0]).load_lora(tmp_path / "lora")
    ids, left = torch.randint(50, (2, 64)), torch.tensor([5, 2])
    context = trained.encode_context(*branches_of(trained, (8, 8)))
    expected = logits_of(trained, ids, context, left=left)
    merged: Any = drawing.base.transformer
    torch.testing.assert_close(logits_of(merged, ids, context, left=left), expected)
    plain: Any = muse.base.transformer
    assert (logits_of(plain, ids, context, left=left) - expected).abs().max() > 1e-2


def test_adapters_of_the_training_script(muse: Muse, made: tuple[Path, Any], tmp_path: Path):
    """Its train_meissonic.py compiles the network, adapts it, and saves its layers as a U-Net's."""
    peft = pytest.importorskip("peft")
    from diffusers.loaders.lora_pipeline import LoraLoaderMixin

    network = copy.deepcopy(made[1].transformer)
    compiled: Any = torch.compile(network)
    how = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False
    )
    peft.inject_adapter_in_model(how, network)
    network.peft_config = {"default": how}
    layers = peft.get_peft_model_state_dict(compiled)
    LoraLoaderMixin.save_lora_weights(tmp_path / "lakes", unet_lora_layers=layers)
    drawing = Muse.from_pretrained(made[0]).load_lora(tmp_path / "lakes", 2)  # alpha / rank
    ids, left = torch.randint(50, (2, 64)), torch.tensor([5, 2])
    states = texts_of(made[1], TEXTS)[::-1]
    micro = torch.tensor([[32.0, 32, 0, 0, 6]]).expand(2, -1)
    with torch.no_grad():
        expected = network(ids.view(2, 8, 8), *states, micro, left).flatten(2).transpose(1, 2)
    found: list[Tensor] = []
    for model in (drawing.base.transformer, muse.base.transformer):
        given: Any = model
        context = given.encode_context(branches_of(given, (8, 8))[0])
        found.append(logits_of(given, ids, context, left=left)[0])
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
    assert (found[1] - expected).abs().max() > 0.1


def changed(folder: Path, file: str) -> Callable[[dict[str, Any]], None]:
    """What changes a part's configuration."""

    def change(changes: dict[str, Any]) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("transformer/config.json", {"num_layers": 3}, "does not fit Meissonic's transformer"),
        ("transformer/config.json", {"num_layers": "many"}, "num_layers must be a whole number"),
        ("transformer/config.json", {"num_layers": 10**9}, "depth"),
        ("transformer/config.json", {"upsample": False}, "downsample and upsample differ"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds is true"),
        ("transformer/config.json", {"pooled_projection_dim": 20}, "is not the width 32"),
        ("transformer/config.json", {"axes_dims_rope": [4, 6, 8]}, "must add up to the 16"),
        ("transformer/config.json", {"axes_dims_rope": [3, 7, 6]}, "three even numbers"),
        ("transformer/config.json", {"axes_dims_rope": 16}, "axes_dims_rope must be three"),
        ("transformer/config.json", {"joint_attention_dim": 24}, "belongs to another model"),
        ("scheduler/scheduler_config.json", {"mask_token_id": 3}, "mask_id 3 must be"),
        ("text_encoder/config.json", {"projection_dim": 99}, "belongs to another model"),
    ],
)
def test_what_does_not_fit_is_refused(
    file: str, change: dict[str, Any], message: str, made: tuple[Path, Any], tmp_path: Path
):
    shutil.copytree(made[0], tmp_path / "model")
    changed(tmp_path / "model", file)(change)
    with pytest.raises(CheckpointError, match=message):
        Muse.from_pretrained(tmp_path / "model")


def test_another_network_of_the_same_name(made: tuple[Path, Any], tmp_path: Path):
    shutil.copytree(made[0], tmp_path / "model")
    path = tmp_path / "model" / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["num_single_layers"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another Transformer2DModel than Meissonic's"):
        Muse.from_pretrained(tmp_path / "model")


def test_a_part_that_is_missing(made: tuple[Path, Any], tmp_path: Path):
    shutil.copytree(made[0], tmp_path / "model")
    (tmp_path / "model/transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights of the transformer"):
        Muse.from_pretrained(tmp_path / "model")
