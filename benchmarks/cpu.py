"""What this CPU does best: matrix products, convolutions and attention, by precision.

    OMP_NUM_THREADS=1 python benchmarks/cpu.py

The candidates of a row alternate, and their medians are printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from muse_maskgit_pytorch.layers import attend

HALF = torch.bfloat16


def compare(title: str, candidates: dict[str, Callable[[], object]], flops: float = 0) -> None:
    """Print the median time of each candidate over 15 rounds, and its GFLOP/s."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(18):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if round_ >= 3:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        rate = f"{flops / median(times) / 1e9:8.0f} GFLOP/s" if flops else ""
        print(f"{title:38}{name:24}{median(times) * 1e3:9.2f} ms{rate}")


def product(dtype: torch.dtype) -> Callable[[], object]:
    a, b = torch.randn(2048, 256).to(dtype), torch.randn(256, 1024).to(dtype)
    return lambda: a @ b


def convolution(dtype: torch.dtype) -> Callable[[], object]:
    x = torch.randn(16, 128, 16, 16).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3).to(dtype).requires_grad_()
    return lambda: F.conv2d(x.requires_grad_(), weight, padding=1).sum().backward()


def attention(
    tokens: int, dtype: torch.dtype, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[], object]:
    q, k, v = (torch.randn(32, 4, tokens, 64).to(dtype).requires_grad_() for _ in range(3))
    return lambda: kernel(q, k, v).float().sum().backward()


def main() -> None:
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    types = {"float32": torch.float32, "bfloat16": HALF}
    compare(
        "product 2048 x 256 x 1024",
        {name: product(dtype) for name, dtype in types.items()},
        flops=2 * 2048 * 256 * 1024,
    )
    compare(
        "3x3 convolution, fwd + bwd",
        {name: convolution(dtype) for name, dtype in types.items()},
        flops=3 * 2 * 9 * 16 * 128 * 128 * 16 * 16,
    )
    fused = F.scaled_dot_product_attention
    for tokens in (64, 256):
        candidates = {
            "fused, float32": attention(tokens, torch.float32, fused),
            "fused, bfloat16": attention(tokens, HALF, fused),
            "attend(), bfloat16": attention(tokens, HALF, attend),
        }
        compare(f"attention of {tokens} tokens, fwd + bwd", candidates)


if __name__ == "__main__":
    main()
