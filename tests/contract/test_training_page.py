"""The Python of docs/training.md is run as it stands, but for sizes and the text encoder."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, VQGanVAE

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
# each text must occur in the block that has the first word
SMALLER = {
    'from_pretrained("runs/base': {"256": "32", "128": "16", "10_000": "2, batch_size=2"},
    "swa_utils": {
        "seq_len=256, dim=768, depth=12": "seq_len=16, dim=16, depth=1, heads=2",
        "128": "16",
        "batch_size=64": "batch_size=2",
        "num_workers=4": "num_workers=0",
        "range(100)": "range(3)",
    },
}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, t5: str) -> Path:
    """Where a reader would stand: captioned images, a tokenizer, both stages."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_images").mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), (60 * i, 0, 99)).save(f"my_images/{i}.png")
        Path(f"my_images/{i}.txt").write_text(f"a picture of shade {i}")
    vae = VQGanVAE(dim=8, codebook_size=64, quantizer="fsq", factor=4, num_res_blocks=1)
    vae.save("runs/vae/vae-ema.safetensors")
    for name, size, low in (("base", 16, None), ("superres", 32, 16)):
        transformer = MaskGitTransformer(
            num_tokens=vae.codebook_size, seq_len=(size // 4) ** 2, dim=16, depth=1, heads=2,
            t5_name=t5,
        )  # fmt: skip
        model = MaskGit(vae=vae, transformer=transformer, image_size=size, cond_image_size=low)
        model.save(f"runs/{name}/{name}-ema.safetensors")
    return tmp_path


def test_the_blocks_run(reader, t5):
    names: dict = {}
    small = {key: dict(texts) for key, texts in SMALLER.items()}
    small["swa_utils"]["google/t5-v1_1-base"] = t5
    for block in BLOCKS:
        for key, texts in small.items():
            for text, smaller in texts.items() if key in block else ():
                assert text in block
                block = block.replace(text, smaller)
        exec(block, names)
    assert all(any(key in block for block in BLOCKS) for key in small)
    assert (reader / "runs/further/base-ema.safetensors").is_file()

    # the loop of one's own: six steps, and what it saved is their average
    assert names["average"].n_averaged == 6
    again = MaskGit.from_pretrained("mine.safetensors").state_dict()
    for name, value in names["average"].module.state_dict().items():
        assert torch.equal(again[f"transformer.{name}"], value)
    assert names["picture"].shape == (1, 3, 16, 16)
