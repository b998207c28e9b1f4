"""What of a sampling step is not the network: the sampler's, guidance's and Python's share.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --dim 1024 --codes 65536
    python benchmarks/overhead.py --once  # what computing equal rows and branches once brings

One guided step of 256 tokens, of which 64 % are masked, the mean over the steps of the cosine
schedule. Processor time of one thread: of the whole step, within the network and within its head;
medians. "plan" is making the plan and its noise, once for all steps. ``--once`` draws with the
base stage of the shipped model, both ways in turns.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, Muse, VQGanVAE, maskgit
from muse_maskgit_pytorch.conditioning import Conditioner
from muse_maskgit_pytorch.sampling import SampleState, make_plan, step
from muse_maskgit_pytorch.structures import TextEmbeds


@dataclass
class Timed:
    """A network that adds up the processor time spent in it and in its head."""

    network: Any
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(["network", "head"], 0.0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def _count(self, name: str, function: Any, *given: Any, **more: Any) -> Any:
        start = time.process_time()
        result = function(*given, **more)
        self.spent[name] += time.process_time() - start
        return result

    def __call__(self, *given: Any, **more: Any) -> Any:
        return self._count("network", self.network, *given, **more)

    def to_logits(self, hidden: Any) -> Any:
        return self._count("head", self.network.to_logits, hidden)


@torch.no_grad()
def shares(model: MaskGit, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step by part."""
    text = TextEmbeds.of(torch.randn(batch, 32, 768))
    options = model.default_options.replace(
        timesteps=18, cond_scale=3.0, guidance_schedule="constant", seeds=0
    )
    mask_id = model.transformer.mask_id
    canvas = torch.randint(mask_id, (batch, 256))
    canvas[:, 93:] = mask_id
    denoiser = model.denoiser(text, options)
    timed = Timed(denoiser.network)
    object.__setattr__(denoiser, "network", timed)
    found: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        timed.spent |= dict.fromkeys(timed.spent, 0.0)
        before = time.process_time()
        plan = make_plan(canvas == mask_id, options)
        start = time.process_time()
        step(SampleState.start(canvas, mask_id), plan, denoiser, guided=True, num_logits=163)
        whole = time.process_time() - start
        parts = timed.spent | {"rest": whole - sum(timed.spent.values()), "plan": start - before}
        for name, seconds in parts.items():
            found.setdefault(name, []).append(seconds)
    return {name: median(seconds[1:]) for name, seconds in found.items()}


def once(rounds: int) -> None:
    """Print seconds with equal rows and branches computed once, and each for itself."""
    base = Muse.from_pretrained("scenes").base
    options = base.default_options.replace(cond_scale=3.0, guidance_schedule="constant", seeds=0)
    eight, one = (base.embed_texts(["a red apple"] * number) for number in (8, 1))
    calls: dict[str, Any] = {
        "eight of one prompt, one step": lambda: base.sample(eight, options.replace(timesteps=1)),
        "eight of one prompt, 12 steps": lambda: base.sample(eight, options.replace(timesteps=12)),
        "a negative prompt that is the prompt": lambda: base.sample(
            one, options.replace(timesteps=12), negatives=["a red apple"]
        ),
    }
    plain = maskgit.same_as_before, Conditioner.guides
    each: Any = (lambda *rows: torch.zeros(len(rows[0])).bool()), (lambda *_: True)
    print("| call | once, s | each, s | each / once | same ids |")
    print("| --- | --- | --- | --- | --- |")
    for name, call in calls.items():
        spent: list[tuple[float, float]] = []
        ids = []
        for _ in range(rounds + 1):
            turn = []
            for way in (plain, each):
                maskgit.same_as_before, Conditioner.guides = way
                start = time.process_time()
                ids.append(call())
                turn.append(time.process_time() - start)
            spent.append((turn[0], turn[1]))
        first, second = zip(*spent[1:], strict=True)
        ratio = median(b / a for a, b in spent[1:])
        same = f"{float((ids[-1] == ids[-2]).float().mean()):.1%}"
        print(f"| {name} | {median(first):.3f} | {median(second):.3f} | {ratio:.2f} | {same} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--once", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.once:
        return once(args.rounds)
    torch.manual_seed(0)
    transformer = MaskGitTransformer(
        num_tokens=args.codes, seq_len=256, dim=args.dim, depth=8, t5_name="none",
        text_embed_dim=768,
    )  # fmt: skip
    for block in transformer.blocks:
        torch.nn.init.normal_(block.ff.to_out.weight, std=0.02)
    vae: Any = VQGanVAE(
        dim=4, num_res_blocks=0, factor=4, codebook_size=args.codes, quantizer="lfq"
    )
    model = MaskGit(vae=vae, transformer=transformer, image_size=64).eval()
    print("| batch | network, ms | head, ms | rest, ms | rest of the step | plan of 18 steps, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for batch in args.batch:
        found = shares(model, batch, args.rounds)
        whole = found["network"] + found["head"] + found["rest"]
        times = [f"{1000 * found[name]:.1f}" for name in ("network", "head", "rest")]
        cells = [str(batch), *times, f"{found['rest'] / whole:.1%}", f"{1000 * found['plan']:.1f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
