"""The lines of the log are means over the steps since the line before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from muse_maskgit_pytorch.watching.interval import Interval


def alone(value: Tensor) -> Tensor:
    """The sum over one process."""
    return value


def terms(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def figures(interval: Interval, step: int, reduce: Any = alone) -> dict[str, float]:
    line = interval.line(step, reduce)
    assert line.pop("steps_per_s") > 0
    assert line.pop("data_wait") == 0  # there was nothing to wait for
    return line


def test_a_line_is_the_mean_of_its_steps_alone():
    interval = Interval()
    for loss in (1.0, 2.0, 6.0):
        interval.add(terms(loss=loss))
    assert figures(interval, 3) == {"loss": 3.0}
    interval.add(terms(loss=5.0))
    assert figures(interval, 4) == {"loss": 5.0}


def test_each_figure_is_the_mean_over_the_steps_that_have_it():
    """The discriminator begins late; a value that is no number spoils no mean."""
    interval = Interval()
    interval.add(terms(loss=1.0, norm=math.inf))
    interval.add(terms(loss=math.nan, norm=4.0))
    interval.add(terms(loss=3.0, norm=6.0, generator=7.0))
    assert figures(interval, 3) == {"loss": 2.0, "norm": 5.0, "generator": 7.0}
    interval.add(terms(loss=math.nan))
    assert math.isnan(figures(interval, 4)["loss"])


def test_many_steps_lose_no_digits():
    interval = Interval()
    for _ in range(20_000):  # single precision would be off by 1e-4
        interval.add(terms(loss=0.1))
    assert figures(interval, 20_000)["loss"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_a_checkpoint_of_one_process_holds_the_sums_of_all():
    def total(value: Tensor) -> Tensor:  # the other process had three steps of a loss of 10
        return value + torch.tensor([[30.0], [3.0]])

    main, other = Interval(), Interval()
    for interval in (main, other):
        interval.add(terms(loss=2.0))
    main.gather(total, keep=True)
    other.gather(total, keep=False)
    resumed = Interval()
    resumed.load(main.state(), "cpu", keep=True)
    for interval in (main, resumed):
        assert figures(interval, 4) == {"loss": 8.0}
    assert math.isnan(figures(other, 4)["loss"])  # it has given away what it had
