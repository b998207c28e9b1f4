"""Pictures that say how they were drawn, and are drawn again bit for bit."""

import json
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from muse_maskgit_pytorch import Muse, SampleOptions
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.images import RECORD, image_grid, record_of, save_png
from muse_maskgit_pytorch.provenance import (
    Record,
    attach_to_sheet,
    fingerprint,
    from_json,
    read_records,
    to_json,
)
from muse_maskgit_pytorch.request import Request

PROMPTS = ["a red car", "two cats", '日本語 ❤️ "quoted"']


@pytest.fixture(scope="module")
def muse(t5: str) -> Any:
    """Images of 16, then 32 pixels."""
    torch.manual_seed(0)
    vae, text = tiny.vae(), dict(t5_name=t5, text_embed_dim=None)
    base = tiny.maskgit(tiny.transformer(**text), vae=vae, sample_options=dict(timesteps=3))
    superres = tiny.superres(
        model=tiny.transformer(seq_len=64, **text),
        vae=tiny.vae(),
        cond_vae=vae,
        sample_options=dict(timesteps=2),
    )
    return Muse(base, superres).eval()


@pytest.fixture(scope="module")
def pictures(muse: Any) -> list[Image.Image]:
    """Three of one call, with options that differ from the model's and from row to row."""
    return muse(
        PROMPTS,
        negative_texts=["dogs", "", "blue"],
        seeds=[5, 3, 2**40],
        base_options=SampleOptions(timesteps=[2, 3, 4], cond_scale=[1.0, 2.0, 3.5]),
        superres_options=SampleOptions(timesteps=2, temperature=0.5, noise_schedule="linear"),
    )


def same_pixels(first: list[Image.Image], second: list[Image.Image]) -> bool:
    return [image.tobytes() for image in first] == [image.tobytes() for image in second]


# The record ----------------------------------------------------------------------------------


def test_a_png_says_how_it_was_drawn(muse: Any, pictures: list, tmp_path: Path):
    save_png(pictures[2], tmp_path / "a.png")
    [record] = read_records(tmp_path / "a.png")
    assert record.rows == (2,)
    assert record.prompts == PROMPTS[2:]
    assert record.request.prompts == PROMPTS
    assert record.request.negatives == ["dogs", "", "blue"]
    base, superres = record.request.options["base"], record.request.options["superres"]
    wanted = SampleOptions(timesteps=[2, 3, 4], cond_scale=[1.0, 2.0, 3.5], seeds=[5, 3, 2**40])
    assert base == wanted.with_rows(3)
    assert (superres.temperature, superres.noise_schedule) == ([0.5] * 3, "linear")
    assert record.model == muse.fingerprint
    assert record.made_by["torch"] == torch.__version__
    assert record.made_by["device"] == "cpu"


def test_the_chunk_is_utf8_json_that_any_tool_reads(pictures: list, tmp_path: Path):
    raw = save_png(pictures[0], tmp_path / "a.png").read_bytes()
    assert "日本語 ❤️".encode() in raw  # neither compressed nor escaped
    with Image.open(tmp_path / "a.png") as image:
        assert image.tobytes() == pictures[0].tobytes()
        document = json.loads(image.info["muse"])
    assert document["format"] == "muse_maskgit_pytorch picture"
    [record] = document["drawings"]
    assert record["prompts"] == PROMPTS
    every = {field.name for field in fields(SampleOptions)}
    assert record["options"]["base"].keys() == every  # later defaults do not change it


def test_a_record_belongs_to_the_pixels_that_were_drawn(muse: Any, pictures: list, tmp_path: Path):
    text = muse.base.embed_texts(["a red car"])
    other = muse(text_embeds=text, seeds=1)
    assert same_pixels(other, muse("a red car", seeds=1))
    assert record_of(other[0]) is None  # an embedding is not a prompt
    assert record_of(pictures[0].copy()) == record_of(pictures[0])
    assert record_of(pictures[0].crop((0, 0, 8, 8))) is None
    brighter = pictures[0].point(lambda level: min(255, level + 1))
    assert record_of(brighter) is None
    pictures[0].save(tmp_path / "a.png")  # Pillow's way of saving leaves the record out
    assert record_of(Image.open(tmp_path / "a.png")) is None


def test_one_stopped_by_a_callback_has_no_record(muse: Any):
    assert record_of(muse("a red car", callback=lambda step: None)[0])
    assert record_of(muse("a red car", callback=lambda step: step.step == 2)[0]) is None


def test_random_seeds_are_recorded(muse: Any):
    first = muse(["a red car", "a red car"])
    again = from_json(str(record_of(first[0])), "")[0]
    assert same_pixels(muse.like(replace(again, rows=(0, 1))), first)
    seeds = again.request.seeds
    assert len(set(seeds)) == 2
    assert again.request.options["superres"].seeds == seeds
    assert not same_pixels(muse(["a red car", "a red car"]), first)


def test_a_written_record_is_read_as_it_was(muse: Any, pictures: list):
    records = from_json(str(record_of(pictures[1])), "")
    assert from_json(to_json(records), "") == records


# Again ---------------------------------------------------------------------------------------


def test_the_same_picture_again(muse: Any, pictures: list, tmp_path: Path):
    for number, picture in enumerate(pictures):
        save_png(picture, tmp_path / f"{number}.png")
        again = muse.like(tmp_path / f"{number}.png")
        assert same_pixels(again, [picture])
        assert record_of(again[0]) == record_of(picture)


def test_all_pictures_of_a_sheet(muse: Any, pictures: list, tmp_path: Path):
    shown = [pictures[2], pictures[0], *muse("a red car", seeds=1), pictures[1]]
    sheet = image_grid(shown, 2, ["a", "b", "c", "d"])
    attach_to_sheet(sheet, shown)
    save_png(sheet, tmp_path / "sheet.png")
    assert [r.rows for r in read_records(tmp_path / "sheet.png")] == [(2, 0), (0,), (1,)]
    again = muse.like(tmp_path / "sheet.png")
    assert same_pixels(again, shown)
    sheet = image_grid([*shown, Image.new("RGB", (32, 32))], 2)
    attach_to_sheet(sheet, [*shown, Image.new("RGB", (32, 32))])
    assert record_of(sheet) is None


def test_a_picture_of_a_sheet_alone(muse: Any, pictures: list):
    """The sampler's rows are independent: the ids are the same, and the pixels but for rounding.

    (A decoder's sums depend on the size of the batch in their last bits. That is why the record
    holds the whole batch, and `like` draws it along.)
    """
    [record] = from_json(str(record_of(pictures[0])), "")
    _, ids = with_ids(muse, record.request)
    for row, picture in enumerate(pictures):
        alone = record.request.take([row])
        assert alone.prompts == [PROMPTS[row]]
        assert alone.options["base"].timesteps == [[2, 3, 4][row]]
        assert alone.options["superres"].timesteps == [2]
        [again], alone_ids = with_ids(muse, alone)
        pairs = zip(alone_ids, ids, strict=True)
        assert all(torch.equal(one[0], every[row]) for one, every in pairs)
        assert abs(levels(again) - levels(picture)).max() <= 1
    swapped, _ = with_ids(muse, record.request.take([2, 0]))
    assert abs(levels(swapped[0]) - levels(pictures[2])).max() <= 1
    assert abs(levels(swapped[1]) - levels(pictures[0])).max() <= 1


def with_ids(muse: Any, request: Request) -> tuple[list[Image.Image], list[torch.Tensor]]:
    """Pictures, and the last ids of both stages."""
    seen: dict[int, torch.Tensor] = {}
    drawn = muse.draw(request, lambda step: seen.update({step.ids.shape[1]: step.ids}))
    return muse.pictures(drawn), [seen[16], seen[64]]


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_values_that_are_not_one_for_each_row(muse: Any):
    options = SampleOptions(cond_scale=[1.0, 2.0], seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="cond_scale has 2 values for 3 images"):
        muse.request(["a", "b", "c"], base_options=options)


def test_a_saved_model_draws_it_again(muse: Any, pictures: list, tmp_path: Path):
    save_png(pictures[0], tmp_path / "a.png")
    again = Muse.from_pretrained(muse.save(tmp_path / "muse.safetensors"))
    assert same_pixels(again.like(tmp_path / "a.png"), pictures[:1])


# The fingerprint -----------------------------------------------------------------------------


def test_what_the_fingerprint_covers(tmp_path: Path):
    model = Muse(tiny.maskgit())
    first = fingerprint(model)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert fingerprint(Muse.from_pretrained(model.save(tmp_path / "a.safetensors"))) == first

    weight = model.base.transformer.to_logits.weight
    with torch.no_grad():
        weight[0, 0] += 1
        assert fingerprint(model) != first  # in place, although it was known
        weight[0, 0] -= 1

    half = Muse.from_pretrained(model.save(tmp_path / "h.safetensors", torch.float16))
    rounded = fingerprint(half)
    assert rounded != first  # other weights, other pictures
    again = Muse.from_pretrained(half.save(tmp_path / "b.safetensors"))
    assert fingerprint(again) == rounded  # the same values in a file twice as large
    assert fingerprint(half.half()) != rounded  # computes in another type

    settings = Muse.from_pretrained(tmp_path / "b.safetensors")
    settings.base._init_args["sample_options"] = {"timesteps": 5}
    assert fingerprint(settings) == rounded  # every record has the options that were used
    settings = Muse.from_pretrained(tmp_path / "b.safetensors")
    settings.base.transformer._init_args["t5_name"] = "another"
    assert fingerprint(settings) != rounded


def test_the_fingerprint_is_computed_once_per_loading_of_weights(monkeypatch: Any):
    model = Muse(tiny.maskgit())
    first = fingerprint(model)
    rounded = fingerprint(model.half().float())
    assert rounded != first
    monkeypatch.setattr("muse_maskgit_pytorch.provenance.digest_state", None)  # not needed again
    assert fingerprint(model) == rounded


def test_settings_of_the_training_do_not_count():
    model = tiny.maskgit()
    other = tiny.maskgit(
        model.transformer, vae=model.vae, label_smoothing=0.1, critic_target="truth"
    )
    assert fingerprint(other) == fingerprint(model)
    assert fingerprint(tiny.maskgit(model.transformer, vae=model.vae)) == fingerprint(model)


def test_another_models_picture(muse: Any, pictures: list, tmp_path: Path):
    save_png(pictures[0], tmp_path / "a.png")
    other = Muse(muse.base)
    with pytest.raises(ValueError) as error:
        other.like(tmp_path / "a.png")
    assert f"drawn by the model {muse.fingerprint}" in str(error.value)
    assert f"this one is {other.fingerprint}" in str(error.value)


# Best of n -----------------------------------------------------------------------------------


def brightness(image: Image.Image, prompt: str) -> float:
    return sum(image.tobytes()) * (1 if prompt == "two cats" else -1)


def test_the_best_of_n(muse: Any, tmp_path: Path):
    texts = ["a red car", "two cats"]
    best = muse.best_of(3, brightness, texts, seeds=10)
    turns = [muse(texts, seeds=[10 + turn, 13 + turn]) for turn in range(3)]
    for text, picture, drawn in zip(texts, best, zip(*turns, strict=True), strict=True):
        scores = [brightness(image, text) for image in drawn]
        assert len(set(scores)) == 3
        assert picture == drawn[scores.index(max(scores))]
        again = muse.like(save_png(picture, tmp_path / "a.png"))
        assert same_pixels(again, [picture])


def test_equal_scores_keep_the_first(muse: Any):
    assert muse.best_of(2, lambda image, text: 1.0, "two cats", seeds=4) == muse(
        "two cats", seeds=4
    )
    assert len(muse.best_of(2, lambda image, text: 1.0, "two cats", negative_texts="dogs")) == 1


def test_best_of_refuses_nonsense(muse: Any):
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        muse.best_of(0, brightness, "a")
    with pytest.raises(ValueError, match="each must be a number"):
        muse.best_of(1, lambda image, text: float("nan"), "a")


# Bad input -----------------------------------------------------------------------------------


def png_with(record: Any, path: Path) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(RECORD, record if isinstance(record, str) else json.dumps(record))
    Image.new("RGB", (2, 2)).save(path, pnginfo=chunks)
    return path


def document(**changes: Any) -> dict[str, Any]:
    record: dict[str, Any] = dict(model="0a", made_by={"torch": "2"}, prompts=["a"], rows=[0])
    record |= dict(
        negative_prompts=None, options={"base": {"seeds": [1]}}, image_size=[16, 24], edit=None
    )
    return {
        "format": "muse_maskgit_pytorch picture",
        "version": 2,
        "drawings": [{**record, **changes}],
    }


def test_the_documents_of_the_next_test_are_good_but_for_one_thing(tmp_path: Path):
    [record] = read_records(png_with(document(), tmp_path / "a.png"))
    request = Request(
        prompts=["a"],
        negatives=None,
        options={"base": SampleOptions(seeds=[1]).with_rows(1)},
        image_size=(16, 24),
    )
    assert record == Record(request, (0,), model="0a", made_by={"torch": "2"})


def test_pictures_of_version_1_are_read_and_not_drawn_again(muse: Any, tmp_path: Path):
    """Both stages drew with the same random numbers then."""
    old = dict(lowres_scale=1.0, guidance_start=0.5, guidance_end=1.0, seeds=[7], timesteps=5)
    options = {"base": {**old, "guidance_schedule": "interval"}, "superres": old}
    drawing = document(options=options, image_size=None) | {"version": 1}
    path = png_with(drawing, tmp_path / "old.png")
    [record] = read_records(path)
    assert record.request.seeds == [7]
    assert record.request.options["base"].guidance_schedule == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"old.png was drawn by .* 0\.1, in which both stages"):
        muse.like(path)
    options["superres"] = {**old, "lowres_scale": 2.0}
    with pytest.raises(ValueError, match=r"lowres_scale 2\.0 is not supported"):
        read_records(png_with(document(options=options) | {"version": 1}, path))


@pytest.mark.parametrize(
    "record, says",
    [
        ("not json", "Expecting value"),
        ("[" * 100_000, "recursion"),
        ("[]", "not in this package's format"),
        ({"format": "other"}, "not in this package's format"),
        (document() | {"version": 3}, "format version 3, this package reads up to 2"),
        (document(image_size=None), "image_size must be a list of 2 int"),
        (document() | {"drawings": []}, "lists no pictures"),
        (document() | {"drawings": 5}, "not iterable"),
        ({k: v for k, v in document().items() if k != "drawings"}, "'drawings' is missing"),
        (document(prompts="a"), "prompts must be a list of some str"),
        (document(prompts=[1]), "prompts must be a list of some str"),
        (document(negative_prompts=["a", "b"]), "negative_prompts must be a list of 1 str"),
        (document(rows=[1]), r"rows \[1\] of 1 prompts"),
        (document(rows=[True]), "rows must be a list of some int"),
        (document(model="\x1b[2J"), "model is not a fingerprint"),
        (document(made_by=None), "'NoneType' object"),
        (document(options={}), "options of the base are missing"),
        (document(options={"base": {}}), "'seeds' is missing"),
        (document(options={"base": {"seeds": [1, 2]}}), "seeds must be a list of 1 int"),
        (document(options={"base": {"seeds": [1], "glow": 1}}), r"unknown options 'base' \['glow'"),
        (document(options={"base": {"seeds": [1], "timesteps": 0}}), "timesteps must be at least"),
        (
            document(options={"base": {"seeds": [1], "timesteps": "\x1b"}}),
            "timesteps must be a whole",
        ),
    ],
)
def test_damaged_records(record: Any, says: str, tmp_path: Path):
    with pytest.raises(ValueError, match=says) as error:
        read_records(png_with(record, tmp_path / "a.png"))
    assert "a.png: the record of how it was drawn cannot be used" in str(error.value)
    assert "\x1b" not in str(error.value)


def test_seeds_beyond_64_bits(muse: Any):
    with pytest.raises(ValueError, match="seeds must be at most 18446744073709551615"):
        muse("a", seeds=2**64)


def test_pictures_without_a_record(tmp_path: Path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg")
    for name in ("a.png", "a.jpg"):
        with pytest.raises(ValueError, match=f"{name} does not say how it was drawn"):
            read_records(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    for name in ("absent.png", "b.png"):
        with pytest.raises(ValueError, match=f"cannot read image .*{name}"):
            read_records(tmp_path / name)


def test_counts_of_negative_prompts(muse: Any):
    with pytest.raises(ValueError, match="2 negative_texts for 3 texts"):
        muse(PROMPTS, negative_texts=["a", "b"])


# Limits --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* was drawn with torch 2")
@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(options={"base": {"seeds": [1], "timesteps": 10**7}}), "10000000 steps"),
        (dict(image_size=[16384, 16]), "16384 pixels a side, the limit is 2048"),
        (dict(rows=[0] * 1025), "shows 1025 pictures of one batch"),
        (
            dict(prompts=["a"] * 2000, options={"base": {"seeds": [1] * 2000}}),
            "2000 pictures in one batch, the limit is 1024",
        ),
        (
            dict(prompts=["a"] * 9, options={"base": {"seeds": [1] * 9}}, image_size=[2048, 2048]),
            "37748736 pixels in one batch",
        ),
        (
            dict(options={"base": {"seeds": [1], "timesteps": 9000}}, image_size=[2048, 2048]),
            "pixels in one batch times steps",
        ),
    ],
)
def test_what_a_record_may_not_ask_for_unless_it_is_trusted(
    muse: Any, changes: dict, says: str, tmp_path: Path, monkeypatch: Any
):
    written = document(model=muse.fingerprint, **changes)
    [drawing] = written["drawings"]
    png_with(written, tmp_path / "a.png")
    with pytest.raises(ValueError, match="has options of base, the model's stages are base and su"):
        muse.like(tmp_path / "a.png")
    drawing["options"]["superres"] = drawing["options"]["base"]
    path = png_with(written, tmp_path / "a.png")
    assert read_records(path)  # muse inspect shows it
    with pytest.raises(ValueError, match=says) as error:
        muse.like(path)
    assert "a.png" in str(error.value)
    assert "--large true" in str(error.value)
    drawn = []
    monkeypatch.setattr(Muse, "draw", lambda self, request, callback: drawn.append(request))
    monkeypatch.setattr(Muse, "pictures", lambda self, drawn: [None] * 3000)
    muse.like(path, large=True)
    assert drawn[0].large


def test_calls_have_the_limits_of_records(muse: Any):
    with pytest.raises(ValueError, match="the call asks for 10000000 steps, the limit is 10000"):
        muse("a", base_options=SampleOptions(timesteps=10**7))
    with pytest.raises(ValueError, match="4096 pixels a side"):
        muse("a", image_size=4096)
    with pytest.raises(ValueError, match="17 times the area of the trained pictures"):
        muse("a", image_size=(128, 136))
    muse.request("a", image_size=4096, large=True).check_size(trained=32)
    muse.request("a", image_size=128).check_size(trained=32)


# Bits ----------------------------------------------------------------------------------------


def test_another_number_of_threads_is_said(muse: Any, pictures: list, tmp_path, monkeypatch):
    """It decides the order of sums, and so single pixels."""
    path = save_png(pictures[0], tmp_path / "a.png")
    [record] = read_records(path)
    threads = torch.get_num_threads()
    assert record.made_by["threads"] == str(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the text encoder .* does not know")
        muse.like(path)
    torch.set_num_threads(threads + 1)
    try:
        here = f"drawn with threads {threads}, this is {threads + 1}: single pixels may differ"
        monkeypatch.setattr(Muse, "draw", lambda self, request, callback: None)
        monkeypatch.setattr(Muse, "pictures", lambda self, drawn: pictures)
        with pytest.warns(UserWarning, match=here):
            muse.like(path)
        earlier = {k: v for k, v in record.made_by.items() if k != "threads"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "the text encoder .* does not know")
            muse.like(replace(record, made_by=earlier))
    finally:
        torch.set_num_threads(threads)
