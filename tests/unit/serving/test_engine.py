"""The engine: mixtures come out as each request alone, and nothing that was accepted is lost."""

import os
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.editing import inpaint
from muse_maskgit_pytorch.serving.capacity import most_rows, peak_memory
from muse_maskgit_pytorch.serving.engine import Closed, Engine, Full, Late, Turns, Watch

NAMES = [f"kind {number}" for number in range(tiny.TEXT_DIM)]  # what can be drawn


def cascade(low_vae: bool = True, **transformer: Any) -> Muse:
    """Images of 16, then 32 pixels, of random weights, from classes or from embeddings."""
    text = dict(classes=NAMES)
    base = tiny.maskgit(tiny.transformer(**text, **transformer))
    low = dict(vae=tiny.vae(), cond_vae=base.vae if low_vae else tiny.randomise(tiny.vae()))
    superres = tiny.superres(model=tiny.transformer(seq_len=64, **text), **low)
    return Muse(base, superres).eval()


def requests(muse: Muse, count: int) -> list[Any]:
    """Requests of all kinds."""
    rng = torch.Generator().manual_seed(1)

    def pick(values: list[Any]) -> Any:
        return values[int(torch.randint(len(values), (), generator=rng))]

    made = []
    for seed in range(count):
        batch, size = pick([1, 1, 2, 3]), pick([None, None, (32, 64)])
        canvases = {}
        if pick([True, False]):
            for name, stage in muse.stages.items():
                grid = stage.geometry.grid(muse.sizes(size)[name])
                ids = tiny.ids(batch, grid[0] * grid[1], seed=seed)
                hidden = torch.rand(ids.shape, generator=rng) < pick([0.0, 0.2, 0.6, 1.0])
                canvases[name] = ids.masked_fill(hidden, stage.transformer.mask_id)
        texts: dict[str, Any] = dict(texts=[pick(NAMES) for _ in range(batch)])
        if pick([True, True, False]):
            texts = dict(text_embeds=tiny.text(batch, pick([1, 4, 9]), seed))
        made.append(
            muse.request(
                **texts,
                negative_texts=pick([None, pick(NAMES), ""]),
                seeds=100 * seed,
                image_size=size,
                canvases=canvases,
                timesteps=[pick([1, 2, 3, 5, 8]) for _ in range(batch)],
                superres_timesteps=pick([1, 2, 4]),
                cond_scale=[pick([1.0, 1.0, 2.5, 5.0]) for _ in range(batch)],
                guidance_schedule=pick(["linear", "cosine", "constant", [0, 0, 1]]),
                noise_schedule=pick(["cosine", "linear", "square"]),
                policy=pick([None, "confidence", "margin", "entropy", "halton", "random"]),
                temperature=pick([1.0, 0.7, 0.0]),
                choice_temperature=pick([0.0, 4.5]),
                remask=pick([0.0, 0.0, 0.5]),
                top_k=pick([0, 0, 5]),
                top_p=pick([1.0, 1.0, 0.8]),
                min_p=pick([0.0, 0.0, 0.1]),
            )
        )
    return made


def mixtures(muse: Muse, joined: bool, count: int, kinds: int = 24) -> None:
    """Random requests that come at random times into a small engine give what they give alone."""
    pool = requests(muse, kinds)
    alone = [muse.draw(request) for request in pool]
    rng = torch.Generator().manual_seed(2)
    engine = Engine(muse, rows=6, queue=1000, joined=joined)
    for _ in range(count):
        some = torch.randint(kinds, (int(torch.randint(2, 7, (), generator=rng)),), generator=rng)
        futures = []
        for place in some.tolist():
            priority = float(torch.randint(3, (), generator=rng))
            futures.append(engine.submit(pool[place], priority=priority))
            for _ in range(int(torch.randint(4, (), generator=rng))):
                engine.turn()
        while engine.turn():
            pass
        for place, future in zip(some.tolist(), futures, strict=True):
            drawn = future.result(timeout=0)
            assert torch.equal(drawn.base_images, alone[place].base_images)
            assert torch.equal(drawn.images, alone[place].images)
    assert engine.load == {"waiting": 0, "drawn": 0, "room": 1000}


def exact(muse: Muse) -> Muse:
    """In double precision, where no batch rounds a token away."""
    for stage in muse.stages.values():
        stage.transformer.double()
    return muse


def test_a_mixture_is_drawn_as_each_request_alone():
    mixtures(cascade(), joined=False, count=3, kinds=6)
    mixtures(exact(cascade()), joined=True, count=6, kinds=12)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("self_cond", [False, True])
def test_many_mixtures(self_cond):
    """As many as MUSE_FUZZ_CASES says: a thousand take minutes."""
    count = int(os.environ.get("MUSE_FUZZ_CASES", "12"))
    mixtures(exact(cascade(self_cond=self_cond)), joined=True, count=count, kinds=24)
    low = cascade(low_vae=False, self_cond=self_cond)
    mixtures(low, joined=False, count=count // 6, kinds=24)


def test_self_conditioning_and_another_low_tokenizer():
    mixtures(exact(cascade(low_vae=False, self_cond=True)), joined=True, count=2, kinds=4)


def test_guided_rows_join_unguided_ones_with_self_conditioning():
    """The first have hidden states of one branch, and then of two."""
    muse = exact(cascade(self_cond=True))
    pair = [muse.request("kind 1", timesteps=6, cond_scale=scale, seeds=1) for scale in (1.0, 3.0)]
    alone = [muse.draw(request) for request in pair]
    engine, futures = Engine(muse, rows=4, joined=True), []
    for request in pair:
        futures.append(engine.submit(request))
        engine.turn()
        engine.turn()
    while engine.turn():
        pass
    for future, expected in zip(futures, alone, strict=True):
        assert torch.equal(future.result(timeout=0).images, expected.images)


def test_rows_really_share_passes():
    """Four requests of unlike steps and policies take the passes of the longest."""
    muse, passes = cascade(), []

    class Count(Watch):
        def advanced(self, stage, rows, seconds):
            passes.append((stage, rows))

    engine = Engine(muse, rows=8, joined=True, watch=Count())
    for steps, policy in enumerate(["confidence", "halton", "margin", "random"], 1):
        engine.submit(muse.request("kind 1", timesteps=steps, policy=policy))
    while engine.turn():
        pass
    base = [rows for stage, rows in passes if stage == "base"]
    assert base == [4, 3, 2, 1]


def test_whoever_waits_for_a_turn_has_it_before_the_one_who_asks_again():
    turns, order, waiting = Turns(), [], threading.Event()

    def other() -> None:
        waiting.set()
        with turns:
            order.append("other")

    with turns:
        thread = threading.Thread(target=other)
        thread.start()
        waiting.wait()
        time.sleep(0.05)
    with turns:  # asked at once, as the engine does
        order.append("again")
    thread.join()
    assert order == ["other", "again"]


@pytest.fixture
def muse():
    return cascade()


def test_urgent_and_old_requests_go_first(muse, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("muse_maskgit_pytorch.serving.engine.time.monotonic", lambda: now[0])
    engine, order = Engine(muse, rows=1), []

    def submit(name: str, **how: Any) -> None:
        future = engine.submit(muse.request("kind 1", timesteps=1), **how)
        future.add_done_callback(lambda _: order.append(name))

    submit("first")
    now[0] = 5.0
    submit("later")
    submit("urgent", priority=1)
    now[0] = 16.0
    submit("too late to be urgent", priority=1)
    while engine.turn():
        pass
    assert order == ["urgent", "first", "later", "too late to be urgent"]


def test_on_a_cpu_the_one_that_is_nearest_to_its_end_goes_first(muse, monkeypatch):
    """But a long one that has waited for long is not disturbed any more."""
    now = [0.0]
    monkeypatch.setattr("muse_maskgit_pytorch.serving.engine.time.monotonic", lambda: now[0])

    def order(joined: bool) -> list[str]:
        engine, ended = Engine(muse, rows=8, joined=joined), []

        def submit(name: str, steps: int, **how: Any) -> None:
            request = muse.request("kind 1", timesteps=steps, superres_timesteps=1)
            future = engine.submit(request, **how)
            future.add_done_callback(lambda _: ended.append(name))

        submit("long", 12)
        for _ in range(3):
            engine.turn()
        submit("middle", 7)
        submit("short", 2)
        submit("urgent", 8, priority=1)
        while len(ended) < 2:
            engine.turn()
        now[0] += 5  # worth thirty passes
        submit("latest", 2)
        while engine.turn():
            pass
        return ended

    assert order(joined=False) == ["urgent", "short", "middle", "long", "latest"]
    assert order(joined=True)[0] == "short"  # all of them move


def test_a_full_queue_says_when_to_come_again(muse):
    engine = Engine(muse, rows=2, queue=3)
    request = muse.request(["kind 1"] * 2, timesteps=1)
    engine.submit(request)
    engine.turn()
    engine.submit(request)
    with pytest.raises(Full) as full:
        engine.submit(request)
    assert full.value.retry_after >= 1
    one = engine.submit(muse.request("kind 1", timesteps=1))
    engine.close()
    assert one.done()
    with pytest.raises(Closed):
        engine.submit(request)


def test_what_is_too_large_or_wrong_is_refused(muse):
    engine = Engine(muse, rows=2)
    with pytest.raises(ValueError, match=r"asks for 3 pictures of 32 x 32.*at most 2 of 32 x 32"):
        engine.submit(muse.request(["kind 1"] * 3))
    with pytest.raises(ValueError, match=r"asks for 1 pictures of 64 x 64.*take fewer or smaller"):
        engine.submit(muse.request("kind 1", image_size=64))
    with pytest.raises(ValueError, match="timeout"):
        engine.submit(muse.request("kind 1"), timeout=-1)
    with pytest.raises(ValueError, match="rows"):
        Engine(muse, rows=0)


def test_cancelled_and_late_requests_leave_at_once(muse):
    engine = Engine(muse, rows=4, joined=True)
    how = dict(timesteps=8, seeds=1)
    kept, gone = (engine.submit(muse.request("kind 1", **how)) for _ in range(2))
    late = engine.submit(muse.request("kind 1", **how), timeout=0.001)
    engine.turn()
    assert gone.cancel()
    time.sleep(0.002)
    engine.turn()
    assert engine.load["drawn"] == 1
    while engine.turn():
        pass
    with pytest.raises(CancelledError):
        gone.result()
    with pytest.raises(Late, match=r"not drawn within 0\.001 seconds"):
        late.result()
    # its neighbours have left, and it is none the worse
    assert torch.equal(kept.result().images, muse.draw(muse.request("kind 1", **how)).images)


def test_one_that_fails_fails_alone(muse):
    engine = Engine(muse, rows=4, joined=True)

    def broken(step: Any) -> None:
        raise RuntimeError("no")

    good = engine.submit(muse.request("kind 1", timesteps=2))
    bad = engine.submit(muse.request("kind 1", timesteps=2), broken)
    worse = engine.submit(muse.request("kind 1", timesteps=2, top_k=1000))  # more than codes
    while engine.turn():
        pass
    assert good.result().images.shape == (1, 3, 32, 32)
    with pytest.raises(RuntimeError, match="no"):
        bad.result()
    with pytest.raises(ValueError, match="top_k 1000"):
        worse.result()


def test_callbacks_see_their_own_rows_and_may_stop(muse):
    engine, seen = Engine(muse, rows=4, joined=True), []
    stopped = engine.submit(
        muse.request("kind 1", timesteps=8, superres_timesteps=1), lambda _: True
    )
    request = muse.request(["kind 1", "kind 2"], timesteps=[2, 3], superres_timesteps=1)
    engine.submit(request, seen.append)
    while engine.turn():
        pass
    assert stopped.result().stopped
    assert [step.step for step in seen] == [1, 2, 3, 1]
    assert [step.ids.shape for step in seen] == [(2, 16)] * 3 + [(2, 64)]
    assert not seen[2].mask.any()


def test_edits_are_drawn_by_the_engine(muse):
    picture = tiny.images(1, 32)[0]
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:16] = True
    how = dict(seeds=3, timesteps=3, grow=0)
    with Engine(muse, rows=4) as engine:
        futures: list[Any] = []
        served = inpaint(engine.through(futures.append), picture, "kind 1", mask, **how)
    assert len(futures) == 1
    assert futures[0].done()
    [alone] = inpaint(muse, picture, "kind 1", mask, **how)
    assert served[0].tobytes() == alone.tobytes()
    assert served[0].info == alone.info


def test_every_accepted_request_is_answered_before_the_end(muse):
    engine = Engine(muse, rows=2, queue=100).start()
    assert engine.alive
    futures, refused = [], threading.Event()

    def client() -> None:
        try:
            for _ in range(50):
                futures.append(engine.submit(muse.request("kind 1", timesteps=1)))
        except Closed:
            refused.set()

    threads = [threading.Thread(target=client) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    engine.close()
    for thread in threads:
        thread.join()
    assert not engine.alive
    assert futures
    assert all(future.result(timeout=0).images.shape == (1, 3, 32, 32) for future in futures)
    dropped = Engine(muse, rows=1)
    waiting = [dropped.submit(muse.request("kind 1")) for _ in range(2)]
    dropped.close(drain=False)
    assert all(future.cancelled() for future in waiting)


def test_capacity_is_measured_within_the_memory(muse, monkeypatch):
    assert most_rows(muse, 1e12, by_speed=False) == 8
    costs = {1: 10.0, 2: 11.0, 4: 12.0, 8: 24.0}
    monkeypatch.setattr(
        "muse_maskgit_pytorch.serving.capacity._measured", lambda _, n: (costs[n], 100.0 * n)
    )
    with pytest.raises(ValueError, match="give it more memory"):
        most_rows(muse, 10)
    assert most_rows(muse, 1e12) == 4  # of eight, each takes as long
    assert most_rows(muse, 250) == 2
    assert most_rows(muse, 550, by_speed=False) == 5


def test_the_memory_of_a_function_is_measured():
    if not (taken := peak_memory(torch.device("cpu"), lambda: torch.ones(2**25).sum())):
        pytest.skip("this system does not say")
    assert 2**26 < taken < 2**29
