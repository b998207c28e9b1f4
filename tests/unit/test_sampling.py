"""The sampler against theory and against a plain, slow one."""

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from muse_maskgit_pytorch import SampleOptions, TextEmbeds
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.sampling import (
    Denoiser,
    SampleState,
    Sampling,
    choose_tokens,
    loop,
    make_plan,
    masked_counts,
    sample_tokens,
    step,
    stream_seed,
)
from muse_maskgit_pytorch.sampling.contract import guided_hidden
from muse_maskgit_pytorch.transformer import Context

N = 16


def denoiser(text: TextEmbeds, guided: bool = True, model=None, critic=None) -> Denoiser:
    """A model's view of these texts; with the text-free branch where there is guidance."""
    model = model or MODEL
    kept = [tiny.conditioning(text, keep=keep) for keep in ((True, False) if guided else (True,))]
    contexts = [
        m and Context.stack([m.encode_context(branch) for branch in kept]) for m in (model, critic)
    ]
    return Denoiser(model, contexts[0], critic, contexts[1])


torch.manual_seed(0)
MODEL = tiny.transformer()
SELF_COND = tiny.transformer(self_cond=True)
CRITIC = tiny.critic()
MASK = MODEL.mask_id


def blank(batch: int = 2) -> Tensor:
    return torch.full((batch, N), MASK)


def rows_of(text: TextEmbeds, rows: list[int]) -> TextEmbeds:
    return TextEmbeds(text.embeds[rows], text.mask[rows])


# The plan


def test_masked_counts_of_the_paper():
    assert masked_counts(256, 2) == [181, 0]
    assert masked_counts(256, 1) == [0]
    assert masked_counts(256, 4) == [236, 181, 97, 0]
    assert masked_counts(0, 3) == [0, 0, 0]
    assert masked_counts(3, 5) == [2, 1, 0, 0, 0]


def test_guidance_rises_linearly_and_noise_falls():
    options = SampleOptions(timesteps=5, cond_scale=3.0, choice_temperature=8.0, seeds=[1])
    plan = make_plan(torch.ones(1, 100, dtype=torch.bool), options)
    assert plan.cond_scale[0].tolist() == [1, 1.5, 2, 2.5, 3]
    assert plan.choice_temperature[0].tolist() == [8, 6, 4, 2, 0]
    assert plan.temperature.tolist() == [[1] * 5]  # of the token choice: the same in every step
    constant = make_plan(
        torch.ones(1, 100, dtype=torch.bool), options.replace(guidance_schedule="constant")
    )
    assert constant.cond_scale[0].tolist() == [3] * 5


def test_a_single_step_is_guided_and_without_order_noise():
    plan = make_plan(torch.ones(1, N, dtype=torch.bool), SampleOptions(timesteps=1, cond_scale=4.0))
    assert plan.cond_scale.tolist() == [[4]]
    assert plan.choice_temperature.tolist() == [[0]]


def test_ramps_end_where_a_row_with_few_open_tokens_ends():
    mask = torch.arange(N)[None] < 3
    plan = make_plan(mask, SampleOptions(timesteps=10, cond_scale=3.0))
    assert plan.num_masked[0].tolist() == [2, 1, 0] + [0] * 7
    assert plan.cond_scale[0, :3].tolist() == [1, 2, 3]
    assert plan.left[0].tolist() == [2, 1, 0] + [0] * 7


def test_noise_is_that_of_the_seed_alone():
    mask = torch.ones(2, N, dtype=torch.bool)
    a = make_plan(mask, SampleOptions(timesteps=[3, 6], seeds=[5, 9]))
    b = make_plan(mask, SampleOptions(timesteps=[6, 3], seeds=[9, 5]))
    assert torch.equal(a.uniform[1], b.uniform[0])
    assert torch.equal(a.gumbel[0, :3], b.gumbel[1, :3])
    assert (a.uniform[0, :3] != a.uniform[1, :3]).all()
    state = torch.get_rng_state()
    make_plan(mask, SampleOptions(seeds=[5, 9]))
    counted = make_plan(mask, SampleOptions(seeds=5))
    listed = make_plan(mask, SampleOptions(seeds=[5, 6]))
    assert torch.equal(counted.uniform, listed.uniform)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone


def test_gumbel_noise_has_its_law():
    plan = make_plan(torch.ones(1, 20_000, dtype=torch.bool), SampleOptions(timesteps=1, seeds=[3]))
    assert stats.kstest(plan.gumbel.flatten().numpy(), "gumbel_r").pvalue > 0.01


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(timesteps=0), "timesteps must be at least 1, not 0"),
        (dict(timesteps=-3), "timesteps must be at least 1, not -3"),
        (dict(temperature=-1.0), "temperature must be at least 0, not -1"),
        (dict(choice_temperature=[1.0, -2.0]), "choice_temperature must be at least 0, not -2"),
        (dict(temperature=math.nan), "temperature must be a finite number, not nan"),
        (dict(seeds=[1, 2, 3]), "seeds has 3 values for 2 images"),
        (dict(cond_scale=[3.0]), "cond_scale has 1 values for 2 images"),
        (dict(temperature_end=-0.5), "temperature_end must be at least 0, not -0.5"),
        (dict(top_k=-1), "top_k must be at least 0, not -1"),
        (dict(top_k=2.5), "top_k must be a whole number, not 2.5"),
        (dict(top_p=1.5), r"top_p must be in \[0, 1\], not 1.5"),
        (dict(min_p=[0.1, -0.1]), r"min_p must be in \[0, 1\], not -0.1"),
        (dict(remask=math.nan), "remask must be a finite number, not nan"),
        (dict(cond_scale=math.inf), "cond_scale must be a finite number, not inf"),
        (dict(policy="halten"), "policy must be one of .* not 'halten'"),
        (dict(noise_schedule=[0.9, 1.2]), r"noise_schedule must be in \[0, 1\], not 1.2"),
        (dict(noise_schedule=[0.2, 0.4]), r"noise_schedule must fall .* not \[0.2, 0.4\]"),
        (dict(noise_schedule=[]), "noise_schedule is an empty table"),
        (dict(guidance_schedule=[]), "guidance_schedule is an empty table"),
        (
            dict(guidance_schedule="interval"),
            "guidance_schedule must be one of .* a table of numbers or a function",
        ),
        (dict(noise_schedule="cosin"), "noise_schedule must be one of .* not 'cosin'"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(torch.ones(2, N, dtype=torch.bool), SampleOptions(**changes))


# The choice of tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choice_follows_the_softmax(temperature):
    logits = torch.randn(12)
    draws = 100_000
    ids, log_prob = choose_tokens(
        logits.expand(1, draws, -1), torch.tensor([temperature]), torch.rand(1, draws)
    )
    expected = (logits / temperature).softmax(-1).double() * draws
    observed = ids.flatten().bincount(minlength=12).double()
    expected *= observed.sum() / expected.sum()
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 0.01
    # confidence is that of the model, at temperature 1
    torch.testing.assert_close(log_prob, logits.log_softmax(-1)[ids])


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(2, 50, 9)
    ids, _ = choose_tokens(logits, torch.tensor([0.0, 1e-6]), torch.rand(2, 50))
    assert torch.equal(ids, logits.argmax(-1))


def test_choice_at_the_ends_of_the_uniform():
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf]).expand(1, 2, 4)
    ids, _ = choose_tokens(logits, torch.ones(1), torch.tensor([[0.0, 1 - 2**-24]]))
    assert ids.tolist() == [[1, 2]]  # never a token of probability 0


def test_half_precision_logits_are_drawn_in_float32():
    logits = torch.randn(1, 200, 4096).bfloat16()
    uniform = torch.rand(1, 200)
    half = choose_tokens(logits, torch.ones(1), uniform)
    full = choose_tokens(logits.float(), torch.ones(1), uniform)
    assert torch.equal(half[0], full[0])
    assert half[1].dtype == torch.float32


# The loop


def plain_sample(model, text: TextEmbeds, canvas: Tensor, options: SampleOptions) -> Tensor:
    """Every row by itself, logits everywhere, two passes, guidance on the logits."""
    plan = make_plan(canvas == MASK, options)
    rows = []
    for row in range(len(canvas)):
        ids, mask = canvas[row].clone(), canvas[row] == MASK
        kept = tiny.conditioning(rows_of(text, [row]))
        dropped = tiny.conditioning(rows_of(text, [row]), keep=False)
        past_c = past_u = torch.zeros(1, 1, N, model.dim)
        for i in range(plan.num_steps):
            if not mask.any():
                break
            past_c = model(ids[None], model.encode_context(kept), past_c)
            past_u = model(ids[None], model.encode_context(dropped), past_u)
            c, u = model.to_logits(past_c)[0, 0], model.to_logits(past_u)[0, 0]
            logits = u + plan.cond_scale[row, i] * (c - u)
            chances = (logits / plan.temperature[row, i]).softmax(-1)
            scores = torch.full((N,), math.inf)
            for position in mask.nonzero().flatten().tolist():
                cdf = chances[position].cumsum(0)
                token = int((cdf <= plan.uniform[row, i, position] * cdf[-1]).sum())
                ids[position] = token
                confidence = logits[position].log_softmax(-1)[token]
                noise = plan.choice_temperature[row, i] * plan.gumbel[row, i, position]
                scores[position] = confidence + noise
            mask = torch.zeros(N, dtype=torch.bool)
            mask[scores.argsort()[: int(plan.num_masked[row, i])]] = True
            ids[mask] = MASK
        rows.append(ids)
    return torch.stack(rows)


@pytest.mark.parametrize("model", [MODEL, SELF_COND], ids=["plain", "self_cond"])
def test_sampler_equals_the_plain_one(model):
    text = tiny.text(3)
    canvas = blank(3)
    canvas[1, ::2] = 7
    canvas[2] = torch.where(torch.arange(N) < 2, MASK, 3)
    options = SampleOptions(
        timesteps=[6, 4, 5],
        temperature=[1.0, 0.7, 1.5],
        cond_scale=[3.0, 1.0, -0.5],
        seeds=[1, 2, 3],
    )
    with torch.no_grad():
        expected = plain_sample(model, text, canvas, options)
        assert torch.equal(sample_tokens(denoiser(text, model=model), canvas, options), expected)


@pytest.mark.parametrize("model", [MODEL, SELF_COND], ids=["plain", "self_cond"])
@pytest.mark.parametrize("critic", [None, CRITIC], ids=["confidence", "critic"])
def test_a_row_does_not_depend_on_its_neighbours(model, critic):
    text = tiny.text(4)
    canvas = blank(4)
    canvas[3, :9] = 5
    every: dict[str, Any] = dict(
        timesteps=[8, 3, 1, 6],
        temperature=[1.0, 0.0, 2.0, 0.7],
        choice_temperature=[4.5, 0.0, 1.0, 9.0],
        cond_scale=[3.0, 1.0, 5.0, 0.0],
        seeds=[11, 12, 13, 14],
    )
    together = sample_tokens(
        denoiser(text, model=model, critic=critic), canvas, SampleOptions(**every)
    )
    for row in range(4):
        own: dict[str, Any] = {name: [values[row]] for name, values in every.items()}
        alone = sample_tokens(
            denoiser(rows_of(text, [row]), model=model, critic=critic),
            canvas[row : row + 1],
            SampleOptions(**own),
        )
        assert torch.equal(alone[0], together[row]), row


def test_scale_one_is_no_guidance():
    text, options = tiny.text(), SampleOptions(timesteps=6, cond_scale=1.0, seeds=[1, 2])
    plain = sample_tokens(denoiser(text, guided=False), blank(), options)
    assert torch.equal(sample_tokens(denoiser(text), blank(), options), plain)


def test_scale_zero_is_the_text_free_branch():
    options = SampleOptions(timesteps=6, cond_scale=0.0, guidance_schedule="constant", seeds=[1, 2])
    a = sample_tokens(denoiser(tiny.text(seed=1)), blank(), options)
    b = sample_tokens(denoiser(tiny.text(seed=2)), blank(), options)
    assert torch.equal(a, b)


def test_guided_step_at_scale_one_is_exactly_the_conditional_branch():
    text, ids, ones = tiny.text(), tiny.ids(), torch.ones(2)
    guided, branches = guided_hidden(MODEL, denoiser(text).context, ids, ones)
    assert torch.equal(guided, branches[0])
    assert not torch.equal(guided, branches[1])


def test_guidance_and_text_and_seed_matter():
    def sample(seed=1, scale=3.0, text=0):
        options = SampleOptions(timesteps=6, cond_scale=scale, seeds=[seed, seed + 1])
        return sample_tokens(denoiser(tiny.text(seed=text)), blank(), options)

    same = sample()
    assert torch.equal(sample(), same)
    for other in (sample(seed=3), sample(scale=9.0), sample(text=1)):
        assert not torch.equal(other, same)


def test_without_seeds_the_global_generator_decides():
    options = SampleOptions(timesteps=4)
    model = denoiser(tiny.text())
    torch.manual_seed(1)
    first, second = (sample_tokens(model, blank(), options) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(sample_tokens(model, blank(), options), first)
    assert not torch.equal(first, second)


def test_temperature_zero_does_not_depend_on_the_seed():
    def sample(seeds):
        options = SampleOptions(timesteps=5, temperature=0.0, choice_temperature=0.0, seeds=seeds)
        return sample_tokens(denoiser(tiny.text()), blank(), options)

    assert torch.equal(sample([1, 2]), sample([3, 4]))


@pytest.mark.parametrize("critic", [None, CRITIC], ids=["confidence", "critic"])
def test_callback_sees_the_planned_counts_and_known_tokens(critic):
    canvas = blank()
    canvas[1, 3:9] = torch.arange(6)
    options = SampleOptions(timesteps=5, seeds=[1, 2])
    plan = make_plan(canvas == MASK, options)
    seen = []
    out = sample_tokens(denoiser(tiny.text(), critic=critic), canvas, options, seen.append)
    assert [s.step for s in seen] == [1, 2, 3, 4, 5]
    assert torch.stack([s.mask.sum(1) for s in seen], 1).tolist() == plan.num_masked.tolist()
    for before, after in pairwise(seen):
        assert torch.equal(before.ids == MASK, before.mask)
        assert torch.equal(after.ids[1, 3:9], canvas[1, 3:9])
        if critic is None:  # what was once decided stays
            assert torch.equal(after.ids[~before.mask], before.ids[~before.mask])
    assert torch.equal(out, seen[-1].ids)
    assert (out < MASK).all()


def test_a_critic_may_take_back_a_decision():
    seen = []
    options = SampleOptions(timesteps=8, seeds=[1, 2], choice_temperature=0.0)
    sample_tokens(denoiser(tiny.text(), critic=CRITIC), blank(), options, seen.append)
    steps = pairwise(seen)
    assert any((~before.mask & after.mask).any() for before, after in steps)


def test_critic_is_guided_too():
    text, ids = tiny.text(), tiny.ids()
    model = denoiser(text, critic=CRITIC)
    scale = torch.tensor([3.0, 0.0])
    with_text, without = (
        CRITIC.to_logits(CRITIC(ids, CRITIC.encode_context(tiny.conditioning(text, keep=keep))))[0]
        for keep in (True, False)
    )
    expected = without + scale[:, None, None] * (with_text - without)
    hidden, _ = guided_hidden(CRITIC, model.critic_context, ids, scale)
    torch.testing.assert_close(CRITIC.to_logits(hidden), expected)


def test_callback_can_stop():
    seen = []
    out = sample_tokens(
        denoiser(tiny.text()),
        blank(),
        SampleOptions(timesteps=6),
        lambda s: seen.append(s) or s.step == 2,
    )
    assert len(seen) == 2
    assert torch.equal(out, seen[-1].ids)
    assert (out == MASK).any()


def test_a_full_canvas_comes_back():
    canvas = tiny.ids()
    assert torch.equal(sample_tokens(denoiser(tiny.text()), canvas, SampleOptions()), canvas)


def test_logits_of_masked_positions_are_enough():
    canvas = blank()
    canvas[0, ::3] = 4
    plan = make_plan(canvas == MASK, SampleOptions(timesteps=4, seeds=[1, 2]))
    model = denoiser(tiny.text())
    fast = slow = SampleState.start(canvas, MASK)
    for most in (16, 14, 11, 6):
        assert int(fast.mask.sum(1).max()) <= most
        fast = step(fast, plan, model, num_logits=most)
        slow = step(slow, plan, model)
        assert torch.equal(fast.ids, slow.ids)
        assert torch.equal(fast.mask, slow.mask)
    assert not fast.mask.any()


@pytest.mark.parametrize("policy", ["confidence", "margin", "random", None])
def test_logits_of_some_positions_at_a_time(monkeypatch, policy):
    """Drawn with the same noise; a function of one's own sees all positions."""
    seen = []

    def own(logits: Tensor, log_prob: Tensor) -> Tensor:
        seen.append(log_prob.shape[1])
        return log_prob

    options = SampleOptions(
        timesteps=4, cond_scale=3.0, seeds=[1, 2], policy=policy or own, top_k=9, temperature=0.7
    )
    whole = sample_tokens(denoiser(tiny.text()), blank(), options)
    widths = seen.copy()
    monkeypatch.setattr(loop, "LOGITS", 5 * 2 * MODEL.num_tokens)
    counts, head = [], MODEL.to_logits
    with head.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1])):
        assert torch.equal(sample_tokens(denoiser(tiny.text()), blank(), options), whole)
    if policy is None:
        assert seen == 2 * widths
    else:
        assert max(counts) == 5


@pytest.mark.parametrize("model", [MODEL, SELF_COND], ids=["plain", "self_cond"])
def test_rows_at_different_steps_share_a_batch(model):
    """Prompts admitted while another is half done, of other lengths, steps, guidance and limits.

    Each ends as it would alone, also when the batch is taken apart again on the way.
    """
    texts = [tiny.text(1, 5), tiny.text(2, 8, seed=1)]
    options = [
        SampleOptions(timesteps=6, cond_scale=1.0, top_k=5, seeds=[1]),
        SampleOptions(timesteps=[4, 8], cond_scale=[2.0, 5.0], top_p=[0.9, 1.0], seeds=[2, 3]),
    ]
    canvases = [blank(1), blank(2)]
    canvases[1][1, ::2] = 7
    models = [denoiser(texts[0], guided=model.self_cond, model=model)]
    models += [denoiser(texts[1], model=model)]
    plans = [make_plan(c == MASK, o) for c, o in zip(canvases, options, strict=True)]
    states = [SampleState.start(canvas, MASK) for canvas in canvases]

    def alone(i: int) -> Tensor:
        state = states[i]
        for _ in range(plans[i].num_steps):
            state = step(state, plans[i], models[i], guided=i == 1 or model.self_cond)
        return state.ids

    expected = torch.cat([alone(0), alone(1)])
    state = states[0]
    for _ in range(3):
        state = step(state, plans[0], models[0], guided=model.self_cond)
    state, plan, both = state.cat(states[1]), plans[0].cat(plans[1]), models[0].cat(models[1])
    for _ in range(4):
        state = step(state, plan, both)
    assert state.step.tolist() == [7, 4, 4]  # the first row was done a step ago, and stayed
    assert torch.equal(state.ids[:2], expected[:2])
    last = slice(2, 3)
    state, plan, both = state.rows(last), plan.rows(last), both.rows(last)
    for _ in range(4):
        state = step(state, plan, both)
    assert torch.equal(state.ids, expected[last])


def test_rows_of_several_policies_share_a_batch():
    """Each is ranked by its own, also when others have left; a critic takes a pass more."""
    names: list[Any] = ["confidence", "halton", "margin", lambda logits, log_prob: -log_prob]
    model = copy.deepcopy(MODEL).double()  # no difference by rounding
    texts = [tiny.text(1, 3 + i, seed=i) for i in range(len(names))]
    rows = [
        (denoiser(text, model=model), SampleOptions(timesteps=3 + i, seeds=[i], policy=name))
        for i, (text, name) in enumerate(zip(texts, names, strict=True))
    ]
    alone = [sample_tokens(row, blank(1), options) for row, options in rows]
    first, *others = [Sampling.start(row, blank(1), options) for row, options in rows]
    first.advance()
    for other in others:
        first = first.cat(other)
    assert set(first.plan.policies) == set(names)
    first.advance()
    first.advance()
    assert first.finished.tolist() == [True, False, False, False]
    assert torch.equal(first.state.ids[:1], alone[0])
    rest = first.rows(torch.tensor([3, 1]))
    assert rest.plan.policies == (names[3], names[1])
    assert rest.plan.num_steps == 6
    assert not rest.run()
    assert torch.equal(rest.state.ids, torch.cat([alone[3], alone[1]]))

    mask = torch.ones(1, N, dtype=torch.bool)
    plans = [make_plan(mask, SampleOptions(policy=policy)) for policy in ("critic", "margin")]
    with pytest.raises(ValueError, match="'critic' and 'margin' cannot share a batch"):
        plans[0].cat(plans[1])


def test_another_step_can_be_plugged_in():
    calls = []

    def counted(*args, **how):
        calls.append(how)
        return step(*args, **how)

    options = SampleOptions(timesteps=3, seeds=[1, 2])
    model = denoiser(tiny.text())
    ids = sample_tokens(model, blank(), options, step=counted)
    assert torch.equal(ids, sample_tokens(model, blank(), options))
    assert [call["num_logits"] for call in calls] == [16, 13, 8]


def test_streams_of_a_seed_are_independent():
    mask = torch.ones(1, 4096, dtype=torch.bool)
    options = SampleOptions(timesteps=1, seeds=[5])
    first, second = (make_plan(mask, options, stream=s).uniform[0, 0] for s in ("", "superres"))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.05
    assert len({stream_seed(5, f"window {i}") for i in range(1000)}) == 1000
    assert stream_seed(5, "superres") == stream_seed(5 + 2**32, "superres")  # 32 bits count
    assert stream_seed(5, "superres") == 2569320129  # pictures must outlive versions


class UVit:
    """diffusers' aMUSEd transformer behind the sampler's contract: what an adapter must do."""

    self_cond = False

    def __init__(self, net, side: int):
        self.net, self.side = net, side
        self.mask_id = net.config.vocab_size - 1
        self.num_tokens = net.config.codebook_size

    def __call__(self, ids, context):
        text, pooled, micro = (t.flatten(0, 1) for t in context.tensors)
        branches = len(context.tensors[0])
        rows = ids.repeat(branches, 1).view(-1, self.side, self.side)
        logits = self.net(rows, text, pooled, micro).flatten(2).transpose(1, 2)
        return logits.unflatten(0, (branches, -1))

    def to_logits(self, hidden):
        return hidden


class UVitContext:
    def __init__(self, *tensors):
        self.tensors = tensors

    def rows(self, rows):
        return UVitContext(*(t[:, rows] for t in self.tensors))

    def branches(self, count):
        return UVitContext(*(t[:count] for t in self.tensors))

    def cat(self, other):
        pairs = zip(self.tensors, other.tensors, strict=True)
        return UVitContext(*(torch.cat(pair, dim=1) for pair in pairs))


def test_a_foreign_transformer_is_sampled():
    """Every policy, guidance, and rows that do not depend on one another."""
    from diffusers import UVit2DModel

    made: Any = UVit2DModel  # lazy modules hide its type
    net = made(
        hidden_size=16, encoder_hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
        in_channels=16, block_out_channels=16, codebook_size=30, vocab_size=32, sample_size=4,
        intermediate_size=16, cond_embed_dim=12, micro_cond_encode_dim=4,
        micro_cond_embed_dim=20, block_num_heads=2, use_bias=False,
    ).eval()  # fmt: skip
    network = UVit(net, side=4)
    context = UVitContext(
        torch.randn(2, 2, 5, 12), torch.randn(2, 2, 12), torch.rand(1, 1, 5).expand(2, 2, 5)
    )
    canvas = torch.full((2, N), network.mask_id)
    for policy in ("confidence", "margin", "halton", "random"):
        options = SampleOptions(timesteps=4, cond_scale=[2.0, 3.0], policy=policy, seeds=[1, 2])
        ids = sample_tokens(Denoiser(network, context), canvas, options)
        assert ((ids >= 0) & (ids < 30)).all()
        last = Denoiser(network, context).rows(slice(1, 2))
        alone = sample_tokens(last, canvas[1:], options.with_rows(2).take([1]))
        assert torch.equal(alone[0], ids[1])


def test_a_finished_row_stays():
    text, canvas = tiny.text(), blank()
    plan = make_plan(canvas == MASK, SampleOptions(timesteps=2, seeds=[1, 2]))
    state = SampleState.start(canvas, MASK)
    for _ in range(2):
        state = step(state, plan, denoiser(text))
    again = step(state, plan, denoiser(text, critic=CRITIC))
    assert torch.equal(again.ids, state.ids)


def test_a_tiny_temperature_takes_the_likeliest_too():
    logits = torch.tensor([[[1.0, 5.0, 2.0, 0.0, 3.0]]])
    for temperature in (1e-3, 1e-30, 1e-38, 1e-45):
        ids, _ = choose_tokens(logits, torch.tensor([temperature]), torch.tensor([[0.7]]))
        assert ids.item() == 1


def test_values_of_rows_may_be_lists_tuples_arrays_or_tensors():
    """And a list of ones is no guidance, so it costs none."""
    wanted = SampleOptions(timesteps=[4, 2], cond_scale=[1.0, 2.0], noise_schedule=[0.5, 0.25])
    kinds: list[Any] = [tuple, np.array, torch.tensor]
    for kind in kinds:
        made = SampleOptions(
            timesteps=kind([4, 2]), cond_scale=kind([1.0, 2.0]), noise_schedule=kind([0.5, 0.25])
        )
        assert made == wanted
        assert made.guided
    scalars: dict[str, Any] = dict(temperature=np.float32(0.5), timesteps=np.int64(3))
    assert SampleOptions(**scalars).timesteps == 3
    assert not SampleOptions(cond_scale=[1, 1]).guided
    plan = make_plan(torch.ones(2, N, dtype=torch.bool), wanted)
    assert (plan.num_masked[1, 2:] == 0).all()


def test_seeds_are_whole_numbers():
    mask = torch.ones(2, 4, dtype=torch.bool)

    def noise(seeds) -> torch.Tensor:
        return make_plan(mask, SampleOptions(timesteps=2, seeds=seeds)).uniform

    assert torch.equal(noise(np.int64(3)), noise([3, 4]))
    for seeds in (1.5, "ab", [1, 2.0], 2**64):
        with pytest.raises(ValueError, match=r"seeds must be (a whole number|at )"):
            noise(seeds)


def test_another_default_device_changes_nothing():
    """Random tensors from CPU generators say where they are: ``set_default_device`` may be on."""
    model, text, ids = tiny.maskgit(), tiny.text(), tiny.ids()
    for options in (SampleOptions(timesteps=3, policy="halton", top_k=4), SampleOptions(4)):
        arguments: dict[str, Any] = dict(text_embeds=text, options=options, seeds=1)
        expected = model.generate_ids(**arguments)
        with torch.device("meta"):
            assert torch.equal(model.generate_ids(**arguments), expected)
            assert model(ids, text_embeds=text).device.type == "cpu"


# Savings


@pytest.mark.parametrize("model", [MODEL, SELF_COND], ids=["plain", "self_cond"])
@pytest.mark.parametrize("critic", [None, CRITIC], ids=["alone", "critic"])
def test_rows_in_parts_are_the_rows_together(model, critic):
    options = SampleOptions(timesteps=4, cond_scale=2.0, seeds=[1, 2, 3, 4, 5], top_k=20)
    whole = denoiser(tiny.text(5), model=model, critic=critic)
    together = sample_tokens(whole, blank(5), options)
    for size in (1, 2, 5, 9):
        parts = sample_tokens(replace(whole, at_once=size), blank(5), options)
        assert torch.equal(parts, together)


@pytest.mark.parametrize("critic", [None, CRITIC], ids=["alone", "critic"])
def test_rows_that_are_done_leave_the_batch(monkeypatch, critic):
    """They cost nothing more, and all rows are what they are alone."""
    text, steps = tiny.text(4), [2, 5, 3, 5]
    canvas = blank(4)
    canvas[3, :13] = 7  # three tokens are open: done after three steps
    options = SampleOptions(timesteps=steps, cond_scale=2.0, seeds=[1, 2, 3, 4])
    counts, forward = [], type(MODEL).forward

    def counted(self, ids, *arguments, **named):
        counts.append((self is MODEL, len(ids)))
        return forward(self, ids, *arguments, **named)

    monkeypatch.setattr(type(MODEL), "forward", counted)
    seen = []
    drawn = sample_tokens(
        denoiser(text, critic=critic), canvas, options, lambda step: seen.append(step.ids.clone())
    )
    assert [rows for ours, rows in counts if ours] == [4, 4, 3, 1, 1]
    assert all(ids.shape == drawn.shape for ids in seen)
    for row in range(4):
        alone = sample_tokens(
            denoiser(rows_of(text, [row]), critic=critic), canvas[[row]], options.take([row])
        )
        assert torch.equal(drawn[[row]], alone)
