"""The public API in four examples: their calls run as they are written here.

In small: sizes are replaced, everything trains, backpropagates and generates. Once in the sizes
written here: construction and one loss. Each runs in a process of its own, whose hub holds a tiny
t5-small and a tiny microsoft/resnet-50.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

TOKENIZER = """
import torch
from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer

vae = VQGanVAE(
    dim = 256,
    vq_codebook_size = 512
)

trainer = VQGanVAETrainer(
    vae = vae,
    image_size = 128,
    folder = '/path/to/images',
    batch_size = 4,
    grad_accum_every = 8,
    num_train_steps = 50000
).cuda()

trainer.train()
"""

BASE = """
import torch
from muse_maskgit_pytorch import VQGanVAE, MaskGit, MaskGitTransformer

vae = VQGanVAE(
    dim = 256,
    vq_codebook_size = 512
).cuda()

vae.load('/path/to/vae.pt')

transformer = MaskGitTransformer(
    num_tokens = 512,
    seq_len = 256,
    dim = 512,
    depth = 8,
    dim_head = 64,
    heads = 8,
    ff_mult = 4,
    t5_name = 't5-small',
)

base_maskgit = MaskGit(
    vae = vae,
    transformer = transformer,
    image_size = 256,
    cond_drop_prob = 0.25,
).cuda()

texts = [
    'a red kite over a field of barley',
    'two otters asleep on their backs',
    'a lighthouse in thick fog',
    'a bowl of plums on a blue table'
]

images = torch.randn(4, 3, 256, 256).cuda()

loss = base_maskgit(
    images,
    texts = texts
)

loss.backward()

images = base_maskgit.generate(texts = [
    'an owl on a chimney',
    'a tram in the rain',
    'three lemons'
], cond_scale = 3.)

images.shape # (3, 3, 256, 256)
"""

SUPERRES = """
import torch
import torch.nn.functional as F
from muse_maskgit_pytorch import VQGanVAE, MaskGit, MaskGitTransformer

vae = VQGanVAE(
    dim = 256,
    vq_codebook_size = 512
).cuda()

vae.load('./path/to/vae.pt')

transformer = MaskGitTransformer(
    num_tokens = 512,
    seq_len = 1024,
    dim = 512,
    depth = 2,
    dim_head = 64,
    heads = 8,
    ff_mult = 4,
    t5_name = 't5-small',
)

superres_maskgit = MaskGit(
    vae = vae,
    transformer = transformer,
    cond_drop_prob = 0.25,
    image_size = 512,
    cond_image_size = 256,
).cuda()

texts = [
    'a red kite over a field of barley',
    'two otters asleep on their backs',
    'a lighthouse in thick fog',
    'a bowl of plums on a blue table'
]

images = torch.randn(4, 3, 512, 512).cuda()

loss = superres_maskgit(
    images,
    texts = texts
)

loss.backward()

images = superres_maskgit.generate(
    texts = [
        'an owl on a chimney',
        'a tram in the rain',
        'three lemons',
        'a lighthouse in thick fog'
    ],
    cond_images = F.interpolate(images, 256),
    cond_scale = 3.
)

images.shape # (4, 3, 512, 512)
"""

CASCADE = """
from muse_maskgit_pytorch import Muse

base_maskgit.load('./path/to/base.pt')

superres_maskgit.load('./path/to/superres.pt')

muse = Muse(
    base = base_maskgit,
    superres = superres_maskgit
)

images = muse([
    'an owl on a chimney',
    'a tram in the rain',
    'three lemons',
    'a lighthouse in thick fog'
])

images # List[PIL.Image.Image]
"""

# What a small run changes, per example; every left side must occur there.
SMALL_VAE = {"dim = 256": "dim = 8", "vq_codebook_size = 512": "vq_codebook_size = 32"}
SMALL_TRANSFORMER = {
    "num_tokens = 512": "num_tokens = 32",
    "    dim = 512": "    dim = 32",
    "dim_head = 64": "dim_head = 8",
    "heads = 8": "heads = 2",
}
SMALL = {
    TOKENIZER: SMALL_VAE
    | {
        "image_size = 128": "image_size = 32",
        "grad_accum_every = 8": "grad_accum_every = 2",
        "num_train_steps = 50000": "num_train_steps = 2",
        "/path/to/images": "images",
    },
    BASE: SMALL_VAE
    | SMALL_TRANSFORMER
    | {
        "seq_len = 256": "seq_len = 4",
        "depth = 8": "depth = 2",
        "image_size = 256": "image_size = 32",
        "256, 256).cuda()": "32, 32).cuda()",
        "/path/to/vae.pt": "path/to/vae.pt",
    },
    SUPERRES: SMALL_VAE
    | SMALL_TRANSFORMER
    | {
        "seq_len = 1024": "seq_len = 16",
        "    image_size = 512": "    image_size = 64",
        "cond_image_size = 256": "cond_image_size = 32",
        "512, 512).cuda()": "64, 64).cuda()",
        "(images, 256)": "(images, 32)",
        "path/to/vae.pt": "results/vae-ema.safetensors",
    },
    CASCADE: {},
}

PREAMBLE = """
import json, os, resource, time, warnings
import torch
if not torch.cuda.is_available():
    torch.nn.Module.cuda = torch.Tensor.cuda = lambda self, *args, **kwargs: self
facts = {}
os.makedirs('path/to', exist_ok=True)
"""

RESULTS = """
facts['peak_gb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps(facts))
"""


def small(example: str) -> str:
    for large, replacement in SMALL[example].items():
        assert large in example, large
        example = example.replace(large, replacement)
    return example


def run(folder: Path, environment: dict[str, str], *parts: str, timeout: int = 300) -> dict:
    script = folder / "example.py"
    script.write_text("\n".join([PREAMBLE, *parts, RESULTS]))
    process = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=os.environ | environment | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


def test_the_four_examples_in_small(tmp_path: Path, hub_environment: dict[str, str]):
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for i in range(8):
        pixels = noise.integers(0, 255, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    facts = run(
        tmp_path,
        hub_environment,
        small(TOKENIZER),
        "facts['steps'] = trainer.step",
        "facts['files'] = sorted(os.listdir('results'))",
        "torch.save(vae.state_dict(), 'path/to/vae.pt')",
        "trained = {k: v.clone() for k, v in vae.state_dict().items()}",
        small(BASE),
        "facts['same_vae'] = all(torch.equal(v, trained[k]) for k, v in vae.state_dict().items())",
        "facts['base_loss'] = [list(loss.shape), float(loss)]",
        "facts['base_grads'] = [bool(p.grad is not None and p.grad.isfinite().all())"
        " for p in transformer.parameters()]",
        "facts['vae_grads'] = [p.grad is not None for p in vae.parameters()]",
        "facts['base'] = list(images.shape)",
        "facts['range'] = [float(images.min()), float(images.max())]",
        "torch.save(base_maskgit.state_dict(), 'path/to/base.pt')",
        small(SUPERRES),
        "facts['superres_loss'] = [list(loss.shape), float(loss)]",
        "facts['superres_grads'] = [bool(p.grad is not None and p.grad.isfinite().all())"
        " for p in transformer.parameters()]",
        "facts['superres'] = list(images.shape)",
        "torch.save(superres_maskgit.state_dict(), 'path/to/superres.pt')",
        small(CASCADE),
        "facts['muse'] = [type(images).__name__]",
        "facts['muse'] += [[type(i).__module__, i.mode, *i.size] for i in images]",
    )
    assert facts["steps"] == 2
    assert {"vae.safetensors", "vae-ema.safetensors", "metrics.jsonl"} <= set(facts["files"])
    assert facts["same_vae"]
    for loss in ("base_loss", "superres_loss"):
        shape, value = facts[loss]
        assert shape == []
        # untrained, a guess among 32 codes costs about log 32 = 3.5
        assert 2 < value < 6
    assert all(facts["base_grads"])
    assert all(facts["superres_grads"])
    assert not any(facts["vae_grads"])
    assert facts["base"] == [3, 3, 32, 32]
    assert facts["superres"] == [4, 3, 64, 64]
    assert 0 <= facts["range"][0] < facts["range"][1] <= 1
    assert facts["muse"] == ["list"] + [["PIL.Image", "RGB", 64, 64]] * 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_examples_in_their_own_sizes(tmp_path: Path, hub_environment: dict[str, str]):
    """All four are constructed; base and super-resolution give one loss; 24 GB are enough."""
    images = tmp_path / "path" / "to" / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (128, 128), "teal").save(images / "1.png")

    def until(example: str, end: str) -> str:
        assert end in example
        example = example.replace("'/path/to/", "'path/to/")
        return example[: example.index(end)]

    facts = run(
        tmp_path,
        hub_environment,
        until(TOKENIZER, "trainer.train()"),
        "torch.save(vae.state_dict(), 'path/to/vae.pt')",
        "start = time.perf_counter()",
        until(BASE, "loss.backward()"),
        "facts['base'] = [list(loss.shape), float(loss), loss.requires_grad]",
        "facts['base_s'] = time.perf_counter() - start",
        "del loss",
        "torch.save(base_maskgit.state_dict(), 'path/to/base.pt')",
        "start = time.perf_counter()",
        until(SUPERRES, "loss.backward()"),
        "facts['superres'] = [list(loss.shape), float(loss), loss.requires_grad]",
        "facts['superres_s'] = time.perf_counter() - start",
        "torch.save(superres_maskgit.state_dict(), 'path/to/superres.pt')",
        until(CASCADE, "images = muse("),
        "facts['parts'] = [type(m).__name__ for m in (muse.base, muse.superres)]",
        timeout=3600,
    )
    print(facts)
    for stage in ("base", "superres"):
        shape, loss, has_graph = facts[stage]
        assert shape == []
        assert 5 < loss < 9  # log 512 = 6.2
        assert has_graph
    assert facts["parts"] == ["MaskGit", "MaskGit"]
    assert facts["peak_gb"] < 24
