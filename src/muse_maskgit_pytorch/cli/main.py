"""The `muse` command: finds the subcommand, turns errors into one sentence and an exit code.

Exit codes: 0 done, 1 a mistake of this package, 2 one in the input, 130 interrupted, 141 nobody
reads the output any more. `MUSE_DEBUG=1` shows tracebacks.
Also a module to launch: ``accelerate launch -m muse_maskgit_pytorch.cli.main train base ...``.
"""

from __future__ import annotations

import difflib
import gc
import io
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType

from .. import __version__
from ..strings import printable

# Words of the command -> its module, its function there, which has a parser in `options`, and what
# it does. The module is imported when its options are known to be right.
COMMANDS = {
    ("train", "vae"): ("train", "train_vae", "train an image tokenizer"),
    ("train", "decoder"): ("train", "train_decoder", "fine-tune a tokenizer's decoder alone"),
    ("train", "base"): ("train", "train_base", "train the text-to-image stage"),
    ("train", "superres"): ("train", "train_superres", "train the super-resolution stage"),
    ("data", "check"): ("check", "check", "look for what is wrong with a data set"),
    ("cache",): ("cache", "cache", "encode images and captions once, for all training runs"),
    ("estimate",): ("estimate", "estimate", "say what a recipe takes of memory, time and money"),
    ("average",): ("average", "average", "average the weights of a run, after it"),
    ("eval", "vae"): ("evaluate", "eval_vae", "judge an image tokenizer by figures"),
    ("eval", "base"): ("evaluate", "eval_base", "judge a base stage by its pictures of captions"),
    ("eval", "superres"): ("evaluate", "eval_superres", "judge a super-resolution stage likewise"),
    ("eval", "model"): ("evaluate", "eval_model", "judge a whole model likewise"),
    ("tune",): ("tune", "tune", "search a model's sampling options, store them as a preset"),
    ("report",): ("report", "report", "draw a run's curves and pictures as one HTML page"),
    ("generate",): ("generate", "generate", "draw pictures of prompts"),
    ("edit", "inpaint"): ("edit", "inpaint", "repaint a part of a picture"),
    ("edit", "outpaint"): ("edit", "outpaint", "continue a picture beyond its edges"),
    ("edit", "free"): ("edit", "free", "change a whole picture by a prompt, without a mask"),
    ("edit", "vary"): ("edit", "vary", "draw variations of a picture"),
    ("serve",): ("serve", "serve", "serve a model over HTTP, in the form of OpenAI's images API"),
    ("bench-serve",): ("load", "bench_serve", "say how a running server does under load"),
    ("doctor",): ("doctor", "doctor", "say what this machine has, and what is broken"),
    ("inspect",): ("generate", "inspect", "show how the pictures of a PNG were drawn"),
    ("bundle",): ("generate", "bundle", "join trained stages into one model file"),
    ("export",): ("export", "export", "write a model in another program's format"),
    ("push",): ("push", "push", "write a model's folder with its card, push it to the hub"),
}


def usage() -> str:
    """What `muse` alone prints."""
    rows = [f"  muse {' '.join(words):<16} {text}" for words, (*_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"muse {__version__}: text to image with masked generative transformers",
            "",
            *rows,
            "",
            "Add --help to a command for its options. Every option can also stand in a YAML file",
            "given as --config (--vae.dim 64 is `vae: {dim: 64}`); options after it override it.",
        ]
    )


def run(argv: Sequence[str]) -> None:
    """Run one command line.

    Raises:
        ValueError: no such command.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] in ("-V", "--version", "version"):
        print(f"muse {__version__}")
        return
    for words, (module, function, _) in COMMANDS.items():
        if tuple(argv[: len(words)]) == words:
            options = list(argv[len(words) :])
            parser = getattr(import_module(".options", __package__), f"{function}_parser")()
            parser.check(options)  # first: to import the models takes seconds
            return getattr(_imported(module), function)(parser, options)
    groups = {words[0] for words in COMMANDS if len(words) > 1}
    if argv[0] in groups and (len(argv) == 1 or argv[1] in ("-h", "--help")):
        print(usage())
        return
    known = [" ".join(words) for words in COMMANDS]
    near = [
        name
        for given in (" ".join(argv[:2]), argv[0])
        for name in difflib.get_close_matches(given, known, n=1)
    ]
    hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(known)}"
    raise ValueError(f"unknown command {' '.join(argv[:2])!r}: {hint}")


def _imported(module: str) -> ModuleType:
    """A module of commands, with all that it needs.

    In a fresh process that makes half a million objects, which stay: to look for garbage among
    them takes a tenth of the time that a picture takes.
    """
    if "torch" in sys.modules:
        return import_module(f".{module}", __package__)
    gc.disable()
    try:
        return import_module(f".{module}", __package__)
    finally:
        gc.freeze()
        gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # a letter that the terminal cannot show is shown by its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"muse: warning: {_one_line(message)}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            run(sys.argv[1:] if argv is None else argv)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk or a closed pipe can be told
    except KeyboardInterrupt:
        print("muse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # who reads has seen enough, as `head` has; Python would complain again at its end
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("MUSE_DEBUG"):
            raise
        text, code = _said(error)
        print(f"muse: error: {_one_line(text)}", file=sys.stderr)
        return code
    return 0


def _said(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, (ValueError, OSError, ImportError, ArgumentError)):
        return str(error), 2
    words = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in words or "can't allocate" in words:
        return (
            "this takes more memory than there is: take fewer at a time (a smaller batch_size) or "
            f"smaller ones (image_size). {error}",
            2,
        )
    return (
        f"this should not have happened: {type(error).__name__}: {error}. MUSE_DEBUG=1 shows where "
        "it was; please report it",
        1,
    )


def _one_line(message: object) -> str:
    return printable(" ".join(str(message).split()), 2000)


if __name__ == "__main__":
    sys.exit(main())
