"""Learning efficiency: the loss after equally many CPU seconds, ours and the 0.3.5 release's.

    python examples/emoji/make_dataset.py --out data/emoji
    python benchmarks/learning.py --release-python release-env/bin/python --seconds 90

(how to make the release's environment stands at the top of `speed.py`). The images become ids
once, by the shipped tokenizer, and the captions embeddings by the shipped text encoder. Every run
is a process of one thread with a budget of CPU seconds for its training steps. All get the same
batches in the same order, the same betas, clipping and warm-up, a cosine that ends with the budget,
and drop a tenth of the texts. Ours has the parts of our trainer, `MaskGit.losses` and
`make_optimizer`. The release has its `MaskGit` and AdamW, and PyTorch's fused attention in the
place of its own, which makes it faster. "ours/3" has a third of the budget: the goal is the
release's final loss.

The validation loss is that of the 197 held-out captions' images, in nats per masked token, texts
seen: the ratios at equal distances of the cosine law, the same masks for all. Runs that stand in
``--out`` are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIZE: dict[str, Any] = dict(dim=128, depth=4, heads=2, dim_head=64)
CODES, TOKENS, WIDTH = 4096, 64, 384
BATCH, LOOKS = 32, 12
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # ids, embeddings, which are real -> a scalar
# ids with the mask token, embeddings, which are real -> logits
Logits = Callable[[Tensor, Tensor, Tensor], Tensor]


def encode(data: Path, out: Path) -> None:
    """Write ids and text embeddings of both splits."""
    from muse_maskgit_pytorch import ImageFolder, Muse, TokenCache, write_cache

    model = Muse.from_pretrained("emoji").base
    tensors = {}
    for split in ("train", "heldout"):
        dataset = ImageFolder(data / "64" / split, 64, captions=True)
        folder = out.with_name(f"{out.stem}-{split}")
        write_cache(folder, model, dataset)
        cache = TokenCache(folder, model)
        batch = cache.__getitems__(range(len(cache)))
        assert batch.ids is not None
        assert batch.text_embeds is not None
        tensors[f"{split}/ids"] = batch.ids.int()
        tensors[f"{split}/embeds"] = batch.text_embeds.embeds.half()
        tensors[f"{split}/mask"] = batch.text_embeds.mask
    save_file(tensors, out)


def ours(spec: dict[str, Any]) -> tuple[nn.Module, Loss, Logits, torch.optim.Optimizer]:
    muse: Any = import_module("muse_maskgit_pytorch")
    optimizers: Any = import_module("muse_maskgit_pytorch.training.optimizers")
    structures: Any = import_module("muse_maskgit_pytorch.structures")
    vae = muse.VQGanVAE(dim=4, num_res_blocks=0, factor=4, codebook_size=CODES, quantizer="lfq")
    transformer = muse.MaskGitTransformer(
        **{**SIZE, **spec["transformer"]},
        num_tokens=CODES,
        seq_len=TOKENS,
        text_embed_dim=WIDTH,
        t5_name="none",
    )
    model = muse.MaskGit(vae=vae, transformer=transformer, image_size=32, **spec["maskgit"])

    def loss(ids: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        return model.losses(ids, text_embeds=structures.TextEmbeds(embeds, mask)).total

    def logits(ids: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        given = structures.TextEmbeds(embeds, mask)
        context = transformer.encode_context(
            structures.Conditioning(given, None, torch.ones(len(ids), dtype=torch.bool))
        )
        return transformer.to_logits(transformer(ids, context)[0])

    optimizer = optimizers.make_optimizer(
        spec["optimizer"], transformer, spec["lr"], (0.9, 0.96), spec["weight_decay"]
    )
    return transformer, loss, logits, optimizer


def release(spec: dict[str, Any]) -> tuple[nn.Module, Loss, Logits, torch.optim.Optimizer]:
    import_module("transformers")  # before the stand-in, for it looks for torchvision's version
    import_module("versus_old").stand_in_for_torchvision()
    package = "muse_maskgit_pytorch"
    t5: Any = import_module(f"{package}.t5")
    t5.T5_CONFIGS["none"] = {"config": argparse.Namespace(d_model=WIDTH)}
    old: Any = import_module(package)
    attend: Any = import_module(f"{package}.attend").Attend  # type: ignore[attr-defined]
    attend.flash_attn = import_module("speed_worker").fused_attention
    transformer = old.MaskGitTransformer(**SIZE, num_tokens=CODES, seq_len=TOKENS, t5_name="none")
    transformer.self_cond_to_init_embed = None  # without self-conditioning never used
    vae = old.VQGanVAE(dim=16, codebook_size=CODES, use_vgg_and_gan=False)
    model = old.MaskGit(image_size=16, transformer=transformer, vae=vae)

    def loss(ids: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        return model(ids, text_embeds=embeds, cond_drop_prob=0.1)

    def logits(ids: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
        return transformer(ids, text_embeds=embeds)

    optimizer = torch.optim.AdamW(
        transformer.parameters(),
        spec["lr"],
        (0.9, 0.96),
        weight_decay=spec["weight_decay"],
        fused=True,
    )
    return transformer, loss, logits, optimizer


def validate(logits: Logits, data: dict[str, Tensor]) -> float:
    """Cross-entropy of the masked tokens of the held-out images, the same masks always."""
    ids, embeds, seen = (data[f"heldout/{name}"] for name in ("ids", "embeds", "mask"))
    generator = torch.Generator().manual_seed(0)
    ratio = torch.cos(
        (torch.randperm(len(ids), generator=generator) + 0.5) / len(ids) * torch.pi / 2
    )
    order = torch.rand(ids.shape, generator=generator).argsort(1).argsort(1)
    masked = order < (ratio * TOKENS).round().clamp(min=1)[:, None]
    total = 0.0
    with torch.no_grad():
        for rows in torch.arange(len(ids)).split(BATCH):
            given = torch.where(masked[rows], CODES, ids[rows])
            scores = logits(given, embeds[rows], seen[rows])[masked[rows]]
            total += float(F.cross_entropy(scores, ids[rows][masked[rows]], reduction="sum"))
    return total / int(masked.sum())


def work(spec: dict[str, Any]) -> dict[str, Any]:
    """One run: its curve of (CPU seconds, step, validation loss)."""
    torch.set_num_threads(1)
    data = load_file(spec["data"])
    data = {k: v.long() if k.endswith("ids") else v for k, v in data.items()}
    data = {k: v.float() if k.endswith("embeds") else v for k, v in data.items()}
    torch.manual_seed(spec["seed"])
    network, loss, logits, optimizer = (ours if spec["ours"] else release)(spec)
    parameters = [p for p in network.parameters() if p.requires_grad]
    rows = torch.Generator().manual_seed(spec["seed"])
    torch.manual_seed(spec["seed"])
    curve: list[tuple[float, int, float]] = []
    seconds, step, budget = 0.0, 0, spec["seconds"]
    peaks = [group["lr"] for group in optimizer.param_groups]
    while seconds < budget:
        batch = torch.randint(len(data["train/ids"]), (BATCH,), generator=rows)
        length = int(data["train/mask"][batch].sum(1).max())
        given = [data[f"train/{name}"][batch] for name in ("ids", "embeds", "mask")]
        given = [given[0], given[1][:, :length], given[2][:, :length]]
        began = time.process_time()
        done = seconds / budget
        rise = min(1.0, (done + 0.001) / 0.05)
        factor = rise * (0.01 + 0.99 * (1 + torch.cos(torch.tensor(done * torch.pi)).item()) / 2)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        loss(*given).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - began
        step += 1
        if seconds >= budget * (len(curve) + 1) / LOOKS:
            network.eval()
            curve.append((seconds, step, validate(logits, data)))
            network.train()
    return {"parameters": sum(p.numel() for p in parameters), "steps": step, "curve": curve}


def run(spec: dict[str, Any], python: str, name: str, out: Path) -> dict[str, Any]:
    """The result of one run, which a process of its own makes unless it stands in a file."""
    path = out / f"{name}.json"
    if not path.exists():
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if not spec["ours"]:
            env.pop("PYTHONPATH", None)  # it may lead to our package, which has the same name
        call = [python, __file__, "--work", json.dumps(spec)]
        done = subprocess.run(call, env=env, stdout=subprocess.PIPE, text=True, check=True)
        path.write_text(done.stdout.splitlines()[-1])
        print(f"{name}: {json.loads(path.read_text())['curve'][-1][2]:.4f}", flush=True)
    return json.loads(path.read_text())


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--release-python", default=None)
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--release-lr", type=float, default=3e-3)
    parser.add_argument("--optimizer", default="adamw", help="of ours")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(work(args.work)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    data = args.out / "tokens.safetensors"
    if not data.exists():
        encode(args.data, data)
    common = dict(data=str(data), weight_decay=0.01, transformer={}, maskgit={})
    sides: dict[str, dict[str, Any]] = {
        "release": dict(ours=False, lr=args.release_lr, seconds=args.seconds),
        "ours": dict(ours=True, lr=args.lr, seconds=args.seconds),
        "ours/3": dict(ours=True, lr=args.lr, seconds=args.seconds / 3),
    }
    if args.release_python is None:
        del sides["release"]
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for seed in args.seeds:
        for side, spec in sides.items():
            spec |= common | dict(seed=seed, optimizer=args.optimizer)
            name = f"{side.replace('/', '-')}-{args.optimizer if spec['ours'] else 'adamw'}"
            name += f"-{spec['lr']:g}-{spec['seconds']:g}s-{seed}"
            python = sys.executable if spec["ours"] else args.release_python or sys.executable
            results[side].append(run(spec, python, name, args.out))
    goal = None
    for side, spec in sides.items():
        runs = results[side]
        ends = [r["curve"][-1][2] for r in runs]
        goal = mean(ends) if side == "release" else goal
        times = [next((c[0] for c in r["curve"] if goal and c[2] <= goal), None) for r in runs]
        print(
            f"{side:8} {runs[0]['parameters']:>9,} parameters, {spec['seconds']:g} s, "
            f"{mean(r['steps'] for r in runs):.0f} steps: loss {spread(ends)}; the release's final "
            f"loss at {[None if t is None else round(t, 1) for t in times]} s"
        )


if __name__ == "__main__":
    main()
