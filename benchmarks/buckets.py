"""What a training step costs at the shapes of `aspect_ratios`, against the square's.

    python benchmarks/buckets.py

Forward and backward of a batch of token ids, as from a cache; CPU time of one thread, the median of
rounds in which all sizes take turns.
"""

from __future__ import annotations

import statistics
import time

import torch

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, TextEmbeds, VQGanVAE

RATIOS = ["1:1", "3:2", "2:3", "2:1", "1:2"]
BATCH, ROUNDS = 8, 9


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformer = MaskGitTransformer(
        num_tokens=4096, seq_len=256, dim=256, depth=6, heads=4, t5_name="none", text_embed_dim=384
    )
    vae = VQGanVAE(dim=8, codebook_size=4096, quantizer="fsq", layers=4, num_res_blocks=1)
    model = MaskGit(vae=vae, transformer=transformer, image_size=256)
    text = TextEmbeds.of(torch.randn(BATCH, 16, 384))
    seconds: dict[tuple[int, int], list[float]] = {}
    for _ in range(ROUNDS + 1):
        for size in model.geometry.buckets(RATIOS):
            grid = model.geometry.grid(size)
            ids = torch.randint(4096, (BATCH, grid[0] * grid[1]))
            # as many tokens masked in each round, so that rounds differ by the machine alone
            mask = torch.rand(ids.shape) < 0.64
            began = time.process_time()
            model(ids, text_embeds=text, image_size=size, mask=mask).backward()
            seconds.setdefault(size, []).append(time.process_time() - began)
    square = statistics.median(seconds[256, 256][1:])
    for (height, width), found in seconds.items():
        took, tokens = statistics.median(found[1:]), height * width // 256
        share = f"{took / square:.2f} of the square's"
        print(f"{width} x {height} px, {tokens} tokens: {1000 * took:.0f} ms, {share}")


if __name__ == "__main__":
    main()
