"""The command line: signatures to keys, mistakes to one sentence, and three tiny real trainings."""

import inspect
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from PIL import GifImagePlugin, Image
from torch.nn import functional as F

from muse_maskgit_pytorch import (
    MaskGit,
    MaskGitTrainer,
    MaskGitTransformer,
    Muse,
    SampleOptions,
    TokenCritic,
    VQGanVAE,
    VQGanVAETrainer,
    __version__,
)
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.checkpoint import SHIPPED, load_tree
from muse_maskgit_pytorch.cli import drawing, options
from muse_maskgit_pytorch.cli import generate as generating
from muse_maskgit_pytorch.cli import train as training
from muse_maskgit_pytorch.cli.main import COMMANDS, main
from muse_maskgit_pytorch.cli.parser import nearest
from muse_maskgit_pytorch.film import Film
from muse_maskgit_pytorch.images import save_png, set_record, to_tensor
from muse_maskgit_pytorch.provenance import Record, read_records, to_json
from muse_maskgit_pytorch.request import Request
from muse_maskgit_pytorch.training.loop import Trainer
from tests import hub

RECIPES = Path(__file__).parents[2] / "recipes"
COLOURS = ("red", "green", "blue", "black")
SHAPES = ("cross", "square")

# Runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory, t5: str) -> Path:
    """Eight captioned images, and recipes for all stages."""
    root = tmp_path_factory.mktemp("cli")
    (root / "images").mkdir()
    for number, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES)):
        image = Image.new("RGB", (16, 16), "white")
        image.paste(colour, (4, 4, 12, 12) if shape == "square" else (6, 0, 10, 16))
        image.save(root / "images" / f"{number}.png")
        (root / "images" / f"{number}.txt").write_text(f"a {colour} {shape}")

    trainer = dict(folder=f"{root}/images", batch_size=4, num_train_steps=2, warmup_steps=0)
    trainer |= dict(log_every=1, sample_every=0)

    def write(name: str, tree: dict) -> None:
        (root / name).write_text(yaml.safe_dump(tree))

    vae = dict(dim=8, layers=1, channel_mults=[1, 1], num_res_blocks=1, quantizer="fsq")
    write(
        "vae.yaml",
        {
            "vae": {**vae, "codebook_size": 64, "patch_size": 2},
            "trainer": trainer
            | dict(image_size=16, perceptual_weight=0, gan_weight=0, results_folder=f"{root}/vae"),
        },
    )
    stage = {
        "vae": f"{root}/vae/vae-ema.safetensors",
        "transformer": dict(dim=16, depth=1, heads=2, dim_head=8, t5_name=t5),
        "trainer": trainer | dict(valid_fraction=0, num_samples=2),
    }
    base = stage["trainer"] | dict(results_folder=f"{root}/base")
    options = dict(timesteps=3, cond_scale=2.0)
    maskgit = dict(image_size=8, sample_options=options)
    write("base.yaml", stage | dict(maskgit=maskgit, trainer=base))
    superres = stage["trainer"] | dict(results_folder=f"{root}/superres")
    sizes = dict(image_size=16, cond_image_size=8)
    write("superres.yaml", stage | dict(maskgit=sizes, trainer=superres))
    return root


@pytest.fixture(scope="module")
def muse_file(root: Path) -> Path:
    """All three stages trained by their recipes, and bundled."""
    for stage in ("vae", "base", "superres"):
        assert main(["train", stage, "--config", f"{root}/{stage}.yaml"]) == 0
    stages = [f"--{s}={root}/{s}/{s}-ema.safetensors" for s in ("base", "superres")]
    assert main(["bundle", *stages, "--out", f"{root}/muse.safetensors", "--dtype=float16"]) == 0
    return root / "muse.safetensors"


def test_the_three_trainings_write_what_their_recipes_say(muse_file: Path):
    root = muse_file.parent
    vae = VQGanVAE.from_pretrained(root / "vae" / "vae-ema.safetensors")
    assert (vae.codebook_size, vae.factor, vae.config["dim"]) == (64, 4, 8)
    muse = Muse.from_pretrained(muse_file)
    assert muse.superres is not None
    # derived from the tokenizer, not stated in the recipe
    assert (muse.base.transformer.seq_len, muse.superres.transformer.seq_len) == (4, 16)
    assert muse.base.transformer.num_tokens == 64
    assert muse.base.default_options == SampleOptions(timesteps=3, cond_scale=2.0)
    assert muse.superres.default_options == SampleOptions(timesteps=8)
    lines = (root / "base" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 2]  # at last of the samples


def test_flags_override_the_recipe(root: Path, tmp_path: Path):
    flags = [
        "--vae.dim",
        "4",
        "--trainer.num_train_steps=1",
        f"--trainer.results_folder={tmp_path}",
    ]
    assert main(["train", "vae", "--config", f"{root}/vae.yaml", *flags]) == 0
    assert VQGanVAE.from_pretrained(tmp_path / "vae.safetensors").config["dim"] == 4


def test_a_recipe_and_its_seed_give_the_same_weights(muse_file: Path, tmp_path: Path):
    root = muse_file.parent
    for seed, same in ((0, True), (1, False)):
        flags = [f"--trainer.results_folder={tmp_path}/{seed}", f"--trainer.seed={seed}"]
        assert main(["train", "base", "--config", f"{root}/base.yaml", *flags]) == 0
        first, second = (
            MaskGit.from_pretrained(folder / "base.safetensors").transformer.to_logits.weight
            for folder in (root / "base", tmp_path / str(seed))
        )
        assert torch.equal(first, second) is same


def test_a_run_is_resumed_only_when_asked(root: Path, tmp_path: Path, capsys):
    run = ["train", "vae", "--config", f"{root}/vae.yaml", f"--trainer.results_folder={tmp_path}"]
    assert main(run) == 0
    assert main(run) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*run, "--trainer.resume=true", "--trainer.num_train_steps=3"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]


def test_a_critic_is_trained_on_a_finished_model(muse_file: Path, tmp_path: Path):
    root = muse_file.parent
    saved = root / "base" / "base.safetensors"
    flags = [f"--init_from={saved}", "--token_critic.depth=2", "--trainer.part=critic"]
    flags += [f"--trainer.results_folder={tmp_path}"]
    assert main(["train", "base", "--config", f"{root}/base.yaml", *flags]) == 0
    before = MaskGit.from_pretrained(saved).state_dict()
    model = MaskGit.from_pretrained(tmp_path / "base.safetensors")
    assert isinstance(model.critic, TokenCritic)
    assert len(model.critic.blocks) == 2
    assert model.critic.t5_name == model.transformer.t5_name  # as in the transformer
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    # and a model with its critic goes on as one
    flags[0], flags[-1] = f"--init_from={tmp_path}/base.safetensors", f"{flags[-1]}/2"
    again = started(["--config", f"{root}/base.yaml", *flags]).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


def started(argv: list[str], superres: bool = False) -> MaskGit:
    """The stage that `muse train` begins with."""
    parser = options.maskgit_parser(superres)
    start = training.open_start(parser, argv, superres)
    return training.make_maskgit(parser.read(argv), start)


def test_fine_tuning_takes_one_flag(tmp_path: Path, capsys):
    """The shipped model by its name, with its stage or without; all of it as it is there."""
    shipped = Muse.from_pretrained("scenes")
    assert shipped.superres is not None
    for name in ("scenes", "scenes:base"):
        model = started([f"--init_from={name}", "--maskgit.sample_options.timesteps=3"])
        assert model.config["transformer"] == shipped.base.config["transformer"]
        assert model.presets.keys() == shipped.base.presets.keys()
        assert model.default_options == shipped.base.default_options.replace(timesteps=3)
        for key, value in shipped.base.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
    model = started(["--init_from=scenes", "--maskgit.cond_drop_prob=0.3"], superres=True)
    assert model.cond_image_size == 128
    assert model.cond_drop_prob == 0.3
    for key, value in shipped.superres.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("init_from: scenes:superres")
    error = fails(["train", "base", "--config", str(recipe)], capsys)
    assert "scenes:superres is a super-resolution stage: use muse train superres" in error
    assert "--vae is missing" in fails(["train", "base", *SMALLEST], capsys)


SMALLEST = ["--transformer.dim=8", "--transformer.depth=1", "--maskgit.image_size=16"]


def test_a_stated_tokenizer_is_the_one(muse_file: Path, tmp_path: Path):
    """It wins over that of ``init_from``, with a warning if its tokens mean something else."""
    root = muse_file.parent
    init = f"--init_from={root}/base/base.safetensors"
    old = MaskGit.from_pretrained(root / "base" / "base.safetensors")
    assert isinstance(old.vae, VQGanVAE)
    made = old.vae.with_decoder(decoder_res_blocks=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = started([init, f"--vae={made.save(tmp_path / 'decoder.safetensors')}"])
    assert model.vae.config["decoder_res_blocks"] == 4
    other = VQGanVAE(**old.vae.config)
    with pytest.warns(UserWarning, match="its tokens mean something else"):
        model = started([init, f"--vae={other.save(tmp_path / 'other.safetensors')}"])
    weights = model.vae.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in other.state_dict().items())


def test_a_tokenizer_starts_from_a_shipped_one(root: Path, tmp_path: Path):
    """Its sizes need not be said again."""
    run = ["train", "vae", "--init_from=scenes:base", f"--trainer.folder={root}/images"]
    run += ["--trainer.image_size=16", "--trainer.batch_size=2", "--trainer.num_train_steps=1"]
    run += ["--trainer.perceptual_weight=0", "--trainer.gan_weight=0", "--trainer.lr=0"]
    assert main([*run, f"--trainer.results_folder={tmp_path / 'r'}"]) == 0
    tuned = VQGanVAE.from_pretrained(tmp_path / "r" / "vae.safetensors")
    shipped = Muse.from_pretrained("scenes").base.vae
    assert tuned.config == shipped.config
    assert all(torch.equal(tuned.state_dict()[k], v) for k, v in shipped.state_dict().items())


def test_a_tokenizer_starts_from_a_saved_one(muse_file: Path, tmp_path: Path):
    root = muse_file.parent
    flags = [f"--init_from={root}/vae/vae.safetensors", f"--trainer.results_folder={tmp_path}"]
    run = ["train", "vae", "--config", f"{root}/vae.yaml", *flags, "--trainer.lr=0"]
    assert main(run) == 0
    first, second = (
        VQGanVAE.from_pretrained(folder / "vae.safetensors").state_dict()
        for folder in (root / "vae", tmp_path)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_superres_with_a_tokenizer_of_its_own(muse_file: Path):
    root = muse_file.parent
    argv = ["--config", f"{root}/superres.yaml", f"--cond_vae={root}/vae/vae.safetensors"]
    model = training.make_maskgit(options.maskgit_parser(True).read(argv))
    assert model.cond_vae is not model.vae
    model = training.make_maskgit(options.maskgit_parser(True).read(argv[:-1]))
    assert model.cond_vae is model.vae


@pytest.fixture(scope="module")
def decoder_file(muse_file: Path) -> Path:
    """A larger decoder for the tokenizer of the stages."""
    root = muse_file.parent
    recipe = yaml.safe_load((root / "vae.yaml").read_text())
    tree = dict(decoder_dim=16, decoder_res_blocks=2, vae=f"{root}/vae/vae-ema.safetensors")
    tree["trainer"] = recipe["trainer"] | dict(results_folder=f"{root}/decoder")
    (root / "decoder.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", "decoder", "--config", f"{root}/decoder.yaml"]) == 0
    return root / "decoder" / "vae-ema.safetensors"


def test_a_decoder_is_trained_alone(decoder_file: Path):
    before = VQGanVAE.from_pretrained(decoder_file.parents[1] / "vae" / "vae-ema.safetensors")
    larger = VQGanVAE.from_pretrained(decoder_file)
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(larger.encode_to_ids(images), before.encode_to_ids(images))
    assert larger.same_ids(before)
    assert (larger.config["decoder_dim"], larger.config["decoder_res_blocks"]) == (16, 2)
    lines = [json.loads(line) for line in (decoder_file.parent / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def test_a_new_decoder_is_bundled(decoder_file: Path, tmp_path: Path, capsys):
    """With the stages, or into a whole model; the old one is not carried along."""
    root = decoder_file.parents[1]
    stages = [f"--{s}={root}/{s}/{s}-ema.safetensors" for s in ("base", "superres")]
    swap = ["--vae", str(decoder_file)]
    assert main(["bundle", *stages, "--out", f"{tmp_path}/old.safetensors"]) == 0
    assert main(["bundle", *stages, *swap, "--out", f"{tmp_path}/new.safetensors"]) == 0
    base = f"--base={tmp_path}/old.safetensors"
    assert main(["bundle", base, *swap, "--out", f"{tmp_path}/again.safetensors"]) == 0
    trees = [load_tree(tmp_path / f"{name}.safetensors", "Muse")[0] for name in ("new", "again")]
    assert trees[0]["state"].keys() == trees[1]["state"].keys()
    assert all(torch.equal(v, trees[1]["state"][k]) for k, v in trees[0]["state"].items())
    old, new = (Muse.from_pretrained(tmp_path / f"{n}.safetensors") for n in ("old", "new"))
    ids = torch.arange(16).view(1, 4, 4)
    pictures = VQGanVAE.from_pretrained(decoder_file).decode_from_ids(ids)
    assert new.superres is not None
    for stage in (new.base, new.superres):
        assert torch.equal(stage.vae.decode_from_ids(ids), pictures)
    last = dict(old.base.vae.named_parameters())["decoder.0.weight"]
    assert not any(torch.equal(last, value) for value in trees[0]["state"].values())
    capsys.readouterr()


def test_a_decoder_of_other_ids_is_not_bundled(decoder_file: Path, tmp_path: Path, capsys):
    """Such as that of the tokenizer before it was rounded to half precision."""
    base = f"--base={decoder_file.parents[1]}/muse.safetensors"
    out = f"--out={tmp_path}/m.safetensors"
    error = fails(["bundle", base, "--vae", str(decoder_file), out], capsys)
    assert f"--vae {decoder_file}: its encoder and codebook are of no tokenizer" in error
    assert list(tmp_path.iterdir()) == []


def test_what_no_decoder_can_be_trained_on(decoder_file: Path, tmp_path: Path, capsys):
    root = decoder_file.parents[1]
    run = ["train", "decoder", "--config", f"{root}/decoder.yaml"]
    run += [f"--trainer.results_folder={tmp_path}/r"]
    hub.make_vqmodel(tmp_path / "foreign")
    capsys.readouterr()  # what diffusers says of the libraries that it finds
    error = fails([*run, f"--vae={tmp_path}/foreign"], capsys)
    assert "only decoders of our own VQGanVAE can be trained" in error
    error = fails([*run, "--decoder_dim=8", "--decoder_res_blocks=0"], capsys)
    assert "decoder_res_blocks 0 are fewer than the 1" in error
    assert "trainer.decoder_only" in fails([*run, "--trainer.decoder_only=false"], capsys)
    assert "add :base or :superres" in fails([*run, f"--vae={root}/muse.safetensors"], capsys)
    assert not (tmp_path / "r").exists()


# Pictures ------------------------------------------------------------------------------------


def test_one_prompt_gives_the_picture_itself(muse_file: Path, tmp_path: Path, capsys):
    out = tmp_path / "deep" / "one.png"
    command = ["generate", "a red square", f"--model={muse_file}", "--seed=3", f"--out={out}"]
    assert main(command) == 0
    assert Image.open(out).size == (16, 16)
    assert capsys.readouterr().out == f"{out}\n"
    first = Image.open(out).tobytes()
    assert main(command) == 0
    assert Image.open(out).tobytes() == first
    expected = Muse.from_pretrained(muse_file)("a red square", seeds=3)[0]
    assert expected.tobytes() == first
    assert [path.name for path in out.parent.iterdir()] == ["one.png"]  # no temporary file


def test_several_prompts_give_a_sheet_and_each(muse_file: Path, tmp_path: Path):
    flags = [f"--model={muse_file}", f"--out={tmp_path}/sheet.png", f"--each={tmp_path}/each"]
    prompts = ["a red cross", "a blue square"]
    assert main(["generate", *prompts, *flags, "--seed", "[5, 5]", "--negative", "a black"]) == 0
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width >= 2 * 16
    assert sheet.height > 16 + 4  # captions under the pictures
    names = sorted(path.name for path in (tmp_path / "each").iterdir())
    assert names == ["001-a-red-cross.png", "002-a-blue-square.png"]
    assert Image.open(tmp_path / "each" / names[0]).size == (16, 16)


def test_prompts_from_a_file_and_standard_input(muse_file: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "p.txt").write_bytes(
        "\ufeff# what to draw\r\n\r\n  a red cross \r\na schwarzes Quadräß\r\n".encode()
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("a blue cross\n\n# no\na green cross"))
    flags = [f"--model={muse_file}", f"--out={tmp_path}/x.png", "--seed=1", "--batch_size=2"]
    assert main(["generate", "a", "-", *flags, f"--file={tmp_path}/p.txt"]) == 0
    records = read_records(tmp_path / "x.png")
    assert [record.prompts for record in records] == [
        ["a", "a blue cross"],
        ["a green cross", "a red cross"],
        ["a schwarzes Quadräß"],
    ]
    seeds = [record.request.options["superres"].seeds for record in records]
    assert seeds == [[1, 2], [3, 4], [5]]


def test_like_draws_the_picture_again(muse_file: Path, tmp_path: Path, capsys):
    """One of two batches, alone, and the sheet; bit for bit, records and captions included."""
    make = ["generate", f"--model={muse_file}"]
    prompts = ["a red cross", "a blue square", "a green cross"]
    options = ["--seed", "[9, 4, 9]", "--negative", '["a black cross", "", "red"]']
    options += ["--base.timesteps", "[2, 3, 4]", "--superres.temperature=0.5", "--batch_size=2"]
    first = [f"--out={tmp_path}/sheet.png", f"--each={tmp_path}/each"]
    assert main([*make, *prompts, *options, *first]) == 0
    files = [tmp_path / "sheet.png", *sorted((tmp_path / "each").iterdir())]
    for file in files:
        again = tmp_path / "again.png"
        assert main([*make, f"--like={file}", f"--out={again}"]) == 0
        assert again.read_bytes() == file.read_bytes()
    assert capsys.readouterr().err.count("warning") == 0


def test_like_with_changes(muse_file: Path, tmp_path: Path):
    make = ["generate", f"--model={muse_file}"]
    sheet = tmp_path / "sheet.png"
    first = ["a red cross", "a blue square", "--seed=5", "--base.cond_scale", "[2, 3]"]
    assert main([*make, *first, f"--out={sheet}", f"--each={tmp_path}/each"]) == 0

    def again(*changes: str, of: Path = sheet):
        out = tmp_path / "again.png"
        assert main([*make, f"--like={of}", f"--out={out}", *changes]) == 0
        [record] = read_records(out)
        return record.request

    request = again("--seed=8", "--superres.timesteps=2", "--negative", "green")
    assert request.prompts == ["a red cross", "a blue square"]
    assert request.negatives == ["green", "green"]
    assert request.seeds == request.options["superres"].seeds == [8, 9]
    assert request.options["base"].cond_scale == [2, 3]
    assert request.options["superres"].timesteps == [2, 2]
    assert again("a cat", "a dog").prompts == ["a cat", "a dog"]
    request = again("a bird", of=tmp_path / "each" / "002-a-blue-square.png")
    assert request.prompts == ["a bird"]  # nothing of the batch it was drawn in
    assert request.seeds == [6]
    assert request.options["base"].cond_scale == [3]


def test_like_on_another_device_is_said(muse_file: Path, tmp_path: Path, capsys):
    picture = tmp_path / "a.png"
    make = ["generate", f"--model={muse_file}", f"--out={picture}"]
    assert main([*make, "a red cross"]) == 0
    [record] = read_records(picture)
    other = {**record.made_by, "device": "cuda"}
    image = Image.open(picture)
    set_record(image, to_json([replace(record, made_by=other)]))
    save_png(image, picture)
    capsys.readouterr()
    assert main([*make, f"--like={picture}"]) == 0
    assert "was drawn with device cuda, this is cpu: single pixels may" in capsys.readouterr().err


def test_inspect_says_how_a_picture_was_drawn(muse_file: Path, tmp_path: Path, capsys):
    make = ["generate", "a red cross", "a \x1b[31mblue square", f"--model={muse_file}"]
    flags = ["--seed=7", "--negative", '["", "dogs"]', "--base.cond_scale", "[1.5, 2.5]"]
    assert main([*make, *flags, f"--out={tmp_path}/a.png", f"--each={tmp_path}/each"]) == 0
    capsys.readouterr()
    assert main(["inspect", f"{tmp_path}/a.png"]) == 0
    sheet = capsys.readouterr().out.splitlines()
    assert sheet[0] == f"{tmp_path}/a.png"
    assert sheet[1].startswith(f"model {Muse.from_pretrained(muse_file).fingerprint} (package ")
    assert "  prompt    a red cross" in sheet
    assert "  prompt    a \\x1b[31mblue square" in sheet  # nothing that a terminal would obey
    (last,) = (tmp_path / "each").glob("002*")
    assert main(["inspect", str(last)]) == 0
    words = capsys.readouterr().out
    assert "a red cross" not in words
    assert "  negative  dogs\n" in words
    assert "  base      seed=8 timesteps=3" in words
    assert "cond_scale=2.5" in words
    assert main(["inspect", str(last), "--json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["drawings"][0]["rows"] == [1]


def test_a_gif_of_the_unmasking(muse_file: Path, tmp_path: Path):
    flags = [f"--model={muse_file}", "--seed=1", "--base.timesteps=2", "--superres.timesteps=3"]
    flags += [f"--out={tmp_path}/a.png", f"--gif={tmp_path}/a.gif"]
    assert main(["generate", "a red cross", *flags]) == 0
    with GifImagePlugin.GifImageFile(tmp_path / "a.gif") as gif:
        assert gif.size == (16, 16)
        assert 2 <= gif.n_frames <= 5  # equal ones are joined
        assert b"\x80\x80\x80" in gif.convert("RGB").tobytes()  # still masked
        gif.seek(gif.n_frames - 1)
        assert gif.info["duration"] >= 2000
        last = torch.tensor(list(gif.convert("RGB").tobytes()))
    drawn = torch.tensor(list(Image.open(tmp_path / "a.png").tobytes()))
    assert (last - drawn).abs().float().mean() < 8  # the picture, in 256 colours
    flags += ["--base.timesteps", "[2, 3, 4]", "--batch_size=2"]
    assert main(["generate", "a", "b", "c", *flags]) == 0  # of several batches and lengths
    with Image.open(tmp_path / "a.gif") as gif, Image.open(tmp_path / "a.png") as sheet:
        assert gif.size == sheet.size


def test_a_film_shows_what_is_there():
    """Decided cells of the decoded ids; the others grey, then the picture of the stage below."""
    base, superres = tiny.maskgit(), tiny.superres()
    film = Film(Muse(base, superres), [1], (32, 32))

    def add(step: int, ids: torch.Tensor, mask: torch.Tensor) -> None:
        film.add(cast(Any, SimpleNamespace(step=step, ids=ids, mask=mask)))  # all that it reads

    low, high = tiny.ids(2), tiny.ids(2, 64)
    half = torch.arange(16) < 8  # the upper half of 4 x 4 cells
    add(1, torch.where(half, 60, low), half.expand(2, 16))
    add(2, low, torch.zeros(2, 16, dtype=torch.bool))
    masked = torch.ones(2, 64, dtype=torch.bool)
    add(1, torch.full((2, 64), 60), masked)
    add(2, high, ~masked)
    [strip] = film.strips()
    first, second, third, last = (to_tensor(frame) for frame in strip)
    assert first.shape == last.shape == (3, 32, 32)
    assert (first[:, :16] == 128 / 255).all()
    assert first[:, 16:].unique().numel() > 2
    drawn = base.decode(low)[1:]
    assert (second - F.interpolate(drawn, 32)[0]).abs().max() <= 0.5001 / 255
    enlarged = F.interpolate(drawn, 32, mode="bilinear")[0]
    assert (third - enlarged).abs().max() <= 0.5001 / 255
    assert (last - superres.decode(high)[1]).abs().max() <= 0.5001 / 255


def test_only_stated_options_replace_the_models_own(muse_file: Path, tmp_path: Path):
    (tmp_path / "options.yaml").write_text("superres: {cond_scale: 1.5}")
    flags = [f"--model={muse_file}", f"--out={tmp_path}/x.png", "--base.timesteps", "2"]
    assert main(["generate", "a", "b", *flags, "--config", f"{tmp_path}/options.yaml"]) == 0
    [record] = read_records(tmp_path / "x.png")
    for stage, wanted in {
        "base": SampleOptions(timesteps=2, cond_scale=2.0),
        "superres": SampleOptions(timesteps=8, cond_scale=1.5),
    }.items():
        options = record.request.options[stage]
        assert options == wanted.replace(seeds=options.seeds).with_rows(2)


def test_the_bar_counts_every_sampling_step(muse_file: Path, monkeypatch):
    ticks = []

    class Bar(nullcontext):
        def __init__(self, total: int, **_):
            super().__init__(self)
            ticks.append(total)

        def update(self) -> None:
            ticks.append(1)

    monkeypatch.setattr(drawing, "tqdm", Bar)
    model = Muse.from_pretrained(muse_file)
    with drawing.progress(32) as callback:
        model(["a red cross", "a"], callback=callback)
    assert ticks[0] == 32
    assert 0 < len(ticks[1:]) <= 32  # one for each step; fewer where there are fewer tokens


def test_a_base_alone_draws(muse_file: Path, tmp_path: Path, capsys):
    base = muse_file.parent / "base" / "base.safetensors"
    command = ["generate", "a red cross", f"--model={base}", f"--out={tmp_path}/a.png"]
    assert main(command) == 0
    assert Image.open(tmp_path / "a.png").size == (8, 8)
    assert main([*command, "--superres.timesteps=2"]) == 2
    assert "no such stage" in capsys.readouterr().err


def test_inspect_shows_foreign_text_escaped_cut_and_counted(tmp_path: Path, capsys):
    """Control characters may be meant for the terminal; rows may be without end."""
    base = {"base": SampleOptions(seeds=[1, 2]).with_rows(2)}
    prompts = ["\x1b[2J\x9b31m\u202egnp", "x" * 10_000]
    request = Request(prompts=prompts, negatives=None, options=base, image_size=(16, 16))
    image = Image.new("RGB", (2, 2))
    record = Record(request, (0, 1) * 200, "0a", {"torch": "\x1b]0;title\x07"})
    set_record(image, to_json([record]))
    save_png(image, tmp_path / "a.png")
    for more in ([], ["--json", "true"]):
        assert main(["inspect", f"{tmp_path}/a.png", *more]) == 0
        out = capsys.readouterr().out
        assert not set(out) & set("\x1b\x9b\x07\u202e")
        if more:
            assert json.loads(out)["drawings"][0]["prompts"] == prompts
        else:
            assert out.count("prompt") == 100
            assert "... and 300 more: --json true shows them all" in out
            assert max(map(len, out.splitlines())) <= 2000


def test_more_than_is_sensible_needs_a_switch(muse_file, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("muse_maskgit_pytorch.request.MAX_STEPS", 8)
    make = ["generate", "a", f"--model={muse_file}", f"--out={tmp_path}/a.png"]
    assert "4096 pixels a side" in fails([*make, "--image_size=4096"], capsys)
    error = fails([*make, "--base.timesteps=9", "--large=false"], capsys)
    assert "the command asks for 9 steps" in error
    assert list(tmp_path.iterdir()) == []
    assert main([*make, "--base.timesteps=9", "--large=true"]) == 0


# Files -----------------------------------------------------------------------------------------


@pytest.fixture
def nothing_drawn(monkeypatch):
    """Drawing, or opening a model, fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("work before the outputs were checked")

    monkeypatch.setattr(drawing, "open_model", refuse)
    monkeypatch.setattr(generating, "open_model", refuse)


@pytest.mark.parametrize("command", [["generate", "a"], ["edit", "vary", "x.png"]])
@pytest.mark.parametrize(
    "output, says",
    [
        ("--out={}/folder.png", "is a folder: give the name of a file"),
        ("--out={}/file/a.png", "file' is no folder"),
        ("--out=/proc/a.png", "nothing can be written in '/proc'"),
        ("--out=/proc/new/deep/a.png", "nothing can be written in '/proc'"),
        ("--each={}/file", "file' is no folder"),
        ("--each=/proc/each", "nothing can be written in '/proc'"),
    ],
)
def test_an_impossible_output_is_refused_before_any_work(
    command, output, says, nothing_drawn, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert says in fails([*command, output.format(tmp_path)], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"folder.png", "file"}


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "a", "--gif=/proc/a.gif"],
        ["bundle", "--base=b.safetensors", "--out=/proc/a.safetensors"],
        ["bundle", "--base=b.safetensors", "--out=a.bin"],
        ["tune", "--model=scenes", "--data=f", "--preset=p", "--out=/proc/a.safetensors"],
        ["tune", "--model=scenes", "--data=f", "--preset=p", "--results=/proc/a"],
        ["eval", "vae", "--vae=scenes:base", "--folder=f", "--image_size=8", "--out=/proc/a.json"],
    ],
)
def test_so_is_one_of_another_command(argv, nothing_drawn, capsys):
    error = fails(argv, capsys)
    assert "nothing can be written in '/proc'" in error or "must end in .safetensors" in error


def test_a_failing_output_does_not_take_the_others_with_it(
    muse_file: Path, tmp_path: Path, capsys, monkeypatch
):
    def full(image, path, *args):
        if "002" in Path(path).name or Path(path).suffix == ".gif":
            raise OSError(28, "No space left on device", str(path))
        return save(image, path)

    save = save_png
    monkeypatch.setattr(generating, "save_png", full)
    monkeypatch.setattr(generating, "save_gif", full)
    make = ["generate", "a", "b", f"--model={muse_file}", f"--gif={tmp_path}/a.gif"]
    assert main([*make, f"--out={tmp_path}/a.png", f"--each={tmp_path}/each"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error
    assert "002-b.png" in error
    assert "a.gif" in error
    assert read_records(tmp_path / "a.png")[0].prompts == ["a", "b"]
    assert [path.name for path in (tmp_path / "each").iterdir()] == ["001-a.png"]


@pytest.mark.parametrize("seed", [["--seed=5"], []])
def test_many_pictures_are_written_as_they_are_drawn(
    muse_file: Path, tmp_path: Path, capsys, monkeypatch, seed
):
    """An interrupted start leaves them, another one goes on."""
    monkeypatch.setattr(generating, "SHEET", 6)
    (tmp_path / "p.txt").write_text("\n".join(f"a {i}" for i in range(8)))
    make = ["generate", f"--file={tmp_path}/p.txt", f"--model={muse_file}", "--batch_size=2", *seed]
    each = tmp_path / "each"
    assert "too many for one sheet" in fails([*make, f"--out={tmp_path}/a.png"], capsys)
    make += [f"--each={each}", f"--out={tmp_path}/a.png"]
    drawn: list[list[str]] = []

    def drawing_until(stop: int):
        def draw(self, request, *args):
            drawn.append(request.prompts)
            if len(drawn) > stop:
                raise KeyboardInterrupt
            return real(self, request, *args)

        return draw

    real = Muse.draw
    monkeypatch.setattr(Muse, "draw", drawing_until(3))
    assert main(make) == 130
    assert "6 of 8 pictures are there" in capsys.readouterr().err
    names = [f"00{i + 1}-a-{i}.png" for i in range(8)]
    assert sorted(path.name for path in each.iterdir()) == names[:6]
    before = {path.name: path.read_bytes() for path in each.iterdir()}

    (each / names[2]).write_bytes(before[names[2]][:-60])  # damaged: its batch is drawn again
    drawn.clear()
    monkeypatch.setattr(Muse, "draw", drawing_until(99))
    assert main(make) == 0
    output = capsys.readouterr()
    assert drawn == [["a 2", "a 3"], ["a 6", "a 7"]]
    assert output.out == f"{each}\n"
    assert "8 of 8 pictures are there, 4 of them from an earlier start" in output.err
    assert not (tmp_path / "a.png").exists()
    after = {path.name: path.read_bytes() for path in each.iterdir()}
    assert sorted(after) == names
    kept = [name for name in before if seed or name not in names[2:4]]
    assert all(after[name] == before[name] for name in kept)

    drawn.clear()  # all are there: with a seed they stay, without one others are wanted
    assert main([*make, "--base.timesteps=3"]) == 0
    assert len(drawn) == (0 if seed else 4)
    drawn.clear()
    assert main([*make, "--base.timesteps=2"]) == 0
    assert len(drawn) == 4  # they are others


def test_an_interrupted_sheet_shows_what_was_drawn(muse_file: Path, tmp_path: Path, monkeypatch):
    def draw(self, request, *args):
        if "c" in request.prompts:
            raise KeyboardInterrupt
        return real(self, request, *args)

    real = Muse.draw
    monkeypatch.setattr(Muse, "draw", draw)
    make = ["generate", *"abcd", f"--model={muse_file}", "--batch_size=2"]
    assert main([*make, f"--out={tmp_path}/a.png"]) == 130
    assert read_records(tmp_path / "a.png")[0].prompts == ["a", "b"]


def test_names_of_files_sort_and_fit_a_disk():
    names = [path.name for path in drawing.each_files(Path("x"), ["a"] * 1200)]
    assert names == sorted(names)
    assert names[0] == "0001-a.png"
    [path] = drawing.each_files(Path("x"), ["caf\udce9 " + "\U00010330" * 60])
    assert len(path.name.encode()) < 200
    assert path.name.startswith("001-caf-\U00010330")


def test_the_home_folder(muse_file: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o.yaml").write_text("out: ~/out.png\neach: ~/each")
    make = ["generate", "a", "--seed=1", f"--model={muse_file}", "--config=~/o.yaml"]
    assert main(make) == 0
    assert (tmp_path / "out.png").exists()
    assert (tmp_path / "each" / "001-a.png").exists()
    assert main(["inspect", "~/out.png"]) == 0
    vary = ["edit", "vary", "~/out.png", f"--model={muse_file}", "--out=~/b.png"]
    assert main(vary) == 0
    like = ["generate", "--like=~/out.png", f"--model={muse_file}", "--out=~/c.png"]
    assert main(like) == 0
    assert main(["inspect", "~/out.png", "--json=true"]) == 0
    capsys.readouterr()
    assert "would be overwritten" in fails([*vary, "--out=~/out.png"], capsys)
    assert not (tmp_path / "~").exists()


# Streams ----------------------------------------------------------------------------------------


def test_the_model_that_draws_is_named(muse_file: Path, tmp_path: Path, capsys):
    assert main(["generate", "a", f"--model={muse_file}", f"--out={tmp_path}/a.png"]) == 0
    output = capsys.readouterr()
    assert output.out == f"{tmp_path}/a.png\n"
    name = Muse.from_pretrained(muse_file).fingerprint
    assert f"muse: drawing with {muse_file}, {name}, on cpu\n" in output.err
    config = options.generate_parser().read(["a"])
    drawing.announce(config, Muse.from_pretrained(muse_file))
    assert "the shipped model scenes (--model FILE draws with" in capsys.readouterr().err


def test_the_precision_is_chosen_and_recorded(muse_file: Path, tmp_path: Path, capsys):
    out = tmp_path / "a.png"
    assert main(["generate", "a", f"--model={muse_file}", f"--out={out}", "--precision=auto"]) == 0
    [record] = read_records(out)
    assert record.made_by["precision"] in ("float32", "bfloat16")
    capsys.readouterr()
    said = fails(["generate", "a", f"--model={muse_file}", "--precision=fp8"], capsys)
    assert "precision" in said
    assert "'float32', 'bfloat16', 'int8'" in said


def test_a_negative_prompt_in_brackets_is_a_text():
    def given(value: str) -> Any:
        return options.generate_parser().read(["a", "--negative", value]).negative

    assert given("[a, b]") == "[a, b]"
    assert given('["a", "b"]') == ["a", "b"]
    assert given("no") == "no"
    assert given("2024") == "2024"


def test_standard_input_that_is_closed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert "standard input, which is closed" in fails(["generate", "-"], capsys)


def test_a_device_without_numbers(muse_file: Path, capsys):
    error = fails(["generate", "a", f"--model={muse_file}", "--device=meta"], capsys)
    assert "--device 'meta' cannot be used" in error


def test_a_terminal_without_the_letters_and_a_reader_that_leaves(tmp_path: Path):
    """Of `muse inspect`: the first is shown by numbers, the second no error."""
    options = {"base": SampleOptions(seeds=[1]).with_rows(1)}
    request = Request(prompts=["日本 é"], negatives=None, options=options, image_size=(16, 16))
    image = Image.new("RGB", (2, 2))
    set_record(image, to_json([Record(request, (0,), "0a", {"torch": "2"})]))
    path = save_png(image, tmp_path / "é.png")
    source = str(Path(__file__).parents[2] / "src")
    plain = {**os.environ, "PYTHONPATH": source, "PYTHONIOENCODING": "ascii:strict"}
    code = (
        "import gc, os, sys; from muse_maskgit_pytorch.cli.main import main\n"
        "words = sys.argv[1:]; code = main(words); code += main([*words, '--json', 'true'])\n"
        "assert gc.isenabled()\n"
        "read, write = os.pipe(); os.dup2(write, 1); os.close(read)\n"
        "code = code * 1000 + main(words); os._exit(0 if code == 141 else 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(path)],
        env=plain,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\\u65e5\\u672c \\xe9" in done.stdout
    document = done.stdout[done.stdout.index("{") :]
    assert json.loads(document)["drawings"][0]["prompts"] == ["日本 é"]


def test_what_should_not_happen_and_what_has_no_room(monkeypatch, capsys):
    def failing(error: Exception):
        def broken(parser, argv):
            raise error

        monkeypatch.setattr(generating, "inspect", broken)

    failing(KeyError("x"))
    assert main(["inspect"]) == 1
    assert "this should not have happened: KeyError: 'x'" in capsys.readouterr().err
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        failing(error)
        assert "more memory than there is" in fails(["inspect"], capsys)


# Keys ------------------------------------------------------------------------------------------

PARSERS = {
    "vae": options.train_vae_parser(),
    "decoder": options.train_decoder_parser(),
    "base": options.maskgit_parser(superres=False),
    "superres": options.maskgit_parser(superres=True),
    "generate": options.generate_parser(),
}


@pytest.mark.parametrize(
    "command, section, cls, elsewhere",
    [
        ("vae", "vae", VQGanVAE, set()),
        ("vae", "trainer", VQGanVAETrainer, {"vae", "data"}),
        ("decoder", "trainer", VQGanVAETrainer, {"vae", "data", "decoder_only"}),
        ("base", "transformer", MaskGitTransformer, set()),
        ("superres", "transformer", MaskGitTransformer, set()),
        ("superres", "token_critic", TokenCritic, set()),
        ("base", "maskgit", MaskGit, {"vae", "transformer", "token_critic", "cond_vae"}),
        ("superres", "maskgit", MaskGit, {"vae", "transformer", "token_critic", "cond_vae"}),
        ("superres", "maskgit.sample_options", SampleOptions, set()),
        ("base", "trainer", MaskGitTrainer, {"maskgit", "data"}),
        ("superres", "trainer", MaskGitTrainer, {"maskgit", "data"}),
        ("generate", "base", SampleOptions, {"seeds"}),  # --seed
        ("generate", "superres", SampleOptions, {"seeds"}),
    ],
)
def test_every_argument_of_a_constructor_is_a_key(command, section, cls, elsewhere):
    keys = {key for key in PARSERS[command].keys() if key.startswith(f"{section}.")}  # noqa: SIM118
    found = {key.removeprefix(f"{section}.").partition(".")[0] for key in keys}
    wanted = set(inspect.signature(cls).parameters)
    if issubclass(cls, Trainer):
        wanted |= set(inspect.signature(Trainer).parameters) - {"model"}
    wanted -= elsewhere | {"common"}
    if command == "base":
        wanted -= {"cond_image_size"}  # would make it a superres
    assert found == wanted


def test_defaults_are_those_of_the_signatures():
    for section, cls in {"vae": VQGanVAE, "trainer": VQGanVAETrainer}.items():
        defaults = PARSERS["vae"]._parser.get_defaults(skip_validation=True)[section].as_dict()
        for name, parameter in inspect.signature(cls).parameters.items():
            if parameter.default is not inspect.Parameter.empty and name != "data":
                assert defaults[name] == parameter.default
    unstated = PARSERS["generate"]._parser.get_defaults(skip_validation=True).base.as_dict()
    assert set(unstated.values()) == {None}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_parse(recipe: Path):
    command = next((c for c in ("vae", "decoder", "superres") if c in recipe.stem), "base")
    trained = ["--vae", "scenes:base"] if command == "decoder" else []
    parser, argv = PARSERS[command], ["--config", str(recipe), *trained]
    if "init_from" in recipe.read_text():
        argv.append("--init_from=scenes")  # the recipe's own may be what another recipe trains
        parser = options.maskgit_parser(command == "superres")
        training.open_start(parser, argv, command == "superres")
    assert parser.read(argv).trainer.results_folder


@pytest.mark.parametrize("recipe", ["paper-vae-f16", "paper-vae-f8", "folder-vae"])
def test_recipes_that_claim_the_papers_weights_have_them(recipe: str):
    """Table 5: perceptual 0.05, adversarial 0.1."""
    trainer = PARSERS["vae"].read(["--config", str(RECIPES / f"{recipe}.yaml")]).trainer
    assert (trainer.perceptual_weight, trainer.gan_weight) == (0.05, 0.1)


@pytest.mark.parametrize("command", ["vae", "base", "superres"])
def test_print_config_is_a_config(root: Path, tmp_path: Path, command, capsys):
    argv = ["--config", f"{root}/{command}.yaml", "--trainer.lr=0.5"]
    with pytest.raises(SystemExit) as stopped:
        main(["train", command, *argv, "--print_config"])
    assert stopped.value.code == 0
    (tmp_path / "full.yaml").write_text(capsys.readouterr().out)
    before = PARSERS[command].read(argv).as_dict()
    after = PARSERS[command].read(["--config", f"{tmp_path}/full.yaml"]).as_dict()
    del after["config"], before["config"]
    assert after == before
    assert after["trainer"]["lr"] == 0.5


# Mistakes --------------------------------------------------------------------------------------


def fails(argv: list[str], capsys) -> str:
    """Run; check that it fails as a mistake in the input; return its one sentence."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("muse: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "text, near",
    [
        ("vea: {dim: 8}", "'vea': did you mean vae?"),
        ("vae: {dmi: 8}", "'vae.dmi': did you mean vae.dim?"),
        ("trainer: {batchsize: 8}", "'trainer.batchsize': did you mean trainer.batch_size?"),
        ("codebook_size: 8", "'codebook_size': did you mean vae.codebook_size?"),
        ("vae: {zzz: 8}", "'vae.zzz': see --help"),
        ("vae: 5", "vae must hold options, not 5"),
        ("vae:", "vae must hold options, not None"),
        ("5", "holds no keys"),
        ("vae: {a: [}", "is not valid YAML"),
    ],
)
def test_a_mistyped_key_in_yaml_names_the_nearest(text, near, tmp_path: Path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    assert near in fails(["train", "vae", "--config", f"{tmp_path}/bad.yaml"], capsys)


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "vae: {dim: 8}\ntrainer: {lr: 1}\nvae: {layers: 2}",
            "'vae' stands in line 1 and again in",
        ),
        ("vae:\n  dim: 8\n  dim: 9", "'dim' stands in line 2 and again in line 3: join the two"),
        ("vae: " + "{dim: " * 3000 + "1" + "}" * 3000, "is nested too deep to be a recipe"),
        ("vae: {dim: " + "[" * 3000 + "]" * 3000 + "}", "is nested too deep to be a recipe"),
        ("vae: &a {vae: *a}", "bad.yaml"),
        ("vae: absent.yaml", "vae must hold options, not 'absent.yaml'"),
        ("trainer: {seed: null}", "trainer.seed must be int, not null"),
        ("trainer: {mixed_precision: fp8}", "must be one of 'no', 'fp16' or 'bf16', not fp8"),
        ("? {a: b}\n: 1", "in the place of a key"),
        ("trainer: {folder: !!python/object/apply:os.system [ls]}", "trainer.folder must be"),
    ],
)
def test_a_recipe_that_cannot_be_read(text, says, tmp_path: Path, capsys):
    (tmp_path / "bad.yaml").write_text(text)
    argv = ["train", "vae", "--config", f"{tmp_path}/bad.yaml", "--trainer.image_size=16"]
    assert says in fails(argv, capsys)


def test_aliases_that_stand_for_a_memory_full_of_values(tmp_path: Path, capsys):
    nest = "&a [1]"
    for letter, below in zip("bcdefghi", "abcdefgh", strict=True):
        nest = f"[{nest}, &{letter} [" + f"*{below}, " * 20 + "]]"
    (tmp_path / "bomb.yaml").write_text(f"vae: {{channel_mults: {nest}}}")
    argv = ["train", "vae", "--config", f"{tmp_path}/bomb.yaml"]
    assert "holds more than 10000 values" in fails(argv, capsys)


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("folder: 2024", "folder", "2024"),
        ("folder: 1e3", "folder", "1e3"),
        ("folder: 2024-01-01", "folder", "2024-01-01"),
        ("folder: yes", "folder", "yes"),
        ("folder: null", "folder", None),
        ("folder:", "folder", None),
        ("resume: yes", "resume", True),
        ("resume: off", "resume", False),
        ("lr: 1e-4", "lr", 1e-4),
        ("betas: [0.9, 5e-1]", "betas", (0.9, 0.5)),
        ("num_train_steps: 0x10", "num_train_steps", 16),
    ],
)
def test_a_value_in_yaml_is_what_a_person_means(text, name, value, tmp_path: Path):
    (tmp_path / "a.yaml").write_text(f"trainer:\n  image_size: 16\n  {text}\n")
    trainer = PARSERS["vae"].read(["--config", f"{tmp_path}/a.yaml"]).trainer
    assert trainer[name] == value
    assert type(trainer[name]) is type(value)


def test_sections_in_files_of_their_own(tmp_path: Path):
    """Named in YAML, beside the recipe, or on the command line."""
    (tmp_path / "sub.yaml").write_text("dim: 24\nlayers: 3")
    (tmp_path / "a.yaml").write_text("vae: sub.yaml\ntrainer: {image_size: 16}")
    for argv in (["--config", "a.yaml"], ["--vae", "sub.yaml", "--trainer.image_size=16"]):
        argv = [f"{tmp_path}/{word}" if word.endswith(".yaml") else word for word in argv]
        vae = PARSERS["vae"].read([*argv, "--vae.layers=2"]).vae
        assert (vae.dim, vae.layers) == (24, 2)
        assert VQGanVAE(**vae.as_dict()).config["dim"] == 24
    (tmp_path / "sub.yaml").write_text("dmi: 24")
    with pytest.raises(ValueError, match=r"sub.yaml: unknown key 'vae.dmi': did you mean vae.dim"):
        PARSERS["vae"].read(["--config", f"{tmp_path}/a.yaml"])


def test_what_a_recipe_takes_from_an_anchor(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "transformer: &t {dim: 24, depth: 1}\ntoken_critic: {<<: *t, depth: 2}\nvae: scenes:base\n"
        "maskgit: {image_size: 16, presets: {fast: {timesteps: 3, noise_schedule: [0.5, 0.1]}}}"
    )
    config = PARSERS["base"].read(["--config", f"{tmp_path}/a.yaml"])
    assert (config.token_critic.dim, config.token_critic.depth) == (24, 2)
    assert config.maskgit.presets == {"fast": {"timesteps": 3, "noise_schedule": [0.5, 0.1]}}


def test_a_mistyped_key_in_the_depth(tmp_path: Path, capsys):
    (tmp_path / "bad.yaml").write_text("maskgit: {sample_options: {cond_scal: 2}}")
    error = fails(["train", "base", f"--config={tmp_path}/bad.yaml"], capsys)
    assert "did you mean maskgit.sample_options.cond_scale?" in error


@pytest.mark.parametrize(
    "argv, near",
    [
        (["train", "vae", "--vae.dmi", "8"], "--vae.dmi: did you mean --vae.dim?"),
        (["train", "vae", "--vea.dim=8"], "--vea.dim: did you mean --vae.dim?"),
        (["train", "vae", "--trainer.fold", "x"], "did you mean --trainer.folder?"),
        (["train", "base", "--transfomer.dim", "8"], "did you mean --transformer.dim?"),
        (["train", "base", "--transformer.image_size=8"], "did you mean --maskgit.image_size?"),
        (["generate", "a", "--base.timestep", "8"], "did you mean --base.timesteps?"),
        (["generate", "a", "--sed", "8"], "did you mean --seed?"),
        (["train", "bse"], "did you mean 'train base'?"),
        (["trian", "vae"], "did you mean 'train vae'?"),
        (["generat"], "did you mean 'generate'?"),
        (["xyz"], "the commands are train vae"),
    ],
)
def test_a_mistyped_flag_or_command_names_the_nearest(argv, near, capsys):
    assert near in fails(argv, capsys)


def test_the_nearest_key():
    known = ["vae.dim", "trainer.lr", "trainer.lr_schedule", "init_from"]
    assert nearest("trainer.lr_shedule", known) == "trainer.lr_schedule"
    assert nearest("lr", known) == "trainer.lr"
    assert nearest("init", known) == "init_from"
    assert nearest("trainer.qqq", known) is None


@pytest.mark.parametrize(
    "argv, says",
    [
        (["train", "vae", "--config", "absent.yaml"], "absent.yaml"),
        (["train", "vae"], "trainer.image_size"),
        (["train", "vae", "--trainer.image_size=16"], "folder"),
        (["train", "vae", "--vae.dim", "abc"], "vae.dim"),
        (["train", "vae", "--vae.quantizer", "vqq"], "'fsq'"),
        (["train", "vae", "stray"], "stray"),
        (["train", "vae", "--trainer.folder=absent", "--trainer.image_size=16"], "does not exist"),
        (["generate"], "at least one prompt"),
        (["generate", "a", " "], "no empty one"),
        (["generate", "a", "--out", "a.xyz"], "must end in .png"),
        (["generate", "a", "--gif", "a.png"], "must end in .gif"),
        (["generate", "a", "--batch_size=0"], "--batch_size must be at least 1, not 0"),
        (["generate", "--file", "absent.txt"], "absent.txt"),
        (["generate", "--file", os.devnull], f"{os.devnull} holds no prompt"),
        (["generate", f"--file={SHIPPED / 'scenes.safetensors'}"], "is not a text file in UTF-8"),
        (["generate", "--like", "absent.png"], "cannot read image 'absent.png'"),
        (["inspect", "absent.png"], "cannot read image 'absent.png'"),
        (["inspect"], "pictures"),
        (["generate", "a", "--model", "absent.safetensors"], "absent.safetensors"),
        (["bundle", "--base", "absent.safetensors", "--out", "a.safetensors"], "absent"),
    ],
)
def test_bad_input(argv, says, capsys):
    assert says in fails(argv, capsys)


def test_geometry_that_does_not_fit_is_said_before_any_work(muse_file: Path, tmp_path, capsys):
    root = muse_file.parent
    run = ["train", "base", "--config", f"{root}/base.yaml", f"--trainer.results_folder={tmp_path}"]
    assert "set seq_len=4" in fails([*run, "--transformer.seq_len=9"], capsys)
    error = fails([*run, "--transformer.num_tokens=65"], capsys)
    assert "num_tokens 65" in error
    assert "codebook_size 64" in error
    assert "10 is not a positive multiple" in fails([*run, "--maskgit.image_size=10"], capsys)
    init = f"--init_from={root}/base/base.safetensors"
    assert "does not fit" in fails([*run, init, "--transformer.dim=24"], capsys)
    (checkpoint,) = (root / "vae").glob("*checkpoint*")
    assert "to go on from, and no model" in fails([*run, f"--vae={checkpoint}"], capsys)
    assert "a local copy" in fails([*run, f"--transformer.t5_name={tmp_path}/no"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_wrong_kind(muse_file: Path, tmp_path: Path, capsys):
    root = muse_file.parent
    make = ["generate", "a", f"--out={tmp_path}/a.png", "--model"]
    assert "holds a VQGanVAE" in fails([*make, f"{root}/vae/vae.safetensors"], capsys)
    assert "muse bundle" in fails([*make, f"{root}/superres/superres.safetensors"], capsys)
    assert "--device 'abc'" in fails([*make, f"{muse_file}", "--device=abc"], capsys)
    stages = [f"--{s}={root}/superres/superres.safetensors" for s in ("base", "superres")]
    error = fails(["bundle", *stages, f"--out={tmp_path}/m.safetensors"], capsys)
    assert "is a super-resolution stage alone" in error
    assert list(tmp_path.iterdir()) == []


def test_counts_that_do_not_fit_and_pictures_of_others(muse_file: Path, tmp_path: Path, capsys):
    make = ["generate", f"--model={muse_file}", f"--out={tmp_path}/a.png"]
    error = fails([*make, "a", "b", "c", "--negative", '["x", "y"]'], capsys)
    assert "2 negative_texts for 3 texts" in error
    assert "seeds has 1 values for 2 images" in fails([*make, "a", "b", "--seed=[1]"], capsys)
    many = [*make, *["a"] * 65, f"--gif={tmp_path}/a.gif"]
    assert "--gif shows up to 64 pictures, not 65" in fails(many, capsys)
    assert list(tmp_path.iterdir()) == []

    assert main([*make, "a"]) == 0
    capsys.readouterr()
    like = f"--like={tmp_path}/a.png"
    assert "2 prompts for the 1 pictures of" in fails([*make, "a", "b", like], capsys)
    base = muse_file.parent / "base" / "base.safetensors"
    error = fails(["generate", f"--model={base}", like], capsys)
    assert f"was drawn by the model {Muse.from_pretrained(muse_file).fingerprint}, this" in error
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    error = fails([*make, f"--like={tmp_path}/plain.png"], capsys)
    assert "plain.png does not say how it was drawn" in error
    assert "does not say how it was drawn" in fails(["inspect", f"{tmp_path}/plain.png"], capsys)


def test_tracebacks_on_request(monkeypatch):
    monkeypatch.setenv("MUSE_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown command"):
        main(["xyz"])


def test_interrupted_training_saves_and_exits_130(root: Path, tmp_path: Path, monkeypatch, capsys):
    def interrupted(self, batches):
        if self.step == 0:
            signal.raise_signal(signal.SIGINT)
        return train_step(self, batches)

    train_step = VQGanVAETrainer.train_step
    monkeypatch.setattr(VQGanVAETrainer, "train_step", interrupted)
    run = ["train", "vae", "--config", f"{root}/vae.yaml", f"--trainer.results_folder={tmp_path}"]
    assert main(run) == 130
    assert capsys.readouterr().err.endswith("muse: interrupted\n")
    (checkpoint,) = tmp_path.glob("*checkpoint*")
    assert load_tree(checkpoint)[0]["step"] == 1


@pytest.mark.parametrize("argv", [[], ["--help"], ["train"], ["train", "-h"]])
def test_help(argv, capsys):
    assert main(argv) == 0
    assert "muse train superres" in capsys.readouterr().out


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_names_every_option(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    keys = getattr(options, f"{COMMANDS[words][1]}_parser")().keys()
    assert {key for key in keys if f" {key} " not in said.replace("--", " ")} == set()
    assert "<" not in said.replace("<=", "").replace("< ", "")  # as Python shows its objects


def test_help_says_what_an_option_is(capsys):
    with pytest.raises(SystemExit):
        main(["train", "base", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--transformer.dim ... width D. (int, required)" in said
    assert "--trainer.lr ... peak learning rate. (float, default:" in said  # of a base class
    assert "(all | transformer | critic, default: all)" in said
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert "usage: muse inspect [options] pictures ..." in capsys.readouterr().out


def test_help_and_mistyped_options_load_neither_torch_nor_the_parser():
    code = """
import contextlib, io, sys
from muse_maskgit_pytorch.cli.main import COMMANDS, main
main(["--version"]); main(["--help"]); main(["generat"])
for words in COMMANDS:
    assert main([*words, "--mistyped", "3"]) == 2
assert main(["train", "base", "--trainer.lrr=3"]) == 2
for words in COMMANDS:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main([*words, "--help"])
assert not {"torch", "numpy", "PIL", "jsonargparse", "yaml"} & set(sys.modules)
"""
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"muse {__version__}\n")
