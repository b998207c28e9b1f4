"""This tokenizer against that of the `muse-maskgit-pytorch` 0.3.5 release: one command, one run.

The release needs an environment of its own, for its package has our name:

    python -m venv old-env
    old-env/bin/pip install torch==2.13.0 accelerate beartype einops ema-pytorch pillow \
        memory-efficient-attention-pytorch sentencepiece tqdm transformers vector-quantize-pytorch
    old-env/bin/pip install --no-deps muse-maskgit-pytorch==0.3.5

    python benchmarks/versus.py --old-python old-env/bin/python --out runs/versus

Every contender trains in a process and on a thread of its own, some steps at a time, in turns, so
that whatever slows the machine down slows all of them. An image counts once per step, loading
included, and the median step of the later half makes the speed. All see the same folder in equally
many steps of equally many images, cut an image of 64 pixels into 64 tokens of 4,096 codes, and have
as many parameters (5.1 million without discriminators). One judge looks at the reconstructions that
they write: PSNR, and the Fréchet distance of the features of one network (rFID), with the raw or
the averaged weights, whichever are better.

The release is run with its own trainer and its defaults: LFQ, L1, hinge GAN, Adam at 3e-4. What
does not work in it, and what was done about it:

- VQ (``lookup_free_quantization=False``): a comma is missing, ``True **vq_kwargs``: TypeError.
- Without GAN (``use_vgg_and_gan=False``): its trainer asks for the parameters of the discriminator
  that is not there: AttributeError. Such a model would leave out LFQ's entropy term as well.
- VGG-16 for its perceptual term is downloaded through torchvision: here at random weights. Its
  trainer spends more than a third of a step on gradients of VGG that nothing uses; they are
  switched off in its favour, which makes it 1.6 times faster. Given as the argument ``vgg``, the
  network would be trained along.
- It asks on the terminal whether to delete a results folder that is not empty: it gets a new one.
- It takes a second batch for the discriminator (not counted), mirrors images at random, and
  computes the gradient penalty at every step, whatever ``apply_grad_penalty_every`` says.

Its settings were tried in 200 steps of 8 images; held-out PSNR, and codes in use there:

    defaults, float32 | bfloat16                                   13.7 dB, 867 | 13.7 dB, 1,453
    plain L2 in the place of VGG                                   13.4 dB, 525
    LFQ: diversity_gamma 1 for 4                                   12.3 dB, 4
    LFQ: entropy weight 0.02 for 0.1, commitment 0.25 for 0        14.6 dB, 32
    LFQ: both of these                                             15.3 dB, 25
    learning rate 1e-3, clipping at 1                              stopped half-way: slower

So there are two candidates for its best setting, the defaults, which use more codes, and the last
but one, which is ahead early; both take part.

Contenders: ``old``, its defaults; ``old-bf16``, the same under accelerate's mixed precision;
``old-tuned``, the other LFQ weights, in bfloat16 too; ``old-pixels``, in bfloat16, with a plain L2
in the place of VGG: the fastest that it can be made. ``ours`` in bfloat16 and ``ours-fp32``, both
without GAN and perceptual term; ``ours-gan`` with the GAN from half of the steps on.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from versus_old import Turns, reconstruct  # type: ignore[import-not-found]  # it lies beside

from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer
from muse_maskgit_pytorch.data.folder import ImageFolder
from muse_maskgit_pytorch.evaluation import metrics
from muse_maskgit_pytorch.features import FeatureNet
from muse_maskgit_pytorch.images import image_grid

SIZE, CODES = 64, 4096
NEVER = 10**9

OLD_VAE = dict(dim=64, layers=3, codebook_size=CODES)
OLD_LFQ = dict(entropy_loss_weight=0.02, diversity_gamma=1.0, commitment_loss_weight=0.25)
OLD_TRAINER = dict(valid_frac=0, save_results_every=NEVER, save_model_every=NEVER)
OUR_VAE = dict(dim=64, layers=2, channel_mults=[1, 2, 3], patch_size=2)
OUR_VAE |= dict(quantizer="fsq", codebook_size=CODES)
OUR_TRAINER = dict(lr=1e-3, warmup_steps=100, ema_decay=0.998, mixed_precision="bf16")
OUR_TRAINER |= dict(perceptual_weight=0, gan_weight=0, cache_images=True)
OUR_TRAINER |= dict(valid_fraction=0, sample_every=0, save_every=NEVER)


def specifications(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each contender is made of: the arguments of its constructors, and its files."""
    common = dict(folder=str(args.data / "train"), image_size=SIZE)
    common |= dict(num_train_steps=args.steps, batch_size=args.batch_size)
    old = OLD_TRAINER | common | args.old_trainer
    ours = OUR_TRAINER | common | dict(seed=args.seed)
    if args.perceptual:
        ours |= dict(perceptual_model=args.perceptual, perceptual_weight=0.05)
    ours |= args.our_trainer
    gan = dict(gan_weight=0.1, gan_adaptive=True, discriminator_dim=32)
    gan |= dict(gan_start=args.steps // 2, gan_ramp=args.steps // 8) | args.gan
    half = dict(accelerate_kwargs=dict(mixed_precision="bf16"))
    old_vae, our_vae = OLD_VAE | args.old_vae, OUR_VAE | args.our_vae
    tuned = OLD_VAE | dict(lfq_kwargs=OLD_LFQ) | args.old_vae
    specs: dict[str, dict[str, Any]] = {
        "old": dict(vae=old_vae, trainer=old, perceptual="vgg16"),
        "old-bf16": dict(vae=old_vae, trainer=old | half, perceptual="vgg16"),
        "old-tuned": dict(vae=tuned, trainer=old | half, perceptual="vgg16"),
        "old-pixels": dict(vae=old_vae, trainer=old | half, perceptual="pixels"),
        "ours": dict(vae=our_vae, trainer=ours),
        "ours-fp32": dict(vae=our_vae, trainer=ours | dict(mixed_precision="no")),
        "ours-gan": dict(vae=our_vae, trainer=ours | gan),
    }
    for name, spec in specs.items():
        spec["trainer"] = spec["trainer"] | dict(results_folder=str(args.out / name))
        spec |= dict(seed=args.seed, real=str(args.out / "real.safetensors"))
        spec |= dict(drawn=str(args.out / f"{name}.safetensors"))
    if unknown := set(args.contenders) - set(specs):
        raise ValueError(f"contenders {sorted(unknown)} do not exist: choose from {list(specs)}")
    return {name: specs[name] for name in args.contenders}


class Contender:
    """A training in a process of its own, which goes on only when told to.

    Args:
        command: starts it; the JSON of its specification is added.
        spec: that specification.
        log: file for what it prints.

    Attributes:
        seconds: of every step so far.
        results: what it says of itself at its end.
    """

    def __init__(self, command: list[str], spec: dict[str, Any], log: Path):
        self.spec, self.log = spec, log
        self.seconds: list[float] = []
        self.results: dict[str, Any] = {}
        with open(log, "w") as stderr:
            self.process = subprocess.Popen(
                [*command, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        self._listen()

    def train(self, steps: int) -> None:
        """Let it do some steps, the last ones included its reconstructions."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self._listen()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender has ended too early: see the end of {self.log}")
        answer = json.loads(line)
        self.seconds += answer.pop("seconds")
        self.results |= answer

    def images_per_s(self) -> float:
        """By the median step of the later half, where a GAN takes part if there is one."""
        later = self.seconds[len(self.seconds) // 2 :]
        return self.spec["trainer"]["batch_size"] / median(later)


def train_ours(spec: dict[str, Any]) -> None:
    """Be one of our contenders."""
    turns = Turns()

    class InTurns(VQGanVAETrainer):
        def train_step(self, batches: Iterator[Any]) -> dict[str, Tensor]:
            turns.begin_step()
            return super().train_step(batches)

    torch.manual_seed(spec["seed"])
    vae = VQGanVAE(**spec["vae"])
    trainer = InTurns(vae, **spec["trainer"])
    trainer.train()
    vae.eval()
    with trainer.ema.applied():
        averaged = copy.deepcopy(vae)
    models = {"raw": vae, "averaged": averaged}
    coders = {name: (model.encode_to_ids, model.decode_from_ids) for name, model in models.items()}
    reconstruct(Path(spec["real"]), Path(spec["drawn"]), coders)
    turns.answer(parameters=sum(p.numel() for p in vae.parameters()))


def ceiling(dtype: torch.dtype) -> float:
    """GFLOP/s of a matrix product of 2048 x 256 x 1024 on one thread, the best of ten."""
    a, b = torch.randn(2048, 256).to(dtype), torch.randn(256, 1024).to(dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * 2048 * 256 * 1024 / min(seconds) / 1e9


class Judge:
    """Figures of reconstructions of a fixed set of uint8 images (n, 3, S, S)."""

    def __init__(self, images: Tensor, features: FeatureNet):
        self.images, self.features = images, features
        self.statistics = self._statistics(images)

    @torch.no_grad()
    def _statistics(self, images: Tensor) -> metrics.FeatureStatistics:
        statistics = metrics.FeatureStatistics()
        for part in images.split(32):
            statistics.update(self.features.pooled(part.float() / 255))
        return statistics

    def psnr(self, drawn: Tensor) -> float:
        return float(metrics.psnr(self.images.float() / 255, drawn.float() / 255).mean())

    def rfid(self, drawn: Tensor) -> float:
        real, made = self.statistics, self._statistics(drawn)
        return metrics.frechet_distance(real.mean, real.covariance, made.mean, made.covariance)


def figures(contender: Contender, judges: dict[str, Judge]) -> dict[str, Any]:
    """All that is to be said of a contender, with the better of its raw and averaged weights."""
    saved = load_file(contender.spec["drawn"])
    by_weights = {w: judges["heldout"].psnr(saved[f"{w}/heldout"]) for w in ("raw", "averaged")}
    weights = max(by_weights, key=by_weights.__getitem__)
    found: dict[str, Any] = {"weights": weights, **contender.results}
    found["images_per_s"] = contender.images_per_s()
    for name, judge in judges.items():
        drawn, ids = saved[f"{weights}/{name}"], saved[f"{weights}/{name}/ids"]
        found |= {f"psnr_{name}": judge.psnr(drawn), f"rfid_{name}": judge.rfid(drawn)}
        found[f"codes_{name}"] = len(ids.unique())
    return found | {"psnr_heldout_by_weights": by_weights, "specification": contender.spec}


def table(results: dict[str, dict[str, Any]], judges: dict[str, Judge]) -> str:
    """The figures as Markdown, a line per contender; speeds also as multiples of the release's."""
    olds = [name for name in results if name.startswith("old")]
    head = ["", "weights", "parameters", "images/s", *(f"x {name}" for name in olds)]
    for name, judge in judges.items():
        head += [f"{figure} {name} ({len(judge.images)})" for figure in ("PSNR", "rFID", "codes")]
    rows = [head, ["---"] * len(head)]
    for contender, found in results.items():
        speed = found["images_per_s"]
        row = [contender, found["weights"], f"{found['parameters'] / 1e6:.2f} M", f"{speed:.1f}"]
        row += [f"{speed / results[name]['images_per_s']:.2f}" for name in olds]
        for name in judges:
            row += [f"{found[f'psnr_{name}']:.2f} dB", f"{found[f'rfid_{name}']:.2f}"]
            row += [str(found[f"codes_{name}"])]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contender", type=json.loads, help=argparse.SUPPRESS)  # be this one
    parser.add_argument("--old-python", default="old-env/bin/python")
    parser.add_argument("--data", type=Path, default=Path("data/emoji/64"))
    parser.add_argument("--out", type=Path, default=Path("runs/versus"), help="a new folder")
    default = ["old", "old-bf16", "old-tuned", "ours", "ours-fp32", "ours-gan"]
    parser.add_argument("--contenders", nargs="+", default=default)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--turn", type=int, default=20, help="steps before it is the next's turn")
    parser.add_argument("--train-images", type=int, default=1000, help="how many are judged")
    parser.add_argument("--features", default="efficientnet-lite0", help="FeatureNet of the rFID")
    parser.add_argument("--perceptual", help="FeatureNet of our perceptual term; default: no term")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("old-vae", "old-trainer", "our-vae", "our-trainer", "gan"):
        parser.add_argument(f"--{name}", type=json.loads, default={}, help="JSON of arguments")
    args = parser.parse_args()
    if args.contender:
        return train_ours(args.contender)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    specs = specifications(args)
    if args.out.exists():
        parser.error(f"{args.out} exists: name a new folder, for nothing is overwritten")
    args.out.mkdir(parents=True)

    real = {}
    for name in ("heldout", "train"):
        images = ImageFolder(args.data / name, SIZE)
        count = min(len(images), args.train_images if name == "train" else len(images))
        rows = [i * len(images) // count for i in range(count)]  # from all over the set
        real[name] = torch.stack([(images[i]["image"] * 255).round().byte() for i in rows])
    save_file(real, args.out / "real.safetensors")
    features = FeatureNet(args.features)
    judges = {name: Judge(images, features) for name, images in real.items()}

    running: dict[str, Contender] = {}
    for name, spec in specs.items():
        # -I: a PYTHONPATH to our package must not reach the release, which has the same name
        old = [args.old_python, "-I", str(Path(__file__).with_name("versus_old.py"))]
        command = old if name.startswith("old") else [sys.executable, __file__, "--contender"]
        running[name] = Contender(command, spec, args.out / f"{name}.log")
    ceilings: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    with tqdm(total=args.steps, unit="step") as bar:
        while remaining := [c for c in running.values() if not c.results]:
            for dtype, found in ceilings.items():
                found.append(ceiling(getattr(torch, dtype)))
            for contender in remaining:
                contender.train(args.turn)
            speeds = {name: f"{c.images_per_s():.1f}" for name, c in running.items()}
            bar.set_postfix(speeds)
            bar.update(args.turn)

    results = {name: figures(c, judges) for name, c in running.items()}
    print(f"\n{args.steps} steps of {args.batch_size} images, {CODES} codes, one thread each")
    print(f"rFID by the features of {args.features}; in brackets the number of images judged\n")
    print(table(results, judges))
    print("\nmatrix product, GFLOP/s (lowest, median, highest of the rounds):")
    for dtype, found in ceilings.items():
        print(f"  {dtype:9}{min(found):6.0f}{median(found):6.0f}{max(found):6.0f}")
    report = {"torch": torch.__version__, "steps": args.steps, "batch_size": args.batch_size}
    report |= {"images": {name: len(judge.images) for name, judge in judges.items()}}
    report |= {"features": args.features, "ceilings_gflops": ceilings, "contenders": results}
    (args.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")

    columns = 16
    some = torch.arange(columns) * len(real["heldout"]) // columns
    lines = [real["heldout"][some]]
    for name, found in results.items():
        lines.append(load_file(specs[name]["drawn"])[f"{found['weights']}/heldout"][some])
    image_grid(torch.cat(lines).float() / 255, columns).save(args.out / "heldout.png")
    print(f"\nheld-out images, above {', '.join(results)}: {args.out}/heldout.png")


if __name__ == "__main__":
    main()
