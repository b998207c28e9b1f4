"""Training loss and generation: what must matter matters, and nothing else does."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_maskgit_pytorch import MaskGit, SampleOptions, TextEmbeds
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cross_entropy import cross_entropy
from muse_maskgit_pytorch.images import resize
from tests.shapes import unchecked


def loss(model: MaskGit, *args, seed: int = 0, **kwargs: Any) -> Tensor:
    kwargs.setdefault("cond_drop_prob", 0.0)
    torch.manual_seed(seed)
    return model(*args, **kwargs)


def calls(monkeypatch, module, name: str) -> list[tuple]:
    """Record the arguments of a method."""
    seen, real = [], getattr(module, name)

    def spy(*args, **kwargs):
        seen.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, spy)
    return seen


# Geometry


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny.maskgit(vae=tiny.vae(codebook_size=64)), "num_tokens 60.*codebook_size 64"),
        (lambda: tiny.maskgit(image_size=32), "seq_len 16.*image_size 32.*factor 4.*seq_len=64"),
        (lambda: tiny.maskgit(image_size=18), "image size 18.*factor 4: use 16"),
        (lambda: tiny.superres(cond_image_size=18), "image size 18.*factor 4: use 16"),
        (lambda: tiny.superres(cond_image_size=32), "cond_image_size 32.*image_size 32"),
        (lambda: tiny.superres(cond_image_size=-4), "cond_image_size -4"),
        (lambda: tiny.maskgit(cond_vae=tiny.vae()), "cond_vae.*cond_image_size"),
        (lambda: tiny.maskgit(token_critic=tiny.critic(num_tokens=9)), "token_critic.*9.*60"),
        (lambda: tiny.maskgit(token_critic=tiny.critic(seq_len=9)), "token_critic.*seq_len 9.*16"),
        (
            lambda: tiny.maskgit(token_critic=tiny.critic(), self_token_critic=True),
            "token_critic and self_token_critic",
        ),
        (lambda: tiny.maskgit(cond_drop_prob=1.5), r"cond_drop_prob must be in \[0, 1\], not 1.5"),
        (lambda: tiny.maskgit(no_mask_token_prob=-0.1), r"no_mask_token_prob.*-0.1"),
        (lambda: tiny.maskgit(critic_loss_weight=math.nan), "critic_loss_weight must be a finite"),
        (lambda: tiny.maskgit(critic_target="real"), "critic_target must be one of.*'real'"),
    ],
)
def test_what_does_not_fit(make: Callable, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_inputs_that_do_not_fit():
    model, ids, text = tiny.maskgit(), tiny.ids(), tiny.text()
    with pytest.raises(ValueError, match=r"images are \(2, 3, 32, 32\).*16, 16"):
        model(tiny.images(2, 32), text_embeds=text)
    with pytest.raises(ValueError, match="9 ids per image, this model has 16"):
        model(tiny.ids(2, 9), text_embeds=text)
    with unchecked(), pytest.raises(ValueError, match="3 texts for 2 images"):
        model(ids, text_embeds=tiny.text(3))
    with pytest.raises(ValueError, match="texts is empty"):
        model(ids, [])
    with pytest.raises(ValueError, match="either texts or text_embeds"):
        model(ids)
    with pytest.raises(ValueError, match="either texts or text_embeds"):
        model(ids, ["a", "b"], text_embeds=text)
    with pytest.raises(ValueError, match="text 1 of 2 must be a string, not 1"):
        model(ids, [1, 2])
    with pytest.raises(ValueError, match="without cond_image_size"):
        model.generate(text_embeds=text, cond_images=tiny.images())
    with unchecked(), pytest.raises(ValueError, match=r"canvas is \(2, 9\).*\(2, 16\)"):
        model.generate(text_embeds=text, canvas=tiny.ids(2, 9))


def test_conditions_that_do_not_fit():
    model, text = tiny.superres(), tiny.text()
    with pytest.raises(ValueError, match=r"cond_images are \(32, 32\).*16"):
        model.generate(text_embeds=text, cond_images=tiny.images(2, 32))
    with pytest.raises(ValueError, match="needs cond_images of 16"):
        model.generate(text_embeds=text)
    with pytest.raises(ValueError, match="needs cond_images of 16"):
        model(tiny.ids(2, 64), text_embeds=text)
    for number in (1, 9):
        with pytest.raises(ValueError, match=rf"{number} cond_ids per image.*16 has 16"):
            model(tiny.ids(2, 64), text_embeds=text, cond_ids=tiny.ids(2, number))
    with unchecked(), pytest.raises(ValueError, match="1 low-resolution images for 2"):
        model(tiny.ids(2, 64), text_embeds=text, cond_ids=tiny.ids(1))
    with unchecked(), pytest.raises(ValueError, match="1 low-resolution images for 2 texts"):
        model.generate(text_embeds=text, cond_ids=tiny.ids(1))


# The tokenizers


def test_tokenizers_stay_frozen_and_in_eval_mode():
    vae, cond_vae = tiny.vae(quantizer="vq").train(), tiny.vae(quantizer="vq").train()
    model = tiny.superres(vae=vae, cond_vae=cond_vae)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    for mode in (True, False):
        assert model.train(mode) is model
        assert model.transformer.training == mode
        for tokenizer in (vae, cond_vae):
            assert not any(m.training for m in tokenizer.modules())
            assert not any(p.requires_grad for p in tokenizer.parameters())
    torch.nn.Sequential(model).train()
    assert not vae.training
    model(tiny.images(2, 32), text_embeds=tiny.text()).backward()
    model.generate(text_embeds=tiny.text(), cond_images=tiny.images(), timesteps=2)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


# The loss


def test_the_loss_is_a_scalar_with_a_graph():
    model = tiny.maskgit()
    value = model(tiny.images(), text_embeds=tiny.text())
    assert value.shape == ()
    value.backward()
    assert all(p.grad is not None for p in model.transformer.parameters())


def test_the_loss_of_an_ignorant_model_is_that_of_guessing():
    model = tiny.maskgit()
    torch.nn.init.zeros_(model.transformer.to_logits.weight)
    value = loss(model, tiny.ids(), text_embeds=tiny.text())
    assert value.item() == pytest.approx(math.log(60), rel=1e-5)


def test_cached_ids_give_the_loss_of_their_images():
    for model, size in ((tiny.maskgit(), 16), (tiny.superres(), 32)):
        images, text = tiny.images(2, size), tiny.text()
        ids = model.vae.encode_to_ids(images)
        cond = (
            {} if model.cond_vae is None else dict(cond_ids=model.encode_cond(None, None, images))
        )
        full = loss(model, images, text_embeds=text, cond_drop_prob=0.5)
        for cached in (ids, ids.flatten(1)):
            again = loss(model, cached, text_embeds=text, cond_drop_prob=0.5, **cond)
            assert torch.equal(again, full)


def test_low_resolution_matters_in_training():
    """Given, derived from the images, or as ids."""
    model = tiny.superres()
    ids, text = tiny.ids(2, 64), tiny.text()
    one, two = tiny.images(seed=1), tiny.images(seed=2)
    base = loss(model, ids, text_embeds=text, cond_images=one)
    assert not torch.isclose(loss(model, ids, text_embeds=text, cond_images=two), base)
    cond_ids = model.cond_vae.encode_to_ids(one)
    assert torch.equal(loss(model, ids, text_embeds=text, cond_ids=cond_ids), base)
    assert not torch.isclose(loss(model, ids, text_embeds=text, cond_ids=(cond_ids + 1) % 60), base)
    images = tiny.images(2, 32)
    derived = loss(model, images, text_embeds=text)
    small = resize(images, (16, 16))
    assert torch.equal(loss(model, images, text_embeds=text, cond_images=small), derived)
    assert not torch.isclose(loss(model, images, text_embeds=text, cond_images=one), derived)
    # and it still does where the text is dropped
    one, two = (
        loss(model, ids, text_embeds=text, cond_images=c, cond_drop_prob=1.0) for c in (one, two)
    )
    assert not torch.isclose(one, two)


def test_text_and_image_matter_in_training():
    for model, tokens in ((tiny.maskgit(), 16), (tiny.superres(), 64)):
        cond: dict[str, Any] = {} if tokens == 16 else dict(cond_ids=tiny.ids())
        ids = tiny.ids(2, tokens)
        base = loss(model, ids, text_embeds=tiny.text(), **cond)
        assert not torch.isclose(loss(model, ids, text_embeds=tiny.text(seed=1), **cond), base)
        other = loss(model, tiny.ids(2, tokens, seed=1), text_embeds=tiny.text(), **cond)
        assert not torch.isclose(other, base)


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.25, 1.0])
def test_guidance_dropout_has_its_rate(monkeypatch, drop):
    model = tiny.maskgit(tiny.transformer(dim=8, depth=1), cond_drop_prob=drop)
    seen = calls(monkeypatch, model.transformer, "encode_context")
    with torch.no_grad():
        for _ in range(4):
            model(tiny.ids(500), text_embeds=tiny.text(500))
    keep = torch.cat([conditioning.keep for (conditioning,) in seen])
    assert len(keep) == 2000
    assert (~keep).float().mean().item() == pytest.approx(drop, abs=0.025)
    assert drop in (0, 1) or keep[:500].any()  # drawn for each sample, not for the batch


@pytest.mark.parametrize("critic", [None, "token", "self"])
@pytest.mark.parametrize("self_cond", [False, True])
def test_dropped_text_is_not_seen_by_any_path(self_cond, critic):
    model = tiny.maskgit(
        tiny.transformer(self_cond=self_cond),
        self_cond_prob=1.0,
        token_critic=tiny.critic() if critic == "token" else None,
        self_token_critic=critic == "self",
    )
    one, two = (
        loss(model, tiny.ids(), text_embeds=tiny.text(seed=s), cond_drop_prob=1.0) for s in (1, 2)
    )
    assert torch.equal(one, two)
    one, two = (loss(model, tiny.ids(), text_embeds=tiny.text(seed=s)) for s in (1, 2))
    assert not torch.isclose(one, two)


def test_self_conditioning_is_trained_at_its_rate(monkeypatch):
    for prob, passes in ((0.0, 20), (1.0, 40)):
        model = tiny.maskgit(tiny.transformer(self_cond=True), self_cond_prob=prob)
        seen = calls(monkeypatch, model.transformer, "forward")
        for _ in range(20):
            model(tiny.ids(), text_embeds=tiny.text())
        assert len(seen) == passes
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen[::2], seen[1::2], strict=True))


def test_mask_law_at_the_transformers_door(monkeypatch):
    model = tiny.maskgit(tiny.transformer(dim=8, depth=1))
    seen = calls(monkeypatch, model.transformer, "forward")
    with torch.no_grad():
        ids = tiny.ids(3000)
        model(ids, text_embeds=tiny.text(3000))
    inputs = seen[0][0]
    masked = inputs == model.transformer.mask_id
    assert masked.any(1).all()
    # at least one of 16 lifts the mean a little above 2/pi
    assert masked.float().mean().item() == pytest.approx(2 / math.pi, abs=0.02)
    assert torch.equal(inputs[~masked], ids[~masked])


def judged_rows(monkeypatch) -> list[int]:
    """Filled with the number of rows that each loss is taken of."""
    rows: list[int] = []

    def seen(head, hidden, labels, *settings):
        rows.append(len(labels))
        return cross_entropy(head, hidden, labels, *settings)

    monkeypatch.setattr("muse_maskgit_pytorch.maskgit.cross_entropy", seen)
    return rows


def test_the_loss_is_over_masked_positions_only(monkeypatch):
    model = tiny.maskgit()
    seen = judged_rows(monkeypatch)
    masked = calls(monkeypatch, model.transformer, "forward")
    model(tiny.ids(), text_embeds=tiny.text())
    assert seen[0] == (masked[0][0] == model.transformer.mask_id).sum()


def test_a_given_mask_and_the_weights_of_micro_batches(monkeypatch):
    """Four micro batches, each with its share of the masked tokens, are one large batch."""
    model, ids, text = tiny.maskgit(), tiny.ids(8), tiny.text(8)
    mask = model.draw_mask(8)
    assert mask.shape == (8, 16)
    assert mask.any(1).all()
    whole = model.losses(ids, text_embeds=text, mask=mask, cond_drop_prob=0.0)
    parts = []
    for rows in torch.arange(8).split(2):
        share = mask[rows].sum() / mask.sum() * 4
        some = TextEmbeds(text.embeds[rows], text.mask[rows])
        parts.append(
            model.losses(
                ids[rows],
                text_embeds=some,
                mask=mask[rows],
                mask_weight=share,
                cond_drop_prob=0.0,
            ).total
            / 4
        )
    torch.testing.assert_close(sum(parts), whole.total)


def test_seen_tokens_count_as_much_as_they_are_told_to():
    """A weight of 1 is the mean of all tokens' losses, times how many more they are."""
    mask = torch.rand(2, 16) < 0.5

    def terms(**changes):
        torch.manual_seed(0)
        model = tiny.maskgit(cond_drop_prob=0.0, **changes)
        tiny.randomise(model.transformer)
        return model, model.losses(tiny.ids(), text_embeds=tiny.text(), mask=mask)

    _, plain = terms()
    assert plain.total is plain.ce
    model, all_alike = terms(unmasked_weight=1.0)
    ids = tiny.ids()
    context = model.transformer.encode_context(tiny.conditioning(tiny.text()))
    logits = model.transformer.to_logits(
        model.transformer(torch.where(mask, model.transformer.mask_id, ids), context)[0]
    )
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids.flatten(), reduction="none"
    )
    torch.testing.assert_close(all_alike.total, losses.sum() / mask.sum())
    torch.testing.assert_close(all_alike.ce, plain.ce)
    half = terms(unmasked_weight=0.5)[1].total
    torch.testing.assert_close(half - plain.ce, (all_alike.total - plain.ce) / 2)


def test_an_image_twice_with_mask_and_complement():
    model = tiny.superres(cond_drop_prob=0.0)
    arguments = dict(text_embeds=tiny.text(), cond_ids=tiny.ids(2, 16))
    mask = torch.rand(2, 64) < 0.3
    both = model.losses(tiny.ids(2, 64), **arguments, mask=torch.cat([mask, ~mask])).total
    first, second = (
        model.losses(tiny.ids(2, 64), **arguments, mask=m).total for m in (mask, ~mask)
    )
    share = mask.float().mean()
    torch.testing.assert_close(both, share * first + (1 - share) * second)


def test_low_resolution_is_noisy_in_training_alone(monkeypatch):
    model = tiny.superres(cond_noise_prob=0.3)
    seen, encode = [], model.transformer.encode_context
    monkeypatch.setattr(
        model.transformer, "encode_context", lambda c: seen.append(c.cond_ids) or encode(c)
    )
    low = torch.full((200, 16), 7)
    for training in (True, False):
        model.train(training)
        text = tiny.text(200)
        model.losses(tiny.ids(200, 64), text_embeds=text, cond_ids=low)
    noisy, clean = seen
    assert torch.equal(clean, low)
    assert abs(float((noisy != low).float().mean()) - 0.3 * 59 / 60) < 0.03
    assert len(noisy.unique()) == 60


def test_no_mask_token_prob(monkeypatch):
    ids, text = tiny.ids(500), tiny.text(500)
    model = tiny.maskgit(tiny.transformer(dim=8, depth=1), no_mask_token_prob=0.25)
    inputs = calls(monkeypatch, model.transformer, "forward")
    judged = judged_rows(monkeypatch)
    with torch.no_grad():
        model(ids, text_embeds=text)
    shown = 1 - (inputs[0][0] == model.transformer.mask_id).sum() / judged[0]
    assert shown.item() == pytest.approx(0.25, abs=0.03)


# Critics


def test_critic_losses():
    plain = tiny.maskgit().losses(tiny.ids(), text_embeds=tiny.text())
    assert plain.critic is None
    assert plain.total is plain.ce
    critics: list[dict[str, Any]] = [dict(token_critic=tiny.critic()), dict(self_token_critic=True)]
    for changes in critics:
        model = tiny.maskgit(critic_loss_weight=0.5, **changes)
        terms = model.losses(tiny.ids(), text_embeds=tiny.text())
        assert terms.critic > 0
        assert terms.total.item() == pytest.approx((terms.ce + 0.5 * terms.critic).item())


def test_parts_train_alone():
    def gradients(part: Any) -> tuple[bool, ...]:
        model = tiny.maskgit(token_critic=tiny.critic())
        model.losses(tiny.ids(), text_embeds=tiny.text(), part=part).total.backward()
        return tuple(
            any(p.grad is not None for p in m.parameters())
            for m in (model.transformer, model.critic)
        )

    assert gradients("all") == (True, True)
    assert gradients("transformer") == (True, False)
    assert gradients("critic") == (False, True)


def test_what_the_critic_learns(monkeypatch):
    """Whether a token was sampled, by default, though it may be the true one; or whether it is."""
    ids, text = torch.full((4, 16), 7), tiny.text(4)
    mask = torch.arange(16) % 3 == 0
    targets = {}
    for target in ("sampled", "truth"):
        model = tiny.maskgit(token_critic=tiny.critic(), critic_target=target)
        seen = calls(monkeypatch, F, "binary_cross_entropy_with_logits")
        monkeypatch.setattr(
            "muse_maskgit_pytorch.maskgit.choose_tokens",
            lambda logits, *_: (torch.full(logits.shape[:-1], 7), None),
        )
        model.losses(ids, text_embeds=text, mask=mask.expand(4, -1))
        targets[target] = seen[0][1]
    assert torch.equal(targets["sampled"], (~mask).float().expand(4, -1))
    assert targets["truth"].all()


def test_a_self_critic_encodes_its_context_once(monkeypatch):
    model = tiny.maskgit(self_token_critic=True)
    seen = calls(monkeypatch, model.transformer, "encode_context")
    model.losses(tiny.ids(), text_embeds=tiny.text()).total.backward()
    assert len(seen) == 1
    assert model.critic.to_logits.weight.grad is not None


def test_the_critic_learns_to_tell_real_tokens():
    """Real images are one code everywhere; whatever else is sampled is a fake."""
    torch.manual_seed(1)
    model = tiny.maskgit(token_critic=tiny.critic())
    optimizer = torch.optim.Adam(model.critic.parameters(), lr=3e-3)
    ids, text = torch.full((16, 16), 7), tiny.text(16)
    for _ in range(100):
        terms = model.losses(ids, text_embeds=text, part="critic")
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
    assert terms.critic < 0.2


# Generation


def test_images_have_their_size_and_range():
    for model, size, cond in (
        (tiny.maskgit(), 16, {}),
        (tiny.superres(), 32, dict(cond_images=tiny.images(3))),
        (tiny.superres(), 32, dict(cond_ids=tiny.ids(3))),
    ):
        images = model.generate(text_embeds=tiny.text(3), timesteps=3, **cond)
        assert images.shape == (3, 3, size, size)
        assert 0 <= images.min() <= images.max() <= 1
        assert not images.requires_grad


def test_default_steps_are_the_papers():
    assert tiny.maskgit().default_options.timesteps == 24
    assert tiny.superres().default_options.timesteps == 8
    model = tiny.maskgit(sample_options=dict(timesteps=5))
    seen = []
    model.generate(text_embeds=tiny.text(), callback=seen.append)
    assert len(seen) == 5
    model.generate(text_embeds=tiny.text(), callback=seen.append, timesteps=2)
    assert len(seen) == 7
    model.generate(
        text_embeds=tiny.text(), callback=seen.append, options=SampleOptions(timesteps=3)
    )
    assert len(seen) == 10


def test_unknown_sampling_option():
    with pytest.raises(ValueError, match="no 'timestep', did you mean 'timesteps'"):
        tiny.maskgit().generate(text_embeds=tiny.text(), timestep=3)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(self_token_critic=True), dict(token_critic=True), dict(self_cond=True)],
    ids=["plain", "self_critic", "token_critic", "self_cond"],
)
@pytest.mark.parametrize("superres", [False, True])
def test_seed_text_and_low_resolution_decide(superres, changes):
    changes = dict(changes)
    seq_len = 64 if superres else 16
    model = tiny.transformer(seq_len=seq_len, self_cond=changes.pop("self_cond", False))
    if "token_critic" in changes:
        changes["token_critic"] = tiny.critic(seq_len=seq_len)
    model = (tiny.superres if superres else tiny.maskgit)(model=model, **changes)

    def generate(text=0, seeds=(1, 2), cond=0, **options) -> Tensor:
        if superres:
            options["cond_images"] = tiny.images(seed=cond)
        text = tiny.text(seed=text)
        return model.generate_ids(text_embeds=text, seeds=seeds, timesteps=4, **options)

    same = generate()
    assert torch.equal(generate(), same)
    others = [generate(text=1), generate(seeds=(1, 3))[1:], generate(cond_scale=1.0)]
    if superres:
        others.append(generate(cond=1))
    for other in others:
        assert not torch.equal(other, same[-len(other) :])
    assert torch.equal(generate(seeds=(1, 3))[0], same[0])


def test_canvas():
    model = tiny.maskgit()
    canvas = tiny.ids()
    canvas[:, ::2] = model.transformer.mask_id
    ids = model.generate_ids(text_embeds=tiny.text(), canvas=canvas, timesteps=3)
    assert torch.equal(ids[:, 1::2], canvas[:, 1::2])
    assert (ids < 60).all()
    full = tiny.ids()
    images = model.generate(text_embeds=tiny.text(), canvas=full)
    assert torch.equal(images, model.vae.decode_from_ids(full.view(2, 4, 4)))


def test_a_callback_that_stops_still_gives_images():
    model = tiny.maskgit()
    images = model.generate(text_embeds=tiny.text(), callback=lambda step: step.step == 2)
    assert images.shape == (2, 3, 16, 16)


# Texts


@pytest.fixture
def speaking(t5: str) -> MaskGit:
    """A model whose texts go through a tiny T5."""
    return tiny.maskgit(tiny.transformer(t5_name=t5, text_embed_dim=None))


def test_one_string_is_one_prompt(speaking):
    assert speaking.generate("a red car", timesteps=2).shape[0] == 1
    assert len(speaking.embed_texts("a red car").mask) == 1
    assert loss(speaking, tiny.ids(1), "a red car").isfinite()


def test_texts_equal_their_embeddings(speaking):
    texts = ["a red car", "two cats"]
    embeds = speaking.embed_texts(texts)
    assert torch.equal(
        loss(speaking, tiny.ids(), texts), loss(speaking, tiny.ids(), text_embeds=embeds)
    )
    assert torch.equal(
        speaking.generate(texts, seeds=[1, 2], timesteps=3),
        speaking.generate(text_embeds=embeds, seeds=[1, 2], timesteps=3),
    )


def test_a_bare_tensor_is_all_text():
    model, text = tiny.maskgit(), tiny.text().embeds
    whole = TextEmbeds(text, torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(
        loss(model, tiny.ids(), text_embeds=text), loss(model, tiny.ids(), text_embeds=whole)
    )


def test_an_empty_prompt_is_refused(speaking):
    with pytest.raises(ValueError, match="text 2 of 2 is empty"):
        speaking.generate(["a red car", ""], timesteps=2)


def test_negative_prompts(speaking):
    def ids(**changes) -> Tensor:
        return speaking.generate_ids(
            ["a red car", "two cats"], seeds=[1, 2], timesteps=4, cond_scale=5.0, **changes
        )

    none = ids()
    assert torch.equal(ids(negative_texts=""), none)
    assert torch.equal(ids(negative_texts=["", ""]), none)
    assert not torch.equal(ids(negative_texts="blurred"), none)
    assert torch.equal(ids(negative_texts="blurred"), ids(negative_texts=["blurred"] * 2))
    mixed = ids(negative_texts=["", "blurred"])  # one row without, one with
    assert torch.equal(mixed[0], none[0])
    assert torch.equal(mixed[1], ids(negative_texts="blurred")[1])
    with pytest.raises(ValueError, match="3 negative_texts for 2 texts"):
        ids(negative_texts=["a", "b", "c"])


def test_negative_prompts_in_superres_and_with_a_critic(t5):
    text = dict(t5_name=t5, text_embed_dim=None)
    model = tiny.superres(
        model=tiny.transformer(seq_len=64, **text), token_critic=tiny.critic(seq_len=64, **text)
    )

    def ids(**changes) -> Tensor:
        return model.generate_ids(
            "a cat", cond_ids=tiny.ids(1), seeds=[1], timesteps=4, cond_scale=5.0, **changes
        )

    assert not torch.equal(ids(negative_texts="blurred"), ids())


# Learning


def test_one_batch_is_learnt_by_heart():
    model = tiny.maskgit(tiny.transformer(dim=32))
    optimizer = torch.optim.AdamW(model.transformer.parameters(), lr=3e-3)
    ids, text = tiny.ids(8), tiny.text(8)
    for _ in range(250):
        value = model(ids, text_embeds=text, cond_drop_prob=0.0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert value < 0.5  # from log(60) = 4.1


def test_ids_beyond_the_codebook_are_refused():
    model = tiny.maskgit()
    with pytest.raises(ValueError, match="ids range from 0 to 60, the codebook has 60 codes"):
        model(
            torch.cat([tiny.ids(1)[:, :14] * 0, torch.tensor([[0, 60]])], 1),
            text_embeds=tiny.text(1),
        )


@pytest.mark.parametrize(
    "options",
    [dict(guidance_schedule="lineer"), dict(noise_schedule="cosin"), dict(timesteps=2.5)],
)
def test_mistyped_options_are_refused_where_they_are_made(options: dict):
    with pytest.raises(ValueError, match=next(iter(options))):
        SampleOptions(**options)


def test_ids_are_those_of_float32_under_autocast():
    model = tiny.maskgit()
    images = tiny.images(8)
    with torch.autocast("cpu", torch.bfloat16):
        ids = model.vae.encode_to_ids(images)
    assert torch.equal(ids, model.vae.encode_to_ids(images))
