"""Policies, limits of the token choice, guidance: against plain loops, theory and diffusers."""

import math
from typing import Any, get_args

import pytest
import torch
from scipy import stats
from torch import Tensor

from muse_maskgit_pytorch import Muse, SampleOptions, TextEmbeds
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.images import save_png
from muse_maskgit_pytorch.sampling import (
    ORDERS,
    SCORES,
    Denoiser,
    Policy,
    SampleState,
    choose,
    choose_tokens,
    make_plan,
    sample_tokens,
    step,
)
from muse_maskgit_pytorch.sampling.choose import _most_likely, _select, _select_on_cpu
from muse_maskgit_pytorch.sampling.policies import entropy, halton_order, margin, rolled_halton
from muse_maskgit_pytorch.transformer import Context

N = 16
torch.manual_seed(0)
MODEL = tiny.transformer()
CRITIC = tiny.critic()
MASK = MODEL.mask_id
OPEN = torch.ones(1, N, dtype=torch.bool)


def blank(batch: int = 2) -> Tensor:
    return torch.full((batch, N), MASK)


def denoiser(text: TextEmbeds, critic=None, guided: bool = False) -> Denoiser:
    kept = [tiny.conditioning(text, keep=keep) for keep in ((True, False) if guided else (True,))]
    contexts = [
        m and Context.stack([m.encode_context(branch) for branch in kept]) for m in (MODEL, critic)
    ]
    return Denoiser(MODEL, contexts[0], critic, contexts[1])


def rows_of(text: TextEmbeds, row: int) -> TextEmbeds:
    return TextEmbeds(text.embeds[row : row + 1], text.mask[row : row + 1])


# Which positions to keep


def test_every_name_of_a_policy_is_one():
    assert set(get_args(Policy)) == {*SCORES, *ORDERS, "critic"}


def test_margin_and_entropy_of_small_cases():
    logits = torch.tensor([[[0.5, 0.3, 0.2], [1 / 3] * 3, [1, 0, 0]]]).log()
    drawn = torch.zeros(1, 3)
    assert margin(logits, drawn)[0, 0].item() == pytest.approx(math.log(0.2), rel=1e-5)
    assert margin(logits, drawn)[0, 1] < -80  # a tie
    assert margin(logits, drawn)[0, 2] == 0
    spread = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    torch.testing.assert_close(entropy(logits, drawn), torch.tensor([[-spread, -math.log(3), 0.0]]))


def test_halton_order_by_hand():
    # base 2: 0 1/2 1/4 3/4 1/8 5/8, base 3: 0 1/3 2/3 1/9 4/9 7/9
    assert halton_order(2, 3).tolist() == [[0, 4, 2], [3, 1, 5]]


@pytest.mark.parametrize("side", [4, 8, 16])
def test_halton_order_is_even(side):
    """Of the first quarter of the cells, each quadrant gets its share, within two."""
    first = (halton_order(side, side) < side**2 // 4).float()
    quadrants = torch.nn.functional.avg_pool2d(first[None], side // 2) * (side // 2) ** 2
    assert (quadrants - side**2 / 16).abs().max() <= 2
    drawn = torch.rand(200, side**2).argsort(1).view(200, side, side) < side**2 // 4
    chance = torch.nn.functional.avg_pool2d(drawn.float(), side // 2) * (side // 2) ** 2
    assert quadrants.std() < chance.std(dim=(1, 2)).mean()


def test_orders_are_those_of_the_seed_and_of_nothing_else():
    for policy in ORDERS:
        a = make_plan(OPEN.expand(2, N), SampleOptions(policy=policy, timesteps=4, seeds=[3, 4]))
        b = make_plan(OPEN, SampleOptions(policy=policy, timesteps=9, seeds=[4]))
        assert torch.equal(a.order[1], b.order[0])
        assert not torch.equal(a.order[0], a.order[1])
        assert (a.choice_temperature == 0).all()


def test_orders_begin_anywhere():
    plan = make_plan(
        torch.ones(800, N, dtype=torch.bool), SampleOptions(policy="halton", timesteps=1, seeds=0)
    )
    assert stats.chisquare(plan.order.argmin(1).bincount(minlength=N).numpy()).pvalue > 0.01
    plan = make_plan(
        torch.ones(800, N, dtype=torch.bool), SampleOptions(policy="random", timesteps=1, seeds=0)
    )
    for turn in (0, 7):
        where = (plan.order == turn).float().argmax(1).bincount(minlength=N)
        assert stats.chisquare(where.numpy()).pvalue > 0.01


def test_halton_on_an_oblong_grid_needs_the_grid():
    options = SampleOptions(policy="halton", timesteps=2, seeds=1)
    mask = torch.ones(1, 12, dtype=torch.bool)
    plan = make_plan(mask, options, grid=(2, 6))
    assert torch.equal(plan.order[0].long(), rolled_halton(plan.gumbel[0, 0], (2, 6)))
    with pytest.raises(ValueError, match=r"needs the grid of 12 tokens, not \(3, 3\)"):
        make_plan(mask, options)


def plain_sample(text: TextEmbeds, canvas: Tensor, options: SampleOptions, critic=None) -> Tensor:
    """Every row by itself, without guidance, position by position."""
    plan = make_plan(canvas == MASK, options)
    policy = options.policy or ("critic" if critic else "confidence")
    limits = [torch.zeros(len(canvas)).long(), torch.ones(len(canvas)), torch.zeros(len(canvas))]
    for i, name in enumerate(("top_k", "top_p", "min_p")):
        limits[i] = limits[i] if getattr(plan, name) is None else getattr(plan, name)
    rows = []
    for row, ids in enumerate(canvas.clone()):
        given = tiny.conditioning(rows_of(text, row))
        known, sure = ids != MASK, torch.zeros(N)
        for i in range(plan.num_steps):
            masked = ids == MASK
            if not masked.any():
                break
            logits = MODEL.to_logits(MODEL(ids[None], MODEL.encode_context(given)))[0, 0]
            drawn, scores, likely = ids.clone(), torch.zeros(N), sure.clone()
            for at in masked.nonzero().flatten().tolist():
                heat = plan.temperature[row, i]
                chances = (logits[at] / heat).softmax(-1) if heat else logits[at].softmax(-1)
                kept = allowed(chances, *(limit[row].item() for limit in limits))
                cdf = torch.where(kept, chances, 0.0).cumsum(0)
                token = int((cdf <= plan.uniform[row, i, at] * cdf[-1]).sum())
                drawn[at] = token if heat else int(logits[at].argmax())
                p = logits[at].softmax(-1)
                best = p.sort(descending=True).values
                likely[at] = p[drawn[at]]
                by_name: dict[Any, Any] = {
                    "confidence": p[drawn[at]].log(),
                    "margin": (best[0] - best[1]).log(),
                    "entropy": (p * p.log()).sum(),
                }
                scores[at] = by_name.get(policy, -plan.order[row, at])
            free = masked
            if policy == "critic":
                scores = CRITIC.to_logits(CRITIC(drawn[None], CRITIC.encode_context(given)))
                scores, free = scores.flatten(), ~known
            gumbel = plan.gumbel[row, i]
            scores = scores + plan.choice_temperature[row, i] * gumbel
            earlier = (~masked & ~known).nonzero().flatten().tolist()
            earlier.sort(key=lambda at: float(sure[at] - gumbel[at]))
            again = earlier[: int(plan.num_remasked[row, i])]
            others = [at for at in free.nonzero().flatten().tolist() if at not in again]
            others.sort(key=lambda at: float(scores[at]))
            ids, sure = drawn, likely
            ids[(again + others)[: int(plan.num_masked[row, i])]] = MASK
        rows.append(ids)
    return torch.stack(rows)


def allowed(chances: Tensor, top_k: float, top_p: float, min_p: float) -> Tensor:
    """One token after the other, the likeliest first."""
    kept, total = torch.zeros(len(chances), dtype=torch.bool), 0.0
    for rank, token in enumerate(chances.argsort(descending=True, stable=True).tolist()):
        p = float(chances[token])
        fits = (rank < top_k or not top_k) and (total < top_p or top_p == 1 or rank == 0)
        kept[token] = fits and p >= min_p * float(chances.max())
        total += p
    return kept


@pytest.mark.parametrize("critic", [None, CRITIC], ids=["", "with_critic"])
@pytest.mark.parametrize("policy", [None, *SCORES, *ORDERS])
def test_sampler_equals_the_plain_one(policy, critic):
    text, canvas = tiny.text(3), blank(3)
    canvas[1, ::2] = 7
    options = SampleOptions(
        timesteps=[7, 4, 5],
        temperature=[1.0, 0.7, 1.5],
        temperature_end=[1.0, 1.2, 0.0],
        cond_scale=1.0,
        policy=policy,
        remask=[0.6, 0.0, 1.0],
        top_k=[0, 9, 20],
        top_p=[0.8, 1.0, 0.95],
        min_p=[0.0, 0.05, 0.01],
        seeds=[1, 2, 3],
    )
    judged = options.replace(policy=policy or ("critic" if critic else None))
    with torch.no_grad():
        expected = plain_sample(text, canvas, judged, critic)
    assert torch.equal(sample_tokens(denoiser(text, critic), canvas, options), expected)


def test_policies_differ_and_a_stated_one_overrides_the_critic():
    text = tiny.text()

    def draw(policy, critic=None):
        options = SampleOptions(timesteps=5, cond_scale=1.0, seeds=[1, 2], policy=policy)
        return sample_tokens(denoiser(text, critic), blank(), options)

    drawn = [draw(policy) for policy in (*SCORES, *ORDERS)] + [draw("critic", CRITIC)]
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])
    assert torch.equal(draw(None), draw("confidence"))
    assert torch.equal(draw(None, CRITIC), draw("critic", CRITIC))
    assert torch.equal(draw("halton", CRITIC), draw("halton"))


# Remasking


def test_remasked_counts():
    options = SampleOptions(timesteps=4, noise_schedule="linear", remask=1.0)
    plan = make_plan(OPEN, options)
    assert plan.num_masked.tolist() == [[12, 8, 4, 0]]
    assert plan.num_remasked.tolist() == [[0, 4, 4, 0]]  # min(decided before, masked after)
    assert make_plan(OPEN, options.replace(remask=0.5)).num_remasked.tolist() == [[0, 2, 2, 0]]


def test_unlikely_tokens_are_remasked_the_more_often():
    """One of two decided tokens goes back: by weights exp(-1) and exp(-0.1)."""
    draws = 600
    ids = blank(draws)
    ids[:, :2] = 3
    options = SampleOptions(timesteps=3, noise_schedule=[14 / 16, 10 / 16], cond_scale=1.0, seeds=0)
    plan = make_plan(ids == ids, options)
    plan.num_remasked[:, 1] = 1
    zeros = torch.zeros(draws, N)
    log_probs = zeros.clone()
    log_probs[:, 1] = math.log(0.1)
    state = SampleState(ids, ids == MASK, torch.ones(draws).long(), zeros, log_probs)
    after = step(state, plan, denoiser(tiny.text(1).cat(tiny.text(draws - 1))), guided=False)
    assert (after.mask.sum(1) == 10).all()
    assert (after.mask[:, :2].sum(1) == 1).all()
    chance = math.exp(-0.1) / (math.exp(-0.1) + math.exp(-1))
    assert stats.binomtest(int(after.mask[:, 1].sum()), draws, chance).pvalue > 0.01
    assert torch.equal(after.scores[:, :2] == -math.inf, after.mask[:, :2])


# The choice of tokens

LIMITS: list[dict[str, Any]] = [
    dict(top_k=3),
    dict(top_p=0.7),
    dict(min_p=0.3),
    dict(top_k=4, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_choice_follows_the_limited_softmax(limits):
    logits, draws = torch.randn(12), 100_000
    given = {name: torch.tensor([value]) for name, value in limits.items()}
    ids, log_prob = choose_tokens(
        logits.expand(1, draws, -1), torch.tensor([0.8]), torch.rand(1, draws), **given
    )
    chances = (logits / 0.8).softmax(-1)
    kept = allowed(chances, *({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | limits).values())
    assert 1 < kept.sum() < 12
    observed = ids.flatten().bincount(minlength=12)
    assert (observed[~kept] == 0).all()
    expected = chances[kept].double()
    expected *= draws / expected.sum()
    assert stats.chisquare(observed[kept].numpy(), expected.numpy()).pvalue > 0.01
    torch.testing.assert_close(log_prob, logits.log_softmax(-1)[ids])


def test_a_row_without_limits_is_not_touched_by_those_of_others():
    logits, uniform = torch.randn(2, 500, 40) * 3, torch.rand(2, 500)
    ones = torch.ones(2)
    limited, _ = choose_tokens(
        logits, ones, uniform, torch.tensor([0, 2]), torch.tensor([1, 0.5]), torch.tensor([0, 0.5])
    )
    free, _ = choose_tokens(logits, ones, uniform)
    assert torch.equal(limited[0], free[0])
    assert not torch.equal(limited[1], free[1])


def test_whole_numbers_are_limits_too():
    text = tiny.text()
    options = SampleOptions(timesteps=3, cond_scale=1.0, seeds=1, top_p=[0, 1], min_p=[1, 0])
    greedy, free = sample_tokens(denoiser(text), blank(), options)
    likeliest = options.replace(temperature=[0.0, 1.0], top_p=1.0, min_p=0.0)
    assert torch.equal(sample_tokens(denoiser(text), blank(), likeliest)[0], greedy)
    assert torch.equal(sample_tokens(denoiser(text), blank(), likeliest)[1], free)


def test_rounding_cuts_no_token_at_probability_1():
    probs = torch.tensor([0.0, -40.0]).softmax(-1)  # the first alone rounds to 1
    kept = _most_likely(probs.expand(2, 2), None, torch.tensor([1.0, 0.99]))
    assert kept.tolist() == [[True, True], [True, False]]


def sorted_out(weights: Tensor, k: int, p: float) -> Tensor:
    """The same by sorting, in float64."""
    order = weights.double().argsort(descending=True, stable=True)
    before = weights.double()[order].cumsum(0) - weights.double()[order]
    kept = before < p * weights.double().sum() if p < 1 else torch.ones_like(before).bool()
    kept &= torch.arange(len(order)) < (k or len(order))
    return torch.zeros(len(order)).bool().scatter(0, order, kept)


@pytest.mark.parametrize("select", [_select_on_cpu, _select])
@pytest.mark.parametrize("equals", [False, True])
@pytest.mark.parametrize("limits", ["k", "few", "many", "p", "both"])
def test_selecting_keeps_what_sorting_keeps(monkeypatch, select, equals, limits):
    monkeypatch.setattr(choose, "_select_on_cpu", select)
    rows, codes = 40, 97
    weights = (torch.randn(rows, codes) * 2).exp()
    weights = (weights * 4).ceil() / 4 if equals else weights
    weights /= weights.amax(dim=-1, keepdim=True)
    most = {"p": 0, "few": 3, "many": 80}.get(limits, codes)  # each is selected in its own way
    k = torch.randint(0, most + 1, (rows,))
    p = 0.02 + 0.97 * torch.rand(rows) if limits in ("p", "both") else torch.ones(rows)
    p[0] = 1.0
    if limits != "p":
        k[1], k[2] = 1, codes
    kept = _most_likely(weights, k if k.any() else None, p if (p < 1).any() else None)
    each = zip(weights, k.tolist(), p.tolist(), strict=True)
    assert torch.equal(kept, torch.stack([sorted_out(*row) for row in each]))


@pytest.mark.parametrize("select", [_select_on_cpu, _select])
def test_most_weights_may_be_nothing(monkeypatch, select):
    """exp(-1000) is 0: not more of them are kept than are asked for, nor is any needed."""
    monkeypatch.setattr(choose, "_select_on_cpu", select)
    logits = torch.full((1, 1, 9), -1000.0)
    logits[..., 4] = 0
    for limits in ((torch.tensor([3]), None), (None, torch.tensor([0.9]))):
        ids, _ = choose_tokens(logits, torch.ones(1), torch.rand(1, 1), *limits)
        assert ids.tolist() == [[4]]


def test_many_logits_are_looked_at_in_chunks(monkeypatch):
    logits, uniform = torch.randn(3, 10, 50), torch.rand(3, 10)
    settings = torch.tensor([1.0, 0.0, 0.7]), uniform, torch.tensor([0, 7, 20])
    whole = choose_tokens(logits, *settings)
    monkeypatch.setattr(choose, "CHUNK", 350)  # 7 of the 30
    for one, other in zip(whole, choose_tokens(logits, *settings), strict=True):
        assert torch.equal(one, other)


def test_equal_tokens_are_cut_at_k():
    ids, _ = choose_tokens(
        torch.zeros(1, 1000, 8), torch.ones(1), torch.rand(1, 1000), torch.tensor([3])
    )
    assert ids.unique().tolist() == [0, 1, 2]


def test_temperature_moves_linearly():
    options = SampleOptions(timesteps=[5, 3], temperature=[2.0, 1.0], temperature_end=[1.0, 0.0])
    plan = make_plan(OPEN.expand(2, N), options)
    assert plan.temperature[0].tolist() == [2, 1.75, 1.5, 1.25, 1]
    assert plan.temperature[1, :3].tolist() == [1, 0.5, 0]


# Guidance


@pytest.mark.parametrize(
    "changes, shares",
    [
        (dict(guidance_schedule="linear"), [0, 0.25, 0.5, 0.75, 1]),
        (dict(guidance_schedule="constant"), [1] * 5),
        (dict(guidance_schedule="cosine"), [0, 0.146447, 0.5, 0.853553, 1]),
        (dict(guidance_schedule=[0, 0, 0.5, 2, -1]), [0, 0, 0.5, 2, -1]),
        (dict(guidance_schedule=[0, 1]), [0, 0.25, 0.5, 0.75, 1]),  # a table of other steps
    ],
)
def test_guidance_schedules(changes, shares):
    plan = make_plan(OPEN, SampleOptions(timesteps=5, cond_scale=3.0, **changes))
    shares = torch.tensor(shares, dtype=torch.float32)
    torch.testing.assert_close(plan.cond_scale[0], 1 + 2 * shares)


def test_a_searched_schedule_is_two_tables():
    """AutoNAT's for 8 steps (Ni et al. 2024)."""
    ratios = [0.953, 0.880, 0.794, 0.746, 0.625, 0.407, 0.261]
    weights = [0, 0, 0, 0.9, 1.6, 1.2, 1.4, 1.2]
    options = SampleOptions(8, cond_scale=2.0, noise_schedule=ratios, guidance_schedule=weights)
    plan = make_plan(torch.ones(1, 256, dtype=torch.bool), options)
    assert plan.num_masked[0].tolist() == [int(256 * r) for r in ratios] + [0]
    torch.testing.assert_close(plan.cond_scale[0] - 1, torch.tensor(weights))
    assert (plan.cond_scale[0, :3] == 1).all()  # exactly: these steps are spared


@pytest.mark.parametrize(
    "changes, passes",
    [
        (dict(guidance_schedule="constant"), [2] * 5),
        (dict(guidance_schedule="linear"), [1, 2, 2, 2, 2]),
        (dict(guidance_schedule=[0, 0, 1, 0, 1]), [1, 1, 2, 1, 2]),
        (dict(cond_scale=1.0), [1] * 5),
        (dict(cond_scale=[1, 1]), [1] * 5),
        (dict(cond_scale=[1, 3], guidance_schedule="constant"), [2] * 5),
    ],
)
def test_steps_without_guidance_skip_the_second_branch(changes, passes):
    seen = []
    hook = MODEL.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[1].mask)))
    try:
        options = SampleOptions(timesteps=5, seeds=1).replace(**changes)
        sample_tokens(denoiser(tiny.text(), guided=True), blank(), options)
    finally:
        hook.remove()
    assert seen == passes


# Bad input, and what a callback sees


def test_options_that_do_not_fit_the_model():
    model, text = tiny.maskgit(), tiny.text()
    with pytest.raises(ValueError, match="top_k 61 is larger than the codebook's 60 codes"):
        model.generate_ids(text_embeds=text, timesteps=2, top_k=[3, 61])
    with pytest.raises(ValueError, match="policy 'critic' needs a model with a token critic"):
        model.generate_ids(text_embeds=text, timesteps=2, policy="critic")
    with pytest.raises(ValueError, match="3 negative_texts for 2 texts"):
        model.generate_ids(text_embeds=text, negative_texts=["a", "b", "c"], cond_scale=1.0)
    with pytest.warns(UserWarning, match="timesteps 20 exceed the 16 tokens"):
        ids = model.generate_ids(text_embeds=text, timesteps=20)
    assert (ids < MASK).all()


def test_tables_and_tensors_are_options():
    given: dict[str, Any] = dict(noise_schedule=[0.75, 0.5], top_k=[1, 2], remask=[0, 0.5])
    tensors: dict[str, Any] = {name: torch.tensor(value) for name, value in given.items()}
    options = SampleOptions(**tensors, policy="halton")
    assert options == SampleOptions(**given, policy="halton")


def test_callback_sees_the_log_probabilities_of_the_draws():
    text, seen = tiny.text(), []
    canvas = blank()
    canvas[0, 3] = 5
    options = SampleOptions(timesteps=4, cond_scale=1.0, seeds=1)
    sample_tokens(denoiser(text), canvas, options, seen.append)
    context = MODEL.encode_context(tiny.conditioning(text))
    before = canvas
    for now in seen:
        log_probs = MODEL.to_logits(MODEL(before, context))[0].log_softmax(-1)
        new = (before == MASK) & (now.ids != MASK)
        of_ids = log_probs.gather(-1, now.ids.clamp(max=MASK - 1)[..., None])[..., 0]
        torch.testing.assert_close(now.log_probs[new], of_ids[new])
        assert now.log_probs[0, 3] == 0
        before = now.ids
    kept = seen[0].ids != MASK  # as when they were drawn
    assert torch.equal(seen[-1].log_probs[kept], seen[0].log_probs[kept])


# Against a published implementation


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps, known", [(1, 0), (5, 0), (11, 0), (7, 3)])
def test_confidence_chooses_what_diffusers_chooses(schedule, steps, known, monkeypatch):
    """Token for token, in every step; the two draws of its scheduler are made from our noise."""
    amused = pytest.importorskip("diffusers.schedulers.scheduling_amused")
    canvas, text = blank(3), tiny.text(3)
    canvas[:, 4 : 4 + known] = 2
    options = SampleOptions(
        timesteps=steps, cond_scale=1.0, choice_temperature=2.0, noise_schedule=schedule, seeds=1
    )
    seen = []
    sample_tokens(denoiser(text), canvas, options, seen.append)

    plan, now = make_plan(canvas == MASK, options), 0
    monkeypatch.setattr(amused, "gumbel_noise", lambda t, generator=None: plan.gumbel[:, now])

    def multinomial(probs, count, generator=None):
        cdf = probs.cumsum(-1)
        point = plan.uniform[:, now].reshape(-1, 1) * cdf[:, -1:]
        return torch.searchsorted(cdf, point, right=True)

    monkeypatch.setattr(amused.torch, "multinomial", multinomial)
    scheduler = amused.AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
    scheduler.set_timesteps(steps, temperature=(2, 0))
    context, ids = MODEL.encode_context(tiny.conditioning(text)), canvas
    for now, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            [logits] = MODEL.to_logits(MODEL(ids, context))
        ids = scheduler.step(logits, timestep, ids, starting_mask_ratio=1 - known / N).prev_sample
        assert torch.equal(ids, seen[now].ids), now
    assert (ids < MASK).all()


def test_a_policy_of_ones_own():
    """A function that does what a name does draws the same; another one does not."""
    model, text = tiny.maskgit(), tiny.text()

    def ids(**changes):
        return model.generate_ids(text_embeds=text, seeds=1, timesteps=5, **changes)

    assert torch.equal(ids(policy=lambda logits, log_prob: log_prob), ids(policy="confidence"))
    assert not torch.equal(ids(policy=lambda logits, log_prob: -log_prob), ids(policy="confidence"))
    SCORES["mine"] = lambda logits, log_prob: -log_prob
    ORDERS["upwards"] = lambda noise, grid: torch.arange(len(noise)).flip(0)
    try:
        mine = ids(policy="mine")
        assert torch.equal(mine, ids(policy=lambda logits, log_prob: -log_prob))
        seen = []
        model.generate(
            text_embeds=text, timesteps=16, policy="upwards", callback=lambda s: seen.append(s.mask)
        )
        assert not seen[0][:, 15].any()  # the last position is decided first
        assert seen[0][:, :15].all()
    finally:
        del SCORES["mine"], ORDERS["upwards"]
    with pytest.raises(ValueError, match=r"its scores must be \(2, 16\), not \(2,\)"):
        ids(policy=lambda logits, log_prob: log_prob[:, 0])
    for wrong in ("mine", 3, ["confidence"]):
        with pytest.raises(ValueError, match=r"policy must be one of .* or a function"):
            ids(policy=wrong)


def test_schedules_of_ones_own():
    model, text = tiny.maskgit(), tiny.text()

    def ids(**changes):
        return model.generate_ids(text_embeds=text, seeds=1, timesteps=5, **changes)

    assert torch.equal(ids(noise_schedule=lambda u: 1 - u), ids(noise_schedule="linear"))
    assert torch.equal(ids(guidance_schedule=torch.ones_like), ids(guidance_schedule="constant"))
    assert not torch.equal(ids(guidance_schedule=lambda p: 1 - p), ids())
    power = tiny.maskgit(noise_schedule=lambda u: (1 - u) ** 3)
    masked = torch.stack([power.draw_mask(4).float().mean() for _ in range(200)]).mean()
    assert abs(masked - 0.25) < 0.04  # the mean of (1 - u)^3, and at least one token
    wrong: list[Any] = [lambda u: u, lambda u: 2 - u, lambda u: u * math.nan, lambda u: 1.0]
    for schedule in wrong:
        with pytest.raises(ValueError, match="noise_schedule"):
            SampleOptions(noise_schedule=schedule)
        with pytest.raises(ValueError, match="noise_schedule"):
            tiny.maskgit(noise_schedule=schedule)
    with pytest.raises(ValueError, match="guidance_schedule"):
        ids(guidance_schedule=lambda p: p[:1])


def test_more_steps_than_tokens_cost_no_more():
    model, text = tiny.maskgit(), tiny.text()
    with pytest.warns(UserWarning, match="timesteps 2000000000 exceed the 16 tokens"):
        many = model.generate_ids(text_embeds=text, seeds=1, timesteps=2 * 10**9)
    assert torch.equal(many, model.generate_ids(text_embeds=text, seeds=1, timesteps=16))


def fading(u: Tensor) -> Tensor:
    return (1 - u) ** 3


def test_files_say_what_they_cannot_repeat(t5, tmp_path):
    """Functions of one's own are named in records and model files, and asked for when needed."""
    transformer = tiny.transformer(t5_name=t5, text_embed_dim=None)
    options = dict(policy=lambda logits, log_prob: log_prob, timesteps=3)
    model = Muse(tiny.maskgit(transformer, noise_schedule=fading, sample_options=options))
    [picture] = model("a red car", seeds=1)
    path = save_png(picture, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"since policy .*<lambda> \(a function of one's own"):
        model.like(path)
    again = Muse.from_pretrained(model.save(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"<lambda> .*: give it again, or another in its place"):
        again("a red car", seeds=1)
    with pytest.raises(ValueError, match=r"test_policies.fading .*: give it again"):
        again.base(tiny.images(), ["a", "b"])
    [repeated] = again("a red car", seeds=1, policy="confidence")  # the same law, by its name
    assert repeated.tobytes() == picture.tobytes()
    again.base.noise_schedule = fading
    assert again.base(tiny.images(), ["a", "b"]).isfinite()
    # what is not given again is passed on
    third = Muse.from_pretrained(again.save(tmp_path / "again.safetensors"))
    with pytest.raises(ValueError, match="<lambda>"):
        third("a red car")
