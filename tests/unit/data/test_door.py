"""One door: the same pictures as a folder, files, a data set, a list or a stream."""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from muse_maskgit_pytorch import MaskGitTrainer, VQGanVAETrainer
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.data import Folder, ImageDataset
from muse_maskgit_pytorch.data.folder import open_source
from muse_maskgit_pytorch.data.order import Sample
from muse_maskgit_pytorch.data.pixels import View
from muse_maskgit_pytorch.data.rows import Filter, Rows
from muse_maskgit_pytorch.data.stream import RowStream, Stream, StreamError
from muse_maskgit_pytorch.data.wording import Wording
from muse_maskgit_pytorch.images import to_tensor

SIZE, COUNT = 16, 12


def png(number: int, size: int = SIZE) -> bytes:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (size, size, 3), generator=generator)
    file = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


def rows(count: int = COUNT) -> list[dict[str, Any]]:
    return [
        {"image": png(i), "text": f"picture {i:02}", "score": i, "number": i} for i in range(count)
    ]


class Endless:
    """A stranger's stream: it begins anew, and knows nothing of its position."""

    def __init__(self, given: list[dict[str, Any]]):
        self.given = given

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.given


class Placed(Endless):
    """One that knows its position, and counts what is read."""

    def __init__(self, given: list[dict[str, Any]]):
        super().__init__(given)
        self.at = self.start = self.read = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.at, self.start = self.start, 0
        while self.at < len(self.given):
            self.at, self.read = self.at + 1, self.read + 1
            yield self.given[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def of_datasets() -> Any:
    import datasets

    table = {name: [row[name] for row in rows()] for name in ("text", "score", "number")}
    table["image"] = [{"bytes": row["image"], "path": None} for row in rows()]  # type: ignore[misc]
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())


def write_folder(root: Path) -> None:
    root.mkdir()
    for number in range(COUNT):
        (root / f"{number:02}.png").write_bytes(png(number))
    lines = [f"{n:02}.png,picture {n:02},picture {n:02} again,{n}" for n in range(COUNT)]
    (root / "metadata.csv").write_text("\n".join(["file_name,text,other,score", *lines]))


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows()):
            for ending, raw in (("png", row["image"]), ("txt", row["text"].encode())):
                info = tarfile.TarInfo(f"{number:02}.{ending}")
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))


def write_parquet(root: Path) -> None:
    root.mkdir()
    for part in range(3):
        of_datasets().shard(3, part, contiguous=True).to_parquet(root / f"{part}.parquet")


def examples(data: Any, **settings: Any) -> list[tuple[str, Tensor]]:
    source = open_source(data, None, True, **settings)
    dataset = ImageDataset(source, SIZE, captions=True)
    return [(dataset[row]["text"], dataset[row]["image"]) for row in range(len(dataset))]


def test_all_doors_give_the_same_pictures_and_captions(tmp_path: Path):
    write_folder(tmp_path / "folder")
    write_parquet(tmp_path / "parquet")
    write_tar(tmp_path / "a.tar")
    of_datasets().save_to_disk(tmp_path / "saved")
    pictures = [Image.open(io.BytesIO(row["image"])) for row in rows()]
    ways = {
        "folder": tmp_path / "folder",
        "parquet": tmp_path / "parquet",
        "glob": f"{tmp_path}/parquet/*.parquet",
        "braces": f"{tmp_path}/parquet/{{0..2}}.parquet",
        "tar": str(tmp_path / "a.tar"),
        "saved": str(tmp_path / "saved"),
        "dataset": of_datasets(),
        "bytes": rows(),
        "PIL": [row | {"image": p} for row, p in zip(rows(), pictures, strict=True)],
        "tensor": [row | {"image": to_tensor(p)} for row, p in zip(rows(), pictures, strict=True)],
    }
    wanted = examples(Folder(tmp_path / "folder", True))
    assert [text for text, _ in wanted] == [row["text"] for row in rows()]
    for name, way in ways.items():
        found = examples(way)
        assert [text for text, _ in found] == [text for text, _ in wanted], name
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, wanted, strict=True)), name
    for name in ("parquet", "glob", "tar", "saved"):
        stream = open_source(str(ways[name]), None, True, streaming=True)
        assert isinstance(stream, RowStream)
        held = Stream(stream, View(SIZE), True).held(1 - 1e-9, 100)
        assert [held[i]["text"] for i in range(COUNT)] == [text for text, _ in wanted], name


def test_an_object_in_a_python_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By its name, or what a function makes; its neighbours can be imported."""
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "beside_own_data.py").write_text("count = 3")
    (tmp_path / "own_data.py").write_text(
        "from PIL import Image\nfrom beside_own_data import count\n"
        "def pictures():\n"
        "    return [{'image': Image.new('RGB', (16, 16)), 'text': f'{i}'} for i in range(count)]\n"
        "loaded = pictures()[:2]\n"
    )
    for name, length in {"pictures": 3, "loaded": 2}.items():
        source = open_source(f"{tmp_path}/own_data.py:{name}", None, True)
        assert len(source) == length
        assert source.item(1).text == "1"
    with pytest.raises(ValueError, match=r"nothing called pictres; did you mean pictures\?"):
        open_source(f"{tmp_path}/own_data.py:pictres", None)
    with pytest.raises(ValueError, match=r"there is no file .*lost\.py"):
        open_source(f"{tmp_path}/lost.py:pictures", None)
    with pytest.raises(ValueError, match="leave it out"):
        open_source(f"{tmp_path}/own_data.py:pictures", None, streaming=True)
    (tmp_path / "json.py").write_text("pictures = []")
    with pytest.raises(ValueError, match=r"json\.py has the name of another module"):
        open_source(f"{tmp_path}/json.py:pictures", None)


def test_a_folder_reads_named_columns_and_parquet_tables(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    write_folder(tmp_path / "a")
    [(text, _), *_] = examples(tmp_path / "a", text_column="other")
    assert text == "picture 00 again"
    (tmp_path / "a/metadata.csv").unlink()
    table = {"file_name": [f"{n:02}.png" for n in range(COUNT)], "text": ["x"] * COUNT}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a/metadata.parquet")
    assert [text for text, _ in examples(tmp_path / "a")] == ["x"] * COUNT


def test_of_several_captions_one_is_drawn_by_the_position_alone():
    given = [row | {"text": ["one", "two", "", "three"]} for row in rows()]
    data = ImageDataset(Rows(given, captions=True), SIZE, captions=True)
    drawn = [data[Sample(0, position)]["text"] for position in range(60)]
    assert set(drawn) == {"one", "two", "three"}
    assert drawn == [data[Sample(0, position)]["text"] for position in range(60)]
    assert data[0]["text"] == "one"


def test_tags_are_shuffled_and_dropped_by_the_position_alone():
    wording = Wording(shuffle_tags=True, tag_dropout=0.3, keep_tags=1)
    drawn = [wording("a, b,c, d", position) for position in range(200)]
    assert drawn == [wording("a, b,c, d", position) for position in range(200)]
    assert all(text.split(", ")[0] == "a" for text in drawn)
    tags = [text.split(", ")[1:] for text in drawn]
    assert {"b", "c", "d"} >= {tag for each in tags for tag in each}
    assert 360 < sum(map(len, tags)) < 480  # 600 of which three in ten are left out
    assert len({text for text in drawn if len(text) == len("a, b, c, d")}) == 6
    assert wording("a, b", None) == "a, b"
    assert all(Wording(tag_dropout=0.9)("a, b", position) for position in range(50))
    with pytest.raises(ValueError, match=r"keep_tags needs"):
        Wording(keep_tags=1)


def opened_whole(data: Any, **settings: Any) -> None:
    source = open_source(data, None, True, **settings)
    Stream(source, View(SIZE)).held(0, 1)


def test_items_are_left_out_by_size_and_by_any_column(tmp_path: Path):
    write_folder(tmp_path / "folder")
    write_parquet(tmp_path / "parquet")
    (tmp_path / "folder/03.png").write_bytes(png(3, 8))
    with pytest.warns(UserWarning, match="left out"):
        found = examples(tmp_path / "folder", where={"score": [2, 5]}, min_size=16)
    assert [text for text, _ in found] == ["picture 02", "picture 04", "picture 05"]
    with pytest.warns(UserWarning, match="8 of 12 images that are outside of where"):
        found = examples(tmp_path / "parquet", where={"score": [2, 5]})
    assert len(found) == 4
    stream = open_source(Endless(rows()), None, True, where={"score": [2, 5]})
    held = Stream(stream, View(SIZE), True).held(1 - 1e-9, 100)
    assert len(held) == 4
    for data in (tmp_path / "folder", rows(), Endless(rows())):
        with pytest.raises(ValueError, match=r"where 'skore' is no column.*nearest is 'score'"):
            opened_whole(data, where={"skore": [2, 5]})
    with (
        pytest.raises(ValueError, match="is left to train on"),
        pytest.warns(UserWarning, match="left out 12 of 12"),
    ):
        examples(rows(), where={"score": [99, 100]})


# Streams ----------------------------------------------------------------------------------------


def taken(
    data: Any, batches: int, *, samples: int = 0, rank: int = 0, world: int = 1, workers: int = 0,
    batch: int = 2, share: float = 0.0, state: str | None = None,
) -> tuple[list[list[str]], Stream]:  # fmt: skip
    """The captions of some batches of one process."""
    stream = Stream(RowStream(data, captions=True), View(SIZE), True, block=4)
    stream.share = share
    if state is not None:
        stream.load(state, dict(batch_size=batch, world=world))
    found = stream.batches_from(
        samples, lambda items: [item["text"] for item in items],
        batch_size=batch, rank=rank, world=world, workers=workers,
    )  # fmt: skip
    texts = []
    for each in islice(found, batches):
        texts.append(each)
        stream.settle()
    return texts, stream


def flat(lists: list[list[Any]]) -> list[Any]:
    return [each for part in lists for each in part]


def streams(tmp_path: Path) -> dict[str, Any]:
    write_parquet(tmp_path / "parquet")
    hf = open_source(str(tmp_path / "parquet"), None, True, streaming=True).data
    return {"plain": Endless(rows()), "placed": Placed(rows()), "datasets": hf}


@pytest.mark.parametrize("name", ["plain", "placed", "datasets"])
def test_a_stream_goes_on_where_it_was(tmp_path: Path, name: str):
    data = streams(tmp_path)[name]
    whole, _ = taken(data, 20)
    for pass_ in (whole[:6], whole[6:12]):
        assert sorted(flat(pass_)) == [row["text"] for row in rows()]
    assert whole[:6] != whole[6:12]
    for done in (1, 5, 6, 13):
        _, stream = taken(streams_again(data), done)
        again, _ = taken(streams_again(data), 20 - done, samples=2 * done, state=stream.state())
        assert again == whole[done:], done


def streams_again(data: Any) -> Any:
    return type(data)(data.given) if isinstance(data, Endless) else data


def test_a_stream_with_a_state_reads_no_more_than_a_block_again():
    _, stream = taken(Placed(rows(1000)), 300)
    data = Placed(rows(1000))
    taken(data, 1, samples=600, state=stream.state())
    assert data.read <= 10  # the first row, whose columns are read, and two blocks


@pytest.mark.parametrize("name", ["plain", "datasets"])
def test_processes_and_workers_share_a_stream(tmp_path: Path, name: str):
    """Each pass gives each row once, with two processes and with two workers, also uneven ones."""
    data = streams(tmp_path)[name]
    ranks = [taken(data, 3, rank=rank, world=2)[0] for rank in (0, 1)]
    assert sorted(flat(flat(ranks))) == [row["text"] for row in rows()]
    both, stream = taken(data, 7, workers=2)
    assert len(set(flat(both[:4]))) == 8  # no overlap
    whole, _ = taken(data, 14, workers=2)
    assert {text for batch in whole for text in batch} == {row["text"] for row in rows()}
    again, _ = taken(data, 7, workers=2, samples=14, state=stream.state())
    assert both + again == whole
    uneven = [taken(Endless(rows(5)), 9, rank=rank, world=2)[0] for rank in (0, 1)]
    assert [len(each) for each in uneven] == [9, 9]
    with pytest.raises(ValueError, match="set num_workers to 2"):
        taken(data, 1, samples=14, state=stream.state())


def test_validation_rows_of_a_stream_are_never_trained_on():
    stream = Stream(RowStream(Endless(rows()), captions=True), View(SIZE), True)
    held = stream.held(0.3, 2)
    texts = {held[row]["text"] for row in range(len(held))}
    assert len(texts) == 2
    trained = {text for batch in taken(Endless(rows()), 40, share=0.3)[0] for text in batch}
    assert not texts & trained
    assert 4 < len(trained) < COUNT


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_a_stream_that_is_broken_off_gives_the_same_weights(tmp_path: Path, workers: int):
    torch.manual_seed(0)
    weights = tiny.maskgit().state_dict()

    def run(name: str, steps: int, **changes: Any) -> Path:
        model = tiny.maskgit()
        model.load_state_dict(weights)
        side = model.image_size
        width = model.transformer.text_embed_dim
        given = [
            {"image": png(i, side), "text_embeds": torch.full((i % 3 + 1, width), i / 9)}
            for i in range(COUNT)
        ]
        settings: dict[str, Any] = dict(
            batch_size=2, warmup_steps=0, lr_schedule="constant", sample_every=0, save_every=2,
            valid_fraction=0.2, num_train_steps=steps, results_folder=str(tmp_path / name),
            shuffle_buffer=5, num_workers=workers, num_samples=2, grad_accum_every=2,
        )  # fmt: skip
        MaskGitTrainer(model, data=Endless(given), **(settings | changes)).train()
        return tmp_path / name / "base.safetensors"

    whole = load_file(run("whole", 5))
    run("parts", 3)
    parts = load_file(run("parts", 5, resume=True))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (valid,) = {
        line.get("valid_loss")
        for line in map(json.loads, (tmp_path / "whole/metrics.jsonl").read_text().splitlines())
        if "valid_loss" in line
    }
    assert valid > 0
    if not workers:
        with pytest.raises(ValueError, match="batch_size was 2 and is 3"):
            run("parts", 6, resume=True, batch_size=3)


def test_the_tokenizer_trains_on_a_stream(tmp_path: Path):
    VQGanVAETrainer(
        tiny.vae(), data=Endless(rows()), image_size=SIZE, crop="random", perceptual_weight=0,
        gan_weight=0, batch_size=2, num_train_steps=2, warmup_steps=0,
        results_folder=str(tmp_path),
    ).train()  # fmt: skip
    assert (tmp_path / "vae.safetensors").is_file()


# What may stand in the place of captions --------------------------------------------------------


def test_embeddings_of_ones_own(tmp_path: Path):
    model = tiny.maskgit()
    width, side = model.transformer.text_embed_dim, model.image_size
    given: list[dict[str, Any]] = [
        {"image": png(i, side), "text_embeds": torch.randn(i % 3 + 2, width)} for i in range(4)
    ]
    given[0] |= {
        "text_embeds": torch.randn(5, width),
        "text_mask": [True, True, False, True, False],
    }
    settings: dict[str, Any] = dict(
        data=given, results_folder=str(tmp_path), batch_size=2, num_train_steps=1, num_samples=2,
        valid_fraction=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"text_embeds.*set cache_tokens=False"):
        MaskGitTrainer(model, **settings)
    trainer = MaskGitTrainer(model, **settings, cache_tokens=False)
    batch = trainer.collate([trainer.dataset[row] for row in range(4)])
    assert batch.text_embeds is not None
    assert batch.text_embeds.mask.sum(1).tolist() == [3, 3, 4, 2]
    trainer.train()


def test_classes_by_name_and_by_number():
    given = [{"image": png(0), "label": 1}, {"image": png(1), "label": "cat"}]
    source = open_source(given, None, True, classes=("cat", "dog"))
    assert [source.item(row).text for row in (0, 1)] == ["dog", "cat"]
    import datasets

    names = datasets.ClassLabel(names=["dog", "cat"])  # in an order of its own
    data = of_datasets().select([0, 1]).add_column("label", [0, 1]).cast_column("label", names)
    source = open_source(data, None, True, text_column="label", classes=("cat", "dog"))
    assert [source.item(row).text for row in (0, 1)] == ["dog", "cat"]


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "yields nothing"),
        ([3], "must be dicts with an image"),
        ([{"imag": png(0), "text": "a"}], "image_column 'image' is no column.*nearest is 'imag'"),
        ([{"image": png(0), "txet": "a"}], "text_column 'text' is no column.*nearest is 'txet'"),
        ([{"image": png(0), "text": None}], "has no caption"),
        ([{"image": png(0), "text": ["", ""]}], "has no caption"),
        ([{"image": png(0), "text": 3}], "must be a string or a list of strings, not 3"),
        ([{"image": png(0), "text_embeds": torch.zeros(3)}], r"must be float \(L,E\)"),
    ],
)
def test_rows_that_cannot_be_used(given: list[Any], says: str):
    with pytest.raises(ValueError, match=says):
        examples(given)
    with pytest.raises(ValueError, match=says):
        taken(Endless(given), 1)


def test_pictures_that_cannot_be_read_are_stood_in_for():
    bad = [b"no picture", torch.full((3, 4, 4), 2.0), torch.zeros(4, 4), 3, None]
    given = [row | {"image": value} for row, value in zip(rows(), [*bad, png(9)], strict=False)]
    data = ImageDataset(Rows(given), SIZE)
    with pytest.warns(UserWarning, match=r"image \d of builtins.list"):
        found = [data[row]["image"] for row in range(6)]
    assert all(torch.equal(each, found[-1]) for each in found)
    assert len(data.broken) == 5


def test_files_that_are_damaged_or_gone_are_named(tmp_path: Path):
    write_parquet(tmp_path / "parquet")
    write_tar(tmp_path / "a.tar")
    raw = (tmp_path / "parquet/1.parquet").read_bytes()
    (tmp_path / "parquet/1.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*1\.parquet"):
        examples(str(tmp_path / "parquet"))
    tar = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(tar[: len(tar) // 2 + 700])
    with pytest.raises(ValueError, match=r"cannot read .*a\.tar"):
        examples(str(tmp_path / "a.tar"))
    with pytest.raises(ValueError, match=r"there is no file .*0\.parquet"):
        examples(str(tmp_path / "0.parquet"))
    with pytest.raises(ValueError, match="does not exist"):
        examples(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("harm", "workers"), [("holed", 0), ("gone", 2), ("tar", 0)])
def test_a_shard_that_is_damaged_ends_a_run_that_goes_on_once_it_is_whole(
    tmp_path: Path, harm: str, workers: int
):
    """One sentence names it, the last whole step is saved, and in the end the weights are equal."""
    write_parquet(tmp_path / "shards")
    if harm == "tar":
        for number in range(3):
            (tmp_path / f"shards/{number}.parquet").unlink()
            write_tar(tmp_path / f"shards/{number}.tar")
    victim = sorted((tmp_path / "shards").iterdir())[2]
    raw = victim.read_bytes()
    half = len(raw) // 2
    classes = [row["text"] for row in rows()]
    shape: dict[str, Any] = dict(classes=classes, text_embed_dim=COUNT)
    weights = tiny.maskgit(tiny.transformer(**shape)).state_dict()

    def trainer(name: str, **changes: Any) -> MaskGitTrainer:
        model = tiny.maskgit(tiny.transformer(**shape), sample_options={"timesteps": 1})
        model.load_state_dict(weights)
        settings: dict[str, Any] = dict(
            batch_size=2, warmup_steps=0, sample_every=0, save_every=100, valid_fraction=0,
            num_train_steps=16 if harm == "tar" else 6, results_folder=str(tmp_path / name),
            shuffle_buffer=3, num_workers=workers, num_samples=1, streaming=True,
        )  # fmt: skip
        return MaskGitTrainer(model, data=str(tmp_path / "shards"), **(settings | changes))

    trainer("whole").train()
    broken = trainer("parts")
    if harm == "gone":
        victim.unlink()
    else:
        victim.write_bytes(
            raw[: half + 700] if harm == "tar" else raw[:99] + bytes(half) + raw[99 + half :]
        )
    with pytest.raises(StreamError, match=rf"{victim.name}.*; step \d+ is saved, and once") as says:
        broken.train()
    victim.write_bytes(raw)
    assert "\n" not in str(says.value)
    [saved] = (tmp_path / "parts").glob("*checkpoint*")
    assert f"step {int(saved.stem[-8:])} is saved" in str(says.value)
    trainer("parts", resume=True).train()
    whole, parts = (load_file(tmp_path / name / "base.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_streams_that_cannot_be_used():
    with pytest.raises(ValueError, match="can be read only once"):
        open_source(iter(rows()), None, True)
    with pytest.raises(ValueError, match="has no rows to train on for process 1 of 2"):
        taken(Endless(rows(1)), 1, rank=1, world=2)
    with pytest.raises(ValueError, match="must be a source, a list or stream"):
        open_source(3, None, True)
    with pytest.raises(ValueError, match="plain folder, which is not streamed"):
        open_source(str(Path(__file__).parent), None, True, streaming=True)
    for where in ({"a": [2, 1]}, {"a": 3}, {"a": ["x", 1]}, [1]):
        with pytest.raises(ValueError, match="where"):
            Filter(where=where)  # type: ignore[arg-type]
