"""AdamW and its 8-bit form: bytes of state, CPU time of the optimizer's step, loss after 60 steps.

A small transformer (4.25 million weights) learns random tokens by heart.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from muse_maskgit_pytorch import MaskGitTransformer, testing
from muse_maskgit_pytorch.training.optimizers import OptimizerName, make_optimizer, named_state

STEPS, SKIPPED = 60, 10  # in all, and before the clock runs
SHAPE: dict[str, Any] = dict(dim=256, depth=4, dim_head=32, heads=8, seq_len=16)


def measure(name: OptimizerName) -> str:
    torch.manual_seed(0)
    text: dict[str, Any] = dict(text_embed_dim=12, t5_name="none")
    transformer = MaskGitTransformer(num_tokens=testing.CODES, **SHAPE, **text)
    model = testing.maskgit(transformer)
    model.vae.requires_grad_(False)
    optimizer = make_optimizer(name, model, 1e-3, (0.9, 0.96), 0.01)
    spent, loss = 0.0, torch.zeros(())
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = model(testing.ids(8), text_embeds=testing.text(8))
        loss.backward()
        began = time.process_time()
        optimizer.step()
        spent += (time.process_time() - began) * (step >= SKIPPED)
        optimizer.zero_grad()
    state = named_state(model, optimizer).values()
    size = sum(v.numel() * v.element_size() for one in state for v in one.values())
    pace = spent / (STEPS - SKIPPED) * 1e3
    return f"{name}: {size / 1e6:.2f} MB, {pace:.1f} ms a step, loss {float(loss):.4f}"


if __name__ == "__main__":
    print(measure("adamw"))
    print(measure("adamw8bit"))
