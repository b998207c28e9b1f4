"""How many pictures a model draws at once: by measurement, within the memory that there is."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ..muse import Muse

MOST = 256  # pictures at once
ALONE = 8  # where they share no passes, more only make all of them wait longer
WORTH_IT = 0.95  # time of a picture in a batch of twice as many, if that is to be chosen
PROMPT = "a picture of a red apple on a table"


def most_rows(muse: Muse, memory: float | None = None, by_speed: bool = True) -> int:
    """The most pictures of the trained size that are to be drawn at once.

    Draws batches of 1, 2, 4, ... pictures, with two guided steps in each stage, for as long as
    there is room and each picture gets cheaper. This also makes the model ready to draw.

    Args:
        muse: the model.
        memory: bytes that drawing may take; by default half of what is free.
        by_speed: whether requests share passes, so that speed decides. If not, one picture is
            drawn, and the memory for it decides, up to 8 pictures.

    Raises:
        ValueError: there is not even room for one.
    """
    budget = free_memory(muse.device) / 2 if memory is None else memory
    best, fastest, count = 0, math.inf, 1
    while count <= MOST:
        try:
            seconds, peak = _measured(muse, count)
        except RuntimeError as error:  # of CUDA and of the CPU's allocator
            if "memory" not in str(error).lower():
                raise
            break
        if peak > budget:
            break
        if not by_speed:
            return min(ALONE, max(1, int(budget // peak))) if peak else ALONE
        if seconds / count > WORTH_IT * fastest:
            break
        best, fastest, count = count, seconds / count, 2 * count
    if not best:
        raise ValueError(
            f"a picture of {muse.image_size} x {muse.image_size} pixels takes more than the "
            f"{budget / 2**20:.0f} MB that drawing may take: give it more memory"
        )
    return best


def _measured(muse: Muse, count: int) -> tuple[float, float]:
    """Seconds of two steps of each stage for so many pictures, and the most bytes they took."""
    texts = muse.base.no_texts(count) or [_label(muse)] * count
    request = muse.request(
        texts, seeds=0, timesteps=2, cond_scale=2.0, guidance_schedule="constant"
    )
    muse.draw(request)  # what is made at the first time
    began = time.perf_counter()
    peak = peak_memory(muse.device, lambda: muse.draw(request))
    return time.perf_counter() - began, peak


def _label(muse: Muse) -> str:
    classes = muse.base.transformer.classes
    return classes[0] if classes else PROMPT


def peak_memory(device: torch.device, function: Callable[[], object]) -> float:
    """The most bytes that a function took beyond what was taken; 0 where nothing says so."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError):  # Linux: the peak starts anew
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    function()
    return max(0.0, _status("VmHWM") - before)


def free_memory(device: torch.device) -> float:
    """Bytes that are free; without bound where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if found := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
            return 1024.0 * int(found[1])
    return math.inf


def _status(name: str) -> float:
    """A size of this process, in bytes."""
    with suppress(OSError):
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE):
            return 1024.0 * int(found[1])
    return 0.0
