"""Named sampling options: what they say, where they are kept, who uses them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import MaskGit, Muse, SampleOptions
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.checkpoint import load_tree, save_tree
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.provenance import read_records
from muse_maskgit_pytorch.training.loop import SAMPLING
from muse_maskgit_pytorch.watching.run_file import leaves

FAST: dict[str, Any] = dict(timesteps=2, policy="halton", noise_schedule=[0.9, 0.3])
QUALITY: dict[str, Any] = dict(timesteps=5, cond_scale=2.0)


def cascade(t5: str, **changes: Any) -> Any:
    """Images of 16, then 32 pixels; the second stage has a preset `fast` of its own."""
    torch.manual_seed(0)
    vae, text = tiny.vae(), dict(t5_name=t5, text_embed_dim=None)
    base = tiny.maskgit(
        tiny.transformer(**text),
        vae=vae,
        sample_options=dict(timesteps=3, temperature=0.5),
        **{"presets": {"fast": FAST, "quality": QUALITY}, **changes},
    )
    superres = tiny.superres(
        model=tiny.transformer(seq_len=64, **text),
        vae=vae,
        sample_options=dict(timesteps=4, cond_scale=1.0),
        presets={"fast": dict(timesteps=1)},
    )
    return Muse(base, superres).eval()


@pytest.fixture(scope="module")
def muse(t5: str) -> Any:
    return cascade(t5)


# One stage -----------------------------------------------------------------------------------


def test_a_preset_is_complete_by_itself(muse: Any):
    assert muse.base.preset("fast") == SampleOptions(**FAST)
    assert muse.base.preset("quality") == SampleOptions(**QUALITY)
    assert muse.base.preset("quality").temperature == 1  # not the 0.5 of sample_options
    assert muse.base.preset("default") == muse.base.default_options
    assert list(muse.base.presets) == ["default", "fast", "quality"]
    # the steps that nobody states are those of the stage, as in sample_options
    assert tiny.maskgit(presets={"a": {}}).preset("a").timesteps == 24
    assert tiny.superres(presets={"a": {}}).preset("a").timesteps == 8


def test_an_unknown_preset_names_the_nearest(muse: Any):
    with pytest.raises(ValueError, match=r"'fats', did you mean 'fast'.* default, fast, quality"):
        muse.base.preset("fats")
    with pytest.raises(ValueError, match=r"unknown preset 'fast'; the presets are default$"):
        tiny.maskgit().preset("fast")


@pytest.mark.parametrize(
    "presets, says",
    [
        ({"fast": {"cond_scal": 2}}, "preset 'fast': .* no 'cond_scal', did you mean 'cond_scale'"),
        ({"a": {}, "b": {"timesteps": 0}}, "preset 'b': timesteps must be at least 1, not 0"),
        ({"b": {"policy": "best"}}, "preset 'b': policy must be one of"),
        ({"b": {"temperature": "hot"}}, "preset 'b': "),
        ({"b": {"noise_schedule": [0.2, 0.8]}}, "preset 'b': noise_schedule must fall"),
        ({"default": {}}, "preset 'default' is the model's sample_options"),
        ({"superres": {}}, "preset 'superres' is the default of a cascade's second stage"),
        ({"": {}}, "preset '' is not a name"),
    ],
)
def test_a_wrong_preset_is_refused_at_once(presets: dict, says: str):
    with pytest.raises(ValueError, match=says):
        tiny.maskgit(presets=presets)


def test_wrong_default_options_are_named_too():
    with pytest.raises(ValueError, match="sample_options: SampleOptions has no 'top'"):
        tiny.maskgit(sample_options={"top": 2})


# The file ------------------------------------------------------------------------------------


def test_presets_are_saved_and_older_files_have_none(muse: Any, tmp_path: Path):
    path = muse.save(tmp_path / "a.safetensors")
    again = Muse.from_pretrained(path)
    assert again.presets == muse.presets
    assert again.superres is not None
    assert again.superres.presets == muse.superres.presets

    tree, kind = load_tree(path)
    for stage in tree["config"].values():
        del stage["config"]["presets"]
    older = Muse.from_pretrained(save_tree(path, tree, kind))
    assert list(older.presets) == ["default", "superres"]
    assert older.presets["default"] == muse.base.default_options


def test_presets_are_part_of_neither_the_fingerprint_nor_the_training(t5: str, muse: Any):
    other = cascade(t5, presets=None)
    assert other.fingerprint == muse.fingerprint
    assert leaves(other.config, skip=SAMPLING) == leaves(muse.config, skip=SAMPLING)
    assert leaves(cascade(t5, label_smoothing=0.1).config, skip=SAMPLING) != leaves(
        muse.config, skip=SAMPLING
    )


# The cascade ---------------------------------------------------------------------------------


def test_the_presets_of_a_cascade(t5: str, muse: Any):
    assert list(muse.presets) == ["default", "fast", "quality", "superres"]
    assert muse.presets["superres"] == muse.superres.default_options
    assert list(Muse(muse.base).presets) == ["default", "fast", "quality"]

    base, superres = muse.base, muse.superres
    # its own preset of that name, or else its default
    assert muse.options("fast") == {
        "base": base.preset("fast"),
        "superres": superres.preset("fast"),
    }
    wanted = {"base": base.preset("quality"), "superres": superres.default_options}
    assert muse.options("quality") == wanted
    wanted = {"base": base.default_options, "superres": superres.default_options}
    assert muse.options() == muse.options("default") == wanted
    assert list(Muse(base).options("fast")) == ["base"]
    with pytest.raises(ValueError, match="unknown preset 'superres'"):
        muse.options("superres")  # no way to draw the base


def test_drawing_by_a_preset(muse: Any):
    wanted = muse.options("fast")
    by_hand = dict(base_options=wanted["base"], superres_options=wanted["superres"])
    first = muse(["a", "b"], seeds=3, preset="fast")
    second = muse(["a", "b"], seeds=3, **by_hand)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in second]
    default = muse(["a", "b"], seeds=3)
    assert [image.tobytes() for image in first] != [image.tobytes() for image in default]

    sharper = wanted["superres"].replace(temperature=0.0)
    by_name = muse.request("a", seeds=3, preset="fast", superres_options=sharper)
    by_hand = dict(base_options=wanted["base"], superres_options=sharper)
    assert by_name == muse.request("a", seeds=3, **by_hand)


def test_a_preset_and_options_of_the_base_exclude_each_other(muse: Any):
    with pytest.raises(ValueError, match="preset 'fast' and base_options are both given"):
        muse("a", preset="fast", base_options=SampleOptions())
    with pytest.raises(ValueError, match="unknown preset 'slow'"):
        muse("a", preset="slow")


# The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(muse: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"--model={muse.save(tmp_path_factory.mktemp('presets') / 'muse.safetensors')}"


def test_generate_takes_a_preset_and_changes_of_it(muse: Any, model: str, tmp_path: Path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    assert main(["generate", "a cat", model, "--preset=fast", "--seed=4", f"--out={first}"]) == 0
    [record] = read_records(first)
    wanted = {n: o.replace(seeds=[4]).with_rows(1) for n, o in muse.options("fast").items()}
    assert record.request.options == wanted

    changes = ["--preset=quality", "--base.top_k=7"]
    assert main(["generate", model, f"--like={first}", *changes, f"--out={second}"]) == 0
    [record] = read_records(second)
    assert record.prompts == ["a cat"]
    wanted = {n: o.replace(seeds=[4]).with_rows(1) for n, o in muse.options("quality").items()}
    wanted["base"] = wanted["base"].replace(top_k=[7])
    assert record.request.options == wanted


def test_generate_names_the_nearest_preset(model: str, tmp_path: Path, capsys):
    out = tmp_path / "a.png"
    assert main(["generate", "a cat", model, "--preset=qualty", f"--out={out}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("muse: error: unknown preset 'qualty', did you mean 'quality'?")
    assert not out.exists()


def test_a_single_stage_keeps_its_presets(muse: Any, tmp_path: Path):
    again = MaskGit.from_pretrained(muse.superres.save(tmp_path / "a.safetensors"))
    assert again.preset("fast").timesteps == 1
