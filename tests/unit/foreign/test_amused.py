"""aMUSEd against diffusers: its transformer, its scheduler, its pipelines, with random weights."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from muse_maskgit_pytorch import CheckpointError, Muse, TextEncoderError, open_model
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.editing import free, outpaint, vary
from muse_maskgit_pytorch.evaluation import tuning
from muse_maskgit_pytorch.foreign import AmusedTransformer
from muse_maskgit_pytorch.images import save_png, to_pil, to_tensor
from muse_maskgit_pytorch.inference.precision import _copy
from muse_maskgit_pytorch.sampling import SampleOptions, make_plan
from muse_maskgit_pytorch.structures import Conditioning
from tests import hub

TEXTS = ["a cat", "two dogs"]
KINDS: dict[str, dict[str, Any]] = {
    "256": {},
    "512": dict(downsample=True, upsample=True),
    "biases": dict(use_bias=True),
    "plain norms": dict(ln_elementwise_affine=False),
    "one width": dict(block_out_channels=32, layer_norm_eps=1e-5),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, and diffusers' pipeline of it."""
    folder = tmp_path_factory.mktemp("amused") / "model"
    return folder, hub.make_amused(folder)


@pytest.fixture(scope="module")
def muse(made: tuple[Path, Any]) -> Muse:
    return Muse.from_pretrained(made[0])


def texts_of(pipeline: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """CLIP's pooled embedding and its states, as the pipelines compute them."""
    reader = pipeline.tokenizer
    tokens = reader(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = pipeline.text_encoder(tokens.input_ids, output_hidden_states=True)
    return output.text_embeds, output.hidden_states[-2]


@torch.no_grad()
def logits_of(model: AmusedTransformer, ids: Tensor, *branches: Conditioning) -> Tensor:
    return model.to_logits(model(ids, model.encode_context(*branches)))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_diffusers(kind: str, tmp_path: Path):
    """For squares and other shapes, with a text, without one, and at single positions."""
    pipeline = hub.make_amused(tmp_path / "model", **KINDS[kind])
    model: Any = Muse.from_pretrained(tmp_path / "model").base.transformer
    embeds = model.text_reader().encode(TEXTS)
    pooled, states = texts_of(pipeline, [*TEXTS, "", ""])
    for grid in ((8, 8), (4, 10)):
        ids = torch.randint(64, (2, math.prod(grid)))
        micro = torch.tensor([[4.0 * grid[1], 4.0 * grid[0], 0, 0, 6]]).expand(4, -1)
        with torch.no_grad():
            rows = ids.repeat(2, 1).view(4, *grid)
            expected = pipeline.transformer(rows, states, pooled, micro)
        expected = expected.flatten(2).transpose(1, 2).unflatten(0, (2, 2))
        seen = torch.ones(2, dtype=torch.bool)
        branches = [Conditioning(text, None, seen, grid) for text in (embeds, None)]
        found = logits_of(model, ids, *branches)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.1
        assert (expected[0] - expected[1]).abs().max() > 1e-2  # the text matters
        at = torch.tensor([[3, 0], [7, 9]])
        context = model.encode_context(*branches)
        with torch.no_grad():
            some = model.to_logits(model(ids, context, at=at))
        wanted = expected.gather(2, at[None, :, :, None].expand(2, -1, -1, 50))
        torch.testing.assert_close(some, wanted, rtol=0, atol=1e-5)


def test_micro_conditions(made: tuple[Path, Any], muse: Muse):
    """They are diffusers', they change the logits, and they belong to the fingerprint."""
    model: Any = Muse.from_pretrained(made[0])
    network = model.base.transformer
    network.set_micro_conditions(crop=(3, 5), aesthetic_score=4.5)
    ids, (pooled, states) = torch.randint(50, (1, 64)), texts_of(made[1], ["a cat"])
    with torch.no_grad():
        micro = torch.tensor([[32.0, 32, 3, 5, 4.5]])
        expected = made[1].transformer(ids.view(1, 8, 8), states, pooled, micro)
    branch = Conditioning(network.text_reader().encode("a cat"), None, torch.ones(1) > 0)
    [found] = logits_of(network, ids, branch)
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
    [before] = logits_of(muse.base.transformer, ids, branch)  # type: ignore[arg-type]
    assert (found - before).abs().max() > 1e-3
    assert model.fingerprint != muse.fingerprint
    for wrong in (dict(crop=[1]), dict(crop=[-1, 0]), dict(aesthetic_score=11)):
        with pytest.raises(ValueError, match=r"crop|aesthetic_score"):
            network.set_micro_conditions(**wrong)


def test_contexts_are_taken_apart_and_joined(muse: Muse):
    model: Any = muse.base.transformer
    ids, text = torch.randint(50, (2, 64)), model.text_reader().encode(TEXTS)
    seen = torch.ones(2, dtype=torch.bool)
    whole = model.encode_context(Conditioning(text, None, seen), Conditioning(None, None, seen))
    with torch.no_grad():
        expected = model(ids, whole)
        parts = [whole.rows(slice(0, 1)), whole.rows(torch.tensor([1]))]
        assert torch.equal(model(ids, parts[0].cat(parts[1])), expected)
        joined = parts[0].branches(1).cat(parts[1])  # the first has no guidance
        found = model(ids, joined)
    torch.testing.assert_close(found[:, 1], expected[:, 1])
    torch.testing.assert_close(found[1, 0], expected[0, 0])


class Noise:
    """Our noise in the places where diffusers' scheduler draws its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mask: Tensor, options: SampleOptions):
        self.plan, self.now = make_plan(mask, options), -1
        amused: Any = pytest.importorskip("diffusers.schedulers.scheduling_amused")
        monkeypatch.setattr(amused.torch, "multinomial", self.multinomial)
        monkeypatch.setattr(amused, "gumbel_noise", self.gumbel)

    def multinomial(self, probs: Tensor, count: int, generator: Any = None) -> Tensor:
        self.now += 1
        cdf = probs.cumsum(-1)
        point = self.plan.uniform[:, self.now].reshape(-1, 1) * cdf[:, -1:]
        return torch.searchsorted(cdf, point, right=True)

    def gumbel(self, like: Tensor, generator: Any = None) -> Tensor:
        return self.plan.gumbel[:, self.now]


@pytest.mark.parametrize("steps, scale", [(12, 10.0), (7, 3.0), (5, 1.0)])
def test_the_pipeline_draws_the_same(
    steps: int, scale: float, made: tuple[Path, Any], muse: Muse, monkeypatch: pytest.MonkeyPatch
):
    """Token for token in every step, and the pictures; with a negative prompt, too."""
    pipeline, options = made[1], muse.base.default_options
    assert options.timesteps == 12
    assert options.cond_scale == 10
    options = options.replace(timesteps=steps, cond_scale=scale, seeds=[5, 6])
    for negative in (None, "blurry"):
        seen: list[Tensor] = []
        drawn = muse.draw(
            muse.request(TEXTS, negative_texts=negative, base_options=options),
            lambda step, seen=seen: seen.append(step.ids),
        )
        theirs: list[Tensor] = []
        with monkeypatch.context() as patch:
            Noise(patch, torch.ones(2, 64, dtype=torch.bool), options)
            picture = pipeline(
                TEXTS,
                num_inference_steps=steps,
                guidance_scale=scale,
                negative_prompt=negative and [negative] * 2,
                output_type="pt",
                callback=lambda _, timestep, ids, theirs=theirs: theirs.append(ids.flatten(1)),
            ).images
        assert len(seen) == len(theirs) == steps
        for now, (ours, their) in enumerate(zip(seen, theirs, strict=True)):
            assert torch.equal(ours, their), now
        assert len(seen[-1].unique()) > 3
        torch.testing.assert_close(drawn.images, picture, rtol=0, atol=1e-5)


def pictures(*seeds: int) -> list[Image.Image]:
    made = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return to_pil(torch.stack(made))


@pytest.mark.parametrize("hole", [(0, 8), (3, 7)])
def test_inpainting_is_that_of_the_pipeline(
    hole: tuple[int, int], made: tuple[Path, Any], muse: Muse, monkeypatch: pytest.MonkeyPatch
):
    from diffusers import AmusedInpaintPipeline

    kind: Any = AmusedInpaintPipeline
    pipeline = kind(**made[1].components | {"scheduler": copy.deepcopy(made[1].scheduler)})
    [image] = pictures(1)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[slice(*hole), 2:] = True
    pixels = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    tensor = to_tensor(image)[None]
    ids = muse.base.vae.encode_to_ids(tensor).flatten(1)
    canvas = ids.masked_fill(mask.flatten(), muse.base.transformer.mask_id)
    options = muse.base.preset("inpaint").replace(seeds=[3])
    ours = muse.base.generate_ids(["a cat"], canvas=canvas, options=options)
    Noise(monkeypatch, mask.view(1, -1), options)
    theirs = pipeline(
        ["a cat"],
        image=image,
        mask_image=Image.fromarray(pixels.numpy()),
        num_inference_steps=12,
        guidance_scale=10.0,
        output_type="latent",
    ).images
    assert torch.equal(ours, theirs.flatten(1))
    assert torch.equal(ours[~mask.view(1, -1)], ids[~mask.view(1, -1)])


def test_edits_precisions_and_best_of(muse: Muse, tmp_path: Path):
    options: dict[str, Any] = dict(seeds=1, timesteps=3)
    [picture] = pictures(1)
    assert outpaint(muse, picture, "a lake", right=16, **options)[0].size == (48, 32)
    assert vary(muse, picture, "a lake", strength=0.5, **options)[0].size == (32, 32)
    assert free(muse, picture, "a hill", at=(100,), seeds=1)[0][0].size == (32, 32)
    best = muse.best_of(2, lambda image, text: to_tensor(image).mean().item(), "a cat", **options)
    assert muse.like(save_png(best[0], tmp_path / "best.png"))[0].tobytes() == best[0].tobytes()
    ids = torch.full((1, 64), muse.base.transformer.mask_id)
    text = muse.base.embed_texts("a cat")
    logits = {}
    for precision in ("float32", "reference"):
        muse.precision = precision  # type: ignore[assignment]
        denoiser = muse.base.denoiser(text, SampleOptions(cond_scale=2.0))
        hidden, _ = denoiser.hidden(ids, torch.tensor([2.0]))
        logits[precision] = denoiser.network.to_logits(hidden)
    muse.precision = "float32"
    torch.testing.assert_close(logits["float32"], logits["reference"], rtol=0, atol=1e-5)


def test_one_file_holds_it_all(made: tuple[Path, Any], muse: Muse, tmp_path: Path):
    again = Muse.from_pretrained(muse.save(tmp_path / "amused.safetensors"))
    assert again.fingerprint == muse.fingerprint
    drawn = [model(TEXTS, seeds=1, timesteps=3)[1].tobytes() for model in (muse, again)]
    assert drawn[0] == drawn[1]
    assert open_model(made[0], "cpu").fingerprint == muse.fingerprint


def test_a_revision_of_the_hub(made: tuple[Path, Any], tmp_path: Path, monkeypatch: Any):
    """All parts are of it; so is the text encoder of a file that was made of them."""
    hub.make_hub(tmp_path / "home", {"me/amused@v2": made[0]})  # and none at main
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    model = Muse.from_pretrained("me/amused", revision="v2")
    assert model.base.transformer.text_encoder == "me/amused@v2"
    assert Muse.from_pretrained(model.save(tmp_path / "it.safetensors"))("a cat", timesteps=1)
    with pytest.raises(CheckpointError, match="me/amused"):
        Muse.from_pretrained("me/amused")


def test_presets_are_searched_on_it(
    made: tuple[Path, Any], resnet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`muse tune` writes a file of the whole model, since its folder has no place for presets."""
    for name, image in enumerate(pictures(*range(9))):
        image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}")
    for axis in ("TEMPERATURES", "NOISE_SCHEDULES", "CHOICE_TEMPERATURES", "TOP_P"):
        monkeypatch.setattr(tuning, axis, getattr(tuning, axis)[:1])
    monkeypatch.setattr(tuning, "GUIDANCE", ({"cond_scale": 2.0}, {"cond_scale": 4.0}))
    command = ["tune", f"--model={made[0]}", f"--data={tmp_path}", "--preset=fast", "--timesteps=2"]
    command += [f"--network={resnet}", "--score=fid", "--seeds=1", "--policies=[confidence]"]
    assert main([*command, "--rounds=1", f"--out={tmp_path}/out.safetensors", "--device=cpu"]) == 0
    tuned = Muse.from_pretrained(tmp_path / "out.safetensors")
    assert tuned.base.preset("fast").timesteps == 2
    assert tuned.base.preset("inpaint").noise_schedule == "linear32"
    assert tuned("a cat", preset="fast", seeds=1)


def test_half_precision_alone(tmp_path: Path):
    pipeline = hub.make_amused(tmp_path / "model", variant="fp16")
    assert not [*tmp_path.rglob("model.safetensors")]
    model: Any = Muse.from_pretrained(tmp_path / "model").base.transformer
    assert model.dtype == torch.float32
    pooled, states = texts_of(pipeline, ["a cat"])
    found = model.text_reader().encode("a cat").embeds
    torch.testing.assert_close(found[:, 0], pooled)
    torch.testing.assert_close(found[:, 1:, :12], states)
    weight = pipeline.transformer.state_dict()["project_to_hidden.weight"]
    assert torch.equal(model.project_to_hidden.weight, weight)


@pytest.mark.parametrize(
    "part, message",
    [
        ("transformer/config.json", "has no transformer/config.json"),
        ("transformer/diffusion_pytorch_model.safetensors", "no weights of the transformer"),
        ("vqvae/diffusion_pytorch_model.safetensors", "no weights of a tokenizer"),
        ("scheduler/scheduler_config.json", "has no scheduler/scheduler_config.json"),
        ("text_encoder/config.json", "has no text_encoder/config.json"),
        ("text_encoder/model.safetensors", "text encoder in .* cannot be read"),
    ],
)
def test_missing_parts_are_named(part: str, message: str, made: tuple[Path, Any], tmp_path: Path):
    shutil.copytree(made[0], tmp_path / "model")
    (tmp_path / "model" / part).unlink()
    with pytest.raises((CheckpointError, TextEncoderError), match=message):
        Muse.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("model_index.json", {"transformer": ["diffusers", "FluxModel"]}, "those of aMUSEd"),
        ("transformer/config.json", {"hidden_size": 48}, "does not fit aMUSEd's transformer"),
        ("transformer/config.json", {"hidden_size": "many"}, "hidden_size"),
        ("transformer/config.json", {"downsample": True}, "downsample and upsample differ"),
        ("transformer/config.json", {"micro_cond_embed_dim": 7}, "must be 5 times"),
        ("scheduler/scheduler_config.json", {"mask_token_id": 3}, "mask_id 3 must be"),
        ("scheduler/scheduler_config.json", {"masking_schedule": "x"}, "masking_schedule 'x'"),
        ("text_encoder/config.json", {"hidden_size": 99}, "belongs to another model"),
    ],
)
def test_what_does_not_fit_is_refused(
    file: str, change: dict[str, Any], message: str, made: tuple[Path, Any], tmp_path: Path
):
    shutil.copytree(made[0], tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        Muse.from_pretrained(tmp_path / "model")


def test_a_tokenizer_of_another_model(made: tuple[Path, Any], tmp_path: Path):
    shutil.copytree(made[0], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vqvae")
    hub.make_vqmodel(tmp_path / "model" / "vqvae", num_vq_embeddings=40)
    with pytest.raises(CheckpointError, match=r"transformer of 50 codes and a tokenizer .* of 40"):
        Muse.from_pretrained(tmp_path / "model")


def test_calls_that_cannot_be(made: tuple[Path, Any], muse: Muse, tmp_path: Path):
    with pytest.raises(ValueError, match=r"text_embeds are .*must|this transformer reads"):
        muse(text_embeds=torch.rand(1, 12, 20))
    with pytest.raises(ValueError, match="reads no low-resolution tokens"):
        muse.base.transformer.with_low_resolution(50, 16)
    with pytest.warns(UserWarning, match="exceed 12 tokens and are cut"):
        muse("a cat that is far too long for it", timesteps=1, seeds=1)


def test_bfloat16_moves_logits_a_little(muse: Muse):
    """The copy of `inference.precision`, which follows the same code."""
    plain: Any = muse.base.transformer
    branches = muse.base.conditioner.branches(muse.base.embed_texts("a cat"))
    ids = torch.randint(50, (1, 64))
    expected = logits_of(plain, ids, *branches)
    found = logits_of(_copy(plain, "bfloat16"), ids, *branches)  # type: ignore[arg-type]
    assert 0 < (found - expected).std() / expected.std() < 0.05
