"""Recipes and command lines at random: done, or refused in a sentence; the work itself is left out.

What a command does with its options behind the checks is the other fuzzers' and tests' matter.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli import drawing, edit, main, options
from muse_maskgit_pytorch.cli import generate as generating
from muse_maskgit_pytorch.cli.parser import Parser
from tests.fuzz.driver import Random, damaged, damaged_bytes, odd, run

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = {
    ("train", "vae"): (options.train_vae_parser, "folder-vae"),
    ("train", "decoder"): (options.train_decoder_parser, "emoji-decoder64"),
    ("train", "base"): (options.train_base_parser, "folder-base"),
    ("train", "superres"): (options.train_superres_parser, "folder-superres"),
}
DRAWING = {
    ("generate",): options.generate_parser,
    ("inspect",): options.inspect_parser,
    ("bundle",): options.bundle_parser,
    ("edit", "inpaint"): options.inpaint_parser,
    ("edit", "outpaint"): options.outpaint_parser,
    ("edit", "free"): options.free_parser,
    ("edit", "vary"): options.vary_parser,
}
CONTROL = re.compile(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]")


class Done(ValueError):
    """The options were taken; the work would begin."""


def work(*args: Any, **kwargs: Any) -> Any:
    raise Done("the work begins")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture and a text file, and nothing heavy behind the commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (16, 16)).save("a.png")
    Path("p.txt").write_text("a red car\n")
    model = Muse(tiny.maskgit())
    monkeypatch.setattr(drawing, "open_model", lambda *_: model)
    monkeypatch.setattr(generating, "open_model", work)
    monkeypatch.setattr(generating, "_draw", work)
    monkeypatch.setattr(edit, "draw", work)
    return tmp_path


def told(argv: list[str], capsys: Any) -> str:
    """Run it; what came of it, in a word."""
    try:
        code = main.main(argv)
    except SystemExit as stopped:  # --help, --print_config
        code = stopped.code
    said = capsys.readouterr()
    assert code in (0, 2), (argv, said.err)
    shown = said.err + said.out.replace("\b", "")  # which jsonargparse's own help has
    assert "Traceback" not in said.err, argv
    assert not CONTROL.search(shown), (argv, said)
    assert max(map(len, [*said.err.splitlines(), ""])) < 2100, argv
    if code == 2:
        assert said.err.splitlines()[-1].startswith("muse: error: "), said.err
    return "taken" if code == 0 or "the work begins" in said.err else "refused"


def word(random: Random) -> str:
    """As a shell hands it over: no NUL, and bytes that are no UTF-8 as lone surrogates."""
    value = odd(random)
    text = value if isinstance(value, str) else json.dumps(value)
    if random.random() < 0.2:
        text = str(random.choice(["[a, b]", "~", "~/x", "a.png", "-", "=", "1e20", "[", "{a: 1}"]))
    elif random.random() < 0.1:
        text = os.fsdecode(random.bytes(int(random.integers(1, 9))))
    return text.replace("\0", "0")


def words(random: Random, parser: Parser) -> list[str]:
    """Options that there are, values at random."""
    options = sorted(parser.keys() | {"config", "help", "colour"})
    argv = [word(random) for _ in range(random.choice([0, 0, 0, 1, 2]))]
    for _ in range(random.choice([1, 1, 2, 4])):
        name = f"--{options[random.integers(len(options))]}"
        value = word(random)
        argv += [f"{name}={value}"] if random.random() < 0.7 else [name, value]
    return argv


def test_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    made = {
        command: (make(), yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()))
        for command, (make, recipe) in TRAINING.items()
    }
    path = tmp_path / "recipe.yaml"

    def one(random: Random) -> str:
        command = list(made)[random.integers(len(made))]
        parser, tree = made[command]
        if random.random() < 0.3:
            raw = damaged_bytes(random, yaml.safe_dump(tree).encode())
        else:
            for _ in range(random.integers(1, 3)):
                tree = damaged(random, tree)
            raw = json.dumps(tree).encode()
        path.write_bytes(raw)
        argv = ["--config", str(path)] + (words(random, parser) if random.random() < 0.2 else [])
        # the command is parsing alone
        monkeypatch.setattr(main, "run", lambda argv: (parser.read(argv[2:]), work()))
        return told([*command, *argv], capsys)

    found = run("recipes", 4, one, default=60)
    assert min(found.values()) > 0


def test_command_lines(tmp_path: Path, capsys):
    parsers = {command: make() for command, make in DRAWING.items()}

    def one(random: Random) -> str:
        command = list(parsers)[random.integers(len(parsers))]
        usual = {"generate": ["a red car"], "edit": ["a.png", "a red car"]}.get(command[0], [])
        argv = [*command, *usual, *words(random, parsers[command])]
        return told(argv, capsys)

    found = run("command lines", 5, one, default=60)
    assert min(found.values()) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "p.txt"}
