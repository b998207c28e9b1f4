"""Two processes train as one: nothing hangs, and both end with the same weights."""

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

SCRIPT = """
import json, os, sys
import torch
from muse_maskgit_pytorch import (
    MaskGit, MaskGitTrainer, MaskGitTransformer, TokenCritic, VQGanVAE, VQGanVAETrainer,
)

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
t5, resnet = sys.argv[1:]
torch.manual_seed(rank)  # on purpose: the processes start with other weights

common = dict(
    folder="images", batch_size=2, grad_accum_every=2, num_train_steps=4, lr=1e-3,
    warmup_steps=1, log_every=1, sample_every=2, save_every=2, valid_fraction=0.3,
)
vae = VQGanVAE(dim=8, codebook_size=16, layers=2, num_res_blocks=1, quantizer="vq")
codebook = vae.quantizer.inner._codebook
# codes that are revived at random differ until the next step: that is not the question here
codebook.threshold_ema_dead_code = 0
codebook.has_dead_code_replacement = False
trainer = VQGanVAETrainer(
    vae, image_size=16, gan_weight=0.1, gan_start=1, gradient_penalty_weight=1.0,
    discriminator_dim=8, perceptual_weight=0.1, perceptual_model=resnet, results_folder="vae",
    max_minutes=60, **common,
)
assert trainer.accelerator.num_processes == 2
trainer.train()
models = {"vae": vae, "discriminator": trainer.discriminator}

vae = VQGanVAE.from_pretrained("vae/vae-ema.safetensors")
for name, size in {"base": {}, "superres": dict(cond_image_size=8)}.items():
    # self-conditioning happens in half of the steps only: the rest leaves weights unused
    shape = dict(num_tokens=16, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5)
    model = MaskGit(
        vae=vae, transformer=MaskGitTransformer(**shape, self_cond=True), image_size=16,
        token_critic=TokenCritic(**shape), **size,
    )
    trainer = MaskGitTrainer(model, num_samples=2, results_folder=name, **common)
    trainer.train()
    models[name] = model

values = {
    f"{name}.{key}": value.double().sum().item()
    for name, model in models.items() for key, value in model.state_dict().items()
}
with open(f"rank{rank}.json", "w") as file:
    json.dump(values, file)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path, t5: str, resnet: str):
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for i in range(12):
        pixels = noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"picture {i}")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [sys.executable, *launch, str(script), t5, resnet],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT / "src"),
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr[-4000:]

    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
    assert first.keys() == second.keys()
    assert {key: (first[key], second[key]) for key in first if first[key] != second[key]} == {}
    for name in ("vae", "base", "superres"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
        assert len(losses) == 4
        assert all(np.isfinite(losses))
        assert (tmp_path / name / f"{name}-ema.safetensors").is_file()
        assert not list((tmp_path / name).glob("*.tmp"))
