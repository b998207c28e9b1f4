"""The copy task: high-resolution tokens are the low-resolution ones enlarged twice.

Without positions of the low-resolution tokens nobody can learn it: every high-resolution token can
only guess among those that occur. With them it must be learnt to the last token.
"""

import torch
from torch import Tensor

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer
from muse_maskgit_pytorch import testing as tiny

CODES, LOW, HIGH = 12, 3, 6  # codes, side of the low- and of the high-resolution grid


def enlarge(low: Tensor) -> Tensor:
    grid = low.view(-1, LOW, LOW)
    return grid.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)


def accuracy(model: MaskGit, low: Tensor) -> float:
    text = torch.zeros(len(low), 1, tiny.TEXT_DIM)
    options = dict(timesteps=1, cond_scale=1.0, temperature=0.0)  # nothing but the low resolution
    out = model.generate_ids(text_embeds=text, cond_ids=low, **options)
    return (out == enlarge(low)).float().mean().item()


def test_copy_task():
    transformer = MaskGitTransformer(
        num_tokens=CODES, seq_len=HIGH**2, dim=32, depth=2, dim_head=16, heads=2, ff_mult=2,
        cond_depth=0, text_embed_dim=tiny.TEXT_DIM,
    )  # fmt: skip
    vae = tiny.vae(codebook_size=CODES)
    model = MaskGit(vae=vae, transformer=transformer, image_size=4 * HIGH, cond_image_size=4 * LOW)
    steps = 1200
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=4e-3, betas=(0.9, 0.96))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    test = tiny.ids(200, LOW**2, seed=1, codes=CODES)
    text = torch.zeros(32, 1, tiny.TEXT_DIM)
    for step in range(steps):
        low = torch.randint(CODES, (32, LOW**2))
        loss = model(enlarge(low), text_embeds=text, cond_ids=low)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49 and loss < 0.01 and accuracy(model, test) == 1:
            break
    assert accuracy(model, test) == 1

    # and the positions are what it goes by
    with torch.no_grad():
        for name, table in model.transformer.named_parameters():
            if name in ("cond_encoder.embed.row", "cond_encoder.embed.column"):
                table.zero_()
    assert accuracy(model, test) < 0.6
