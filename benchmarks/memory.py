"""How much memory drawing large pictures takes, and how long.

    python benchmarks/memory.py                                  # decoders at 512 and 1,024 px
    python benchmarks/memory.py --case decode-64 --size 2048
    python benchmarks/memory.py --case superres pictures
    python benchmarks/memory.py --picture large.png --size 1024  # the shipped tokenizer's

Every measurement is a process of its own, on one thread, with random weights: its largest resident
memory, less what it held when the model was built and warm, and its processor time. "whole" is the
same without strips (`muse_maskgit_pytorch.strips`), all pictures of a batch at once.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = {
    "decode-64": dict(dim=64),
    "decode-128": dict(dim=128),  # the paper's tokenizer
    "decode-256": dict(
        dim=128, decoder_dim=256, decoder_res_blocks=4
    ),  # its enlarged decoder (2.5)
    "pictures": dict(dim=64),  # 64 of them
    "superres": dict(dim=128, factor=8),  # 64 x 64 tokens, two steps, multi-axis
}


def work(case: str, size: int, blocks: int | None) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What warms a case up, and what is measured."""
    import torch

    from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, Muse, VQGanVAE

    torch.manual_seed(0)
    settings: dict[str, Any] = CASES[case] | (
        {} if blocks is None else {"decoder_res_blocks": blocks}
    )
    vae: Any = VQGanVAE(codebook_size=8192, quantizer="lfq", **settings).eval()
    if case != "superres":
        side, batch = size // vae.factor, 64 if case == "pictures" else 1
        ids = torch.randint(8192, (batch, side, side))
        return lambda: vae.decode_from_ids(ids[:1, :2, :2]), lambda: vae.decode_from_ids(ids)
    shape: Any = dict(num_tokens=8192, dim=512, depth=8, t5_name="none", text_embed_dim=768)
    low: Any = VQGanVAE(dim=64, codebook_size=8192, quantizer="lfq")
    base = MaskGit(
        vae=low, transformer=MaskGitTransformer(seq_len=256, **shape), image_size=size // 2
    )
    transformer = MaskGitTransformer(seq_len=(size // 8) ** 2, multi_axis=8, **shape)
    superres = MaskGit(
        vae=vae, cond_vae=low, transformer=transformer, image_size=size, cond_image_size=size // 2
    )
    muse = Muse(base, superres).eval()
    arguments: dict[str, Any] = dict(text_embeds=torch.randn(1, 32, 768), base_timesteps=1, seeds=0)
    return lambda: vae.decode_from_ids(torch.zeros(1, 2, 2).long()), lambda: muse(
        **arguments, superres_timesteps=2, cond_scale=3.0, return_pil_images=False
    )


def resident() -> float:
    """The most that this process has held so far, in MB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def measure(case: str, size: int, way: str, blocks: int | None) -> dict[str, float]:
    import torch

    from muse_maskgit_pytorch import strips, vqgan_vae

    torch.set_num_threads(1)
    if way == "whole":
        strips.CPU_STRIP = vqgan_vae.CPU_PIXELS = 2**62
    warm, run = work(case, size, blocks)
    with torch.no_grad():
        warm()
        before, start = resident(), time.process_time()
        run()
    return {"before": before, "most": resident(), "seconds": time.process_time() - start}


def picture(path: Path, size: int) -> None:
    """Emoji side by side, encoded and decoded by the shipped tokenizer as one picture."""
    import torch

    from muse_maskgit_pytorch import Muse
    from muse_maskgit_pytorch.images import to_pil

    muse = Muse.from_pretrained("scenes")
    vae = (muse.superres or muse.base).vae
    texts = ["a red apple", "a green frog", "a blue fish", "a yellow star"]
    side = muse.image_size
    tiles = muse(texts, seeds=1, return_pil_images=False)
    row = torch.cat([tiles[i % 4] for i in range(size // side)], dim=-1)
    large = torch.cat([row.roll(i * side, dims=-1) for i in range(size // side)], dim=-2)[None]
    decoded = vae.decode_from_ids(vae.encode_to_ids(large))
    to_pil(decoded)[0].save(path)
    error = (decoded - large).square().mean()
    print(f"{path}: {size} px, PSNR {-10 * error.log10():.1f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    decoders = [name for name in CASES if name.startswith("decode")]
    parser.add_argument("--case", nargs="+", choices=CASES, default=decoders, metavar="NAME")
    parser.add_argument("--size", nargs="+", type=int, help="pixels a side")
    parser.add_argument("--way", nargs="+", choices=("strips", "whole"), default=("strips",))
    parser.add_argument("--blocks", type=int, help="residual blocks per resolution; they cost time")
    parser.add_argument("--picture", type=Path, help="write a decoded picture, to be looked at")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    usual = [512, 1024] if args.case == decoders else [512]
    sizes = args.size or usual
    if args.picture:
        return picture(args.picture, sizes[-1])
    if args.child:
        return print(json.dumps(measure(args.case[0], sizes[0], args.way[0], args.blocks)))
    print("| case | px | way | peak, MB | of it the model, torch | CPU seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case in args.case:
        for size in sizes:
            for way in args.way:
                command = [sys.executable, __file__, "--child", "--case", case]
                command += ["--size", str(size), "--way", way]
                command += [] if args.blocks is None else ["--blocks", str(args.blocks)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
                    print(f"| {case} | {size} | {way} | {reason} | | |", flush=True)
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                row = f"| {case} | {size} | {way} | {found['most']:.0f} | {found['before']:.0f} |"
                print(f"{row} {found['seconds']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
