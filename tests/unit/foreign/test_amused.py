"""aMUSEd against diffusers: its transformer, its scheduler, its pipelines, with random weights."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.foreign import AmusedTransformer
from muse_maskgit_pytorch.images import to_pil, to_tensor
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
