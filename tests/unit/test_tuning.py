"""The search for sampling options, and what it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from muse_maskgit_pytorch import FeatureNet, MaskGit, Muse, SampleOptions
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.checkpoint import CheckpointError, load_tree
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.evaluation import tuning
from muse_maskgit_pytorch.evaluation.generator import FactFigures, Judge
from muse_maskgit_pytorch.evaluation.truth import of_texts
from muse_maskgit_pytorch.evaluation.tuning import (
    Results,
    Trials,
    effective,
    make_axes,
    make_trials,
    search,
    settings,
    start_of,
    write_preset,
)
from muse_maskgit_pytorch.images import resize

AXES = {
    "policy": ({"policy": "confidence"}, {"policy": "halton"}),
    "guidance": ({"cond_scale": 1.0}, {"cond_scale": 2.0}, {"cond_scale": 4.0}),
    "temperature": ({"temperature": 0.3}, {"temperature": 0.7}),
    "choice_temperature": ({"choice_temperature": 0.0}, {"choice_temperature": 2.0}),
}
START = SampleOptions(timesteps=2, cond_scale=4.0, policy="confidence")


def last(options: Any) -> SampleOptions:
    *_, found = options
    return found


# The search alone ----------------------------------------------------------------------------


def planted(**wanted: Any) -> Callable[[SampleOptions], dict[str, float]]:
    """A FID that counts the settings that are not as wanted."""

    def trial(options: SampleOptions) -> dict[str, float]:
        return {"fid": sum(getattr(options, k) != v for k, v in wanted.items()), "recall_at_1": 0.5}

    return trial


def test_it_finds_what_is_wanted_and_improves_all_the_way():
    wanted: Any = dict(policy="halton", cond_scale=2.0, temperature=0.3)
    trial = planted(**wanted)
    found = list(search(trial, START, AXES))
    assert found[0] == START
    assert [trial(options)["fid"] for options in found] == [3, 2, 1, 0]
    assert found[-1] == START.replace(**wanted)  # and what has no say stays as it was


def test_settings_that_need_each_other_take_another_round():
    def trial(options: SampleOptions) -> dict[str, float]:
        guided, cool = options.cond_scale == 2, options.temperature == 0.3
        return {"fid": 3 - 2 * (guided and cool) - cool, "recall_at_1": 0}

    axes = {name: AXES[name] for name in ("guidance", "temperature")}
    assert last(search(trial, START, axes, rounds=1)).cond_scale == 4
    assert last(search(trial, START, axes, rounds=2)).cond_scale == 2


def test_it_ends_when_a_round_changes_nothing():
    asked = []

    def trial(options: SampleOptions) -> dict[str, float]:
        asked.append(options)
        return {"fid": 0.0, "recall_at_1": 0.0}

    assert list(search(trial, START, AXES, rounds=9)) == [START]  # ties stay
    candidates = {json.dumps(settings(options)) for options in asked}
    assert len(candidates) == 1 + sum(map(len, AXES.values())) - 2  # two are the start's own


@pytest.mark.parametrize(
    "score, scale", [("balanced", 1.0), ("fid", 2.0), ("recall", 3.0), ("facts", 1.0)]
)
def test_scores(score: Any, scale: float):
    figures: dict[Any, dict[str, float]] = {
        4.0: {"fid": 9.0, "recall_at_1": 0.5, "all_right": 0.2, "facts": 0.5},
        1.0: {"fid": 7.0, "recall_at_1": 0.5, "all_right": 0.3, "facts": 0.6},
        # more real, but not what was asked for
        2.0: {"fid": 1.0, "recall_at_1": 0.4, "all_right": 0.1, "facts": 0.9},
        3.0: {"fid": 8.0, "recall_at_1": 0.6, "all_right": 0.3, "facts": 0.5},
    }
    axes = {"guidance": [{"cond_scale": scale} for scale in figures]}
    found = last(search(lambda options: figures[options.cond_scale], START, axes, score))
    assert found.cond_scale == scale


def test_an_unknown_score_and_no_rounds():
    with pytest.raises(
        ValueError, match="score must be one of balanced, fid, recall, facts, not 'best'"
    ):
        list(search(planted(), START, AXES, "best"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        list(search(planted(), START, AXES, rounds=0))


# Trials --------------------------------------------------------------------------------------


class Likes:
    """A judge that wants certain images."""

    def __init__(self, images: Tensor | None = None, patience: int | None = None):
        self.captions = ["a red car", "two cats", "a tree"]
        self.images, self.patience = images, patience
        self.seen: list[Tensor] = []

    def figures(self, generated: Tensor) -> dict[str, float]:
        if len(self.seen) == self.patience:
            raise KeyboardInterrupt
        self.seen.append(generated)
        far = 0.0 if self.images is None else float((generated - self.images).abs().mean())
        return {"fid": far, "recall_at_1": 0.5, "images": len(generated)}


@pytest.fixture(scope="module")
def stage(t5: str) -> Any:
    torch.manual_seed(0)
    return tiny.maskgit(tiny.transformer(t5_name=t5, text_embed_dim=None)).eval()


@pytest.fixture(scope="module")
def superres(t5: str) -> Any:
    torch.manual_seed(0)
    return tiny.superres(model=tiny.transformer(seq_len=64, t5_name=t5, text_embed_dim=None)).eval()


def trials(stage: Any, judge: Any, **changes: Any) -> Trials:
    changes.setdefault("turns", [0, 1])
    return Trials(stage, judge, tiny.images(3, stage.image_size), **changes)


def test_it_finds_the_options_that_the_judge_wants(stage: Any):
    wanted = START.replace(policy="halton", cond_scale=2.0)
    dreamt = Likes()
    trials(stage, dreamt)(wanted)
    judge = Likes(dreamt.seen[0])
    trial = trials(stage, judge)
    found = last(search(trial, START, {name: AXES[name] for name in ("policy", "guidance")}))
    assert effective(found) == effective(wanted)
    assert trial(found)["fid"] == 0


def test_nothing_is_drawn_twice_not_even_what_differs_in_name_alone(stage: Any, tmp_path: Path):
    judge = Likes(torch.ones(6, 3, 16, 16))
    trial = trials(stage, judge, results=Results(tmp_path / "r.jsonl"))
    last(search(trial, START, AXES))
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    asked = [json.dumps(line["options"]) for line in lines]
    assert len(judge.seen) == len(lines) == len(set(asked))
    count = len(judge.seen)
    trial(START.replace(policy="halton", choice_temperature=3.0))  # unless the search had halton
    trial(START.replace(policy="halton", choice_temperature=5.0))
    assert len(judge.seen) <= count + 1


def test_an_interrupted_search_goes_on(stage: Any, tmp_path: Path):
    images = torch.ones(6, 3, 16, 16)
    judge = Likes(images)
    whole = last(search(trials(stage, judge), START, AXES))
    first = Likes(images, patience=4)
    path = tmp_path / "deep" / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        last(search(trials(stage, first, results=Results(path)), START, AXES))
    assert len(path.read_text().splitlines()) == 4
    second = Likes(images)
    found = last(search(trials(stage, second, results=Results(path)), START, AXES))
    assert found == whole
    assert len(second.seen) == len(judge.seen) - 4
    third = Likes(images, patience=0)
    assert last(search(trials(stage, third, results=Results(path)), START, AXES)) == whole
    assert [file.name for file in path.parent.iterdir()] == ["r.jsonl"]  # nothing half written


def test_other_captions_seeds_and_models_are_other_trials(stage: Any, t5: str, tmp_path: Path):
    results = Results(tmp_path / "r.jsonl")
    judge = Likes()
    trials(stage, judge, results=results)(START)
    trials(stage, judge, results=results, turns=[2])(START)
    trials(stage, judge, results=results, setup={"network": "another"})(START)
    fake: Any = judge
    Trials(stage, fake, tiny.images(3, 16, seed=9), [0, 1], results)(START)
    torch.manual_seed(1)
    other = tiny.maskgit(tiny.transformer(t5_name=t5, text_embed_dim=None))
    trials(other, judge, results=results)(START)
    assert len(judge.seen) == 5
    trials(stage, judge, results=Results(tmp_path / "r.jsonl"), turns=[2], batch_size=2)(START)
    assert len(judge.seen) == 5


def test_noise_is_that_of_the_caption_and_the_turn(stage: Any):
    judge = Likes()
    trials(stage, judge)(START)
    for batch_size in (1, 2):
        trials(stage, judge, batch_size=batch_size)(START)
        assert torch.allclose(judge.seen[-1], judge.seen[0], atol=1e-5)
    seeds = [0, 1, 2, 100_000, 100_001, 100_002]
    alone = stage.generate(judge.captions * 2, options=START.replace(seeds=seeds))
    assert torch.allclose(judge.seen[0], alone, atol=1e-5)


def test_superres_sees_the_true_image_reduced(superres: Any):
    images, judge = tiny.images(3, 32), Likes()
    trials(superres, judge, turns=[0])(START)
    low = resize(images, (16, 16))
    options = START.replace(seeds=0)
    wanted = superres.generate(judge.captions, cond_images=low, options=options)
    assert torch.allclose(judge.seen[0], wanted, atol=1e-5)


def test_passes_are_those_of_one_image(t5: str, stage: Any):
    text = dict(t5_name=t5, text_embed_dim=None)
    options = START.replace(guidance_schedule="constant", timesteps=4)
    assert trials(stage, Likes())(options)["passes"] == 8
    assert trials(stage, Likes())(options.replace(guidance_schedule="linear"))["passes"] == 7
    assert trials(stage, Likes())(options.replace(cond_scale=1.0))["passes"] == 4
    unguided = options.replace(cond_scale=1.0, policy="critic")
    for critic in ({"token_critic": tiny.critic(**text)}, {"self_token_critic": True}):
        model = tiny.maskgit(tiny.transformer(**text), **critic)
        assert trials(model, Likes())(unguided)["passes"] == 8


@pytest.mark.parametrize(
    "changes, idle",
    [
        (dict(policy="halton", choice_temperature=1.0), {"choice_temperature"}),
        (dict(policy="random", choice_temperature=1.0), {"choice_temperature"}),
        (dict(cond_scale=1.0, guidance_schedule=[0, 1]), {"guidance_schedule"}),
        (dict(cond_scale=2.0, guidance_schedule=[0, 1]), set()),
        (dict(policy="margin", choice_temperature=1.0), set()),
    ],
)
def test_what_has_no_effect(stage: Any, changes: dict, idle: set):
    options = START.replace(timesteps=4, **changes)
    short = effective(options)
    assert {name for name, value in vars(short).items() if value != vars(options)[name]} == idle
    both = [stage.generate_ids(["a", "b"], options=o.replace(seeds=1)) for o in (options, short)]
    assert torch.equal(*both)


def test_where_it_starts(t5: str, stage: Any):
    assert start_of(stage, "fast", 8) == SampleOptions(timesteps=8, policy="confidence")
    model = tiny.maskgit(
        self_token_critic=True,
        sample_options=dict(temperature=0.5),
        presets={"fast": dict(timesteps=6, policy="halton")},
    )
    assert start_of(model, "fast") == SampleOptions(timesteps=6, policy="halton")
    assert start_of(model, "fast", 8) == SampleOptions(timesteps=8, policy="halton")
    wanted = SampleOptions(timesteps=24, policy="critic", temperature=0.5)
    assert start_of(model, "default") == start_of(model, "new") == wanted


def test_axes_hold_what_the_stage_can_do(stage: Any):
    axes = make_axes(stage)
    assert {"policy": "critic"} not in axes["policy"]
    assert {"policy": "critic"} in make_axes(tiny.maskgit(self_token_critic=True))["policy"]
    for changes in axes.values():
        assert len({json.dumps(change) for change in changes}) == len(changes) > 1
        for change in changes:
            START.replace(**change)  # refuses what is out of range
    assert make_axes(stage, ["halton"])["policy"] == ({"policy": "halton"},)
    with pytest.raises(ValueError, match="policy 'critic' is none of this stage's: confidence"):
        make_axes(stage, ["critic"])


def test_a_file_of_something_else(tmp_path: Path):
    (tmp_path / "r.jsonl").write_text('{"loss": 3}\n')
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1, is not a result of a search"):
        Results(tmp_path / "r.jsonl")


# Halves --------------------------------------------------------------------------------------


def test_what_is_reported_comes_from_other_captions_and_seeds(stage: Any, resnet: str):
    network, texts, images = FeatureNet(resnet), [f"caption {i}" for i in range(9)], tiny.images(9)
    prompts = of_texts(texts)
    first, second = make_trials(stage, network, prompts, images)
    assert not {*first.judge.captions} & {*second.judge.captions}
    assert {*first.judge.captions} | {*second.judge.captions} == {*texts}
    assert not {*first._turns} & {*second._turns}
    again, _ = make_trials(stage, network, prompts, images, captions=4)
    assert len(again.judge.captions) == 4
    assert {*again.judge.captions} <= {*first.judge.captions}

    # the truth of each half is its own, among all the others
    for trial in (first, second):
        truth = images[[texts.index(caption) for caption in trial.judge.captions]]
        assert isinstance(trial.judge, Judge)
        assert trial.judge.figures(truth)["recall_at_1"] == 1
        others = images[[i for i, text in enumerate(texts) if text not in trial.judge.captions]]
        assert trial.judge.figures(others[:4], torch.arange(4))["recall_at_5"] < 1
    # and among those of the gallery: pictures next to its images are not recognised
    noisy = (images + 0.05 * torch.randn_like(images)).clamp(0, 1)
    hard: Any
    _, hard = make_trials(stage, network, prompts, images, gallery=noisy)
    rows = [texts.index(caption) for caption in hard.judge.captions]
    assert hard.judge.figures(noisy[rows])["recall_at_1"] == 0


class Dark:
    """A judge for whom captions with an even number ask for a dark picture and a small one."""

    def facts(self, pictures: Any, rows: Any) -> list[dict[str, bool]]:
        return [
            {"dark": picture.convert("L").resize((1, 1)).getpixel((0, 0)) < 128, "small": True}
            if int(row.text.split()[-1]) % 2 == 0
            else {}
            for picture, row in zip(pictures, rows, strict=True)
        ]


def test_a_judge_of_facts_in_the_place_of_a_network(stage: Any):
    prompts = of_texts([f"caption {i}" for i in range(9)])
    first, second = make_trials(stage, Dark(), prompts, tiny.images(9), seeds=1)
    assert not {*first.judge.captions} & {*second.judge.captions}
    numbers = [int(caption.split()[-1]) for caption in first.judge.captions]
    images = torch.ones(2 * len(numbers), 3, 16, 16)  # two draws of each, the second one dark
    images[len(numbers) :] = 0
    figures: Any = first.judge.figures(images)
    assert figures == {"images": 2 * len(numbers), "all_right": 0.5, "facts": 0.75}
    assert {"all_right", "facts", "passes"} < first(START).keys()
    odd = Trials(stage, FactFigures(Dark(), of_texts(["caption 1"])), tiny.images(1), [0])
    with pytest.raises(ValueError, match="the judge finds no fact in these prompts"):
        odd(START)


@pytest.mark.parametrize(
    "count, changes, says",
    [
        (7, {}, "7 captioned images are too few: it takes 4 to search on and 4 others"),
        (8, dict(captions=3), "captions must be at least 4, not 3"),
        (8, dict(seeds=0), "seeds must be at least 1, not 0"),
        (8, dict(batch_size=0), "batch_size must be at least 1, not 0"),
    ],
)
def test_too_little(stage: Any, resnet: str, count: int, changes: dict, says: str):
    with pytest.raises(ValueError, match=says):
        make_trials(
            stage, FeatureNet(resnet), of_texts(["a"] * count), tiny.images(count), **changes
        )


# The file of the model -----------------------------------------------------------------------


@pytest.fixture
def model_file(stage: Any, superres: Any, tmp_path: Path) -> Path:
    """In half precision, with a preset."""
    base = MaskGit(
        vae=stage.vae,
        transformer=stage.transformer,
        image_size=16,
        sample_options=dict(timesteps=3, temperature=0.5),
        presets={"quality": dict(timesteps=30)},
    )
    return Muse(base, superres).save(tmp_path / "model.safetensors", torch.float16)


def same_weights(first: Path, second: Path) -> bool:
    a, b = (load_tree(path)[0]["state"] for path in (first, second))
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def test_a_preset_is_added_and_nothing_else_changes(model_file: Path, tmp_path: Path):
    out = tmp_path / "out.safetensors"
    found = START.replace(seeds=5, noise_schedule=[0.8, 0.2])
    assert write_preset(model_file, out, "fast", found) == out
    before, after = Muse.from_pretrained(model_file), Muse.from_pretrained(out)
    assert after.presets == {**before.presets, "fast": found.replace(seeds=None)}
    assert same_weights(model_file, out)
    assert after.fingerprint == before.fingerprint

    write_preset(out, out, "fast", START)  # in place
    write_preset(out, out, "fast", found, stage="superres")
    write_preset(out, out, "default", found, stage="superres")
    after: Any = Muse.from_pretrained(out)
    assert after.options("fast") == {"base": START, "superres": found.replace(seeds=None)}
    assert after.presets["superres"] == found.replace(seeds=None)
    assert after.presets["default"] == before.presets["default"]
    assert same_weights(model_file, out)


def test_a_stage_alone_has_presets_too(superres: Any, tmp_path: Path):
    path = superres.save(tmp_path / "a.safetensors")
    write_preset(path, path, "fast", START)
    again = MaskGit.from_pretrained(path)
    assert again.presets == {**superres.presets, "fast": START}


def test_what_cannot_be_written(model_file: Path, stage: Any, tmp_path: Path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="preset 'superres' is the default of"):
        write_preset(model_file, out, "superres", START)
    alone = Muse(stage).save(tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="holds a Muse without a stage 'superres'"):
        write_preset(alone, out, "fast", START, stage="superres")
    vae = stage.vae.save(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="holds a VQGanVAE without a stage 'base'"):
        write_preset(vae, out, "fast", START)
    with pytest.raises(CheckpointError, match="unknown model 'absent'"):
        write_preset("absent", out, "fast", START)
    assert not out.exists()


# The command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine captioned images."""
    folder = tmp_path_factory.mktemp("images")
    for number, image in enumerate(tiny.images(9, 32)):
        pixels = (image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number}")
    return folder


@pytest.fixture
def few(monkeypatch):
    """A small search."""
    monkeypatch.setattr(tuning, "GUIDANCE", tuning.GUIDANCE[:3])
    monkeypatch.setattr(tuning, "TEMPERATURES", tuning.TEMPERATURES[:2])
    monkeypatch.setattr(tuning, "NOISE_SCHEDULES", tuning.NOISE_SCHEDULES[:2])
    monkeypatch.setattr(tuning, "CHOICE_TEMPERATURES", tuning.CHOICE_TEMPERATURES[:2])
    monkeypatch.setattr(tuning, "TOP_P", tuning.TOP_P[:2])
    monkeypatch.setattr(tuning, "REMASK", tuning.REMASK[:2])


@pytest.fixture
def command(model_file: Path, folder: Path, resnet: str) -> Callable[..., list[str]]:
    def made(**changes: Any) -> list[str]:
        options = dict(model=model_file, data=folder, preset="fast", timesteps=2, network=resnet)
        options |= dict(seeds=1, score="fid", device="cpu", policies="[confidence,halton]")
        return ["tune", *(f"--{name}={value}" for name, value in {**options, **changes}.items())]

    return made


@pytest.mark.parametrize("stage_name", ["base", "superres"])
def test_the_whole_command(
    few, stage_name: str, command, model_file: Path, tmp_path: Path, monkeypatch, capsys
):
    out, results = tmp_path / "out.safetensors", tmp_path / "r.jsonl"
    before = model_file.read_bytes()
    # without --out the preset is shown, and nothing written but the figures
    assert main(command(stage=stage_name, results=results)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "r.jsonl"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["searched", "on", "others"]
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[2:-1]}
    assert rows.keys() >= {"recall_at_1", "fid", "precision", "recall", "passes"}
    assert rows["fid"][1] <= rows["fid"][0]
    name, _, told = lines[-1].partition(": ")
    assert name == "fast"
    found = SampleOptions(**json.loads(told))
    assert found.timesteps == 2

    # once more, all of it is known
    monkeypatch.setattr(Trials, "_figures", None)
    assert main(command(stage=stage_name, results=results, out=out)) == 0
    again = capsys.readouterr().out.splitlines()
    assert again == [*lines, str(out)]
    stage = getattr(Muse.from_pretrained(out), stage_name)
    assert stage.preset("fast") == found
    assert stage.default_options == getattr(Muse.from_pretrained(model_file), stage_name).preset(
        "default"
    )
    assert same_weights(model_file, out)
    assert model_file.read_bytes() == before


def test_in_place_only_when_the_file_is_named(few, command, model_file: Path):
    assert main(command(out=model_file, rounds=1)) == 0
    assert "fast" in Muse.from_pretrained(model_file).presets


def test_an_interruption_tells_what_was_found(
    few, command, model_file: Path, tmp_path: Path, monkeypatch, capsys
):
    calls, figures = [], Trials._figures

    def tired(self, options: SampleOptions) -> dict[str, float]:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(options)
        return {**figures(self, options), "fid": -len(calls)}  # each better than the last

    monkeypatch.setattr(Trials, "_figures", tired)
    out, results = tmp_path / "out.safetensors", tmp_path / "r.jsonl"
    assert main(command(out=out, results=results)) == 130
    name, _, told = capsys.readouterr().out.strip().partition(": ")
    assert name == "fast, best so far"
    assert SampleOptions(**json.loads(told)) == calls[-1]
    assert len(results.read_text().splitlines()) == 3
    assert not out.exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(timesteps=0), "timesteps must be at least 1, not 0"),
        (dict(preset="superres"), "preset 'superres' is the default of"),
        (dict(stage="critic"), "stage"),
        (dict(policies="[critic]"), "policy 'critic' is none of this stage's"),
        (dict(rounds=0), "rounds must be at least 1"),
        (dict(captions=2), "captions must be at least 4"),
        (dict(out="a.png"), "--out 'a.png' must end in .safetensors"),
        (dict(data="absent"), "'absent' does not exist"),
        (dict(network="nobody/nothing"), "nobody/nothing"),
        (dict(device="abc"), "--device 'abc'"),
        (dict(step=3), "did you mean"),
    ],
)
def test_bad_input(command, changes: dict, says: str, capsys):
    assert main(command(**changes)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("muse: error: ")
    assert says in error


def test_the_command_with_a_judge(command, few, tmp_path: Path, capsys):
    (tmp_path / "own.py").write_text(
        "class Judge:\n    def facts(self, pictures, rows):\n"
        "        return [{'dark': p.getpixel((0, 0))[0] < 128} for p in pictures]\n"
    )
    judge = f"{tmp_path / 'own.py'}:Judge"
    main(command(judge=judge, score="facts", rounds=1))
    printed = capsys.readouterr().out
    assert "all_right" in printed
    assert "recall_at_1" not in printed
    for changes, says in (
        (dict(judge=judge), "--score fid is by a network, and --judge is given"),
        (dict(score="facts"), "--score facts is by a judge: say which, --judge FILE.py:NAME"),
    ):
        assert main(command(**changes)) == 2
        assert says in capsys.readouterr().err


def test_bad_files(command, stage: Any, folder: Path, tmp_path: Path, capsys):
    def error(**changes: Any) -> str:
        assert main(command(**changes)) == 2
        return capsys.readouterr().err.splitlines()[-1]

    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "a.png").write_bytes((folder / "0.png").read_bytes())
    assert "has a caption" in error(data=bare)
    (bare / "a.txt").write_text("a caption")
    assert "1 captioned images are too few" in error(data=bare)
    other = tmp_path / "other.safetensors"
    other.write_text("precious")
    assert "exists and is not the file of --model" in error(out=other)
    assert other.read_text() == "precious"
    alone = Muse(stage).save(tmp_path / "alone.safetensors")
    assert "has no stage 'superres'" in error(model=alone, stage="superres")
    vae = stage.vae.save(tmp_path / "vae.safetensors")
    assert "holds a VQGanVAE" in error(model=vae)
