"""Under which licenses weights are: what a model file, its card or the table here says.

Names are those of the Hugging Face hub, such as "mit" or "openrail++".
"""

from __future__ import annotations

from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from .arguments import as_path, printable

CODE = "mit"  # of this package
CARD = "README.md"
CARD_BYTES = 2**16  # of a card that is looked at

# The shipped models', and what others say of theirs on the hub, by name. Their cards were not read
# again for this; one that lies beside the weights is believed first.
KNOWN = {
    "scenes": "mit",
    "amused/amused-*": "openrail++",
    "MeissonFlow/Meissonic": "apache-2.0",
    "google/t5-*": "apache-2.0",
    "google-t5/*": "apache-2.0",
    "t5-*": "apache-2.0",
    "google/flan-*": "apache-2.0",
    "google/ul2": "apache-2.0",
    "google/byt5-*": "apache-2.0",
    "google/mt5-*": "apache-2.0",
    "google/umt5-*": "apache-2.0",
    "google/siglip-*": "apache-2.0",
    "google/siglip2-*": "apache-2.0",
    "google/gemma-*": "gemma",
    "Qwen/Qwen3-*": "apache-2.0",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "mit",
    "sentence-transformers/all-MiniLM-L6-v2": "apache-2.0",
}


def license_of(name: str | Path) -> str | None:
    """The license of weights, by where they are; None: not known.

    A card beside them, ``README.md``, is believed before the table `KNOWN`, and this before one in
    the hub's cache.

    Args:
        name: a file, a folder, the name of a hub repository, perhaps ``@revision``, or of a
            shipped model.
    """
    place = as_path(name)
    folder = place.parent if place.is_file() else place
    whole = [folder.parent] if (folder.parent / "model_index.json").is_file() else []  # diffusers'
    folders = [folder, *whole]
    # as the hub's cache names it: models--owner--name/snapshots/commit/file
    cached = [part for part in place.parts if part.startswith("models--")]
    named, _, revision = str(name).partition("@")
    repository = cached[-1].removeprefix("models--").replace("--", "/") if cached else named
    if place.is_file() and place.parent == Path(__file__).parent / "pretrained":
        repository = place.stem
    for each in folders:
        if (stated := _of_card(each / CARD)) is not None:
            return stated
    for wild, known in KNOWN.items():
        if fnmatchcase(repository, wild):
            return known
    return None if place.exists() else _in_cache(repository, revision or None)


def _in_cache(repository: str, revision: str | None) -> str | None:
    """What the card in the hub's cache says."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):
        found = try_to_load_from_cache(repository, CARD, revision=revision)
        return _of_card(Path(found)) if isinstance(found, str) else None
    return None


def _of_card(path: Path) -> str | None:
    """What the head of a card says; whatever else it holds is no reason to fail."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        with open(path, "rb") as file:
            text = file.read(CARD_BYTES).decode("utf-8", errors="ignore")
        begin, _, rest = text.partition("---\n")
        head, end, _ = rest.partition("\n---")
        about: Any = yaml.safe_load(head) if not begin.strip() and end else None
        if isinstance(about, dict):
            # "other" is followed by its name
            names = [about.get(key) for key in ("license_name", "license")]
            return next((printable(n, 80) for n in names if isinstance(n, str) and n), None)
    return None
