"""Peak memory of a training step's parts: blocks computed again, and the loss in chunks.

    python benchmarks/training_memory.py

Each figure is the growth of a fresh process's peak over what it has before the step.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from muse_maskgit_pytorch import MaskGitTransformer, testing
from muse_maskgit_pytorch.cross_entropy import cross_entropy
from muse_maskgit_pytorch.layers import Block

CASES = ["blocks kept", "blocks computed again", "all logits", "logits in chunks"]


def peak() -> float:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def blocks(again: bool) -> float:
    """8 rows of 256 tokens through 12 blocks of width 256, forward and back."""
    size = dict(num_tokens=1024, seq_len=256, dim=256, depth=12, heads=4, dim_head=64)
    model = MaskGitTransformer(**size, text_embed_dim=testing.TEXT_DIM, t5_name="none")
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputed = again
    ids, before = testing.ids(8, 256), peak()
    context = model.encode_context(testing.conditioning(testing.text(8)))
    model.to_logits(model(ids, context)[0][:, :32]).square().mean().backward()
    return peak() - before


def loss(chunks: bool) -> float:
    """2,048 rows of width 256 and 65,536 codes, forward and back."""
    head = torch.nn.Linear(256, 65_536, bias=False)
    hidden, labels = torch.randn(2048, 256, requires_grad=True), torch.randint(65_536, (2048,))
    before = peak()
    if chunks:
        cross_entropy(head, hidden, labels, 0.1, 1e-4).backward()
    else:
        F.cross_entropy(head(hidden), labels, label_smoothing=0.1).backward()
    return peak() - before


def main() -> None:
    if len(sys.argv) == 1:
        for case in CASES:
            subprocess.run([sys.executable, __file__, case], check=True)
        return
    case, began = CASES.index(sys.argv[1]), time.thread_time()
    grown = (blocks if case < 2 else loss)(bool(case % 2))
    print(
        f"{CASES[case]:22} {grown:5.0f} MB {time.thread_time() - began:5.1f} s of CPU", flush=True
    )


if __name__ == "__main__":
    main()
