"""Pictures in their own shapes: which they get, in what order they come, and what is learnt."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from muse_maskgit_pytorch import MaskGitTrainer, TokenCache
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli.main import run
from muse_maskgit_pytorch.cli.options import maskgit_parser
from muse_maskgit_pytorch.data import Folder, ImageDataset
from muse_maskgit_pytorch.data.cache import Manifest
from muse_maskgit_pytorch.data.encoding import write_cache
from muse_maskgit_pytorch.data.order import EndlessBatches, Sample, Shares
from muse_maskgit_pytorch.data.pixels import View
from muse_maskgit_pytorch.geometry import Geometry
from muse_maskgit_pytorch.images import resize
from tests.runs import COMMON, assert_same, interrupt, last_state, metrics

RATIOS = ["2:1", "1:1", "1:2"]
SIZES = ((12, 24), (16, 16), (24, 12))
SHAPES = [(40, 20), (20, 40), (16, 16), (60, 28), (44, 20), (18, 20), (50, 25)]  # width, height
CLASSES = ["owl", "kite"]


def transformer(**changes: Any) -> Any:
    return tiny.transformer(classes=CLASSES, text_embed_dim=len(CLASSES), **changes)


def base(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = changes.pop("model", None) or transformer()
    return tiny.maskgit(model, **{"sample_options": {"timesteps": 2}, **changes})


def superres() -> Any:
    torch.manual_seed(0)
    low = tiny.vae(layers=1, codebook_size=48)
    return base(cond_vae=low, cond_image_size=8, vae=tiny.vae())


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures: four wide, one high, two square."""
    made = tmp_path / "images"
    for i, size in enumerate(SHAPES):
        (made / CLASSES[i % 2]).mkdir(parents=True, exist_ok=True)
        picture(i, size).save(made / CLASSES[i % 2] / f"{i}.png")
    return made


def trainer(model: Any, results: Path, **changes: Any) -> MaskGitTrainer:
    settings: dict[str, Any] = {**COMMON, "num_samples": 3, "aspect_ratios": RATIOS, **changes}
    return MaskGitTrainer(model, results_folder=str(results), **settings)


def order(counts: list[int], batch: int, number: int, **where: int) -> list[list[Any]]:
    """Batches of buckets with so many items: 0 to 9 in the first, 100 to 109 in the next."""
    settings = {"start": 0, "rank": 0, "world": 1, **where}
    buckets = [range(100 * i, 100 * i + count) for i, count in enumerate(counts)]
    return list(islice(EndlessBatches(buckets, batch, 0, **settings), number))


# Sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "geometry", [Geometry(256, 16), Geometry(512, 8, 256, 16), Geometry(96, 4, 64, 8)]
)
def test_buckets_have_the_shapes_and_about_the_pixels_of_the_square(geometry: Geometry):
    ratios = ["16:9", 1.5, "1", "2:3"]
    found = geometry.buckets(ratios)
    side = geometry.image_size
    assert len(found) == 4
    assert (side, side) in found
    for (height, width), ratio in zip(found, (16 / 9, 1.5, 1, 2 / 3), strict=True):
        assert geometry.pixels((height, width)) == (height, width)  # whole tokens, at both
        assert width / height == pytest.approx(ratio, rel=0.15)
        assert width * height == pytest.approx(side * side, rel=0.15)
    assert Geometry(16, 4).buckets(RATIOS) == SIZES


@pytest.mark.parametrize(
    "ratios", ["3:2", 3, [], ["3x2"], ["3:0"], ["9:1"], [-1], [None], ["1:2:3"]]
)
def test_what_is_no_list_of_ratios_is_refused(ratios: Any):
    with pytest.raises(ValueError, match=r"aspect_ratios must be .* not"):
        base().geometry.buckets(ratios)


def test_a_picture_gets_the_nearest_shape_and_its_middle(folder: Path):
    data = ImageDataset(Folder(folder), View(16, buckets=SIZES), cond_size=8)
    for row, key in enumerate(data.keys):
        width, height = SHAPES[int(Path(key).stem)]
        expected = (16, 16) if max(width, height) < 22 else (12, 24) if width > height else (24, 12)
        item = data[row]
        assert data.size(row) == item["image"].shape[1:] == expected
        assert item["cond_image"].shape[1:] == (expected[0] // 2, expected[1] // 2)
    assert {size: len(rows) for size, rows in data.buckets.items()} == dict(
        zip(SIZES, (4, 2, 1), strict=True)
    )
    assert View(16, buckets=SIZES).nearest((23, 16)) == 0  # 1:2 and 2:1 are as far from 1:1
    assert View(16, buckets=SIZES).nearest((16, 23)) == 2
    stripes = Image.new("RGB", (80, 20), "red")
    stripes.paste("blue", (20, 0, 60, 20))
    view = View(16, buckets=SIZES)
    pixels = view.finish(view.prepare(stripes), None)
    assert pixels.shape == (3, 12, 24)
    assert torch.equal(pixels.amax((1, 2)), torch.tensor([0.0, 0.0, 1.0]))  # the blue half alone


def test_shapes_are_those_of_upright_pictures(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for suffix in ("jpg", "png", "webp"):
        picture(0, (40, 20)).save(tmp_path / f"turned.{suffix}", exif=exif)
    data = ImageDataset(Folder(tmp_path), View(16, buckets=SIZES))
    assert [data.size(row) for row in range(3)] == [(24, 12)] * 3


def test_random_crops_have_the_shape_and_lie_inside():
    view = View(16, "random", (0.5, 0.75), True, buckets=SIZES)
    ramp = torch.arange(200).expand(80, 200)  # columns tell where a crop lies
    image = Image.fromarray(torch.stack([ramp] * 3, -1).to(torch.uint8).numpy())
    spans: list[float] = []
    for position in range(40):
        crop = view.finish(view.prepare(image), position)
        assert crop.shape == (3, 12, 24)
        spans.append(float(crop.amax() - crop.amin()) * 255)
    assert 0.4 < min(spans) / 160 < max(spans) / 160 < 0.8  # of the 160 x 80 that have the shape


def test_a_broken_picture_is_replaced_by_one_of_its_shape(folder: Path):
    paths = sorted(folder.rglob("*.png"))
    for path in paths:
        if path.stem in ("1", "3"):  # the only high one, and a wide one
            path.write_bytes(path.read_bytes()[:100])
    data = ImageDataset(Folder(folder), View(16, buckets=SIZES))
    sizes = [data.size(row) for row in range(len(data))]
    with pytest.warns(UserWarning, match="the next readable one takes its place"):
        items = [data[row]["image"] for row in range(len(data))]
    assert [tuple(item.shape[1:]) for item in items] == sizes
    names = [path.stem for path in paths]
    assert torch.equal(items[names.index("3")], items[names.index("0")])
    assert items[names.index("1")].std() > 0.1  # another, cut to its shape


# The order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[7, 5, 1], [40, 3, 0, 9], [2, 2], [6]])
@pytest.mark.parametrize("batch", [1, 4])
def test_each_picture_comes_as_often_and_none_waits_longer_than_a_batch(counts, batch: int):
    batches = order(counts, batch, 12 * sum(counts) // batch)
    assert all(len({i // 100 for i in each}) == 1 for each in batches)
    seen: Counter[int] = Counter()
    for step, each in enumerate(batches, 1):
        seen.update(each)
        for bucket, count in enumerate(counts):
            given = [seen[100 * bucket + i] for i in range(count)]
            if count:
                assert max(given) - min(given) <= 1 + (batch > count)
                # as often as its share, to within an epoch and a batch
                due = step * batch * count / sum(counts)
                assert abs(sum(given) - due) < count + len(counts) * batch
    positions = [each.position for batch in batches for each in batch]
    assert positions == list(range(len(positions)))


def test_where_buckets_fill_their_batches_an_epoch_has_each_picture_once():
    batches = order([8, 4, 12], 4, 18)
    for epoch in (batches[:6], batches[6:12], batches[12:]):
        assert sorted(i for each in epoch for i in each) == [
            100 * bucket + i for bucket, count in enumerate((8, 4, 12)) for i in range(count)
        ]
    turns = [[each[0] // 100 for each in batches[at : at + 6]] for at in (0, 6, 12)]
    assert len({tuple(each) for each in turns}) > 1  # mixed anew


def test_two_processes_have_a_batch_of_the_same_bucket_and_share_it():
    together = order([7, 5, 2], 4, 30)
    one, two = (order([7, 5, 2], 2, 30, rank=rank, world=2) for rank in (0, 1))
    assert [a + b for a, b in zip(one, two, strict=True)] == together


def test_a_resume_goes_on_where_it_was():
    whole = order([7, 5, 2], 4, 30)
    assert order([7, 5, 2], 4, 18, start=48) == whole[12:]
    # another batch: at the end of each epoch, each bucket has given as much to within a batch
    for epoch in (1, 3, 8):
        found = [order([9, 5, 2], batch, 16 * epoch // batch) for batch in (4, 2)]
        four, two = (Counter(i // 100 for each in them for i in each) for them in found)
        assert all(abs(four[bucket] - two[bucket]) <= 3 * 4 for bucket in range(3))
        assert abs(four[0] - 9 * epoch) <= 3 * 4


def test_validation_has_every_row_once_in_batches_of_one_size(folder: Path):
    data = ImageDataset(Folder(folder), View(16, buckets=SIZES))
    seen: Counter[int] = Counter()
    shapes = []
    for rank in (0, 1):
        mine = list(Shares(data, 2, torch.utils.data.default_collate, rank, 2))
        shapes.append([batch["image"].shape[2:] for _, _, batch in mine])
        for rows, counted, _ in mine:
            seen.update(rows if counted else ())
    assert seen == Counter(range(7))
    assert shapes[0] == shapes[1]


# What is learnt ----------------------------------------------------------------------------------


def stretched(model: Any, height: int, width: int) -> Any:
    """The same transformer with position tables of another grid, interpolated by hand."""
    made = copy.deepcopy(model)
    encoders = () if made.cond_encoder is None else (made.cond_encoder,)
    for embed in (part.embed for part in (made, *encoders)):
        for name, size in (("row", height), ("column", width)):
            table = getattr(embed, name).detach().flatten(0, 1)
            at = torch.linspace(0, len(table) - 1, size)
            low = at.floor().long().clamp(max=len(table) - 2)
            rows = torch.lerp(table[low], table[low + 1], (at - low)[:, None])
            setattr(embed, name, nn.Parameter(rows[:, None] if name == "row" else rows[None]))
    return made


@pytest.mark.parametrize("make", [base, superres])
def test_the_loss_of_a_wide_batch_is_that_of_interpolated_positions(make: Any):
    model = make().eval()
    images = torch.rand(2, 3, 12, 24)
    mask = torch.rand(2, 18) < 0.5
    loss = model.losses(
        images, ["owl", "kite"], image_size=(12, 24), mask=mask, cond_drop_prob=0
    ).total
    ids = model.vae.encode_to_ids(images).flatten(1)
    text = model.embed_texts(["owl", "kite"])
    plain = stretched(model.transformer, 3, 6)
    cond = None
    if make is superres:
        small = resize(images, (6, 12))
        cond = model.cond_vae.encode_to_ids(small).flatten(1)
    context = plain.encode_context(tiny.conditioning(text, cond))
    [hidden] = plain(torch.where(mask, plain.mask_id, ids), context)
    expected = F.cross_entropy(plain.to_logits(hidden[mask]), ids[mask])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"images are \(2, 3, 12, 24\), this model takes"):
        model.losses(images, ["owl", "kite"])


def test_tokens_of_all_shapes_count_alike_in_a_step(folder: Path, tmp_path: Path):
    """A step of two micro batches of other grids is the mean over the tokens of both."""
    made = trainer(
        base(token_critic=tiny.critic(classes=CLASSES, text_embed_dim=2), cond_drop_prob=0.0),
        tmp_path / "r", folder=str(folder), grad_accum_every=2, cache_tokens=False,
    )  # fmt: skip
    rows = made.dataset.buckets
    batches = [made.collate([made.dataset[i] for i in list(rows[size])[:2]]) for size in SIZES[:2]]
    taken: dict[str, Any] = {}

    def keep(arguments: dict[str, Any]) -> dict[str, Tensor]:
        taken.setdefault("calls", []).append(arguments)
        zero = torch.zeros((), requires_grad=True)
        return {"loss": zero}

    made._prepare()
    made.wrapped["model"] = nn.Identity()
    made.wrapped["model"].forward = lambda **arguments: keep(arguments)  # type: ignore
    made.optimizer_step = lambda name: torch.zeros(())  # type: ignore[method-assign]
    made.accumulating = lambda *_: torch.no_grad()  # type: ignore[method-assign]
    made.backward = lambda loss: None  # type: ignore[method-assign]
    made.train_step(iter(batches))
    masks = [call["mask"] for call in taken["calls"]]
    assert [mask.shape[1] for mask in masks] == [18, 16]
    masked, tokens = sum(mask.sum() for mask in masks), 2 * (18 + 16)
    for call, mask in zip(taken["calls"], masks, strict=True):
        # the mean of the two is a sum over masked tokens, and over all, divided by their number
        assert float(call["mask_weight"]) / 2 == pytest.approx(float(mask.sum() / masked))
        assert call["token_weight"] / 2 == pytest.approx(mask.numel() / tokens)
    terms: list[Any] = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)
        arguments: dict[str, Any] = {
            **taken["calls"][0],
            "token_weight": weight,
            "mask_weight": 1.0,
        }
        terms.append(made.maskgit.losses(**arguments))
    assert torch.equal(terms[1].critic, 3 * terms[0].critic)
    assert torch.equal(terms[1].ce, terms[0].ce)


def test_validation_is_a_mean_over_tokens_of_all_shapes(folder: Path, tmp_path: Path):
    figures = []
    for batch_size in (4, 1):
        model = base(token_critic=tiny.critic(classes=CLASSES, text_embed_dim=2))
        made = trainer(model, tmp_path, folder=str(folder), cache_tokens=False)
        made.model.eval()
        torch.manual_seed(3)
        with torch.no_grad():
            figures.append(made.validate(Shares(made.dataset, batch_size, made.collate)))
    assert figures[0]["ce"] == pytest.approx(figures[1]["ce"], rel=1e-5)
    assert {"loss", "ce", "critic"} <= figures[0].keys()  # whose draws are a batch's
    for name in ("nats_50", "accuracy_100", "nats_other_captions"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [base, superres])
def test_from_a_cache_or_interrupted_it_learns_the_same(folder: Path, tmp_path: Path, make: Any):
    """Bit for bit, with validation, and a broken picture; pictures of all shapes are drawn."""
    [path] = folder.rglob("3.png")
    path.write_bytes(path.read_bytes()[:100])
    settings: dict[str, Any] = dict(
        folder=str(folder), num_train_steps=5, valid_fraction=0.3, seed=1, num_samples=7
    )
    seen = trainer(make(), tmp_path / "seen", cache_tokens=False, **settings)
    seen.train()
    interrupt(trainer(make(), tmp_path / "own", **settings), 3)
    trainer(make(), tmp_path / "own", resume=True, **settings).train()
    assert_same(last_state(tmp_path / "own"), last_state(tmp_path / "seen"))
    name = seen.name
    valid = [
        [line["valid_loss"] for line in metrics(tmp_path / run) if "valid_loss" in line]
        for run in ("own", "seen")
    ]
    assert valid[0] == valid[1] != []
    plan = Manifest.read(tmp_path / "own" / f"{name}-cache").plan
    assert plan.view["buckets"] == [list(size) for size in SIZES]
    cache = TokenCache(tmp_path / "own" / f"{name}-cache", make())
    for size, rows in cache.buckets.items():
        batch = cache.__getitems__([Sample(row) for row in rows])
        assert batch.image_size == size
        assert batch.ids is not None
        assert batch.ids.shape[1] == size[0] * size[1] // 16
    sheet = Image.open(tmp_path / "seen" / "samples" / f"{name}-00000005.png")
    assert sheet.width >= 7 * 24
    assert sheet.height >= 2 * 24


def test_it_overfits_wide_pictures_by_their_captions_and_draws_them(tmp_path: Path):
    pictures = [
        {"image": picture(number, (24, 12)), "text": name} for number, name in enumerate(CLASSES)
    ]
    model = base(model=transformer(dim=32, depth=1), cond_drop_prob=0.0)
    trainer(
        model, tmp_path, data=pictures, num_train_steps=80, lr=1e-2, warmup_steps=5, batch_size=8,
        valid_fraction=0, log_every=80, aspect_ratios=["2:1"],
    ).train()  # fmt: skip
    model.eval()
    images = torch.stack([View(16, buckets=((12, 24),)).finish(p["image"], None) for p in pictures])
    ids = model.vae.encode_to_ids(images).flatten(1)
    mask = torch.ones_like(ids, dtype=torch.bool)

    @torch.no_grad()
    def loss(texts: list[str], size: tuple[int, int]) -> float:
        return float(model.losses(ids, texts, image_size=size, mask=mask, cond_drop_prob=0).ce)

    assert loss(CLASSES, (12, 24)) < 0.5
    assert loss(CLASSES[::-1], (12, 24)) > 2  # the caption matters
    assert loss(CLASSES, (24, 12)) > 2  # and so does the shape
    drawn = model.generate_ids(
        CLASSES, image_size=(12, 24), timesteps=4, temperature=0, seeds=[1, 2]
    )
    assert (drawn == ids).float().mean() > 0.8


# Bad input, and the command ----------------------------------------------------------------------


def test_what_has_no_sizes_in_advance_is_refused(folder: Path, tmp_path: Path):
    class Endless:
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield {"image": picture(0, (40, 20)), "text": "owl"}

    with pytest.raises(ValueError, match="aspect_ratios need data with a length"):
        trainer(base(), tmp_path, data=Endless())
    windows = base(model=transformer(multi_axis=2))
    with pytest.raises(ValueError, match="compile, aspect_ratios and multi_axis do not go"):
        trainer(windows, tmp_path, folder=str(folder), compile=True)
    data = ImageDataset(Folder(folder, True, classes=CLASSES), 16, True)
    write_cache(tmp_path / "cache", base(), data, say=None)
    for given in ({"aspect_ratios": RATIOS}, {"aspect_ratios": None, "flip": True}):
        with pytest.raises(ValueError, match="has its own crops, shapes and captions: leave out"):
            trainer(base(), tmp_path, cache=str(tmp_path / "cache"), **given)


def test_ratios_need_no_quotes_in_a_recipe(tmp_path: Path):
    """Where YAML by itself would read 3:2 as sixty times three, and two."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer: {aspect_ratios: [3:2, 1:1, 0.5]}\n")
    words = ["--config", str(recipe), "--maskgit.image_size", "16", "--transformer.dim", "8"]
    config = maskgit_parser(superres=False).read([*words, "--transformer.depth", "1"])
    assert config.trainer.aspect_ratios == ["3:2", "1:1", "0.5"]


def test_muse_cache_serves_both_stages(folder: Path, tmp_path: Path, capsys):
    low = tiny.vae(layers=1, codebook_size=48)
    high = base(cond_vae=low, cond_image_size=8, vae=tiny.vae())
    small = tiny.maskgit(transformer(num_tokens=48, seq_len=16), vae=low, image_size=8)
    for name, model in (("high", high), ("small", small)):
        model.save(tmp_path / f"{name}.safetensors")
    out, names = tmp_path / "cache", [str(tmp_path / f"{n}.safetensors") for n in ("high", "small")]
    run(
        ["cache", "--model", *names, "--folder", str(folder), "--out", str(out),
         "--aspect_ratios", *RATIOS]
    )  # fmt: skip
    caches = [TokenCache(out, model) for model in (high, small)]
    assert list(caches[1].buckets) == [(6, 12), (8, 8), (12, 6)]
    for a, b in zip(*(cache.buckets.values() for cache in caches), strict=True):
        pair: list[Any] = [
            c.__getitems__(list(rows)) for c, rows in zip(caches, (a, b), strict=True)
        ]
        first, second = pair
        assert torch.equal(first.cond_ids, second.ids)
        assert math.prod(first.ids.shape) == len(a) * math.prod(first.image_size) // 16
