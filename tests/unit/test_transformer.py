"""The transformers: two phases against one plain forward; what must matter matters."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muse_maskgit_pytorch import Conditioning, SelfCritic, TextEmbeds, TokenCritic
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.checkpoint import save_tree
from muse_maskgit_pytorch.layers import Block, CrossAttention, SelfAttention, attend
from muse_maskgit_pytorch.transformer import Context, MaskGitTransformer
from tests.shapes import unchecked


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def superres(**changes: Any) -> Any:
    """8 x 8 tokens that read 4 x 4 tokens of 30 codes."""
    return tiny.transformer(seq_len=64, cond_num_tokens=30, cond_seq_len=16, **changes)


def run(model, ids: Tensor, conditioning: Conditioning, *self_cond: Tensor) -> Tensor:
    [hidden] = model(ids, model.encode_context(conditioning), *self_cond)
    return model.to_logits(hidden)


# Attention


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.zeros_like(q)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = [m for m in range(k.shape[2]) if mask is None or mask[b, m]]
        weights = [math.exp(q[b, h, n].dot(k[b, h, m]) / math.sqrt(q.shape[-1])) for m in seen]
        for weight, m in zip(weights, seen, strict=True):
            out[b, h, n] += weight / sum(weights) * v[b, h, m]
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_the_sum_written_out(masked):
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 6, 8), torch.randn(2, 3, 6, 8)
    mask = torch.rand(2, 6) < 0.5 if masked else None
    if mask is not None:
        mask[:, 0] = True
    torch.testing.assert_close(attend(q, k, v, mask), naive_attention(q, k, v, mask))


def plain_self(layer: SelfAttention, x: Tensor) -> Tensor:
    heads = layer.to_out.in_features // layer.dim_head
    q, k, v = (
        t.view(*x.shape[:2], heads, -1).transpose(1, 2)
        for t in layer.to_qkv(layer.norm(x)).chunk(3, -1)
    )
    out = naive_attention(layer.q_norm(q), layer.k_norm(k), v, None)
    return layer.to_out(out.transpose(1, 2).reshape(*x.shape[:2], -1))


def plain_cross(layer: CrossAttention, x: Tensor, seen: Tensor, mask: Tensor) -> Tensor:
    def split(t: Tensor) -> Tensor:
        return t.view(*t.shape[:2], -1, layer.dim_head).transpose(1, 2)

    k, v = map(split, layer.to_kv(seen).chunk(2, -1))
    null_k, null_v = layer.null_kv[:, None].expand(-1, len(x), -1, -1, -1)
    k, v = torch.cat([null_k, k], 2), torch.cat([null_v, v], 2)
    mask = F.pad(mask, (1, 0), value=True)
    q = split(layer.to_q(layer.norm(x)))
    out = naive_attention(layer.q_norm(q), layer.k_norm(k), v, mask)
    return layer.to_out(out.transpose(1, 2).reshape(*x.shape[:2], -1))


def plain_block(block: Block, x: Tensor, seen: Tensor | None, mask: Tensor | None) -> Tensor:
    x = x + plain_self(block.attn, x)
    if block.cross is not None:
        assert seen is not None
        assert mask is not None
        x = x + plain_cross(block.cross, x, seen, mask)
    value, gate = block.ff.to_hidden(block.ff.norm(x)).chunk(2, -1)
    return x + block.ff.to_out(value * F.gelu(gate))


def plain_forward(model, ids: Tensor, conditioning: Conditioning) -> Tensor:
    """The whole transformer in one phase, as the paper's figure has it."""

    def embed(embedding, ids: Tensor) -> Tensor:
        side = math.isqrt(ids.shape[1])
        rows, columns = embedding.row.view(side, -1), embedding.column.view(side, -1)
        places = [rows[n // side] + columns[n % side] for n in range(ids.shape[1])]
        return embedding.token.weight[ids] + torch.stack(places)

    assert conditioning.text is not None
    seen = model.text_norm(model.text_proj(conditioning.text.embeds))
    mask = conditioning.text.mask & conditioning.keep[:, None]
    if conditioning.cond_ids is not None:
        low = embed(model.cond_encoder.embed, conditioning.cond_ids)
        for block in model.cond_encoder.blocks:
            low = plain_block(block, low, None, None)
        seen = torch.cat([seen, model.cond_norm(low)], 1)
        mask = torch.cat([mask, torch.ones(low.shape[:2], dtype=torch.bool)], 1)
    x = embed(model.embed, ids)
    for block in model.blocks:
        x = plain_block(block, x, seen, mask)
    return model.to_logits(model.norm(x))


def test_two_phases_equal_one_plain_forward():
    model, text = tiny.transformer(), tiny.text()
    ids = tiny.ids(codes=61)
    conditioning = replace(tiny.conditioning(text), keep=torch.tensor([True, False]))
    torch.testing.assert_close(
        run(model, ids, conditioning), plain_forward(model, ids, conditioning), atol=1e-4, rtol=1e-4
    )


def test_two_phases_equal_one_plain_forward_in_superres():
    model = superres(depth=1, heads=1)
    ids, low = tiny.ids(num_tokens=64, codes=61), tiny.ids(codes=30)
    conditioning = tiny.conditioning(tiny.text(), low)
    torch.testing.assert_close(
        run(model, ids, conditioning), plain_forward(model, ids, conditioning), atol=1e-4, rtol=1e-4
    )


def test_rows_of_a_context():
    model, ids = tiny.transformer(), tiny.ids(3)
    context = model.encode_context(tiny.conditioning(tiny.text(3)))
    full = model(ids, context)
    torch.testing.assert_close(model(ids[1:], context.rows(slice(1, None))), full[:, 1:])
    some = torch.tensor([2, 0])
    torch.testing.assert_close(model(ids[some], context.rows(some)), full[:, some])


def test_branches_and_rows_joined_are_as_before():
    model, ids = tiny.transformer(), tiny.ids(3)
    short, long = tiny.text(1, 3), tiny.text(2, 7, seed=1)
    seen, empty = (
        model.encode_context(tiny.conditioning(long, keep=keep)) for keep in (True, False)
    )
    guided = Context.stack([seen, empty])
    hidden = model(ids[:2], guided)
    torch.testing.assert_close(hidden[:1], model(ids[:2], seen))
    torch.testing.assert_close(hidden[1:], model(ids[:2], empty))
    assert torch.equal(model(ids[:2], guided.branches(1)), model(ids[:2], seen))
    # one row without guidance after two with it: the branch that it lacks sees nothing
    alone = model.encode_context(tiny.conditioning(short))
    joined = model(ids, guided.cat(alone))
    torch.testing.assert_close(joined[:, :2], hidden)
    torch.testing.assert_close(joined[:1, 2:], model(ids[2:], alone))
    torch.testing.assert_close(model(ids[2:], guided.cat(alone).rows(slice(2, 3))), joined[:, 2:])


def without_text(given: Conditioning) -> Conditioning:
    return replace(given, text=None)


@pytest.mark.parametrize("make", [tiny.transformer, superres, tiny.critic])
def test_no_text_is_a_text_of_which_nothing_is_seen(make):
    """Where nothing is seen, a layer's cross-attention is one vector: exactly, not nearly."""
    model = make()
    low = None if model.cond_encoder is None else tiny.ids(codes=30)
    ids = tiny.ids(num_tokens=model.seq_len)
    given, unseen = (tiny.conditioning(tiny.text(), low, keep=keep) for keep in (True, False))
    fast = model.encode_context(given, without_text(given))
    slow = Context.stack([model.encode_context(given), model.encode_context(unseen)])
    assert fast.num_branches == slow.num_branches == 2
    assert fast.blank == (low is None)
    hidden = model(ids, slow)
    assert not torch.allclose(hidden[0], hidden[1])
    torch.testing.assert_close(model(ids, fast), hidden)
    torch.testing.assert_close(model(ids, fast.branches(1)), hidden[:1])
    torch.testing.assert_close(model(ids[1:], fast.rows(slice(1, 2))), hidden[:, 1:])


def test_rows_with_and_without_negative_texts_joined():
    model, ids = tiny.transformer(), tiny.ids(4)
    given = tiny.conditioning(tiny.text())
    other = tiny.conditioning(tiny.text(2, 8, seed=3))
    pair = model.encode_context(given, without_text(given)), model.encode_context(given, other)
    alone = [model(ids[rows], c) for rows, c in zip((slice(2), slice(2, 4)), pair, strict=True)]
    torch.testing.assert_close(model(ids, pair[0].cat(pair[1])), torch.cat(alone, dim=1))
    flipped = pair[1].cat(pair[0])
    torch.testing.assert_close(model(ids.roll(2, 0), flipped), torch.cat(alone[::-1], dim=1))


@pytest.mark.parametrize("make", [tiny.transformer, superres])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_layer_computes_what_is_wanted(make, depth):
    model = make(depth=depth)
    low = None if model.cond_encoder is None else tiny.ids(codes=30)
    ids = tiny.ids(num_tokens=model.seq_len)
    given = tiny.conditioning(tiny.text(), low)
    context = model.encode_context(given, without_text(given))
    at = torch.rand(ids.shape).argsort(dim=1)[:, :5]
    seen = []
    handle = model.blocks[-1].ff.register_forward_hook(lambda _, i, o: seen.append(o.shape))
    part = model(ids, context, at=at)
    handle.remove()
    assert seen == [(4, 5, model.dim)]
    every = model(ids, context)
    torch.testing.assert_close(
        part, every.gather(2, at[None, ..., None].expand(2, 2, 5, model.dim))
    )


# Guidance


def test_guidance_on_hidden_states_is_guidance_on_logits():
    model, ids = tiny.transformer(), tiny.ids()
    text = tiny.text()
    c, u = (
        model(ids, model.encode_context(tiny.conditioning(text, keep=keep)))
        for keep in (True, False)
    )
    assert model.to_logits.bias is None
    on_logits = model.to_logits(u) + 3 * (model.to_logits(c) - model.to_logits(u))
    torch.testing.assert_close(model.to_logits(u + 3 * (c - u)), on_logits, atol=1e-5, rtol=1e-4)


def test_dropped_text_leaves_nothing_behind():
    model, ids = tiny.transformer(), tiny.ids()
    one, two = (run(model, ids, tiny.conditioning(tiny.text(seed=s), keep=False)) for s in (1, 2))
    assert torch.equal(one, two)


def test_without_text_cross_attention_is_a_constant():
    model = tiny.transformer()
    context = model.encode_context(tiny.conditioning(tiny.text(), keep=False))
    for block, keys_values in zip(model.blocks, context.keys_values, strict=True):
        keys_values = tuple(t[0] for t in keys_values)
        out = block.cross(torch.randn(2, 16, 16), keys_values, context.mask[0])
        value = block.cross.to_out(block.cross.null_kv[1].flatten())
        torch.testing.assert_close(out, value.expand_as(out))


# What must matter, and what must not


def test_text_matters_and_its_padding_does_not():
    model, ids = tiny.transformer(), tiny.ids()
    text = tiny.text()
    base = run(model, ids, tiny.conditioning(text))
    assert (run(model, ids, tiny.conditioning(tiny.text(seed=1))) - base).abs().amax(
        -1
    ).min() > 1e-3
    wild = TextEmbeds(torch.where(text.mask[..., None], text.embeds, 1e3), text.mask)
    torch.testing.assert_close(run(model, ids, tiny.conditioning(wild)), base)
    longer = TextEmbeds(F.pad(text.embeds, (0, 0, 0, 4), value=9.0), F.pad(text.mask, (0, 4)))
    torch.testing.assert_close(run(model, ids, tiny.conditioning(longer)), base)


def test_text_embeddings_of_zero_are_still_text():
    """The mask is never inferred from zeros."""
    model, ids = tiny.transformer(), tiny.ids()
    zeros = TextEmbeds.of(torch.zeros(2, 5, tiny.TEXT_DIM))
    seen = run(model, ids, tiny.conditioning(zeros))
    assert not torch.allclose(seen, run(model, ids, tiny.conditioning(zeros, keep=False)))


def test_texts_of_two_lengths_stacked_are_as_before():
    model = tiny.transformer()
    short, long = tiny.text(1, 3), tiny.text(1, 7, seed=1)
    ids = tiny.ids()
    both = run(model, ids, tiny.conditioning(short.cat(long)))
    torch.testing.assert_close(both[:1], run(model, ids[:1], tiny.conditioning(short)))
    torch.testing.assert_close(both[1:], run(model, ids[1:], tiny.conditioning(long)))


def test_positions_matter_in_both_directions():
    model, conditioning = tiny.transformer(), tiny.conditioning(tiny.text(1))
    ids = tiny.ids(1)
    base = run(model, ids, conditioning).view(4, 4, -1)
    grid = ids.view(1, 4, 4)
    for dim in (1, 2):
        turned = run(model, grid.roll(1, dim).flatten(1), conditioning).view(4, 4, -1)
        # without positions the outputs would only move along
        assert (turned - base.roll(1, dim - 1)).abs().max() > 0.1
    rows, columns = model.embed.row[:, 0], model.embed.column[0]
    assert rows.shape == columns.shape == (4, 16)
    same = torch.full((1, 16), 5)
    outputs = run(model, same, conditioning)[0]
    assert torch.pdist(outputs).min() > 1e-3  # every place has a name of its own


@pytest.mark.parametrize("cond_depth", [0, 1, 3])
def test_low_resolution_tokens_matter(cond_depth):
    model = superres(cond_depth=cond_depth)
    assert len(model.cond_encoder.blocks) == cond_depth
    ids, low, text = tiny.ids(num_tokens=64), tiny.ids(codes=30), tiny.text()
    for keep in (True, False):  # also where the text is dropped
        base = run(model, ids, tiny.conditioning(text, low, keep))
        other = low.clone()
        other[:, 5] = (low[:, 5] + 1) % 30
        changed = run(model, ids, tiny.conditioning(text, other, keep))
        assert (changed - base).abs().amax(-1).min() > 1e-4
        # the same tokens in other places
        moved = run(model, ids, tiny.conditioning(text, low.flip(1), keep))
        assert (moved - base).abs().amax(-1).min() > 1e-3


def test_low_resolution_encoder_has_half_the_depth_by_default():
    assert tiny.transformer(depth=3).cond_depth == 2


def test_self_cond_changes_the_output():
    model, ids = tiny.transformer(self_cond=True), tiny.ids()
    conditioning = tiny.conditioning(tiny.text())
    first = run(model, ids, conditioning)
    assert torch.equal(run(model, ids, conditioning, torch.zeros(1, 2, 16, 16)), first)
    assert not torch.allclose(run(model, ids, conditioning, torch.randn(1, 2, 16, 16)), first)


# Critics


def test_token_critic_gives_one_score():
    critic = tiny.critic()
    assert isinstance(critic, TokenCritic)
    assert run(critic, tiny.ids(), tiny.conditioning(tiny.text())).shape == (2, 16, 1)


def test_self_critic_is_a_head_on_the_transformer():
    model = tiny.transformer()
    critic = tiny.randomise(SelfCritic(model))
    conditioning = tiny.conditioning(tiny.text())
    scores = run(critic, tiny.ids(), conditioning)
    assert scores.shape == (2, 16, 1)
    assert list(critic.state_dict()) == ["to_logits.weight"]  # the rest is the transformer's
    other = replace(conditioning, text=tiny.text(seed=1))
    assert not torch.allclose(run(critic, tiny.ids(), other), scores)


# Weights


def fresh(**changes) -> MaskGitTransformer:
    arguments = dict(num_tokens=30, seq_len=16, dim=16, depth=2, dim_head=8, heads=2)
    return MaskGitTransformer(**arguments, text_embed_dim=tiny.TEXT_DIM, **changes)


def test_output_projections_and_self_conditioning_start_at_zero():
    model = fresh(cond_num_tokens=30, cond_seq_len=16, self_cond=True)
    ends = ("to_out.weight", "self_cond_proj.weight")
    outputs = [p for n, p in model.named_parameters() if n.endswith(ends)]
    assert len(outputs) == 2 * 3 + 1 * 2 + 1
    assert all((p == 0).all() for p in outputs)
    assert not [n for n, _ in model.named_parameters() if n.endswith("bias")]


@pytest.mark.parametrize("self_cond", [False, True])
def test_every_parameter_learns(self_cond):
    model = fresh(self_cond=self_cond, cond_num_tokens=30, cond_seq_len=16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    conditioning = replace(
        tiny.conditioning(tiny.text(), tiny.ids(codes=30)), keep=torch.tensor([True, False])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.enable_grad():
        for _ in range(3):
            # the mask token too
            ids = tiny.ids(codes=31)
            context = model.encode_context(conditioning)
            past = (model(ids, context).detach(),) if self_cond else ()
            [logits] = model.to_logits(model(ids, context, *past))
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), tiny.ids(codes=30).flatten()).backward()
            optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == []


# Bad arguments


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_tokens=0), "num_tokens must be at least 1, not 0"),
        (dict(depth=-1), "depth must be at least 1, not -1"),
        (dict(heads=0), "heads must be at least 1"),
        (dict(max_text_len=0), "max_text_len must be at least 1"),
        (dict(seq_len=20), "seq_len 20 is not a perfect square.*16 or 25"),
        (dict(cond_seq_len=4), "cond_num_tokens and cond_seq_len belong together"),
        (dict(cond_seq_len=0, cond_num_tokens=3), "cond_seq_len must be at least 1"),
        (dict(cond_depth=-1), "cond_depth.*-1"),
        (dict(text_embed_dim=-4), "text_embed_dim.*-4"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.transformer(**changes)


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="depht"):
        tiny.transformer(depht=3)


def test_wrong_conditioning():
    model = tiny.transformer()
    wide = TextEmbeds.of(torch.zeros(2, 5, 99))
    with pytest.raises(ValueError, match=r"width 99.*reads 12"):
        model.encode_context(tiny.conditioning(wide))
    with pytest.raises(ValueError, match="takes no low-resolution tokens"):
        model.encode_context(tiny.conditioning(tiny.text(), tiny.ids()))
    with pytest.raises(ValueError, match="needs low-resolution tokens"):
        superres().encode_context(tiny.conditioning(tiny.text()))
    with unchecked(), pytest.raises(ValueError, match=r"embeds \(2, 5, 12\) and mask \(2, 4\)"):
        TextEmbeds(torch.zeros(2, 5, 12), torch.ones(2, 4, dtype=torch.bool))


def test_wrong_number_of_tokens():
    model = tiny.transformer()
    context = model.encode_context(tiny.conditioning(tiny.text()))
    for number in (1, 9):  # one token would be spread over all positions
        with pytest.raises(ValueError, match=rf"{number} tokens.*16"):
            model(tiny.ids(num_tokens=number), context)


def test_low_resolution_is_added_without_changing_the_model():
    plain = tiny.transformer(seq_len=64)
    made = plain.with_low_resolution(30, 16)
    assert plain.cond_encoder is None
    assert plain._init_args["cond_seq_len"] is None
    assert made._init_args["cond_seq_len"] == 16
    shared = dict(plain.named_parameters())
    assert all(p is shared[n] for n, p in made.named_parameters() if not n.startswith("cond_"))
    assert made.with_low_resolution(30, 16) is made
    with pytest.raises(ValueError, match=r"16 low-resolution tokens of 30 codes, not 4 of 30"):
        made.with_low_resolution(30, 4)


def test_files_from_before_the_second_norm_draw_what_they_drew(tmp_path):
    """One norm served both sources, and the size of the encoder was not among the arguments."""
    model = superres()
    model.cond_norm.weight.copy_(model.text_norm.weight)
    conditioning = tiny.conditioning(tiny.text(), tiny.ids(codes=30))
    expected = run(model, tiny.ids(num_tokens=64), conditioning)
    state = {k: v for k, v in model.state_dict().items() if k != "cond_norm.weight"}
    config = {k: v for k, v in model.config.items() if k not in ("cond_num_tokens", "cond_seq_len")}
    path = tmp_path / "old.safetensors"
    save_tree(path, {"config": config, "state": state}, kind="MaskGitTransformer")
    again = MaskGitTransformer.from_pretrained(path)
    assert torch.equal(run(again, tiny.ids(num_tokens=64), conditioning), expected)
