"""`muse eval base | superres | model`: figures, files, going on, and mistakes in one sentence."""

import base64
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.data.folder import open_source
from muse_maskgit_pytorch.evaluation import Truth, drawing, metrics
from muse_maskgit_pytorch.features import FeatureNet
from muse_maskgit_pytorch.images import to_tensor
from muse_maskgit_pytorch.loading import open_model, open_stage
from muse_maskgit_pytorch.provenance import read_records

COLOURS = ("red", "green", "blue", "gold", "grey", "pink", "navy", "teal")


@pytest.fixture(scope="module")
def root(tmp_path_factory, t5: str) -> Path:
    """Eight captioned images of 40 x 36 pixels, and a model of 16 and 32 pixels."""
    root = tmp_path_factory.mktemp("generator")
    (root / "images").mkdir()
    for number, colour in enumerate(COLOURS):
        image = Image.new("RGB", (40, 36), "white")
        image.paste(colour, (4 + number, 4, 30, 20 + number))
        image.save(root / "images" / f"{number}.png")
        (root / "images" / f"{number}.txt").write_text(f"a {colour} box")
    text = dict(text_embed_dim=16, t5_name=t5)
    options = {"timesteps": 2, "cond_scale": 1.5}
    base = tiny.maskgit(
        tiny.transformer(**text), sample_options=options, presets={"one": {"timesteps": 1}}
    )
    large = tiny.superres(model=tiny.transformer(seq_len=64, **text), sample_options=options)
    Muse(base, large).eval().save(root / "muse.safetensors")
    base.save(root / "base.safetensors")
    large.save(root / "superres.safetensors")
    return root


@pytest.fixture
def command(root: Path, resnet: str, tmp_path: Path):
    """Builds a command line; None takes an option away."""

    def build(part: str = "base", **changes: object) -> list[str]:
        options: dict[str, object] = dict(
            model=root / "muse.safetensors", data=root / "images", features=resnet, device="cpu"
        )
        options |= dict(out=tmp_path / "out", cache=tmp_path / "cache", batch_size=3) | changes
        pairs = [f"--{k}={v}" for k, v in options.items() if v is not None]
        return ["eval", part, *pairs]

    return build


def figures(tmp_path: Path, network: str) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "figures.json").read_text())["metrics"][network]


def drawn(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "out" / "pictures").iterdir())


def images(files: Sequence[Path]) -> torch.Tensor:
    return torch.stack([to_tensor(file) for file in files])


# What comes out ------------------------------------------------------------------------------


def test_a_base_by_its_pictures(root: Path, command, tmp_path: Path, resnet: str, capsys):
    assert main(command(seeds=2)) == 0
    found = figures(tmp_path, resnet)
    files = drawn(tmp_path)
    assert [file.name for file in files[:3]] == ["00001-1.png", "00001-2.png", "00002-1.png"]
    assert {metric["images"] for metric in found.values()} == {16} == {len(files)}

    # the pictures are those of the model, the first prompt's with seeds 0 and 1
    [record] = read_records(files[1])
    texts = [f"a {colour} box" for colour in COLOURS]
    assert record.prompts[0] in texts
    assert record.request.seeds[record.rows[0]] == 1
    model = open_model(root / "base.safetensors", "cpu")
    assert record.model == model.fingerprint
    [again] = model([record.prompts[0]], seeds=1)
    assert (to_tensor(again) - to_tensor(files[1])).abs().max() <= 1.01 / 255

    # the figures are those of the metrics, of true images at the base's size
    setup = json.loads((tmp_path / "out" / "figures.json").read_text())
    order = [texts.index(prompt["text"]) for prompt in setup["prompts"]]
    real = torch.stack([to_tensor(root / "images" / f"{row}.png", 16) for row in order])
    network = FeatureNet(resnet)
    with torch.no_grad():
        a, b = network.pooled(real), network.pooled(images(files))
    near = metrics.neighbourhoods(a, b)
    wanted = {
        "fid": metrics.frechet_of_sets(a, b),
        "kid": metrics.kid(a, b),
        "cmmd": metrics.cmmd(a, b),
        "precision": float(near.precise.double().mean()),
        "recall": float(near.recalled.double().mean()),
        "density": float(near.density.double().mean()),
        "coverage": float(near.covered.double().mean()),
        "diversity": float(metrics.diversity(b.view(8, 2, -1)).mean()),
    }
    values = {name: found[name]["value"] for name in wanted}
    assert values == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    unit = [torch.nn.functional.normalize(x.double(), dim=1) for x in (a, b)]
    cosine = unit[1] @ unit[0].T
    rank = (cosine > cosine[range(16), [n // 2 for n in range(16)]][:, None] + 1e-6).sum(1)
    assert found["recall_at_1"]["value"] == pytest.approx(float((rank < 1).double().mean()))
    assert found["recall_at_5"]["value"] == pytest.approx(float((rank < 5).double().mean()))
    output = capsys.readouterr()
    line = next(line for line in output.out.splitlines() if line.startswith("precision "))
    assert line.split()[1:5] == [
        f"{found['precision']['value']:.5g}",
        f"{found['precision']['interval'][0]:.4g}",
        "to",
        f"{found['precision']['interval'][1]:.4g}",
    ]


def test_a_super_resolution_sees_the_true_low_resolution(root: Path, command, tmp_path: Path):
    assert main(command("superres", model=root / "superres.safetensors", features="none")) == 0
    file = drawn(tmp_path)[2]
    [record] = read_records(file)
    assert record.request.edit is not None
    assert record.request.edit["kind"] == "superres"
    stage = open_stage(root / "superres.safetensors", "superres")
    row = COLOURS.index(record.prompts[0].split()[1])
    low = to_tensor(root / "images" / f"{row}.png", 16)
    image = stage.generate(record.prompts, cond_images=low[None], seeds=[2])
    assert image.shape == (1, 3, 32, 32)
    assert (image[0] - to_tensor(file)).abs().max() <= 1.01 / 255
    with pytest.raises(ValueError, match="was edited"):
        record.check(open_model(root / "muse.safetensors"), file)


def test_the_whole_model_at_its_size(root: Path, command, tmp_path: Path, resnet: str, capsys):
    assert main(command("model", **{"superres.timesteps": 1})) == 0
    assert images(drawn(tmp_path)).shape == (8, 3, 32, 32)
    setup = json.loads((tmp_path / "out" / "setup.json").read_text())
    assert setup["options"]["base"]["timesteps"] == 2
    assert setup["options"]["superres"]["timesteps"] == 1
    assert "diversity" not in figures(tmp_path, resnet)
    assert "left out: diversity" in capsys.readouterr().err


def test_presets_sizes_and_fewer_captions(root: Path, command, tmp_path: Path, resnet: str):
    line = command(preset="one", image_size="[16, 24]", samples=3, references=6)
    assert main(line) == 0
    assert images(drawn(tmp_path)).shape == (3, 3, 16, 24)
    setup = json.loads((tmp_path / "out" / "setup.json").read_text())
    assert setup["options"] == {"base": setup["options"]["base"] | {"timesteps": 1}}
    assert "6 true images" in figures(tmp_path, resnet)["fid"]["note"]


def test_more_captions_hold_the_fewer(command, tmp_path: Path):
    keys = []
    for count in (3, 5):
        out = tmp_path / str(count)
        assert main(command(features="none", samples=count, out=out)) == 0
        prompts = json.loads((out / "figures.json").read_text())["prompts"]
        keys.append([prompt["key"] for prompt in prompts])
    assert keys[1][:3] == keys[0]


# Going on ------------------------------------------------------------------------------------


def test_what_was_drawn_is_kept(command, tmp_path: Path, monkeypatch, capsys):
    draw, calls = drawing.Drawer.draw, []

    def failing(self, request, *others):
        calls.append(request.seeds)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, request, *others)

    monkeypatch.setattr(drawing.Drawer, "draw", failing)
    assert main(command(features="none")) == 130
    assert len(drawn(tmp_path)) == 6
    before = {file: file.stat().st_mtime_ns for file in drawn(tmp_path)}
    drawn(tmp_path)[1].write_bytes(b"cut off")
    assert main(command(features="none")) == 0
    assert calls == [[0, 1, 2], [3, 4, 5], [6, 7], [0, 1, 2], [6, 7]]
    assert {file: file.stat().st_mtime_ns for file in drawn(tmp_path)[3:6]} == {
        file: before[file] for file in drawn(tmp_path)[3:6]
    }
    assert "3 of 8 pictures are from an earlier start" in capsys.readouterr().err


def test_features_are_computed_once(command, tmp_path: Path, monkeypatch, resnet: str):
    assert main(command()) == 0
    first = figures(tmp_path, resnet)
    monkeypatch.setattr(FeatureNet, "pooled", None)  # cannot be called
    assert main(command()) == 0
    assert figures(tmp_path, resnet) == first


def test_features_are_of_these_pixels(root: Path, command, tmp_path: Path, resnet: str):
    folder = tmp_path / "images"
    folder.mkdir()
    for file in (root / "images").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert main(command(data=folder)) == 0
    Image.new("RGB", (40, 36), "black").save(folder / "3.png")  # another one of the same name
    first = figures(tmp_path, resnet)
    assert main(command(data=folder)) == 0
    assert figures(tmp_path, resnet)["fid"]["value"] != first["fid"]["value"]


# Networks, prompts, facts --------------------------------------------------------------------


def test_agreement_with_the_captions(root: Path, command, tmp_path: Path, clip: str, resnet: str):
    assert main([*command(), "--features", resnet, clip]) == 0
    assert "clip_score" not in figures(tmp_path, resnet)
    found = figures(tmp_path, clip)["clip_score"]
    result = json.loads((tmp_path / "out" / "figures.json").read_text())
    scores = [prompt[f"clip_score, {clip}"] for prompt in result["prompts"]]
    assert found["value"] == pytest.approx(sum(scores) / 8)
    assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert found["truth"] is not None


def test_the_page_needs_nothing_else(root: Path, command, tmp_path: Path, resnet: str, clip: str):
    folder = tmp_path / "images"
    folder.mkdir()
    for file in (root / "images").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "0.txt").write_text("a <b>bold</b> box")
    line = command(data=folder, seeds=2)
    assert main([*line, "--features", resnet, clip, "nobody/nothing"]) == 0
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "<script" not in page
    assert not {
        link for link in re.findall(r"(?:src|href)='?([^' >]*)", page) if "data:" not in link
    }
    assert "<b>" not in page.partition("<main>")[2]
    # a sheet of all, the worst and the best by the agreement; charts of three scores
    assert page.count("<img ") == 3
    assert page.count("class=bars") == 5
    found = figures(tmp_path, clip)["clip_score"]
    assert f"<td>{found['value']:.5g}<td>" in page
    assert f"<td>{found['truth']:.4g}<td>" in page
    [sheet, *_] = re.findall(r"src='data:image/png;base64,([^']*)'", page)
    image = Image.open(io.BytesIO(base64.b64decode(sheet)))
    assert image.width > image.height  # eight strips of three small pictures


def test_a_stream_and_a_table(command, tmp_path: Path, resnet: str, root: Path, capsys):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"image": {"bytes": (root / "images" / f"{n}.png").read_bytes()}, "text": f"{c} box"}
        for n, c in enumerate(COLOURS)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    line = command(data=tmp_path / "rows.parquet", streaming="true")
    assert "say how many to take, --samples" in fails(line, capsys)
    assert main([*line, "--samples=7"]) == 0
    prompts = json.loads((tmp_path / "out" / "figures.json").read_text())["prompts"]
    assert {prompt["text"] for prompt in prompts} == {f"{c} box" for c in COLOURS[:7]}
    assert figures(tmp_path, resnet)["fid"]["images"] == 7


def test_judges_see_the_rows_of_the_data(root: Path):
    rows = [
        {"image": Image.open(root / "images" / f"{n}.png"), "text": c, "facts": [{"of": n}]}
        for n, c in enumerate(COLOURS)
    ]
    source = open_source(rows, None, True)
    geometry = open_stage(root / "base.safetensors").geometry
    prompts = Truth(source, geometry, (16, 16), samples=4).prompts
    assert [p.values for p in prompts] == [
        {"text": p.text, "facts": [{"of": COLOURS.index(p.text)}]} for p in prompts
    ]


def test_a_model_that_takes_no_captions(root: Path, command, tmp_path: Path, resnet: str):
    bare = tmp_path / "images"
    bare.mkdir()
    for file in (root / "images").glob("*.png"):
        (bare / file.name).write_bytes(file.read_bytes())
    stage = tiny.maskgit(
        tiny.transformer(classes=[], text_embed_dim=None, t5_name="none"),
        sample_options={"timesteps": 2},
    )
    stage.save(tmp_path / "free.safetensors")
    assert main(command(model=tmp_path / "free.safetensors", data=bare)) == 0
    assert figures(tmp_path, resnet)["fid"]["images"] == 8


def test_prompts_alone(command, tmp_path: Path, clip: str, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\na red box\n\na blue box\n")
    assert main(command(data=None, prompts=file, features=clip, seeds=3)) == 0
    assert figures(tmp_path, clip).keys() == {"clip_score", "diversity"}
    assert len(drawn(tmp_path)) == 6
    assert [read_records(path)[0].prompts[0] for path in drawn(tmp_path)[2:4]] == [
        "a red box",
        "a blue box",
    ]


JUDGE = """
class Judge:
    def facts(self, pictures, rows):
        assert all(row.key and picture.size == (16, 16) for picture, row in zip(pictures, rows))
        return [self.of(picture, row.text) for picture, row in zip(pictures, rows)]

    def of(self, picture, text):
        if "pink" in text:
            return {}
        reddish = picture.resize((1, 1)).getpixel((0, 0))[0] > 127
        return {"red": reddish} | ({"b": True} if "blue" in text else {})
"""


def test_a_judge_of_ones_own(command, tmp_path: Path):
    (tmp_path / "my_judge.py").write_text(JUDGE)
    assert main(command(features="none", seeds=2, judge=tmp_path / "my_judge.py:Judge")) == 0
    found = figures(tmp_path, "judge")
    counts = {name: metric["images"] for name, metric in found.items()}
    assert counts == {"b": 2, "red": 14, "all_right": 14}
    assert found["b"]["value"] == found["b"]["truth"] == 1
    prompts = json.loads((tmp_path / "out" / "figures.json").read_text())["prompts"]
    reddish = [
        Image.open(file).resize((1, 1)).getpixel((0, 0))[0] > 127  # type: ignore[index]
        for file, prompt in zip(drawn(tmp_path), [p for p in prompts for _ in "12"], strict=True)
        if "pink" not in prompt["text"]
    ]
    assert found["red"]["value"] == pytest.approx(sum(reddish) / 14)
    assert found["all_right"]["value"] == found["red"]["value"]


def test_a_network_that_cannot_be_had_leaves_the_others(command, tmp_path, resnet: str, capsys):
    assert main([*command(), "--features", "nobody/nothing", resnet]) == 0
    err = capsys.readouterr().err
    assert "its figures are left out" in err
    assert "'nobody/nothing' cannot be had" in err
    assert figures(tmp_path, resnet)["fid"]["images"] == 8


def test_too_few_images_leave_out_what_needs_more(command, tmp_path, resnet: str, capsys):
    assert main(command(samples=2)) == 0
    assert "precision" not in figures(tmp_path, resnet)
    err = capsys.readouterr().err
    assert "left out: precision, recall, density, coverage" in err
    assert "2 pictures and 2 true images are too few" in err
    assert "fewer images than features" in figures(tmp_path, resnet)["fid"]["note"]


def test_an_image_that_cannot_be_read_is_left_out(root: Path, command, tmp_path: Path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for file in (root / "images").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    assert main(command(features="none", data=folder)) == 0
    assert len(drawn(tmp_path)) == 7
    assert "left out 1 images that cannot be read: 2.png" in capsys.readouterr().err


# Mistakes ------------------------------------------------------------------------------------


def fails(argv: list[str], capsys) -> str:
    """Run; check that it fails as a mistake in the input; return its last line."""
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    last = output.err.splitlines()[-1]
    assert last.startswith("muse: error: ")
    return last


@pytest.mark.parametrize(
    "part, changes, says",
    [
        ("base", dict(data=None), "say what to draw: --data"),
        ("base", dict(prompts="p.txt"), "--prompts FILE, but not both"),
        ("superres", dict(data=None), "say what to draw: --data"),
        ("base", dict(data="absent"), "'absent' does not exist"),
        ("base", dict(seeds=0), "--seeds must be at least 1"),
        ("base", dict(samples=0), "--samples must be at least 1"),
        ("base", dict(batch_size=0), "--batch_size must be at least 1"),
        ("base", dict(preset="slow"), "slow"),
        ("base", dict(image_size=17), "17 is not a positive multiple"),
        ("base", dict(judge="nothing"), "--judge must be FILE.py:NAME"),
        ("base", dict(judge="absent.py:Judge"), "there is no file 'absent.py'"),
        ("base", dict(model="absent.safetensors"), "absent.safetensors"),
        ("base", dict(**{"superres.timesteps": 3}), "unknown option --superres.timesteps"),
    ],
)
def test_bad_input(command, part, changes, says, capsys):
    assert says in fails(command(part, **changes), capsys)


def test_models_without_the_stage(root: Path, command, capsys):
    alone = root / "base.safetensors"
    said = fails(command("superres", model=alone), capsys)
    assert "is a base stage and no super-resolution" in said
    said = fails(command("model", model=alone, **{"superres.timesteps": 3}), capsys)
    assert "has no such stage" in said
    said = fails(command("base", model=root / "superres.safetensors"), capsys)
    assert "is a super-resolution stage alone" in said


def test_folders_without_captions_and_files_without_prompts(command, tmp_path: Path, capsys):
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "bare" / "a.png")
    assert "has a caption" in fails(command(data=tmp_path / "bare"), capsys)
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    said = fails(command(data=None, prompts=tmp_path / "empty.txt"), capsys)
    assert "holds no prompt" in said


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"base.timesteps": 1}, "options.base.timesteps 2, this one has 1"),
        ({"seeds": 2}, "seeds 1, this one has 2"),
        ({"seed": 5}, "seed 0, this one has 5"),
        ({"samples": 4}, "prompts 8, this one has 4"),
        ({"negative": "blur"}, "negative None, this one has blur"),
    ],
)
def test_a_folder_of_another_evaluation(command, tmp_path, changes, says, capsys):
    assert main(command(features="none")) == 0
    capsys.readouterr()
    said = fails(command(features="none", **changes), capsys)
    assert f"{says}: give another folder" in said


def test_a_folder_of_another_model_or_of_something_else(root, command, tmp_path, capsys):
    assert main(command(features="none")) == 0
    capsys.readouterr()
    other = tiny.maskgit(
        tiny.transformer(
            text_embed_dim=16, t5_name=open_stage(root / "base.safetensors").transformer.t5_name
        ),
        sample_options={"timesteps": 2, "cond_scale": 1.5},
    )
    other.save(tmp_path / "other.safetensors")
    said = fails(command(features="none", model=tmp_path / "other.safetensors"), capsys)
    assert "holds an evaluation with model " in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.txt").write_text("")
    said = fails(command(out=tmp_path / "mine"), capsys)
    assert "holds other files and no evaluation" in said
