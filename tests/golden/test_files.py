"""Model files that earlier releases wrote: they load, and draw the ids that they drew there.

Each file is a tiny cascade with random weights, saved in half precision by the release that its
name says. Whoever raises `checkpoint.VERSION` adds a file of the version before.
"""

from pathlib import Path

import pytest
import torch

from muse_maskgit_pytorch import Muse, SampleOptions, TextEmbeds
from muse_maskgit_pytorch.checkpoint import VERSION, stated_by

FILES = Path(__file__).with_name("files")
BASE = [
    [25, 54, 47, 63, 24, 1, 7, 20, 51, 15, 52, 60, 20, 48, 19, 20],
    [29, 29, 29, 58, 26, 53, 29, 18, 29, 57, 29, 47, 29, 29, 29, 47],
]
# The first 16 of each. 0.1.0 itself drew others: both stages shared one stream of random numbers.
SUPERRES = {
    "0.1.0": [
        [42, 22, 43, 34, 12, 8, 22, 6, 47, 31, 37, 58, 20, 51, 47, 43],
        [22, 50, 37, 23, 58, 60, 1, 28, 46, 30, 60, 6, 6, 6, 62, 6],
    ],
    "0.2.0": [
        [42, 22, 43, 33, 11, 62, 22, 6, 22, 31, 36, 57, 39, 50, 43, 39],
        [22, 63, 37, 24, 58, 20, 1, 49, 19, 31, 22, 6, 10, 5, 62, 6],
    ],
}
PIXELS = [1.0, 0.0, 0.9008, 0.0, 0.0, 0.8737]


@pytest.mark.parametrize("release", SUPERRES)
def test_files_of_earlier_releases(release: str, tmp_path: Path):
    muse = Muse.from_pretrained(FILES / f"{release}.safetensors")
    check(muse, release)
    check(Muse.from_pretrained(muse.save(tmp_path / "a.safetensors")), release)


def check(muse: Muse, release: str) -> None:
    text = TextEmbeds.of(torch.linspace(-1, 1, 36).view(2, 3, 6))
    options = SampleOptions(timesteps=4, choice_temperature=2.0, cond_scale=2.0)
    call = dict(text_embeds=text, seeds=[7, 8], options=options)
    low = muse.base.generate_ids(**call)
    assert low.tolist() == BASE
    high = muse.stages["superres"].generate_ids(**call, cond_ids=low)
    assert high[:, :16].tolist() == SUPERRES[release]
    corner = muse.base.vae.decode_from_ids(low.view(2, 4, 4))[:, :, 0, 0]
    torch.testing.assert_close(corner.flatten(), torch.tensor(PIXELS), rtol=0, atol=1e-3)


def test_there_is_a_file_of_every_version():
    versions = {stated_by(path)["version"] for path in FILES.glob("*.safetensors")}
    assert versions == set(range(1, VERSION + 1))
