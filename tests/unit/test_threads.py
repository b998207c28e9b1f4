"""One model, several threads: each gets what it would get alone."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.devices import exact
from muse_maskgit_pytorch.editing import inpaint, vary
from muse_maskgit_pytorch.images import record_of, to_pil
from muse_maskgit_pytorch.text import TextEncoder
from muse_maskgit_pytorch.words import emphasise, replace_words


def test_everything_public_at_once(t5):
    text = dict(t5_name=t5, text_embed_dim=None)
    base, above = tiny.transformer(**text), tiny.transformer(**text, seq_len=64)
    muse = Muse(tiny.maskgit(base), tiny.superres(model=above))
    [picture] = to_pil(tiny.images(1, 32))
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:16] = True
    long = "a red house and " * 40  # in windows: another setting of the tokenizer
    jobs = [
        lambda: muse(["a red car", "two cats"], seeds=1, timesteps=3),
        lambda: emphasise(muse, "a red car", {"red": 3}, seeds=1, timesteps=3),
        lambda: sum(replace_words(muse, "a red car", "a blue car", seeds=1, timesteps=3), ()),
        lambda: inpaint(muse, picture, "a red car", mask, seeds=1, timesteps=3),
        lambda: vary(muse, picture, "two cats", seeds=1, timesteps=3),
        lambda: muse(long, seeds=2, timesteps=3, negative_texts="two cats"),
    ]
    alone = [[(p.tobytes(), record_of(p)) for p in job()] for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        turns = [pool.submit(job) for _ in range(4) for job in jobs]
        together = [[(p.tobytes(), record_of(p)) for p in turn.result()] for turn in turns]
    assert together == alone * 4


def test_a_text_encoder_reads_for_several_threads(t5):
    """Fast tokenizers keep length and padding in one place: without a lock, one text in ten is
    read with another call's.
    """
    encoder = TextEncoder(t5, 16)
    long = "a red house and " * 20
    texts = ["a red car", long, ["a", "two cats and a dog"]]

    def read(turn: int) -> list:
        state = encoder.encode(texts[turn % 3], long="windows" if turn % 2 else "cut")
        return [state.embeds.tolist(), encoder.words(long, "windows")]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
            warnings.simplefilter("ignore")
            alone = [read(turn) for turn in range(6)]
            assert list(pool.map(read, list(range(6)) * 10)) == alone * 10
    finally:
        sys.setswitchinterval(interval)


def test_exact_arithmetic_ends_when_the_last_thread_leaves():
    backends: Any = torch.backends
    settings, inside, leave = backends.cudnn.conv, threading.Event(), threading.Event()
    before = settings.fp32_precision

    def other():
        with exact("cpu"):
            inside.set()
            leave.wait(10)

    settings.fp32_precision = "tf32"
    try:
        with exact("cpu"):
            thread = threading.Thread(target=other)
            thread.start()
            inside.wait(10)
        assert settings.fp32_precision == "ieee"  # the other is still inside
        leave.set()
        thread.join()
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before
