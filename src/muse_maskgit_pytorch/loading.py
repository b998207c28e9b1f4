from __future__ import annotations

import torch

from .checkpoint import CheckpointError, find_file, load_tree
from .maskgit import MaskGit
from .muse import Muse


def open_model(name: str, device: str | None = None) -> Muse:
    path = find_file(name)
    kind = load_tree(path)[1]
    if kind == "Muse":
        model = Muse.from_pretrained(path)
    elif kind != "MaskGit":
        raise CheckpointError(f"{path} holds a {kind}: give a Muse or a base MaskGit")
    else:
        stage = MaskGit.from_pretrained(path)
        if stage.cond_image_size is not None:
            raise CheckpointError(
                f"{path} is a super-resolution stage alone: join it with a base by `muse bundle`"
            )
        model = Muse(stage)
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device!r} cannot be used: {error}") from error
