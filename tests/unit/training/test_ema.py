"""Averaged weights."""

from __future__ import annotations

import pytest
import torch

from muse_maskgit_pytorch.training.ema import EMA, warmed_up


def test_ema_follows_its_formula():
    weight, counter = torch.zeros(3), torch.tensor(0)
    ema = EMA({"weight": weight, "counter": counter}, {"weight"}, decay=warmed_up(0.5))
    expected = torch.zeros(3)
    for step in range(1, 20):
        weight.fill_(float(step))
        counter.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert torch.allclose(ema.average["weight"], expected)
        assert ema.average["counter"] == step
    assert torch.equal(weight, torch.full((3,), 19.0))


def test_ema_decay_is_obeyed():
    """With decay 0 the average is the weight itself, near 1 it hardly moves."""
    ends = {}
    for decay in (0.0, 0.999):
        weight = torch.zeros(1)
        ema = EMA({"weight": weight}, {"weight"}, warmed_up(decay))
        weight.fill_(1.0)
        ema.update(10**6)
        ends[decay] = ema.average["weight"].item()
    assert ends[0.0] == 1
    assert ends[0.999] == pytest.approx(0.001)


def test_ema_is_applied_within_the_block_alone():
    weight = torch.ones(2)
    ema = EMA({"weight": weight}, {"weight"}, warmed_up(0.9))
    weight.fill_(5.0)

    def fail():
        with ema.applied():
            assert torch.equal(weight, torch.ones(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(weight, torch.full((2,), 5.0))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_ema_refuses(decay: float):
    with pytest.raises(ValueError, match="ema_decay"):
        warmed_up(decay)
