"""Files are replaced whole or not at all; a digest sees names, types, shapes and values."""

import hashlib
import os
import socket
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import VQGanVAE, load_tokenizer
from muse_maskgit_pytorch.features import FeatureNet
from muse_maskgit_pytorch.files import digest_file, digest_pixels, digest_state, replacing
from muse_maskgit_pytorch.text import TextEncoder, embed_dim


def write_half(path):
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".txt"
            assert not path.exists() or path.read_text() == "old"
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.txt"]


def test_what_a_digest_sees():
    state = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": torch.arange(12.0)[:6]}
    assert digest_state(same) == digest_state(state)
    others = [
        {"c": state["a"], "b": state["b"]},
        state | {"a": state["a"].view(2, 3)},
        state | {"a": state["a"].view(torch.int32)},
        state | {"a": state["a"] + 1e-6},
        {"a": state["a"]},
    ]
    names = {digest_state(other) for other in [*others, state]} | {digest_state(state, "x")}
    assert len(names) == len(others) + 2
    images = torch.rand(2, 3, 4, 4)
    raw = images.numpy().tobytes()
    assert digest_pixels(images) == hashlib.sha256(raw).hexdigest()[:16]
    assert digest_pixels(images.mT.contiguous().mT) == digest_pixels(images)


def test_the_digest_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_full_disk_names_the_file(tmp_path):
    """The one who writes may not: Pillow's and the system's errors have no name."""
    for error in (OSError(28, "No space left on device"), OSError("encoder error -2")):
        with pytest.raises(OSError, match=r"a\.png") as caught, replacing(tmp_path / "a.png"):
            raise error
        assert caught.value.errno == error.errno
    with pytest.raises(OSError, match="other"), replacing(tmp_path / "a.png"):
        (tmp_path / "other").read_text()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "door", [TextEncoder, embed_dim, FeatureNet, VQGanVAE.from_pretrained, load_tokenizer]
)
def test_without_the_hub_every_door_says_so_at_once(door, monkeypatch):
    """huggingface_hub tries on for 24 seconds, for each file."""
    asked = []

    def nobody(*_: Any, **__: Any) -> Any:
        asked.append(True)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="nobody/none"):
        door("nobody/none")
    assert len(asked) <= 2  # once in a process it asks for something of its own
