"""Token caches on disk: what they give is what the images give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence

from muse_maskgit_pytorch import (
    MaskGitTrainer,
    TextCompute,
    TextEmbeds,
    TokenCache,
    linears,
    transformer,
    write_cache,
)
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli.main import run
from muse_maskgit_pytorch.data import Folder, ImageDataset, Item, split
from muse_maskgit_pytorch.data.cache import shard_path
from muse_maskgit_pytorch.data.order import Sample
from muse_maskgit_pytorch.data.pixels import View
from muse_maskgit_pytorch.data.shards import CacheError, Shard, write_shard
from muse_maskgit_pytorch.files import digest_text
from muse_maskgit_pytorch.text import get_text_encoder
from tests.runs import COMMON, assert_same, last_state, metrics, snapshot

SIZE, COUNT = 16, 9
SETTINGS: dict[str, Any] = dict(say=None, rows=4, batch_size=2)
BROKEN = (2, 3, 8)  # the last one, too: the first stands in for it


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Encoder:
    """A text encoder whose states half precision holds exactly; one token more than words."""

    left = False  # the side of the padding
    stops_at: str | None = None

    def encode(self, texts: list[str], device: Any = "cpu", long: str = "cut") -> TextEmbeds:
        if self.stops_at in texts:
            raise KeyboardInterrupt
        rows = []
        for text in texts:
            generator = torch.Generator().manual_seed(sum(text.encode()))
            rows.append(torch.randint(-9, 9, (len(text.split()) + 1, 12), generator=generator) / 4)
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        side = "left" if self.left else "right"
        return TextEmbeds(*(pad_sequence(each, True, padding_side=side) for each in (rows, masks)))


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    made = Encoder()
    monkeypatch.setattr(transformer, "get_text_encoder", lambda *_: made)
    return made


def caption(number: int) -> str:
    return " ".join(["owl"] * (number % 4 + 1) + [str(number)])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Captioned images, some of which end early."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(COUNT):
        generator = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (SIZE, SIZE + 4, 3), generator=generator)
        path = folder / f"{i}.png"
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
        if i in BROKEN:
            path.write_bytes(path.read_bytes()[:200])
        (folder / f"{i}.txt").write_text(caption(i))
    return folder


def open_images(folder: Path, cond_size: int | None = None) -> ImageDataset:
    return ImageDataset(Folder(folder, captions=True), SIZE, True, cond_size, masks=True)


def add_masks(folder: Path) -> None:
    """Masks of the loss for some of the images, a broken one among them."""
    for i in (0, 3, 4, 6, 7):
        generator = torch.Generator().manual_seed(100 + i)
        grey = torch.randint(0, 256, (SIZE, SIZE + 4), generator=generator)
        Image.fromarray(grey.to(torch.uint8).numpy()).save(folder / f"{i}-masklabel.png")


def base(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    changes["sample_options"] = {"timesteps": 2}
    return tiny.maskgit(**changes)


def superres() -> Any:
    torch.manual_seed(0)
    vae, low = tiny.vae(), tiny.vae(layers=1, codebook_size=48)
    return base(vae=vae, cond_vae=low, cond_image_size=8)


def write(folder: Path, models: Any, dataset: ImageDataset, **changes: Any) -> Path:
    assert write_cache(folder, models, dataset, **SETTINGS | changes)
    return folder


# What it gives -----------------------------------------------------------------------------------


def valid_losses(results: Path) -> list[float]:
    return [line["valid_loss"] for line in metrics(results) if "valid_loss" in line]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("make", [base, superres])
def test_training_from_a_cache_is_training_from_the_images(
    images: Path, tmp_path: Path, make: Any, masks: bool, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit, validation and broken images included; and no image or text is touched."""
    if masks:
        add_masks(images)
    stage = make()
    write(tmp_path / "cache", stage, open_images(images, stage.cond_image_size))

    def train(name: str, **data: Any) -> MaskGitTrainer:
        settings: dict[str, Any] = {**COMMON, "num_train_steps": 3, "num_samples": 2, **data}
        settings |= dict(results_folder=str(tmp_path / name), valid_fraction=0.4)
        trainer = MaskGitTrainer(make(), **settings)
        trainer.train()
        return trainer

    seen = train("seen", folder=str(images), cache_tokens=False)
    if make is base:
        train("own", folder=str(images))
    monkeypatch.setattr(transformer, "get_text_encoder", None)
    shutil.move(images, tmp_path / "gone")
    cached = train("cached", cache=str(tmp_path / "cache"))
    results = [tmp_path / name for name in ("seen", "own", "cached") if (tmp_path / name).exists()]
    for other in results[1:]:
        assert_same(last_state(other), last_state(results[0]))
        assert_same(valid_losses(other), valid_losses(results[0]))
    runs = [json.loads((path / f"{seen.name}-run.json").read_text()) for path in results]
    first, *others = [run["data"] for run in runs]
    for data in others:
        assert data["fingerprint"] == first["fingerprint"]
        assert data["held_back"] == first["held_back"] > 0
    assert cached.dataset.sides() == [SIZE] * COUNT  # by their headers, which are whole
    assert len(list((tmp_path / "cached" / "samples").iterdir())) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_run_keeps_its_cache_and_makes_it_anew_for_other_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = []
    original = write_shard

    def counting(path: Path, *rest: Any) -> None:
        made.append(path.name)
        original(path, *rest)

    monkeypatch.setattr("muse_maskgit_pytorch.data.encoding.write_shard", counting)

    def train(**changes: Any) -> None:
        settings: dict[str, Any] = {**COMMON, "num_samples": 1, "valid_fraction": 0, **changes}
        MaskGitTrainer(
            base(), folder=str(images), results_folder=str(tmp_path / "r"), **settings
        ).train()
        AcceleratorState._reset_state(reset_partial_state=True)

    train()
    assert len(made) == 1
    train(num_train_steps=3, resume=True)
    assert len(made) == 1
    (images / "0.txt").write_text("another caption")
    train(num_train_steps=4, resume=True)
    assert len(made) == 2
    add_masks(images)
    train(num_train_steps=5, resume=True)
    assert len(made) == 3


@pytest.mark.filterwarnings("ignore")
def test_a_broken_image_is_answered_as_by_the_images(images: Path, tmp_path: Path):
    dataset, model = open_images(images), base()
    cache = TokenCache(write(tmp_path / "cache", model, dataset), model)
    assert np.array_equal(cache.places(0), dataset.places(0))
    with pytest.raises(ValueError, match="knows the split of seed 0 alone"):
        cache.places(1)
    parts = [([], range(COUNT)), ([1, 2, 3], range(3)), ([8, 0, 3, 4], range(4))]
    for rows, places in parts:
        part = cache.select(rows) if rows else cache
        seen = dataset.select(rows) if rows else dataset
        assert part.captions(places) == [seen[place]["text"] for place in places]
        batch = part.__getitems__(places)
        assert batch.ids is not None
        pixels = torch.stack([seen[place]["image"] for place in places])
        assert torch.equal(batch.ids, model.vae.encode_to_ids(pixels).flatten(1))
    assert cache.summary()["left_out"] == {"cannot be read": len(BROKEN)}
    assert cache.summary()["fingerprint"] == dataset.summary()["fingerprint"]
    for fraction in (0, 0.3, 0.999):
        sides = [[len(part) for part in split(each, fraction)] for each in (cache, dataset)]
        assert sides[0] == sides[1]


def test_texts_need_not_be_padded_on_the_right(tmp_path: Path, encoder: Encoder):
    encoder.left = True
    model = base()
    cache = TokenCache(
        write(tmp_path / "cache", model, ImageDataset(Pictures(), SIZE, True)), model
    )
    batch = cache.__getitems__([5, 1])
    assert batch.text_embeds is not None
    assert batch.text_embeds.mask.sum(1).tolist() == [4, 4]
    alone = encoder.encode([caption(5)])
    assert torch.equal(batch.text_embeds.embeds[0], alone.embeds[0])


class Pictures:
    """A source that is no folder, and may have several captions of an image."""

    keys = tuple(f"picture {i}" for i in range(COUNT))
    texts_of: Any = staticmethod(caption)

    def __len__(self) -> int:
        return COUNT

    def __str__(self) -> str:
        return "pictures"

    def item(self, index: int) -> Item:
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (24, 20, 3), generator=generator)
        image = Image.fromarray(pixels.to(torch.uint8).numpy())
        return Item(image, self.texts_of(index))


def test_crops_and_captions_are_drawn_by_the_place_in_the_order(tmp_path: Path, encoder: Encoder):
    pictures, crops = Pictures(), 3
    pictures.texts_of = lambda index: [f"{index} as {what}" for what in ("a", "b b", "c c c")]
    torch.manual_seed(0)
    model = superres()
    dataset = ImageDataset(pictures, View(SIZE, "random", flip=True, seed=5), True)
    folder = write(tmp_path / "cache", model, dataset, crops=crops)
    cache = TokenCache(folder, model, seed=5)
    high, low = [], []  # (crop, token) of each image
    for row in range(COUNT):
        views = dataset.views(row, range(row * crops, (row + 1) * crops))
        assert views is not None
        high.append(model.vae.encode_to_ids(views["image"]).flatten(1))
        low.append(model.encode_cond(None, None, views["image"]))
    again = TokenCache(folder, model, seed=5)
    seen = set()
    for position in range(60):
        row = position % COUNT
        sample = Sample(row, position)
        batch, [text] = cache.__getitems__([sample]), cache.captions([sample])
        assert batch.ids is not None
        assert batch.text_embeds is not None
        [crop] = [k for k in range(crops) if torch.equal(high[row][k], batch.ids[0])]
        assert_same(batch.cond_ids, low[row][crop][None])
        assert torch.equal(batch.text_embeds.embeds, encoder.encode([text]).embeds)
        assert text.startswith(f"{row} as ")
        assert text == dataset[sample]["text"]
        seen.add((crop, text[5:]))
        # whatever else is in the batch, and in another process
        both = again.__getitems__([Sample(0, 999), sample])
        assert both.ids is not None
        assert torch.equal(both.ids[1], batch.ids[0])
    assert len(seen) == 9  # all pairs occur
    plain = cache.__getitems__([4])
    assert plain.ids is not None
    assert torch.equal(plain.ids[0], high[4][0])
    assert cache.captions([4]) == [dataset[4]["text"]] == ["4 as a"]


class Masked(Pictures):
    """Every second picture has a mask, which ``masks`` says or not."""

    first = 0

    def item(self, index: int) -> Item:
        item = super().item(index)
        if index % 2 == self.first:
            return replace(item, loss_mask=ImageOps.autocontrast(item.image.convert("L")))  # type: ignore
        return item


def test_shares_are_those_of_the_crop(tmp_path: Path):
    torch.manual_seed(0)
    model, crops = superres(), 3
    view = View(SIZE, "random", flip=True, seed=5, buckets=((16, 16), (24, 8), (8, 24)))
    pictures = Masked()
    dataset = ImageDataset(pictures, view, True, masks=True)
    cache = TokenCache(write(tmp_path / "cache", model, dataset, crops=crops), model, seed=5)
    found = []
    for position in range(60):
        row = position % COUNT
        views = dataset.views(row, range(row * crops, (row + 1) * crops))
        batch = cache.__getitems__([Sample(row, position)])
        assert batch.loss_mask is not None
        if row % 2:
            assert bool((batch.loss_mask == 1).all())
        else:
            assert views is not None
            wanted = model.token_shares(views["loss_mask"], batch.image_size)
            [crop] = [k for k in range(crops) if torch.equal(wanted[k], batch.loss_mask.flatten())]
            found.append((row, crop))
    assert len(set(found)) > 10


def test_a_mask_that_was_not_announced(tmp_path: Path):
    pictures, model = Masked(), base()
    pictures.first = 1
    dataset = ImageDataset(pictures, SIZE, True, masks=True)
    with pytest.raises(ValueError, match=r"item 'picture 1' of pictures has a loss_mask and the"):
        write(tmp_path / "a", model, dataset)
    pictures.masks = [key for i, key in enumerate(pictures.keys) if i % 2]  # type: ignore
    cache = TokenCache(write(tmp_path / "b", model, dataset), model)
    assert cache.plan.masks
    without = ImageDataset(pictures, SIZE, True)
    assert not TokenCache(write(tmp_path / "c", model, without), model).plan.masks


def test_a_cache_of_before_plans_said_how_pictures_are_decoded(tmp_path: Path):
    """Its digest is that of what was said then."""
    model, dataset = base(), ImageDataset(Pictures(), SIZE, True)
    folder = write(tmp_path / "cache", model, dataset)
    tree = json.loads((folder / "manifest.json").read_text())
    now = digest_text(json.dumps(tree["plan"], sort_keys=True)).encode()
    assert tree["plan"].pop("decoding") == "reduced"
    then = digest_text(json.dumps(tree["plan"], sort_keys=True)).encode()
    (folder / "manifest.json").write_text(json.dumps(tree))
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes().replace(now, then))
    assert len(TokenCache(folder, model).captions(range(COUNT))) == COUNT


def test_stages_share_a_cache(tmp_path: Path):
    """The base finds the ids of the super-resolution's low resolution."""
    high = superres()
    low = tiny.maskgit(tiny.transformer(num_tokens=48, seq_len=16), vae=high.cond_vae, image_size=8)
    dataset = ImageDataset(Pictures(), SIZE, True, 8)
    folder = write(tmp_path / "cache", [high, low], dataset)
    batches = [TokenCache(folder, model).__getitems__(range(COUNT)) for model in (high, low)]
    assert_same(batches[0].cond_ids, batches[1].ids)
    assert len(TokenCache(folder, low).plan.ids) == 2


# How it is written -------------------------------------------------------------------------------


def test_what_is_finished_is_kept_whoever_did_it(tmp_path: Path, encoder: Encoder):
    model, dataset = base(), ImageDataset(Pictures(), SIZE, True)
    whole = snapshot(write(tmp_path / "whole", model, dataset))
    folder, settings = tmp_path / "parts", SETTINGS
    encoder.stops_at = caption(6)
    with pytest.raises(KeyboardInterrupt):
        write_cache(folder, model, dataset, **settings)
    with pytest.raises(CacheError, match="is not finished, 1 of 3 shards are there"):
        TokenCache(folder, model)
    begun = shard_path(folder, 0).stat().st_mtime_ns
    encoder.stops_at = caption(2)  # in the shard that is there: it is not read again
    share: dict[str, Any] = dict(world=2, num_workers=1, **settings)
    assert not write_cache(folder, model, dataset, rank=0, **share)
    shard_path(folder, 2).write_bytes(whole["000002.safetensors"][:-1])  # as another system may
    assert not write_cache(folder, model, dataset, rank=1, **share)
    assert write_cache(folder, model, dataset, rank=0, **share)
    assert snapshot(folder) == whole
    assert shard_path(folder, 0).stat().st_mtime_ns == begun


def test_a_full_disk_is_told_and_finished_shards_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset, model, folder = ImageDataset(Pictures(), SIZE, True), base(), tmp_path / "cache"
    original = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "000001.safetensors":
            raise OSError(28, "No space left on device", str(path))
        return original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(CacheError, match=r"000001\.safetensors cannot be written \(No space"):
            write(folder, model, dataset)
    assert sorted(snapshot(folder)) == ["000000.safetensors", "manifest.json"]
    assert len(TokenCache(write(folder, model, dataset), model)) == COUNT


def test_it_says_what_it_takes(tmp_path: Path):
    said: list[str] = []
    model, folder = base(), tmp_path / "cache"
    write(
        folder, model, ImageDataset(Pictures(), SIZE, True), say=said.append, rows=64, batch_size=9
    )
    assert said[0].startswith(f"token cache: {COUNT} images take about ")
    megabytes = float(said[0].split()[6])
    assert megabytes == pytest.approx(TokenCache(folder, model).nbytes() / 1e6, rel=0.5)
    assert said[1].startswith(f"encoded {COUNT} images in ")


# Bad input ---------------------------------------------------------------------------------------


def change(**entries: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return edit


def cut(folder: Path) -> None:
    path = shard_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-5])


def stranger(folder: Path) -> None:
    """A shard of as many bytes, but of another cache."""
    path = shard_path(folder, 1)
    plan = Shard(path, TokenCache(folder, base()).plan.digest)
    write_shard(path, {name: plan.read(name) for name in plan._arrays}, "0" * 16)


BAD = {
    "no cache": (lambda folder: shutil.rmtree(folder), "holds no token cache"),
    "newer": (change(version=2), r"version 2, this package reads up to 1: upgrade"),
    "something else": (change(format="x"), "is not of a token cache"),
    "damaged": (lambda folder: (folder / "manifest.json").write_text("{"), "is damaged"),
    "a wrong plan": (change(plan={"images": -1}), "is damaged"),
    "a wrong table": (change(shards=[[1, 0, 5]]), "is damaged"),
    "cut off": (cut, r"000001\.safetensors has [\d,]+ of [\d,]+ bytes"),
    "vanished": (lambda folder: shard_path(folder, 2).unlink(), r"000002\.safetensors is missing"),
    "a stranger": (stranger, r"000001\.safetensors is a part of another cache"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_cache_is_refused_in_a_sentence(tmp_path: Path, case: str):
    damage, words = BAD[case]
    model = base()
    folder = write(tmp_path / "cache", model, ImageDataset(Pictures(), SIZE, True))
    damage(folder)
    with pytest.raises(CacheError, match=words) as caught:
        TokenCache(folder, model).__getitems__(range(COUNT))
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_off_or_vanishes_while_it_is_used(tmp_path: Path):
    model = base()
    folder = write(tmp_path / "cache", model, ImageDataset(Pictures(), SIZE, True))
    cache = TokenCache(folder, model)
    shard_path(folder, 2).unlink()
    with pytest.raises(CacheError, match=r"000002\.safetensors cannot be opened"):
        cache[8]
    before = cache[5]
    with open(shard_path(folder, 1), "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CacheError, match=r"000001\.safetensors is cut off"):
        cache[5]
    assert before.ids is not None


@pytest.mark.parametrize(
    "model, words",
    [
        (
            lambda: base(vae=tiny.vae(dim=16)),
            r"has ids of VQGanVAE \w+ at 16 px, but .* of VQGanVAE",
        ),
        (
            lambda: base(model=tiny.transformer(seq_len=64), image_size=32),
            "at 16 px, but this model needs those of .* at 32 px",
        ),
        (superres, "but this model needs those of .* at 8 px"),
        (
            lambda: base(model=tiny.transformer(t5_name="other")),
            "another text encoder, none .* than this model has, other",
        ),
    ],
)
def test_a_cache_of_another_model_is_refused(tmp_path: Path, model: Any, words: str):
    folder = write(tmp_path / "cache", base(), ImageDataset(Pictures(), SIZE, True))
    torch.manual_seed(0)
    with pytest.raises(CacheError, match=words):
        MaskGitTrainer(model(), cache=str(folder), results_folder=str(tmp_path / "r"))


def test_a_cache_says_the_precision_of_its_states(t5: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(transformer, "get_text_encoder", get_text_encoder)
    monkeypatch.setattr(linears, "available", lambda _: ["float32", "bfloat16"])
    model = base(model=tiny.transformer(t5_name=t5, text_embed_dim=None))
    dataset = ImageDataset(Pictures(), SIZE, True)
    plain = TokenCache(write(tmp_path / "plain", model, dataset), model)
    model.text_compute = TextCompute("bfloat16")
    folder = write(tmp_path / "low", model, dataset)
    low = TokenCache(folder, model)
    assert "precision" not in plain.plan.tree()["texts"]  # as caches were before there was one
    assert low.plan.tree()["texts"]["precision"] == "bfloat16"
    states = [each[0].text_embeds for each in (low, plain)]
    ours, theirs = (each.embeds for each in states if each is not None)
    assert 0 < (ours - theirs).norm() / theirs.norm() < 0.02
    with pytest.raises(CacheError, match=r"wide, in bfloat16\), than this model has, .* wide\)"):
        MaskGitTrainer(model, cache=str(folder), text_precision="float32")


def test_what_cannot_be_written(images: Path, tmp_path: Path):
    model, dataset = base(), ImageDataset(Pictures(), SIZE, True)
    with pytest.raises(CacheError, match=r"holds something else, '0\.png' say"):
        write(images, model, dataset)
    folder = write(tmp_path / "cache", model, dataset)
    with pytest.raises(CacheError, match=r"another cache: ids was VQGanVAE \w+ at 16 px and is VQ"):
        write(folder, base(vae=tiny.vae(dim=16)), dataset)
    with pytest.raises(ValueError, match=r"read captions differently, by none .* and by other"):
        write(tmp_path / "a", [model, base(model=tiny.transformer(t5_name="other"))], dataset)
    with pytest.raises(ValueError, match="take images of 16 px, and the data are of 8 px"):
        write(tmp_path / "a", model, ImageDataset(Pictures(), 8, True))
    with pytest.raises(ValueError, match="crops=2, but the view shows the centre alone"):
        write(tmp_path / "a", model, dataset, crops=2)
    with pytest.raises(ValueError, match="is given together with images, data"):
        MaskGitTrainer(model, cache=str(folder), folder="data")
    assert not (tmp_path / "a").exists()


# The command -------------------------------------------------------------------------------------

RECIPE = """
vae: {vae}
transformer: {{dim: 16, depth: 2, dim_head: 8, heads: 2, t5_name: none, text_embed_dim: 12}}
maskgit: {{image_size: {size}{low}}}
trainer: {{folder: images, batch_size: 2, num_train_steps: 1, num_samples: 1, results_folder: r}}
"""


@pytest.mark.filterwarnings("ignore")
def test_the_command_caches_for_recipes_and_they_train_from_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    base().vae.save("vae.safetensors")
    low = dict(base=("8", ""), superres=("16", ", cond_image_size: 8"))
    for name, (size, more) in low.items():
        text = RECIPE.format(vae="vae.safetensors", size=size, low=more)
        Path(f"{name}.yaml").write_text(text)
    words = ["cache", "--model", "base.yaml", "superres.yaml", "--folder", "images", "--out", "c"]
    run(words)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"c: {COUNT} images ({len(BROKEN)} broken), ids of VQGanVAE ")
    assert " at 16 px" in said
    assert " at 8 px" in said
    by_data = ["--data" if word == "--folder" else word for word in words]
    run([*by_data, "--min_size", "1"])  # the same images: what stands there is theirs
    assert capsys.readouterr().out.splitlines()[-1] == said
    with pytest.raises(ValueError, match="neither folder nor data is given"):
        run([word for word in words if word not in ("--folder", "images")])
    monkeypatch.setattr(transformer, "get_text_encoder", None)
    for name in low:
        run(["train", name, "--config", f"{name}.yaml", "--trainer.folder", "null",
             "--trainer.cache", "c"])  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)
        assert (tmp_path / "r" / f"{name}.safetensors").is_file()
    with pytest.raises(ValueError, match="--flip mirrors crops, and there are none"):
        run([*words, "--flip", "true"])
    with pytest.raises(CacheError, match="another cache: crops was 0 and is 2"):
        run([*words, "--crops", "2"])
    with pytest.raises(ValueError, match=r"cache c is given together with images, images: leave"):
        run(["train", "base", "--config", "base.yaml", "--trainer.cache", "c"])
