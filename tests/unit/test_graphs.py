"""Sampling by graphs, recorded here as closures over the tensors at fixed places."""

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muse_maskgit_pytorch import SampleOptions, layers, maskgit, sampling
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.inference.graphs import Graphs, rounded
from muse_maskgit_pytorch.sampling import SampleState, sample_tokens
from muse_maskgit_pytorch.structures import TextEmbeds


class Recorded:
    """As a graph does, it computes the same anew from the same tensors, and to the same ones."""

    def __init__(self, wrong: bool = False):
        self.recorded = self.replayed = 0
        self.wrong = wrong

    def __call__(self, function: Callable[[], SampleState], device: torch.device) -> Any:
        self.recorded += 1
        places = function()

        def replay() -> SampleState:
            self.replayed += 1
            for place, value in zip(vars(places).values(), vars(function()).values(), strict=True):
                if place is not None:
                    place.copy_(value)
            if self.wrong:
                places.log_probs.add_(1)
            return places

        return replay


def made(capture: Any = None, most: int = 2**40) -> Graphs:
    return Graphs(capture or Recorded(), most)


def model(**changes: Any) -> Any:
    made = tiny.maskgit(tiny.transformer(depth=1, self_cond=changes.pop("self_cond", False)))
    if changes:
        made = tiny.maskgit(made.transformer, **changes)
    tiny.randomise(made.transformer)
    if made.critic is not None:
        tiny.randomise(made.critic)
    return made.eval()


def text(batch: int, length: int = 5) -> TextEmbeds:
    """The second text is shorter than the others."""
    embeds = torch.randn(batch, length, tiny.text().embeds.shape[-1])
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1:2, 2:] = False
    return TextEmbeds(embeds, mask)


def both(model: Any, graphs: Graphs, text: TextEmbeds, canvas: Tensor, **options: Any) -> None:
    """By graphs and plainly, the same ids and the same previews."""
    chosen = SampleOptions(timesteps=3, seeds=5).replace(**options)
    denoiser = model.denoiser(text, chosen)
    drawn = {}
    for name, step in (("plain", sampling.step), ("graphs", graphs.step(denoiser))):
        seen: list[Any] = []
        ids = sample_tokens(denoiser, canvas, chosen, seen.append, step=step)
        drawn[name] = ids, [(one.ids, one.mask, one.log_probs) for one in seen]
    assert torch.equal(drawn["plain"][0], drawn["graphs"][0])
    for plain, other in zip(drawn["plain"][1], drawn["graphs"][1], strict=True):
        assert torch.equal(plain[0], other[0])
        assert torch.equal(plain[1], other[1])
        torch.testing.assert_close(plain[2], other[2], atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


MODELS = [{}, {"self_cond": True}, {"self_token_critic": True}, {"token_critic": True}]
CHOICES: list[dict[str, Any]] = [
    {},
    {"cond_scale": 1.0},
    {"top_k": 3},
    {"top_p": 0.7, "min_p": 0.05, "policy": "entropy"},
    {"policy": "halton", "remask": 0.5},
]


@pytest.mark.parametrize("kind", MODELS, ids=str)
def test_the_same_as_step_by_step(kind):
    """One pool for all batches from 1 to 9, settings and canvases that are partly given."""
    if "token_critic" in kind:
        kind = {"token_critic": tiny.critic()}
    capture = Recorded()
    graphs, drawing = made(capture), model(**kind)
    mask_id = drawing.transformer.mask_id
    for batch in (5, 9) if kind else range(1, 10):
        canvas = torch.full((batch, 16), mask_id)
        canvas[0, : batch % 4] = 1
        choice = CHOICES[batch % len(CHOICES)]
        for _ in range(3):  # other texts of the same length: seen, recorded, replayed
            both(drawing, graphs, text(batch), canvas, **choice)
    assert capture.replayed > capture.recorded > 3


def test_rows_with_settings_and_steps_of_their_own():
    """Rows that are done leave the batch here too."""
    graphs, drawing = made(), model()
    canvas = torch.full((3, 16), drawing.transformer.mask_id)
    for scale in ([1.0, 3.0, 2.0], [1.0, 1.0, 1.0]):
        both(drawing, graphs, text(3), canvas, timesteps=[2, 5, 3], cond_scale=scale)


def test_texts_of_a_few_lengths_share_their_graphs():
    """Keys are filled up to a multiple of 8 and masked, whatever an earlier text left there."""
    capture = Recorded()
    graphs, drawing = made(capture), model()
    canvas = torch.full((1, 16), drawing.transformer.mask_id)
    for length in (7, 7, 3, 5, 1):  # 7 and the null key need no mask; shorter ones do, and share
        both(drawing, graphs, text(1, length), canvas)
    longer = capture.recorded
    both(drawing, graphs, text(1, 4), canvas)
    assert capture.recorded == longer
    assert len(graphs.kept[drawing.denoiser(text(1), SampleOptions()).network]) == 2


def test_negative_prompts():
    graphs, drawing = made(), model()
    canvas = torch.full((2, 16), drawing.transformer.mask_id)
    chosen = SampleOptions(timesteps=4, seeds=5, cond_scale=3.0)
    branches = [tiny.conditioning(text(2)), tiny.conditioning(text(2, 9))]
    context = drawing.transformer.encode_context(*branches)
    denoiser = sampling.Denoiser(drawing.transformer, context)
    plain = sample_tokens(denoiser, canvas, chosen)
    for _ in range(2):
        assert torch.equal(
            sample_tokens(denoiser, canvas, chosen, step=graphs.step(denoiser)), plain
        )


def test_what_a_step_returned_stays():
    """A callback may keep what it saw: the next steps, and other calls, do not write there."""
    graphs, drawing = made(), model()
    canvas = torch.full((2, 16), drawing.transformer.mask_id)
    options = SampleOptions(timesteps=8, seeds=1)
    denoiser = drawing.denoiser(text(2), options)
    seen: list[Any] = []

    def watch(one: Any) -> None:
        seen.append((one.ids, one.ids.clone()))

    for _ in range(2):
        sample_tokens(denoiser, canvas, options, watch, step=graphs.step(denoiser))
    assert len(seen) == 16
    assert all(torch.equal(*pair) for pair in seen)


def test_within_inference_mode_and_outside():
    graphs, drawing = made(), model()
    canvas = torch.full((2, 16), drawing.transformer.mask_id)
    with torch.inference_mode():
        both(drawing, graphs, text(2), canvas)
    both(drawing, graphs, text(2), canvas)


def test_weights_that_are_moved_are_read_where_they_are():
    capture = Recorded()
    graphs, drawing = made(capture), model()
    canvas = torch.full((1, 16), drawing.transformer.mask_id)
    for _ in range(2):
        both(drawing, graphs, text(1), canvas)
    before = capture.recorded
    drawing.transformer.to_logits.weight.data = drawing.transformer.to_logits.weight.data * 2
    for _ in range(2):
        both(drawing, graphs, text(1), canvas)
    assert capture.recorded == 2 * before > 0


def test_the_bound_lets_the_least_used_go():
    """What was unused for longest goes; what does not fit at all is not tried again."""
    capture = Recorded()
    graphs, drawing = made(capture), model()
    canvas = torch.full((3, 16), drawing.transformer.mask_id)
    network = drawing.transformer

    def draw(batch: int) -> None:
        for _ in range(2):
            both(drawing, graphs, text(batch), canvas[:batch])

    draw(2)
    [first] = graphs.kept[network].values()
    draw(1)
    graphs.most = 2 * first.size
    draw(2)  # used again, so the row alone is what goes
    draw(3)
    kept = list(graphs.kept[network].values())
    assert sum(inputs.size for inputs in kept) <= graphs.most
    assert [len(inputs.state.ids) for inputs in kept] == [3]
    graphs.most = 1  # nothing fits: it is tried once for each shape
    for tried in (True, False):
        before = capture.recorded
        draw(2)
        assert (capture.recorded > before) is tried
    assert not graphs.kept[network]


def fails(function: Any, device: Any) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


@pytest.mark.parametrize(
    "capture, said",
    [
        (fails, r"cannot be recorded \(operation not permitted when stream is capturing\)$"),
        (Recorded(wrong=True), "gave other tokens than the step itself$"),
    ],
)
def test_what_fails_goes_on_plainly_with_one_warning(capture, said):
    graphs, drawing = made(capture), model()
    canvas = torch.full((2, 16), drawing.transformer.mask_id)
    with pytest.warns(UserWarning, match=f"goes on without CUDA graphs, which is slower: .*{said}"):
        both(drawing, graphs, text(2), canvas, timesteps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(drawing, graphs, text(2), canvas, timesteps=8)


def test_what_cannot_be_recorded_safely_is_not():
    """Functions of one's own, hooks, autocast, another project's network: nothing is skipped."""
    capture = Recorded()
    graphs, drawing = made(capture), model()
    canvas = torch.full((2, 16), drawing.transformer.mask_id)
    calls = []

    def own(logits: Tensor, log_prob: Tensor) -> Tensor:
        calls.append(1)
        return log_prob

    options = SampleOptions(timesteps=8, seeds=1, policy=own)
    denoiser = drawing.denoiser(text(2), options)
    sample_tokens(denoiser, canvas, options, step=graphs.step(denoiser))
    assert len(calls) == 8
    hook = drawing.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(2))
    assert graphs.step(denoiser) is sampling.step
    hook.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert graphs.step(denoiser) is sampling.step
    strange = replace(denoiser, network=nn.Identity())
    assert graphs.step(strange) is sampling.step
    assert capture.recorded == 0


def test_a_gpu_draws_by_graphs_unless_told_otherwise(monkeypatch):
    """What chooses the step, with a CPU taken for a GPU."""
    monkeypatch.setattr(maskgit, "GRAPHS", made())
    drawing = model()
    arguments: Any = (text(1), drawing.default_options)
    samplings = [drawing.start(*arguments)]
    monkeypatch.setattr(maskgit, "by_graphs", lambda device: True)
    samplings.append(drawing.start(*arguments))
    samplings.append(drawing.start(*arguments, step=sampling.step))
    drawing.precision = "reference"
    samplings.append(drawing.start(*arguments))
    assert [type(one.step).__name__ for one in samplings] == [
        "function",
        "_GraphStep",
        "function",
        "function",
    ]


def test_threads_share_graphs():
    graphs, drawing = made(), model()
    canvas = torch.full((2, 16), drawing.transformer.mask_id)
    options = SampleOptions(timesteps=8, seeds=1)
    denoisers = [drawing.denoiser(text(2), options) for _ in range(3)]
    expected = [sample_tokens(one, canvas, options) for one in denoisers]
    found: dict[int, Tensor] = {}

    def draw(number: int) -> None:
        with torch.no_grad():
            step = graphs.step(denoisers[number])
            found[number] = sample_tokens(denoisers[number], canvas, options, step=step)

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], ids) for number, ids in enumerate(expected))


def test_sizes_are_few_and_waste_little():
    sizes = [rounded(count) for count in range(1, 257)]
    assert all(count <= size <= 1.25 * count for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 28
    assert [rounded(count, 8) for count in (1, 8, 9, 24, 77)] == [8, 8, 16, 24, 80]


COMPILED = """
import torch
from muse_maskgit_pytorch import testing as tiny

def model():
    made = tiny.maskgit(tiny.transformer(depth=1), self_token_critic=True)
    tiny.randomise(made.transformer), tiny.randomise(made.critic)
    return made

model = model().train()
ids, text = tiny.ids(codes=model.vae.codebook_size), tiny.text()
mask = torch.arange(ids.numel()).view_as(ids) % 3 > 0

def looked_at(graph, _):
    graphs.append(graph)
    return graph

graphs, found = [], []
for compiled in (False, True):
    if compiled:
        model.compile(backend=looked_at)
    model.zero_grad()
    torch.manual_seed(0)
    terms = model.losses(ids, text_embeds=text, mask=mask)
    terms.ce.backward()
    found.append([terms.ce.detach(), *(p.grad for p in model.transformer.parameters())])
torch.testing.assert_close(*found)
assert len(graphs) == 1
model.eval()
drawing = dict(text_embeds=text, seeds=[1, 2], timesteps=2, top_k=5)
images = model.generate(**drawing)
assert len(graphs) > 2  # the step, and decoding
model.precision = "reference"
before = len(graphs)
torch.testing.assert_close(images, model.generate(**drawing))
assert len(graphs) == before
assert not any("_orig_mod" in name for name in model.state_dict())
"""


def test_loss_step_and_decoding_compile_whole():
    """In a process without the checks of shapes, which torch cannot trace."""
    ran = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_attention_without_a_mask_where_texts_are_equally_long(monkeypatch):
    """So that fused kernels can run, which take none."""
    masks: list[Any] = []
    attend = layers.attend

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
        masks.append(mask)
        return attend(q, k, v, mask)

    monkeypatch.setattr(layers, "attend", watched)
    drawing = model()
    arguments: dict[str, Any] = dict(seeds=[1, 2], timesteps=2, cond_scale=3.0)
    drawing.generate_ids(text_embeds=TextEmbeds.of(text(2).embeds), **arguments)
    assert masks
    assert all(mask is None for mask in masks)
    masks.clear()
    drawing.generate_ids(text_embeds=text(2), **arguments)
    assert any(mask is not None for mask in masks)
