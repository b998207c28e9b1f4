"""aMUSEd here against diffusers' own pipeline: memory and seconds, on the same random weights.

    python benchmarks/amused.py --size tiny
    python benchmarks/amused.py --size 256 --folder amused-256-random --steps 4 --rounds 2

The folder gets a model of the exact geometry in diffusers' layout, made by diffusers, in float32
(3.5 GB at the sizes 256 and 512), unless it has one. Every contender loads it in a process and on
a thread of its own and draws one picture a turn, in turns, so that whatever slows the machine down
slows all of them: ``diffusers``, and this package in each of ``--precisions``. A picture is the
whole call, from the text to pixels, with guidance 10; a step is the median time between two of its
calls back. Seconds are those that the process computes, so that what else the machine does counts
for less. Memory is the largest resident set so far. Of other precisions than
float32 the logits are compared with those in float32, half of the tokens masked: the spread of the
differences as a share of the spread of the logits. Random logits are nearly flat, so this says more
than tokens would.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import string
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

# As the configurations of amused/amused-256, amused-512 and their CLIP say.
TRANSFORMER: dict[str, Any] = dict(
    hidden_size=1024, cond_embed_dim=768, micro_cond_encode_dim=256, micro_cond_embed_dim=1280,
    encoder_hidden_size=768, vocab_size=8256, codebook_size=8192, in_channels=768,
    block_out_channels=768, num_res_blocks=3, block_num_heads=12, num_hidden_layers=22,
    num_attention_heads=16, intermediate_size=2816, sample_size=16,
)  # fmt: skip
TEXT: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12
)
TEXT |= dict(num_attention_heads=12)
TOKENIZER: dict[str, Any] = dict(block_out_channels=[128, 256, 256, 512, 768], layers_per_block=2)
TOKENIZER |= dict(latent_channels=64, num_vq_embeddings=8192)
CHANGES: dict[str, dict[str, Any]] = {
    "256": {},
    "512": dict(downsample=True, upsample=True, sample_size=32),
    "tiny": dict(
        hidden_size=64, block_out_channels=64, num_hidden_layers=2, num_attention_heads=4,
        block_num_heads=4, intermediate_size=128, in_channels=64,
    ),
}  # fmt: skip
TEXT_LENGTH = 77
ANSWER = "answer: "  # begins the lines that a contender says to us


def make(folder: Path, size: str) -> None:
    """A model with random weights, saved by diffusers' pipeline."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    theirs: Any = diffusers
    folder.mkdir(parents=True, exist_ok=True)
    names = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    names += [f"<{n}>" for n in range(49406 - len(names))] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = [folder / "vocab.json", folder / "merges.txt"]
    reader: Any = CLIPTokenizer(*map(str, files), model_max_length=TEXT_LENGTH)
    for file in files:
        file.unlink()
    tiny = size == "tiny"
    less: dict[str, Any] = dict(num_hidden_layers=1) if tiny else {}
    text: Any = CLIPTextConfig(
        **TEXT | less, vocab_size=len(names),
        max_position_embeddings=TEXT_LENGTH, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    widths: Any = [32] * 5 if tiny else TOKENIZER["block_out_channels"]
    torch.manual_seed(0)
    transformer = theirs.UVit2DModel(**TRANSFORMER | CHANGES[size])
    vqvae = theirs.VQModel(
        **TOKENIZER | dict(block_out_channels=widths), mid_block_add_attention=False,
        down_block_types=["DownEncoderBlock2D"] * 5, up_block_types=["UpDecoderBlock2D"] * 5,
        lookup_from_codebook=True,
    )  # fmt: skip
    with torch.no_grad():  # their first values would give logits that are all but equal
        for value in transformer.parameters():
            std = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
            value.add_(torch.randn_like(value), alpha=std)
    theirs.AmusedPipeline(
        tokenizer=reader, text_encoder=CLIPTextModelWithProjection(text), transformer=transformer,
        vqvae=vqvae, scheduler=theirs.AmusedScheduler(mask_token_id=8255),
    ).save_pretrained(folder)  # fmt: skip


# A contender ----------------------------------------------------------------------------------

Draw = Callable[[str, int, Callable[..., Any]], Any]  # a prompt, steps, what to call after each


def theirs(folder: Path) -> tuple[Draw, dict[str, Any]]:
    """Diffusers' pipeline."""
    from diffusers import AmusedPipeline

    kind: Any = AmusedPipeline
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    parts = {"transformer": pipeline.transformer, "tokenizer": pipeline.vqvae}
    parts |= {"text encoder": pipeline.text_encoder}
    sizes = {n: sum(p.numel() for p in part.parameters()) / 1e6 for n, part in parts.items()}

    def draw(prompt: str, steps: int, after: Callable[..., Any]) -> Any:
        return pipeline(prompt, num_inference_steps=steps, guidance_scale=10.0, callback=after)

    return draw, {"millions": {name: round(size, 1) for name, size in sizes.items()}}


def ours(folder: Path, precision: Any) -> tuple[Draw, dict[str, Any]]:
    """This package."""
    from muse_maskgit_pytorch import Muse

    muse = Muse.from_pretrained(folder)
    facts = {} if precision == "float32" else {"off": off(muse, precision)}
    muse.precision = precision

    def draw(prompt: str, steps: int, after: Callable[..., Any]) -> Any:
        return muse(prompt, timesteps=steps, cond_scale=10.0, seeds=0, callback=after)

    return draw, facts


@torch.no_grad()
def off(muse: Any, precision: str) -> float:
    """How far the logits are from those in float32."""
    from muse_maskgit_pytorch.sampling import SampleOptions

    base, found = muse.base, []
    length = base.transformer.seq_len
    ids = torch.randint(base.vae.codebook_size, (1, length))
    ids[:, ::2] = base.transformer.mask_id
    for each in ("float32", precision):
        muse.precision = each
        denoiser = base.denoiser(base.embed_texts("a lake"), SampleOptions(cond_scale=10.0))
        network = denoiser.network
        hidden: Tensor = network(ids, denoiser.context)
        found.append(network.to_logits(hidden))
    return float((found[1] - found[0]).std() / found[0].std())


def memory() -> float:
    """The largest resident set so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def work(name: str, folder: Path) -> None:
    """Load, say so, then draw a picture for each prompt that is read."""
    begin = time.process_time()
    draw, facts = theirs(folder) if name == "diffusers" else ours(folder, name)
    facts |= {"seconds to load": time.process_time() - begin, "GB to load": memory()}
    print(f"{ANSWER}{json.dumps(facts)}", flush=True)
    for line in sys.stdin:
        prompt, count = json.loads(line)
        times: list[float] = []
        begin = time.process_time()
        draw(prompt, count, lambda *_, times=times: times.append(time.process_time()))
        told = {"picture": time.process_time() - begin, "GB": memory()}
        told["step"] = median(b - a for a, b in pairwise(times))
        print(f"{ANSWER}{json.dumps(told)}", flush=True)


# All of them ----------------------------------------------------------------------------------


class Contender:
    """A process that draws when told to."""

    def __init__(self, name: str, config: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", name, "--folder", str(config.folder)]
        pipe: Any = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.facts, self.turns = self._answer(), []

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise SystemExit("a contender stopped: what it says is above")

    def draw(self, prompt: str, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps([prompt, steps]), file=self.process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=CHANGES, default="tiny")
    parser.add_argument("--folder", type=Path, help="of the model; amused-SIZE by default")
    parser.add_argument("--steps", type=int, default=12, help="of each picture, at least 2")
    parser.add_argument("--rounds", type=int, default=3, help="pictures of each contender")
    parser.add_argument("--precisions", nargs="+", default=["float32"], help="ours")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    config = parser.parse_args()
    if config.worker:
        return work(config.worker, config.folder)
    config.folder = config.folder or Path(f"amused-{config.size}")
    if not (config.folder / "model_index.json").is_file():
        make(config.folder, config.size)
    names = ["diffusers", *config.precisions]
    contenders = {name: Contender(name, config) for name in names}
    print(f"{contenders['diffusers'].facts['millions']} million weights")
    for name, contender in contenders.items():
        contender.draw("a warm up", 2)
        off = contender.facts.get("off")
        print(
            f"{name:10} loaded in {contender.facts['seconds to load']:.1f} s, "
            f"{contender.facts['GB to load']:.2f} GB"
            + ("" if off is None else f", logits {off:.2%} off")
        )
    for number in range(config.rounds):
        for name, contender in contenders.items():
            contender.turns.append(
                contender.draw("a lake in the " + "woods " * number, config.steps)
            )
            turn = contender.turns[-1]
            print(f"{name:10} {turn['picture']:8.2f} s {turn['step']:8.3f} s/step", flush=True)
    for contender in contenders.values():
        contender.stop()
    print(f"\n{'':10}{'s/picture':>12}{'s/step':>10}{'GB':>8}{'times as fast: picture, step':>32}")
    middle = {
        name: {key: median(turn[key] for turn in each.turns) for key in ("picture", "step", "GB")}
        for name, each in contenders.items()
    }
    for name, figures in middle.items():
        fast = [middle["diffusers"][key] / figures[key] for key in ("picture", "step")]
        print(
            f"{name:10}{figures['picture']:12.2f}{figures['step']:10.3f}{figures['GB']:8.2f}"
            f"{fast[0]:24.2f}{fast[1]:8.2f}"
        )
    return None


if __name__ == "__main__":
    main()
