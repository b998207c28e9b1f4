"""`muse edit`: which pixels are kept, what the files hold, mistakes in one sentence."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import Muse, editing
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli import drawing, edit, options
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.images import (
    image_grid,
    read_record,
    record_of,
    save_png,
    to_pil,
    to_tensor,
)
from muse_maskgit_pytorch.provenance import read_records

SIZE = (32, 32)
LOWER = (0, 16, 32, 32)  # a box, and what `crop` takes


@pytest.fixture(scope="module")
def root(t5: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16, then 32 pixels, a picture, and masks of its lower half."""
    root = tmp_path_factory.mktemp("edit")
    torch.manual_seed(1)
    vae, text = tiny.vae(), dict(t5_name=t5, text_embed_dim=None)
    base = tiny.maskgit(tiny.transformer(**text), vae=vae, sample_options=dict(timesteps=4))
    high = tiny.transformer(seq_len=64, **text)
    steps = dict(timesteps=3)
    superres = tiny.superres(model=high, vae=tiny.vae(), cond_vae=vae, sample_options=steps)
    Muse(base, superres).save(root / "muse.safetensors")
    picture().save(root / "a.png")

    lower = np.zeros(SIZE, dtype=bool)
    lower[16:] = True
    grey = Image.fromarray(np.where(lower, 255, 0).astype(np.uint8))
    grey.save(root / "grey.png")
    grey.convert("RGB").save(root / "rgb.png")
    Image.fromarray(np.where(lower, 65535, 300).astype(np.uint16)).save(root / "16bit.png")
    palette = Image.fromarray(np.where(lower, 3, 7).astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0] * 3 + [255, 255, 255] + [0, 0, 0] * 4)
    palette.save(root / "palette.png")
    Image.fromarray(lower).save(root / "bits.png")
    stroke = Image.new("RGBA", SIZE, (255, 255, 255, 0))  # white paint on an empty layer
    stroke.paste((255, 255, 255, 255), LOWER)
    stroke.save(root / "stroke.png")

    erased = picture().convert("RGBA")
    erased.putalpha(Image.fromarray(np.where(lower, 0, 255).astype(np.uint8)))
    erased.save(root / "erased.png")
    palette.save(root / "erased-palette.png", transparency=3)
    erased.convert("LA").save(root / "erased-grey.png")
    return root


def picture(seed: int = 0, height: int = 32, width: int = 32) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return to_pil(torch.rand(3, height, width, generator=generator))[0]


def run(root: Path, kind: str, *words: str) -> int:
    """The edit of the picture with the model and the seed 3, unless the words say others."""
    usual = [f"--model={root}/muse.safetensors", "--seed=3"]
    stated = {word.partition("=")[0] for word in words}
    usual = [word for word in usual if word.partition("=")[0] not in stated]
    return main(["edit", kind, f"{root}/a.png", *words, *usual])


def result(root: Path, out: Path, kind: str, *words: str) -> Image.Image:
    assert run(root, kind, *words, f"--out={out}") == 0
    with Image.open(out) as image:
        return image.copy()


# Pictures -------------------------------------------------------------------------------------


def test_kept_pixels_are_exact_in_the_file(root: Path, tmp_path: Path, capsys):
    box = ["--box", *map(str, LOWER)]
    out = tmp_path / "deep" / "x.png"
    drawn = result(root, out, "inpaint", "a red car", *box)
    assert capsys.readouterr().out == f"{out}\n"
    upper = (0, 0, 32, 16)
    assert drawn.crop(upper).tobytes() == picture().crop(upper).tobytes()
    assert drawn.crop(LOWER).tobytes() != picture().crop(LOWER).tobytes()
    model = Muse.from_pretrained(root / "muse.safetensors")
    mask = editing.box(SIZE, *LOWER)
    [expected] = editing.inpaint(model, picture(), "a red car", mask, seeds=3)
    assert drawn.tobytes() == expected.tobytes()
    first = out.read_bytes()
    assert result(root, out, "inpaint", "a red car", *box) == drawn
    assert out.read_bytes() == first
    assert [file.name for file in out.parent.iterdir()] == ["x.png"]
    raw = result(root, out, "inpaint", "a red car", *box, "--blend=false")
    assert raw.crop(upper).tobytes() != picture().crop(upper).tobytes()
    assert result(root, out, "inpaint", "a red car", *box, "--seed=4") != drawn
    assert result(root, out, "inpaint", *box) != drawn  # no caption


@pytest.mark.parametrize(
    "mask",
    [f"--white={n}" for n in ("grey", "rgb", "16bit", "palette", "bits", "stroke")]
    + [f"--transparent={n}" for n in ("erased", "erased-palette", "erased-grey")],
)
def test_every_way_to_say_the_same_mask(root: Path, tmp_path: Path, mask: str):
    option, _, name = mask.partition("=")
    config = options.inpaint_parser().read([f"{root}/a.png", option, f"{root}/{name}.png"])
    assert torch.equal(edit.read_mask(config, picture()), editing.box(SIZE, *LOWER))


def test_both_conventions_give_the_same_picture(root: Path, tmp_path: Path):
    white = result(root, tmp_path / "w.png", "inpaint", "a", "--white", f"{root}/grey.png")
    clear = result(root, tmp_path / "t.png", "inpaint", "a", "--transparent", f"{root}/erased.png")
    assert white == clear
    # the picture itself, erased in part, as its own mask
    own = ["edit", "inpaint", f"{root}/erased.png", "a", f"--transparent={root}/erased.png"]
    own += [f"--model={root}/muse.safetensors", "--seed=3", f"--out={tmp_path}/o.png"]
    assert main(own) == 0
    assert Image.open(tmp_path / "o.png").tobytes() == white.tobytes()


def test_outpainting(root: Path, tmp_path: Path):
    sides = ["--left=4", "--bottom", "8"]
    drawn = result(root, tmp_path / "x.png", "outpaint", "a red car", *sides)
    assert drawn.size == (36, 40)
    assert drawn.crop((4, 0, 36, 32)).tobytes() == picture().tobytes()
    for aspect in ("3:2", "1.5"):
        assert result(root, tmp_path / "x.png", "outpaint", "a", f"--aspect={aspect}").size == (
            48,
            32,
        )


def test_variations_from_none_to_all(root: Path, tmp_path: Path):
    same = result(root, tmp_path / "0.png", "vary", "--strength=0")
    assert same.tobytes() == picture().tobytes()
    new = result(root, tmp_path / "1.png", "vary", "a red car", "--strength", "1")
    model = Muse.from_pretrained(root / "muse.safetensors")
    assert new.tobytes() == model("a red car", seeds=3)[0].tobytes()
    edit = read_records(tmp_path / "1.png")[0].request.edit
    assert edit is not None
    assert edit["strength"] == [1.0]


@pytest.mark.parametrize("at", [["--at", "2", "4"], ["--at", "[2, 4]"], ["--at=4"]])
def test_mask_free_editing(root: Path, tmp_path: Path, at: list[str]):
    each = tmp_path / "each"
    result(root, tmp_path / "x.png", "free", "a red car", *at, "--share=0.2", f"--each={each}")
    model = Muse.from_pretrained(root / "muse.safetensors")
    iterations = [2, 4] if len(at) > 1 else [4]
    wanted = editing.free(model, picture(), "a red car", at=iterations, share=0.2, seeds=3)
    files = sorted(each.iterdir())
    names = [f"{i:03d}-after-{n}-a-red-car.png" for i, n in enumerate(iterations, 1)]
    assert [file.name for file in files] == names
    for file, [image] in zip(files, wanted, strict=True):
        assert Image.open(file).tobytes() == image.tobytes()
        assert read_record(file) == record_of(image)


# Files ----------------------------------------------------------------------------------------


def test_a_sheet_begins_with_what_was_given(root: Path, tmp_path: Path):
    words = ["a red car", "two cats", "--count=2", "--white", f"{root}/grey.png", "--batch_size=3"]
    sheet = result(root, tmp_path / "x.png", "inpaint", *words, f"--each={tmp_path}/each")
    files = sorted((tmp_path / "each").iterdir())
    assert [file.name for file in files] == [
        "001-a-red-car.png",
        "002-a-red-car.png",
        "003-two-cats.png",
        "004-two-cats.png",
    ]
    masked = picture()
    masked.paste((128, 128, 128), LOWER)
    captions = ["given", "masked", "seed 3: a red car", "seed 4: a red car"]
    captions += ["seed 5: two cats", "seed 6: two cats"]
    images = [picture(), masked, *map(Image.open, files)]
    assert sheet.tobytes() == image_grid(images, 3, captions).tobytes()
    assert read_record(tmp_path / "x.png") is None
    prompts = [read_records(file)[0].prompts[0] for file in files]
    assert prompts == ["a red car", "a red car", "two cats", "two cats"]
    alone = result(root, tmp_path / "y.png", "inpaint", "two cats", *words[3:5], "--seed=6")
    there, alone = (to_tensor(image) * 255 for image in (Image.open(files[3]), alone))
    assert (there - alone).abs().max() <= 1  # whatever it was drawn with, but for rounding


def test_a_sheet_of_continuations_shows_where_they_continue(root: Path, tmp_path: Path):
    sheet = result(root, tmp_path / "x.png", "outpaint", "--left=8", "--count=2")
    canvas = Image.new("RGB", (40, 32), (128, 128, 128))
    canvas.paste(picture(), (8, 0))
    empty = [Image.new("RGB", (40, 32))] * 2
    captions = ["given", "masked", "seed 3", "seed 4"]
    expected = image_grid([picture(), canvas, *empty], 2, captions)
    top = (0, 0, sheet.width, sheet.height // 2)
    assert sheet.crop(top).tobytes() == expected.crop(top).tobytes()


def test_options_negative_prompts_and_presets_count(root: Path, tmp_path: Path, capsys):
    words = ["a", "--base.timesteps=2", "--superres.temperature=0.5", "--negative", "dogs"]
    result(root, tmp_path / "x.png", "vary", *words)
    [record] = read_records(tmp_path / "x.png")
    assert record.request.negatives == ["dogs"]
    base, superres = record.request.options["base"], record.request.options["superres"]
    assert (base.timesteps, superres.timesteps) == ([2], [3])
    assert superres.temperature == [0.5]
    assert base.seeds == [3]
    result(root, tmp_path / "y.png", "vary", "a", "--image_size", "[32, 64]", "--count=1")
    assert Image.open(tmp_path / "y.png").size == (64, 32)
    assert "unknown preset 'absent'" in fails(
        root, capsys, "vary", "--preset=absent", f"--out={tmp_path}/z.png"
    )


def test_inspect_shows_the_edit_and_like_refuses(root: Path, tmp_path: Path, capsys):
    result(root, tmp_path / "x.png", "inpaint", "a red car", "--box", *map(str, LOWER), "--grow=2")
    capsys.readouterr()
    assert main(["inspect", f"{tmp_path}/x.png"]) == 0
    words = capsys.readouterr().out
    assert "  prompt    a red car\n" in words
    assert "  edit      kind=inpaint blend=True feather=8 grow=2 masks=['" in words
    argv = ["generate", f"--like={tmp_path}/x.png", f"--model={root}/muse.safetensors"]
    assert main([*argv, f"--out={tmp_path}/y.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"muse: error: {tmp_path}/x.png was edited (inpaint)")
    assert error.count("\n") == 1
    assert not (tmp_path / "y.png").exists()


def test_a_scaled_picture_is_said_once(root: Path, tmp_path: Path, capsys):
    picture(0, 64, 64).save(tmp_path / "large.png")
    argv = ["edit", "inpaint", f"{tmp_path}/large.png", "--white", f"{root}/grey.png", "--count=2"]
    argv += ["--batch_size=1", f"--model={root}/muse.safetensors", f"--out={tmp_path}/x.png"]
    assert main(argv) == 0
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("muse: warning: ")]
    assert said == [
        "muse: warning: a picture of 64 x 64 pixels is scaled to 32 x 32",
        "muse: warning: a mask of 32 x 32 pixels is scaled to its picture's 64 x 64",
    ]


@pytest.mark.parametrize(
    "kind, words, total",
    [
        ("inpaint", ["--box", *map(str, LOWER), "--grow=0"], 2 * (4 + 3)),
        ("vary", [], 2 * (4 + 3)),
        ("free", ["a", "--at", "2", "5"], 2 * (5 + 2 * 3)),
        ("outpaint", ["--right=8"], None),
    ],
)
def test_the_bar_knows_its_end(root: Path, tmp_path: Path, monkeypatch, kind, words, total):
    seen: dict[str, Any] = {"steps": 0}

    class Bar(drawing.tqdm):
        def __init__(self, **arguments: Any):
            seen["total"] = arguments["total"]
            super().__init__(**arguments)

        def update(self, n: float | None = 1) -> bool | None:
            seen["steps"] += n
            return super().update(n)

    monkeypatch.setattr(drawing, "tqdm", Bar)
    words = [*words, "--count=2", "--batch_size=1", f"--out={tmp_path}/x.png"]
    assert run(root, kind, *words) == 0
    assert seen["total"] == total
    assert seen["steps"] == (total or 2 * (4 + 3))  # one window


# Options and mistakes -------------------------------------------------------------------------


def test_defaults_are_those_of_the_functions():
    parsers = {options.inpaint_parser: "blend feather grow", options.vary_parser: "strength"}
    parsers |= {options.outpaint_parser: "left top right bottom aspect feather grow"}
    parsers |= {options.free_parser: "share cond_scale top_k"}
    for make, names in parsers.items():
        defaults = make()._parser.get_defaults(skip_validation=True)
        function = getattr(editing, make.__name__.removesuffix("_parser"))
        arguments = inspect.signature(function).parameters
        for name in names.split():
            assert defaults[name] == arguments[name].default
    assert options.free_parser()._parser.get_defaults(skip_validation=True).at == [100]


def fails(root: Path, capsys, kind: str, *words: str) -> str:
    """Run; check that it fails as a mistake in the input; return its one sentence."""
    capsys.readouterr()
    assert run(root, kind, *words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    [said] = [line for line in error.splitlines() if line.startswith("muse: error: ")]
    assert error.endswith(f"{said}\n")
    return said


BOX = ["--box", "0", "0", "8", "8"]


@pytest.mark.parametrize(
    "kind, words, says",
    [
        ("inpaint", ["a"], "exactly one of --white MASK, --transparent MASK and --box"),
        ("inpaint", [*BOX, "--white=grey.png"], "not by --white and --box"),
        ("inpaint", ["--white", "absent.png"], "cannot read image 'absent.png'"),
        ("inpaint", ["--transparent", "absent.png"], "cannot read image 'absent.png'"),
        ("inpaint", [*BOX[:4], "40"], "inside the picture's 32 x 32 pixels"),
        ("inpaint", BOX[:4], "expected 4 arguments"),
        ("inpaint", [*BOX, "--out=a.jpg"], "--out 'a.jpg' must end in .png"),
        ("inpaint", [*BOX, "--grow=-1"], "grow must be at least 0, not -1"),
        ("inpaint", [*BOX, "--fether=2"], "did you mean --feather?"),
        ("vary", ["--count=0"], "--count must be 1 to 64, not 0"),
        ("vary", ["--count=65"], "--count must be 1 to 64, not 65"),
        ("vary", ["a", "b", "--count=33"], "a sheet shows up to 64 results, not 66"),
        ("vary", ["--batch_size=0"], "--batch_size must be at least 1"),
        ("vary", ["--strength=1.5"], "strength must be in [0, 1]"),
        ("vary", ["--count=2", "--seed=[1]"], "seeds has 1 values for 2 images"),
        ("vary", ["--device=abc"], "--device 'abc' cannot be used"),
        ("vary", ["--model=absent.safetensors"], "absent.safetensors"),
        ("vary", ["--image_size=30"], "30 is not a positive multiple of 8"),
        ("outpaint", ["a"], "nothing to add"),
        ("outpaint", ["--left=-1"], "left must be at least 0, not -1"),
        (
            "outpaint",
            ["--left=1", "--aspect=2"],
            "aspect 2.0 and sides [1, 0, 0, 0] are both given",
        ),
        (
            "outpaint",
            ["--aspect=16:0"],
            "--aspect must be width:height, such as 16:9, or their ratio, such as 1.5, not '16:0'",
        ),
        ("outpaint", ["--aspect=16:"], "not '16:'"),
        ("outpaint", ["--aspect=wide"], "not 'wide'"),
        ("outpaint", ["--aspect=nan"], "not 'nan'"),
        ("free", [], "give at least one prompt"),
        ("free", ["a", " "], "no empty one"),
        ("free", ["a", "--at", "4", "2"], "rising iterations"),
        ("free", ["a", "--at", "0"], "at must be at least 1, not 0"),
        ("free", ["a", "--share=0"], "share must be above 0"),
        ("free", ["a", "--top_k=99"], "top_k 99 is larger"),
        ("free", ["a", "--base.timesteps=4"], "--base.timesteps"),  # would do nothing
    ],
)
def test_mistakes(root: Path, tmp_path: Path, capsys, monkeypatch, kind, words, says):
    monkeypatch.chdir(tmp_path)
    assert says in fails(root, capsys, kind, *words)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_what_they_should_be(root: Path, tmp_path: Path, capsys):
    (tmp_path / "torn.png").write_bytes((root / "a.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    for name in ("torn", "text", "absent"):
        file = f"{tmp_path}/{name}.png"
        assert main(["edit", "vary", file]) == 2
        assert f"cannot read image '{file}'" in capsys.readouterr().err
        assert f"cannot read image '{file}'" in fails(root, capsys, "inpaint", f"--white={file}")
    opaque = f"--transparent={root}/grey.png"
    assert "has no transparency; if its white is to be" in fails(root, capsys, "inpaint", opaque)
    Image.new("L", SIZE).save(tmp_path / "black.png")
    empty = fails(root, capsys, "inpaint", f"--white={tmp_path}/black.png")
    assert "a mask repaints nothing" in empty


def test_what_is_edited_is_not_overwritten(root: Path, tmp_path: Path, capsys):
    source = tmp_path / "001-a.png"
    save_png(picture(), source)
    before = source.read_bytes()
    model = f"--model={root}/muse.safetensors"
    (tmp_path / "link.png").symlink_to(source)
    for flags in (
        [f"--out={source}"],
        [f"--out={tmp_path}/../{tmp_path.name}/link.png"],
        [f"--out={tmp_path}/x.png", f"--each={tmp_path}"],
    ):
        assert main(["edit", "vary", str(source), "a", model, *flags]) == 2
        assert "is one of the given files and would be overwritten" in capsys.readouterr().err
    mask = root / "grey.png"
    held = mask.read_bytes()
    assert "would be overwritten" in fails(
        root, capsys, "inpaint", f"--white={mask}", f"--out={mask}"
    )
    assert source.read_bytes() == before
    assert mask.read_bytes() == held
    assert not (tmp_path / "x.png").exists()


def test_the_group_alone_and_a_mistyped_command(capsys):
    assert main(["edit"]) == 0
    assert "muse edit outpaint" in capsys.readouterr().out
    assert main(["edit", "inpant"]) == 2
    assert "did you mean 'edit inpaint'?" in capsys.readouterr().err
