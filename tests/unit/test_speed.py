"""The driver of speed: one tiny case from end to end, and what its table is made of."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.speed import CASES, Case

ROOT = Path(__file__).parents[2]


def test_quick_case_against_another_checkout(tmp_path: Path):
    """The same checkout twice: equal ids, equal work, and a table of both."""
    out = tmp_path / "speed.json"
    command = [sys.executable, str(ROOT / "benchmarks/speed.py"), "--quick", "--pairs", "1"]
    command += ["--skip", "amused", "--against", str(ROOT / "src"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "left out: release: give --release-python" in done.stdout
    assert "| ours | float32 |" in done.stdout
    found = json.loads(out.read_text())["cases"]["generate"]
    ours, again = found["rows"]
    assert again["same_ids"] == 1
    assert ours["flops"] == again["flops"] > 0
    assert ours["seconds"] > 0
    assert found["gemm_gflops"]["float32"] > 0


def test_dense_flops_by_hand():
    """One layer, one token, one pass of two branches, no text."""
    case = Case(tokens=1, codes=10, dim=6, depth=1, heads=1, text_len=0)
    hidden = 16
    linears = 6 * 6 * 4 + 6 * 6 * 2 + 3 * 6 * hidden  # self-attention, cross-attention, MLP
    attention = 2 * 2 * 6  # itself, and the null key
    assert case.dense_flops() == 2 * 2 * (linears + attention + 6 * 10)


def test_train_counts_backward_and_one_branch():
    case = Case(batch=2, tokens=4, steps=1)
    train = Case("train", batch=2, tokens=4, steps=1)
    assert case.dense_flops() * 3 == train.dense_flops() * 2
    assert CASES["decode"].dense_flops() == 0
