"""The cascade: sizes, seeds, and ids that are not made twice."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, Muse, SampleOptions, TextEmbeds
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.images import to_pil
from tests.shapes import unchecked


def cascade(shared: bool = True, **text: Any) -> Any:
    """Images of 16, then 32 pixels."""
    vae = tiny.vae()
    base = tiny.maskgit(tiny.transformer(**text), vae=vae, sample_options=dict(timesteps=3))
    superres = tiny.superres(
        model=tiny.transformer(seq_len=64, **text),
        vae=tiny.vae(),
        cond_vae=vae if shared else tiny.randomise(tiny.vae()),
        sample_options=dict(timesteps=3),
    )
    return Muse(base, superres)


def stages(muse: Any, *args: Any, callback: Any = None, **arguments: Any) -> list[torch.Tensor]:
    """The images of both stages."""
    drawn = muse.draw(muse.request(*args, **arguments), callback)
    return [drawn.base_images, drawn.images]


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match=r"base has a cond_image_size.*swapped"):
        Muse(tiny.superres(), tiny.maskgit())
    with pytest.raises(ValueError, match=r"base draws 16 pixels.*cond_image_size 8"):
        Muse(tiny.maskgit(), tiny.superres(cond_image_size=8))
    with pytest.raises(ValueError, match=r"base draws 16 pixels.*cond_image_size None"):
        Muse(tiny.maskgit(), tiny.maskgit())


def test_a_list_of_pictures_of_the_final_size(t5):
    muse = cascade(t5_name=t5, text_embed_dim=None)
    images = muse(["a red car", "two cats"])
    assert isinstance(images, list)
    assert len(images) == 2
    assert all(isinstance(image, Image.Image) for image in images)
    assert {(image.size, image.mode) for image in images} == {((32, 32), "RGB")}
    assert len(muse("a red car")) == 1  # a string is one prompt
    assert Muse(muse.base)("a red car")[0].size == (16, 16)
    with pytest.raises(ValueError, match="texts is empty"):
        muse([])


def test_prompts_seeds_and_negative_prompts_matter(t5):
    muse = cascade(t5_name=t5, text_embed_dim=None)

    def draw(*args: Any, **arguments: Any) -> bytes:
        return muse(*args, **arguments)[0].tobytes()

    same = draw("a red car", seeds=5)
    assert draw(["a red car"], seeds=[5]) == same
    assert draw("two cats", seeds=5) != same
    assert draw("a red car", seeds=6) != same
    assert draw("a red car", seeds=5, negative_texts="blurred") != same


def test_embeddings_instead_of_texts(t5):
    muse = cascade(t5_name=t5, text_embed_dim=None)
    text = muse.base.embed_texts(["a red car"])
    [by_embeds], [by_text] = muse(text_embeds=text, seeds=1), muse(["a red car"], seeds=1)
    assert by_embeds.tobytes() == by_text.tobytes()
    with pytest.raises(ValueError, match="either texts or text_embeds"):
        muse()


def test_an_integer_seed_counts_up():
    muse, text = cascade(), tiny.text(3)
    pictures = muse(text_embeds=text, seeds=7)
    assert pictures == muse(text_embeds=text, seeds=[7, 8, 9])
    assert pictures != muse(text_embeds=text, seeds=[7, 7, 7])
    with pytest.raises(ValueError, match="seeds has 2 values for 3 images"):
        muse(text_embeds=text, seeds=[1, 2])


def test_options_of_each_stage():
    muse, text = cascade(), tiny.text()
    base = stages(muse, text_embeds=text, seeds=1)
    assert [image.shape for image in base] == [(2, 3, 16, 16), (2, 3, 32, 32)]
    other = stages(
        muse, text_embeds=text, seeds=1, superres_options=SampleOptions(timesteps=2, cond_scale=9.0)
    )
    assert torch.equal(other[0], base[0])
    assert not torch.equal(other[1], base[1])
    other = stages(muse, text_embeds=text, seeds=1, base_options=SampleOptions(timesteps=2))
    assert not torch.equal(other[0], base[0])
    assert not torch.equal(other[1], base[1])  # the low resolution reaches the second stage


def test_single_fields_of_the_options():
    muse, text = cascade(), tiny.text()
    request = muse.request(text_embeds=text, cond_scale=5, timesteps=8, superres_timesteps=3)
    base, superres = (request.options[stage] for stage in ("base", "superres"))
    assert (base.cond_scale, base.timesteps) == ([5.0] * 2, [8] * 2)
    assert (superres.cond_scale, superres.timesteps) == ([5.0] * 2, [3] * 2)
    usual = muse.superres.default_options
    assert superres.temperature == [usual.temperature] * 2
    # a mapping changes one stage, on top of a preset too; its own name wins
    changes = dict(base_options={"timesteps": 2}, superres_options={}, base_top_k=3, top_k=7)
    options = muse.request(text_embeds=text, **changes).options
    assert (options["base"].timesteps, options["base"].top_k) == ([2] * 2, [3] * 2)
    assert options["superres"].timesteps == [usual.timesteps] * 2
    assert options["superres"].top_k == [7] * 2
    whole = SampleOptions(timesteps=5)
    one = muse.request(text_embeds=text, base_options=whole, temperature=0.5).options["base"]
    assert (one.timesteps, one.temperature) == ([5] * 2, [0.5] * 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"timestep": 8}, "no 'timestep', did you mean 'timesteps'"),
        ({"seed": 8}, "no 'seed', did you mean 'seeds'"),
        ({"superres_timestep": 8}, "no 'timestep', did you mean 'timesteps'"),
        ({"colour": 8}, "no 'colour'; it has timesteps"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"temperature": None}, "temperature must be a number, not None"),
        ({"temperature": "1.0"}, "temperature must be a number, not '1.0'"),
        ({"timesteps": 4.0}, "timesteps must be a whole number"),
        ({"top_k": 10**30}, "top_k must be at most"),
        ({"seeds": b"2"}, "seeds must be a whole number"),
        ({"seeds": 1e20}, "seeds must be a whole number"),
        ({"base_options": [("timesteps", 2)]}, "base_options must be SampleOptions or a mapping"),
        ({"image_size": "32"}, "image_size must be a whole number, not '32'"),
        ({"preset": 3}, "unknown preset"),
    ],
)
def test_what_is_no_setting(changes, message):
    with pytest.raises(ValueError, match=message):
        cascade()(text_embeds=tiny.text(), **changes)


def test_what_are_no_texts():
    muse = cascade()
    text = tiny.text()
    broken = TextEmbeds(text.embeds * float("nan"), text.mask)
    unseen = TextEmbeds(text.embeds, text.mask & torch.tensor([[True], [False]]))
    for given, message in [
        (dict(texts=["a", None]), "text 2 of 2 must be a string, not None"),
        (dict(texts=3), "text must be a string, not 3"),
        (dict(texts={"a": 1}), "text must be a string"),
        (dict(text_embeds=broken), "NaN"),
        (dict(text_embeds=unseen), "of text 2 no token is seen"),
        (dict(text_embeds="a"), "text_embeds must be a tensor"),
        (
            dict(text_embeds=text.embeds[0]),
            r"text_embeds must be floating-point numbers \(B, L, E\)",
        ),
        (dict(texts="a", negative_texts=["b", 3]), "2 negative_texts for 1 texts"),
        (dict(texts="a", negative_texts=3), "3 negative_texts for 1 texts"),
    ]:
        with unchecked(), pytest.raises(ValueError, match=message):
            muse(**given)


@unchecked()
def test_numbers_of_any_library():
    muse, text = cascade(), tiny.text()
    plain = muse(text_embeds=text, seeds=3, timesteps=4, image_size=32)
    numpy = dict(seeds=np.int32(3), timesteps=np.array([4, 4]), image_size=np.array([32, 32]))
    assert muse(text_embeds=text.embeds.numpy(), **numpy) == muse(
        text_embeds=text.embeds, seeds=3, timesteps=4
    )
    canvas = torch.full((2, 16), 60, dtype=torch.int32)
    assert muse(text_embeds=text, canvases={"base": canvas.numpy()}, **numpy) == plain
    for wrong in (canvas + 1, canvas - 61, canvas.float()):
        with pytest.raises(ValueError, match="canvas"):
            muse(text_embeds=text, canvases={"base": wrong})
    with pytest.raises(ValueError, match="canvases must be a mapping of 'base' and 'superres'"):
        muse(text_embeds=text, canvases={"bas": canvas})


def test_tensors_and_the_low_resolution_can_be_had():
    muse, given = cascade(), dict(text_embeds=tiny.text(), seeds=1, timesteps=3)
    images, low = muse(**given, return_lowres=True)
    assert images == muse(**given)
    assert [image.size for image in low] == [(16, 16)] * 2
    tensors, low_tensors = muse(**given, return_lowres=True, return_pil_images=False)
    assert [to_pil(t)[0].tobytes() for t in (tensors, low_tensors)] == [
        images[0].tobytes(),
        low[0].tobytes(),
    ]
    assert torch.equal(muse(**given, return_pil_images=False), tensors)


@pytest.mark.parametrize("shared", [True, False])
def test_second_stage_reads_the_ids_or_the_pixels_of_the_first(shared):
    muse, text = cascade(shared), tiny.text()
    low = muse.base.generate_ids(text_embeds=text, seeds=[1, 2])
    if shared:  # ids at hand are not decoded and encoded again
        cond = dict(cond_ids=low)
    else:
        cond = dict(cond_images=muse.base.decode(low))
    high = muse.superres.generate(text_embeds=text, seeds=[1, 2], **cond)
    drawn = stages(muse, text_embeds=text, seeds=1)
    assert torch.equal(drawn[0], muse.base.decode(low))
    assert torch.equal(drawn[1], high)


def test_weights_loaded_later_are_seen():
    """Two tokenizers that become equal after the cascade was made share their ids."""
    muse, text = cascade(shared=False), tiny.text()
    muse.superres.cond_vae.load_state_dict(muse.base.vae.state_dict())
    low = muse.base.generate_ids(text_embeds=text, seeds=[1, 2])
    high = muse.superres.generate(text_embeds=text, seeds=[1, 2], cond_ids=low)
    assert torch.equal(stages(muse, text_embeds=text, seeds=1)[1], high)


@pytest.mark.parametrize("shared", [True, False])
def test_a_saved_cascade_draws_the_same_pictures(shared, tmp_path):
    muse = cascade(shared)
    again = Muse.from_pretrained(muse.save(tmp_path / "muse.safetensors"))
    pictures = muse(text_embeds=tiny.text(), seeds=3)
    assert again(text_embeds=tiny.text(), seeds=3) == pictures


def test_a_base_alone_is_saved_too(tmp_path):
    muse = Muse(cascade().base)
    again = Muse.from_pretrained(muse.save(tmp_path / "muse.safetensors"))
    assert again.superres is None
    assert again(text_embeds=tiny.text(), seeds=3) == muse(text_embeds=tiny.text(), seeds=3)


def test_a_base_stopped_early_still_goes_through_the_cascade():
    base, superres = tiny.maskgit(), tiny.superres()
    superres.cond_vae = base.vae
    images = stages(Muse(base, superres), text_embeds=tiny.text(), callback=lambda step: True)
    assert [image.shape[-1] for image in images] == [16, 32]


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_better_decoder_draws_the_same_ids(everywhere, tmp_path):
    """Swapped in, it decodes; the stages still pass ids, as those mean what they meant."""
    muse, text = cascade(), tiny.text()
    before = stages(muse, text_embeds=text, seeds=1)
    low = muse.base.generate_ids(text_embeds=text, seeds=[1, 2])
    better = muse.base.vae.with_decoder(16, 1)
    old = muse.base.vae.decoder[-1].weight
    assert muse.base.swap_vae(better)
    assert muse.superres.cond_vae is not better
    if everywhere:
        assert muse.superres.swap_vae(better)
        assert muse.superres.cond_vae is better
    assert muse.superres.vae is not better  # whose ids are others
    after = stages(muse, text_embeds=text, seeds=1)
    assert torch.equal(after[0], better.decode_from_ids(low.view(2, 4, 4)))
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1], before[1])  # not decoded and encoded again in between
    again = Muse.from_pretrained(muse.save(tmp_path / "muse.safetensors"))
    drawn = stages(again, text_embeds=text, seeds=1)
    assert all(torch.equal(a, b) for a, b in zip(drawn, after, strict=True))
    with safe_open(tmp_path / "muse.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    stored = any(torch.equal(old, tensor) for tensor in tensors)
    assert stored is not everywhere  # the old decoder goes once nothing uses it


def test_a_tokenizer_of_other_ids_is_not_swapped_in():
    muse = cascade()
    other = tiny.randomise(tiny.vae())
    for stage in (muse.base, muse.superres):
        before = stage.vae, stage.cond_vae
        assert not stage.swap_vae(other)
        assert (stage.vae, stage.cond_vae) == before


def test_a_swapped_tokenizer_is_frozen():
    stage = tiny.maskgit()
    better = stage.vae.with_decoder(None, 2).train()
    assert stage.swap_vae(better)
    assert stage.vae is better
    assert not any(p.requires_grad for p in stage.vae.parameters())
    stage.train()
    assert not stage.vae.training


def test_the_stages_draw_with_independent_random_numbers():
    """The high resolution is drawn from p(high | low, text), whatever noise drew the low one.

    With the same noise in both, a token of one untrained stage equals its twin with probability 1
    at one step each; by chance with 1 / 64.
    """
    vae = tiny.vae(codebook_size=64)
    untrained = dict(num_tokens=64, dim=16, depth=1, dim_head=8, heads=2, text_embed_dim=12)
    plain = [MaskGitTransformer(seq_len=16, **untrained) for _ in range(2)]
    for model in plain:
        torch.nn.init.zeros_(model.to_logits.weight)  # every token equally likely
    base = MaskGit(vae=vae, transformer=plain[0], image_size=16)
    superres = MaskGit(
        vae=vae, transformer=plain[1], image_size=16, cond_vae=vae, cond_image_size=8
    )
    text, seeds = tiny.text(100), list(range(100))
    for steps in (1, 8):
        low = base.generate_ids(text_embeds=text, seeds=seeds, timesteps=steps)
        cond = low.view(-1, 4, 4)[:, :2, :2]
        high = superres.generate_ids(text_embeds=text, seeds=seeds, timesteps=steps, cond_ids=cond)
        assert (low == high).float().mean() < 0.03  # 1,600 tokens: 4 standard deviations
    alone = superres.generate_ids(text_embeds=text, seeds=seeds, timesteps=8, cond_ids=cond)
    assert torch.equal(alone, high)
