"""Editing: what is kept, what is drawn, what does not matter, and what is refused."""

from typing import Any

import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import Muse, editing
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.editing.pixels import fitted_mask, windows
from muse_maskgit_pytorch.images import record_of, resize, save_png, to_pil, to_tensor
from muse_maskgit_pytorch.provenance import read_records

HALF = editing.box((32, 32), 0, 16, 32, 32)


@pytest.fixture(scope="module")
def muse(t5: str) -> Any:
    """Pictures of 16, then 32 pixels, in 4 x 4 and 8 x 8 tokens of 4 pixels."""
    torch.manual_seed(1)
    vae, text = tiny.vae(), dict(t5_name=t5, text_embed_dim=None)
    base = tiny.maskgit(tiny.transformer(**text), vae=vae, sample_options=dict(timesteps=4))
    high = tiny.transformer(seq_len=64, **text)
    superres = tiny.superres(
        model=high, vae=tiny.vae(), cond_vae=vae, sample_options=dict(timesteps=3)
    )
    return Muse(base, superres)


def picture(seed: int = 0, height: int = 32, width: int = 32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return to_pil(torch.rand(3, height, width, generator=generator))[0]


def pixels(image: Image.Image) -> Any:
    return (to_tensor(image) * 255).round().int()


def raw(images: Any) -> list[bytes]:
    """The pixels alone: equal pictures may have been drawn in different ways."""
    return [image.tobytes() for image in images]


def same(some: list[Image.Image], others: list[Image.Image]) -> bool:
    """Equal but for what a decoder rounds differently in batches of other sizes."""
    pairs = zip(some, others, strict=True)
    return all(int((pixels(a) - pixels(b)).abs().max()) <= 1 for a, b in pairs)


# Masks ----------------------------------------------------------------------------------------


def test_both_conventions_of_mask_images():
    grey = Image.new("L", (3, 1))
    grey.putdata([0, 127, 255])
    assert editing.white(grey).tolist() == [[False, False, True]]
    clear = Image.new("RGBA", (3, 1))
    clear.putdata([(9, 9, 9, 255), (255, 255, 255, 0), (9, 9, 9, 128)])
    assert editing.transparent(clear).tolist() == [[False, True, False]]
    with pytest.raises(ValueError, match="no transparency: if its white"):
        editing.transparent(grey)


def test_white_in_every_kind_of_image():
    """16 bits are not clipped to 8, and what is transparent is no white."""
    wanted = [[True, False]]
    deep = Image.new("I;16", (2, 1))
    deep.putdata([65535, 300])
    assert editing.white(deep).tolist() == wanted
    layer = Image.new("RGBA", (2, 1))
    layer.putdata([(255, 255, 255, 255), (255, 255, 255, 0)])
    assert editing.white(layer).tolist() == wanted
    real = Image.new("F", (2, 1))
    real.putdata([1.0, 0.2])
    assert editing.white(real).tolist() == wanted
    assert editing.white(Image.new("1", (2, 1), 1)).all()


def test_thin_lines_of_a_mask_stay_when_it_is_scaled_down(muse):
    line = torch.eye(128, dtype=torch.bool)
    scaled = fitted_mask(line, picture(0, 128, 128), (32, 32))
    assert scaled.diagonal().all()


def test_the_box_is_left_top_right_bottom():
    mask = editing.box((4, 6), 1, 2, 5, 3)
    assert mask.shape == (4, 6)
    assert mask.nonzero().tolist() == [[2, 1], [2, 2], [2, 3], [2, 4]]
    for wrong in [(1, 1, 1, 2), (0, 0, 7, 2), (-1, 0, 2, 2), (3, 0, 2, 2), (0, 3, 2, 2)]:
        with pytest.raises(ValueError, match="inside the picture's 6 x 4 pixels"):
            editing.box((4, 6), *wrong)


# Pixels ---------------------------------------------------------------------------------------


def test_spreading_keeps_what_is_known_and_stays_among_its_values():
    torch.manual_seed(0)
    values, known = torch.rand(2, 3, 13, 22), torch.rand(2, 1, 13, 22) < 0.1
    filled = editing.spread(values, known)
    assert torch.equal(filled.where(known, values), values)
    assert filled.max() <= values.where(known, 0.0).max() + 1e-6
    constant = editing.spread(torch.full_like(values, 0.7).where(known, torch.nan), known)
    assert torch.allclose(constant, torch.full_like(values, 0.7))
    assert not editing.spread(values, torch.zeros_like(known)).any()


def test_the_composite_keeps_pixels_and_corrects_the_seam():
    given = torch.full((1, 3, 8, 24), 0.75)
    drawn = torch.full((1, 3, 8, 24), 0.5)
    repaint = torch.zeros(1, 1, 8, 24, dtype=torch.bool)
    repaint[..., 8:] = True
    row = editing.composite(given, drawn, repaint, feather=4)[0, 0, 0]
    assert (row[:8] == 0.75).all()
    # a share of the error of 0.25: 4/4 beside the seam, then 3/4, 2/4, 1/4, 0
    assert row[8:13].tolist() == pytest.approx([0.75, 0.6875, 0.625, 0.5625, 0.5], abs=0.03)
    assert (row[12:] == 0.5).all()
    hard = editing.composite(given, drawn, repaint, feather=0)
    assert torch.equal(hard, torch.where(repaint, drawn, given))


# Inpainting -----------------------------------------------------------------------------------


def test_kept_pixels_come_back_exactly(muse):
    source = picture()
    [drawn] = editing.inpaint(muse, source, "a red car", HALF, seeds=3)
    assert torch.equal(pixels(drawn)[:, :16], pixels(source)[:, :16])
    assert not torch.equal(pixels(drawn)[:, 16:], pixels(source)[:, 16:])
    [raw] = editing.inpaint(muse, source, "a red car", HALF, seeds=3, blend=False)
    assert not torch.equal(pixels(raw)[:, :16], pixels(source)[:, :16])


def test_the_tokens_away_from_the_mask_are_those_of_the_picture(muse):
    seen = []
    editing.inpaint(muse, picture(), "a red car", HALF, grow=0, seeds=3, callback=seen.append)
    source = to_tensor(picture())[None]
    hidden = editing.spread(source, ~HALF[None, None])
    ids = muse.superres.vae.encode_to_ids(hidden).flatten(1)
    steps = [step for step in seen if step.ids.shape[1] == 64]
    assert len(steps) == 3
    for step in steps:
        assert torch.equal(step.ids[:, :32], ids[:, :32])
        assert not step.mask[:, :32].any()
    base = [step for step in seen if step.ids.shape[1] == 16]
    assert len(base) == 4
    assert all((step.mask.sum(1) <= 8).all() for step in base)


def test_what_lies_under_the_mask_does_not_matter(muse):
    source, other = picture(), picture()
    other.paste((255, 0, 0), (0, 16, 32, 32))
    assert source != other
    arguments: Any = dict(texts="a red car", masks=HALF, seeds=3)
    drawn = editing.inpaint(muse, source, **arguments)
    assert raw(editing.inpaint(muse, other, **arguments)) == raw(drawn)
    other.paste((255, 0, 0), (0, 0, 4, 4))  # what is kept does
    assert raw(editing.inpaint(muse, other, **arguments)) != raw(drawn)


def test_text_seed_and_negative_text_matter(muse):
    def draw(text: str | None = "a red car", **changes: Any) -> Any:
        changes = {"seeds": 3, **changes}
        return raw(editing.inpaint(muse, picture(), text, HALF, **changes))

    assert draw() == draw()
    assert draw("two cats") != draw()
    assert draw(None) != draw()
    assert draw(None) == draw("")
    assert draw(seeds=4) != draw()
    assert draw(negative_texts="blurred") != draw()


def test_a_full_mask_is_generation(muse):
    whole = torch.ones(32, 32, dtype=torch.bool)
    with pytest.warns(UserWarning, match="repaints the whole picture"):
        drawn = editing.inpaint(muse, picture(), "a red car", whole, seeds=3)
    assert raw(drawn) == raw(muse("a red car", seeds=3))


def test_one_for_all_or_one_each(muse):
    sources, texts = [picture(0), picture(1)], ["a red car", "two cats"]
    masks = [HALF, editing.box((32, 32), 0, 0, 16, 32)]
    both = editing.inpaint(muse, sources, texts, masks, seeds=[3, 4])
    alone = [
        editing.inpaint(muse, source, text, mask, seeds=seed)[0]
        for source, text, mask, seed in zip(sources, texts, masks, [3, 4], strict=True)
    ]
    assert same(both, alone)
    shared = editing.inpaint(muse, sources[0], texts, masks[0], seeds=[3, 4])
    assert same(shared[:1], both[:1])
    assert len(editing.inpaint(muse, sources[0], texts[0], masks[0], seeds=[3, 4, 5])) == 3


def test_a_base_alone_is_edited_too(muse):
    alone = Muse(muse.base)
    mask = editing.box((16, 16), 0, 8, 16, 16)
    [drawn] = editing.inpaint(alone, picture(0, 16, 16), "a red car", mask, seeds=3)
    assert drawn.size == (16, 16)
    assert torch.equal(pixels(drawn)[:, :8], pixels(picture(0, 16, 16))[:, :8])


def test_sizes_that_differ_are_scaled_and_said(muse):
    with pytest.warns(UserWarning, match="picture of 64 x 64 pixels is scaled to 32 x 32$"):
        editing.inpaint(muse, picture(0, 64, 64), "a", editing.box((64, 64), 0, 0, 32, 64))
    with pytest.warns(UserWarning, match="48 x 32 .* scaled to 32 x 32, and its margins are cut"):
        editing.inpaint(muse, picture(0, 32, 48), "a", editing.box((32, 48), 0, 0, 24, 32))
    mask = editing.box((64, 64), 0, 32, 64, 64)
    with pytest.warns(UserWarning, match="mask of 64 x 64 pixels is scaled to its picture's 32"):
        scaled = editing.inpaint(muse, picture(), "a", mask, seeds=3)
    assert scaled == editing.inpaint(muse, picture(), "a", HALF, seeds=3)


def test_photographs_are_upright_and_so_are_their_masks(muse, tmp_path):
    """A telephone stores them lying down and says so in EXIF."""
    upright = picture(3, 48, 32)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    with Image.open(path) as photo, pytest.warns(UserWarning, match="32 x 48 pixels is scaled"):
        results = editing.vary(muse, [photo, upright], strength=0, seeds=[0, 0])
    assert raw(results)[0] == raw(results)[1]

    lying = Image.new("L", (32, 48))
    lying.paste(255, (0, 24, 32, 48))  # the lower half, when it stands
    lying.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    with Image.open(path) as stored:
        mask = editing.white(stored)
    assert torch.equal(mask, editing.box((48, 32), 0, 24, 32, 48))
    layer = upright.convert("RGBA")
    layer.putalpha(lying.point(lambda level: 255 - level))
    layer.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    with Image.open(path) as stored:
        assert torch.equal(editing.transparent(stored), mask)


def test_large_pictures_become_small_before_they_become_numbers(muse, monkeypatch):
    sizes = []

    def counting(image: Image.Image, *arguments: Any) -> torch.Tensor:
        sizes.append(max(image.size))
        return to_tensor(image, *arguments)

    monkeypatch.setattr("muse_maskgit_pytorch.editing.pixels.to_tensor", counting)
    big = Image.new("RGB", (640, 640), "red")
    with pytest.warns(UserWarning, match="scaled"):
        editing.inpaint(muse, big, "", editing.box((640, 640), 0, 0, 320, 640), seeds=0)
    assert max(sizes) == 32
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 600)
    for take in (lambda image: editing.vary(muse, image), editing.white):
        with pytest.raises(ValueError, match="MUSE_MAX_MEGAPIXELS"):
            take(big)


def test_another_size_than_trained(muse):
    mask = editing.box((32, 64), 32, 0, 64, 32)
    source = picture(0, 32, 64)
    [drawn] = editing.inpaint(muse, source, "a", mask, seeds=3, image_size=(32, 64))
    assert drawn.size == (64, 32)
    assert torch.equal(pixels(drawn)[..., :32], pixels(source)[..., :32])


# Outpainting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sides",
    [dict(right=16), dict(left=5, bottom=70), dict(left=40, top=40, right=40, bottom=40)],
)
def test_outpainting_adds_what_is_asked_for(muse, sides: dict[str, int]):
    source = picture()
    [drawn] = editing.outpaint(muse, source, "a red car", seeds=3, **sides)
    left, top = sides.get("left", 0), sides.get("top", 0)
    assert drawn.size == (32 + left + sides.get("right", 0), 32 + top + sides.get("bottom", 0))
    kept = pixels(drawn)[:, top : top + 32, left : left + 32]
    assert torch.equal(kept, pixels(source))


def test_outpainting_one_window_is_inpainting(muse):
    [drawn] = editing.outpaint(muse, picture(), "a red car", right=16, seeds=3)
    window = Image.new("RGB", (32, 32))
    window.paste(picture().crop((16, 0, 32, 32)), (0, 0))
    mask = editing.box((32, 32), 16, 0, 32, 32)
    inpainted = editing.inpaint(muse, window, "a red car", mask, seeds=3)
    assert raw([drawn.crop((16, 0, 48, 32))]) == raw(inpainted)


def test_outpainting_to_an_aspect(muse):
    assert editing.outpaint(muse, picture(), "a", aspect=2.0)[0].size == (64, 32)
    assert editing.outpaint(muse, picture(), "a", aspect=0.5)[0].size == (32, 64)
    assert editing.outpaint(muse, picture(0, 32, 48), "a", aspect=2.0)[0].size == (64, 32)


def test_windows_cover_all_and_see_what_is_known():
    repaint = torch.ones(50, 90, dtype=torch.bool)
    repaint[10:42, 20:52] = False
    left = repaint.clone()
    for window in windows(repaint, (32, 32)):
        part = left[window]
        assert part.shape == (32, 32)
        assert part.any()
        assert not part.all()  # each has something to go on from
        left[window] = False
    assert not left.any()


# Variation ------------------------------------------------------------------------------------


def test_strength_from_the_picture_to_nothing_of_it(muse):
    source = picture()

    def vary(given: Any, strength: Any) -> list[bytes]:
        return raw(editing.vary(muse, given, "a red car", strength=strength, seeds=3))

    assert vary(source, 0) == raw([source])
    assert vary(source, 1) == raw(muse("a red car", seeds=3))
    assert vary(picture(9), 1.0) == raw(muse("a red car", seeds=3))
    rows = editing.vary(muse, source, "a red car", strength=[0.0, 0.5, 1.0], seeds=3)
    assert raw(rows[:1]) == raw([source])
    assert same(rows[1:2], editing.vary(muse, source, "a red car", strength=0.5, seeds=4))


def test_strength_is_the_share_of_the_tokens(muse):
    first: list = []

    def look(step: Any) -> None:
        if step.step == 1 and step.ids.shape[1] == 16:
            first.append(step)

    source = to_tensor(picture())[None]
    small = resize(source, (16, 16))
    ids = muse.base.vae.encode_to_ids(small).flatten(1)
    options = muse.base.default_options.replace(timesteps=16)
    editing.vary(muse, picture(), strength=0.5, seeds=0, base_options=options, callback=look)
    # one of the 8 open tokens is decided in the first step
    assert int(first[0].mask.sum()) == 7
    assert (first[0].ids == ids).sum() >= 8


# Mask-free ------------------------------------------------------------------------------------


def test_mask_free_editing_draws_a_share_in_each_iteration(muse):
    seen: list = []
    [drawn] = editing.free(
        muse, picture(), "a red car", at=(5,), share=0.25, seeds=3, callback=seen.append
    )
    assert len(drawn) == 1
    base = [step for step in seen if step.ids.shape[1] == 16]
    assert len(base) == 5
    source = to_tensor(picture())[None]
    small = resize(source, (16, 16))
    before = muse.base.vae.encode_to_ids(small).flatten(1)
    changed = torch.zeros(16, dtype=torch.bool)
    for step in base:
        assert not step.mask.any()
        different = (step.ids != before)[0]
        assert different.sum() <= 4  # a quarter of 16
        changed |= different
        before = step.ids
    assert changed.sum() > 4  # not always the same ones


def test_the_pictures_on_the_way_are_those_of_shorter_edits(muse):
    first, last = editing.free(muse, picture(), "a red car", at=(2, 4), seeds=3)
    assert raw(editing.free(muse, picture(), "a red car", at=(2,), seeds=3)[0]) == raw(first)
    assert raw(editing.free(muse, picture(), "two cats", at=(4,), seeds=3)[0]) != raw(last)


def test_a_ramp_of_the_temperature_does_not_hide_it(muse):
    def draw(temperature: float) -> Any:
        options = muse.base.default_options.replace(temperature=temperature, temperature_end=2.0)
        [images] = editing.free(
            muse, picture(), "a", at=(9,), top_k=0, seeds=3, base_options=options
        )
        return raw(images)

    assert draw(0.0) != draw(1.7)


def test_a_callback_ends_an_edit_wherever_it_stops(muse):
    seen: list = []

    def superres(step: Any) -> bool:
        seen.append(step.ids.shape[1])
        return step.ids.shape[1] == 64

    editing.free(muse, picture(), "a", at=(2, 6), seeds=3, callback=superres)
    assert seen == [16, 16, 64]
    seen.clear()
    editing.outpaint(muse, picture(), "a", right=64, seeds=3, callback=superres)
    assert seen == [16] * 4 + [64]


def test_a_callback_ends_a_mask_free_edit(muse):
    stages = editing.free(
        muse, picture(), "a red car", at=(2, 50), seeds=3, callback=lambda step: True
    )
    assert len(stages) == 1
    assert record_of(stages[0][0]) is None  # nothing says when it stopped


# Records, refusals ----------------------------------------------------------------------------


def test_an_edit_says_how_it_was_made(muse, tmp_path):
    images = editing.inpaint(muse, picture(), ["a", "b"], HALF, seeds=3, negative_texts="c")
    save_png(images[1], tmp_path / "a.png")
    [record] = read_records(tmp_path / "a.png")
    assert record.rows == (1,)
    request = record.request
    assert request.prompts == ["a", "b"]
    assert request.negatives == ["c", "c"]
    assert request.options["superres"].seeds == [3, 4]
    assert request.edit is not None
    assert request.edit["kind"] == "inpaint"
    assert request.edit["feather"] == 8
    assert len(set(request.edit["pictures"])) == 1
    with pytest.raises(ValueError, match=r"was edited \(inpaint\).*muse inspect"):
        muse.like(tmp_path / "a.png")


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(masks=torch.zeros(32, 32, dtype=torch.bool)), "repaints nothing"),
        (dict(masks=torch.ones(32, 32)), "boolean tensor"),
        (dict(masks=Image.new("L", (32, 32))), r"white\(mask\).*transparent\(mask\)"),
        (dict(masks=[]), "masks is empty"),
        (dict(pictures=[]), "pictures is empty"),
        (dict(pictures=torch.rand(3, 32, 32) * 255), r"in \[0, 1\]: divide bytes"),
        (dict(pictures=torch.full((3, 32, 32), torch.nan)), "look for NaN"),
        (dict(pictures=torch.zeros(1, 32, 32)), r"float tensor \(3, H, W\)"),
        (dict(pictures=torch.zeros(3, 32, 32, dtype=torch.uint8)), "float tensor"),
        (dict(texts=["a", "b"], seeds=[1, 2, 3]), "2 texts for 3 pictures"),
        (dict(texts=["a", "b", "c"], negative_texts=["d", "e"]), "2 negative_texts for 3"),
        (dict(masks=[HALF, HALF], texts=["a"] * 3), "2 masks or strengths for 3"),
        (dict(feather=-1), "feather must be"),
        (dict(feather=1.5), "feather must be"),
        (dict(grow=3_000_000_000), "grow must be at most 1024"),
        (dict(pictures="a.png"), "pictures must be PIL images or tensors, not str: open files"),
        (dict(pictures=["a.png"]), "a picture must be a PIL image or a tensor, not str"),
        (dict(pictures=None), "not NoneType"),
        (dict(masks=None), "masks must be PIL images or tensors, not NoneType"),
        (dict(pictures=Image.new("RGB", (0, 5))), "no pixels"),
        (dict(masks=torch.zeros(0, 0, dtype=torch.bool)), "a mask has no pixels"),
        (dict(seeds=1.5), "seeds must be a whole number"),
        (dict(image_size=30), "30 is not a positive multiple of 8"),
    ],
)
def test_what_inpainting_refuses(muse, changes: dict[str, Any], says: str):
    arguments: dict[str, Any] = {"pictures": picture(), "texts": "a", "masks": HALF, **changes}
    with pytest.raises(ValueError, match=says):
        editing.inpaint(muse, **arguments)


def test_what_the_others_refuse(muse):
    with pytest.raises(ValueError, match="nothing to add"):
        editing.outpaint(muse, picture(), "a")
    with pytest.raises(ValueError, match="nothing to add"):
        editing.outpaint(muse, picture(), "a", aspect=1.0)
    with pytest.raises(ValueError, match="left must be at least 0, not -4"):
        editing.outpaint(muse, picture(), "a", left=-4)
    with pytest.raises(ValueError, match=r"aspect 2.0 and sides .* are both given"):
        editing.outpaint(muse, picture(), "a", left=4, aspect=2.0)
    with pytest.raises(ValueError, match="aspect"):
        editing.outpaint(muse, picture(), "a", aspect=float("nan"))
    with pytest.raises(ValueError, match="32032 x 32 pixels: a side may have at most 16384"):
        editing.outpaint(muse, picture(), "a", right=32_000)
    for aspect in (1e9, 1e308, 1e-320, -1.0):
        with pytest.raises(ValueError, match=r"aspect (must be|.* both given)"):
            editing.outpaint(muse, picture(), "a", aspect=aspect)
    with pytest.raises(ValueError, match="would become 640000 x 32: a side may have at most 16384"):
        editing.outpaint(muse, torch.zeros(3, 1, 20_000), "a", left=1)
    with pytest.raises(ValueError, match="one by one"):
        editing.outpaint(muse, [picture(), picture(0, 32, 48)], "a", left=4)
    for strength in (-0.1, 1.5, float("nan"), "0.5", None):
        with pytest.raises(ValueError, match="strength must be"):
            editing.vary(muse, picture(), "a", strength=strength)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rising iterations"):
        editing.free(muse, picture(), "a", at=(50, 20))
    with pytest.raises(ValueError, match="rising iterations"):
        editing.free(muse, picture(), "a", at=())
    with pytest.raises(ValueError, match="rising iterations"):
        editing.free(muse, picture(), "a", at=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share"):
        editing.free(muse, picture(), "a", share=0.0)
    with pytest.raises(ValueError, match="top_k 99 is larger"):
        editing.free(muse, picture(), "a", top_k=99)
