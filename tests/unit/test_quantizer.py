"""All quantizers behind one interface: ids and codes say the same thing."""

import copy
import math
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muse_maskgit_pytorch.quantizer import VQ, Binary, Quantizer, fsq_levels

KINDS = {"vq": 48, "simvq": 48, "lfq": 64, "bsq": 64, "fsq": 60}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: Any, dim: int = 8, **changes: Any) -> Quantizer:
    return Quantizer(dim, changes.pop("codebook_size", KINDS.get(kind)), kind, 4, **changes)


def features(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 8, 5, 3))) * 3


@every_kind
def test_ids_and_codes_say_the_same(kind):
    quantizer = make(kind).eval()
    out = quantizer(features())
    assert out.quantized.shape == (2, 8, 5, 3)
    assert out.ids.shape == (2, 5, 3)
    assert out.ids.dtype == torch.long
    assert 0 <= out.ids.min() <= out.ids.max() < KINDS[kind]
    assert len(out.ids.unique()) > 5
    torch.testing.assert_close(quantizer.decode(out.ids), out.quantized, atol=1e-5, rtol=1e-5)


@every_kind
def test_every_id_is_a_code_of_its_own(kind):
    quantizer = make(kind).eval()
    ids = torch.arange(KINDS[kind]).view(1, 1, -1)
    codes = quantizer.decode(ids)[0, :, 0].T
    assert len(codes) == quantizer.codebook_size == KINDS[kind]
    assert torch.pdist(codes).min() > 1e-4


@every_kind
def test_usage_is_the_share_of_codes_in_the_batch(kind):
    out = make(kind).eval()(features())
    assert out.usage == pytest.approx(len(out.ids.unique()) / KINDS[kind])


@every_kind
def test_the_loss_is_a_scalar(kind):
    loss = make(kind).train()(features()).loss
    assert loss.shape == ()
    assert loss.isfinite()
    assert (loss == 0) == (kind == "fsq")  # the quantizer's loss is not dropped on the way


@every_kind
def test_gradient_reaches_the_encoder_through_the_codes(kind):
    quantizer, x = make(kind).train(), features().requires_grad_()
    quantizer(x).quantized.square().sum().backward()  # the reconstruction alone, not the loss
    assert x.grad is not None
    assert (x.grad != 0).any(dim=1).float().mean() > 0.9
    grad = quantizer.project_in.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0


@every_kind
def test_codes_are_chosen_in_float32(kind):
    quantizer, x = make(kind).eval(), features(2, 8, 16, 16)
    plain = quantizer(x)
    with torch.autocast("cpu", torch.bfloat16):
        under = quantizer(x)
        assert torch.equal(quantizer(x.bfloat16()).ids, quantizer(x.bfloat16().float()).ids)
    assert torch.equal(under.ids, plain.ids)
    assert under.quantized.dtype == torch.float32
    assert quantizer(x.bfloat16()).quantized.dtype == torch.bfloat16


@every_kind
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_no_numbers_still_get_ids(kind, mode, bad):
    """An index error, which ends a GPU's process, would come before any guard."""
    quantizer, x = getattr(make(kind), mode)(), features()
    x[0, :, 2, 1] = bad
    out = quantizer(x)
    assert 0 <= out.ids.min() <= out.ids.max() < KINDS[kind]
    assert quantizer.decode(out.ids).isfinite().all()
    assert out.quantized[1].isfinite().all()  # what stands beside it is unharmed


@every_kind
def test_only_training_moves_the_codebook(kind):
    quantizer = make(kind).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(features())
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())
    if kind == "vq":
        quantizer.train()(features())
        assert not all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())


@pytest.mark.parametrize(
    "kind, weights",
    [
        ("vq", dict(commitment=0.5)),
        ("simvq", dict(commitment=1.0)),  # the library weighs its two parts itself
        ("lfq", dict(commitment=0.5, entropy=0.3, diversity=-0.3)),
        ("bsq", dict(commitment=0.5, entropy=0.3, diversity=-0.3)),
        ("fsq", {}),
    ],
)
def test_the_loss_is_the_weighted_sum_of_its_terms(kind, weights):
    settings = dict(commitment_weight=0.5, entropy_weight=0.3)
    out = make(kind, **settings).train()(features())
    assert out.terms.keys() == weights.keys()
    wanted = sum(weight * out.terms[name].item() for name, weight in weights.items())
    assert out.loss.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("term", ["commitment", "entropy", "diversity"])
@pytest.mark.parametrize("kind", ["lfq", "bsq"])
def test_each_term_reaches_the_encoder(kind, term):
    quantizer = make(kind).train()
    quantizer(features()).terms[term].backward()
    grad = quantizer.project_in.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0


# Codes that are moving averages ------------------------------------------------------------------


def codebook(codes: list[Any], counts: list[float], decay: float, l2_norm: bool = False) -> VQ:
    """With these codes, each chosen so often on average."""
    vq = VQ(len(codes[0]), len(codes), decay, l2_norm).train()
    vq.codes.copy_(torch.tensor(codes))
    vq.counts.copy_(torch.tensor(counts))
    vq.sums.copy_(vq.codes * vq.counts[:, None])
    return vq


def rows(*values: float) -> torch.Tensor:
    """A batch of one-dimensional vectors."""
    return torch.tensor(values, dtype=torch.float).view(1, -1, 1)


def test_codes_are_moving_averages_of_what_chose_them():
    vq = codebook([[0.0], [10.0]], counts=[2.0, 2.0], decay=0.5)
    out = vq(rows(1, 2, 9, 14))
    assert out.ids.tolist() == [[0, 0, 1, 1]]
    assert out.codes.flatten().tolist() == [0, 0, 10, 10]  # the codes of before
    assert out.terms["commitment"] == pytest.approx((1 + 4 + 1 + 16) / 4)
    # sums (0 + 3) / 2 and (20 + 23) / 2, counts 2 and 2
    assert vq.codes.flatten().tolist() == [0.75, 10.75]
    assert vq(rows(4, 5, 5.5, 20)).ids.tolist() == [[0, 0, 0, 1]]
    # sums (1.5 + 14.5) / 2 and (21.5 + 20) / 2, counts (2 + 3) / 2 and (2 + 1) / 2
    assert vq.codes.flatten().tolist() == pytest.approx([8 / 2.5, 20.75 / 1.5])
    assert vq.counts.tolist() == [2.5, 1.5]


def test_codes_on_the_sphere():
    """Vectors are normalised, and so is the mean: here of (1, 0) and (0.6, 0.8)."""
    vq = codebook([[1.0, 0.0], [0.0, -1.0]], counts=[1.0, 1.0], decay=0.0, l2_norm=True)
    out = vq(torch.tensor([[[7.0, 0.0], [0.3, 0.4], [0.0, -5.0]]]))
    assert out.ids.tolist() == [[0, 0, 1]]
    mean = torch.tensor([0.8, 0.4])
    torch.testing.assert_close(vq.codes[0], mean / mean.norm())
    torch.testing.assert_close(vq.codes[1], torch.tensor([0.0, -1.0]))
    distances = [0, (0.6 - 1) ** 2 + 0.8**2, 0]
    assert out.terms["commitment"] == pytest.approx(sum(distances) / 6)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_only_normalised_codes_have_length_one(l2_norm):
    quantizer = make("vq", l2_norm=l2_norm).train()
    for _ in range(3):
        quantizer(features(2, 8, 16, 16))
    lengths = quantizer.state_dict()["inner.codes"].norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(48)) is l2_norm


def test_dead_codes_go_where_the_error_is():
    """Errors 0, 0, 0, 9 and 16; two dead codes stand at 1/4 and 3/4 of their sum."""
    vq = codebook([[0.0], [1e3], [2e3]], counts=[5.0, 0.0, 0.0], decay=0.9)
    out = vq(rows(0, 0, 0, 3, -4))
    assert out.ids.unique().tolist() == [0]
    assert vq.codes[1:].flatten().tolist() == [3, -4]
    assert vq.counts[1:].tolist() == pytest.approx([5 / 3] * 2)  # as often as the average code


def test_dead_codes_are_spread_in_proportion_to_the_error():
    vq = codebook([[0.0]] + [[1e3]] * 40, counts=[80.0] + [0.0] * 40, decay=0.9)
    vq(rows(*[1.0] * 40, *[-(3.0**0.5)] * 40))  # errors 1 and 3
    revived = vq.codes[1:].flatten()
    assert (revived == 1).sum() == 10
    assert (revived < -1.7).sum() == 30


def test_a_revived_code_stays_for_its_grace():
    """Unchosen, it counts 0.9^n of the average after n batches; below 0.1 it moves again."""
    vq = codebook([[0.0], [1e3]], counts=[6.0, 0.0], decay=0.9)
    vq(rows(0, 0, 0, 0, 0, 50))
    for batch in range(1, 23):
        assert vq.codes[1].item() == pytest.approx(50, rel=1e-5), batch
        vq(rows(1, -1, 1, -1, 1, -1))
    assert abs(vq.codes[1].item()) == pytest.approx(1)


def test_a_new_codebook_is_filled_from_the_first_batches():
    """More codes than vectors in a batch, and no code near any vector."""
    vq = VQ(4, 64, decay=0.99, l2_norm=False).train()
    data = torch.randn(8, 1, 16, 4) + 50
    assert (vq.codes - 50).norm(dim=-1).min() > 90
    for batch in data:
        vq(batch)
    assert (vq.codes - 50).norm(dim=-1).max() < 10


@pytest.mark.parametrize("l2_norm", [True, False])
def test_all_codes_come_into_use_on_two_far_clusters(l2_norm):
    vq = VQ(4, 32, decay=0.99, l2_norm=l2_norm).train()
    generator = torch.Generator().manual_seed(0)

    def batch(count: int) -> torch.Tensor:
        side = torch.randint(2, (1, count, 1), generator=generator) * 40.0 - 20
        return torch.randn(1, count, 4, generator=generator) + side

    for _ in range(100):
        vq(batch(256))
    counts = vq.eval()(batch(4096)).ids.flatten().bincount(minlength=32)
    assert counts.min() > 0
    assert counts.max() < 0.2 * counts.sum()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("l2_norm", [True, False])
def test_rows_that_are_no_numbers_teach_nothing(l2_norm, bad):
    vq = VQ(4, 16, decay=0.9, l2_norm=l2_norm).train()
    for _ in range(5):
        vq(torch.randn(1, 64, 4))
    twin, good = copy.deepcopy(vq), torch.randn(1, 64, 4)
    poisoned = torch.randn(1, 3, 4)
    poisoned[0, :, 1] = bad
    ids = twin(torch.cat([poisoned[:, :2], good, poisoned[:, 2:]], dim=1)).ids
    assert torch.equal(ids[:, 2:-1], vq(good).ids)
    assert 0 <= ids.min() <= ids.max() < 16
    for name, value in vq.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    before = vq.codes.clone()
    vq(poisoned)  # nothing else in the batch
    torch.testing.assert_close(vq.codes, before)


def test_training_uses_no_random_numbers():
    """Two codebooks learn the same from the same batches, whatever the generators stand at."""
    first = VQ(4, 64, decay=0.9, l2_norm=True).train()
    second = copy.deepcopy(first)
    data = torch.randn(30, 2, 32, 4)
    for vq in (first, second):
        torch.manual_seed(id(vq) % 1000)
        for batch in data:
            vq(batch)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


# Codes of bits -----------------------------------------------------------------------------------


def entropies(binary: Binary, rows: torch.Tensor) -> tuple[float, float]:
    """Entropy of a vector's code and of the batch's, over the list of all codes.

    The chance of a code is the softmax of its products with the vector; the sharpness 4 is the
    log-odds of a bit at the distance of a code from the boundary, so half of it for either side.
    """
    codes = binary.codes_of(torch.arange(2 ** rows.shape[1])[None])[0]
    products = 2 * rows @ codes.T / codes[0, 0].square()
    chances = products.double().softmax(dim=-1)
    each, mean = torch.special.entr(chances).sum(-1).mean(), chances.mean(0)
    return each.item(), torch.special.entr(mean).sum().item()


@pytest.mark.parametrize("spherical", [True, False])
@pytest.mark.parametrize("bits", [1, 3, 10])
def test_entropies_are_those_over_all_codes(bits, spherical):
    binary, vectors = Binary(bits, spherical).train(), torch.randn(2, 10, bits)
    terms = binary(vectors).terms
    flat = vectors.flatten(0, 1)
    if spherical:
        flat = torch.nn.functional.normalize(flat, dim=-1)
    each, batch = entropies(binary, flat)
    assert terms["entropy"].item() == pytest.approx(each, rel=1e-4)
    assert terms["diversity"].item() == pytest.approx(batch, rel=1e-4)


def test_diversity_of_many_bits_is_an_upper_bound():
    """Bits in two groups that always agree: the bound cannot know, so it counts both."""
    binary, free = Binary(12, spherical=False).train(), torch.randn(1, 20, 12)
    each, batch = entropies(binary, free[0])
    terms = binary(free).terms
    assert terms["entropy"].item() == pytest.approx(each, rel=1e-4)
    assert batch < terms["diversity"].item() <= 12 * math.log(2)
    same = torch.cat([torch.full((1, 8, 12), 5.0), torch.full((1, 8, 12), -5.0)], dim=1)
    assert entropies(binary, same[0])[1] == pytest.approx(math.log(2), rel=1e-4)
    assert binary(same).terms["diversity"].item() == pytest.approx(2 * math.log(2), rel=1e-4)


@pytest.mark.parametrize("bits", [1, 6, 18])
def test_bsq_codes_lie_on_the_unit_sphere(bits):
    binary = Binary(bits, spherical=True)
    out = binary(torch.randn(2, 7, bits) * 9)
    torch.testing.assert_close(out.codes.norm(dim=-1), torch.ones(2, 7))
    torch.testing.assert_close(out.codes, binary.codes_of(out.ids))
    assert out.terms["commitment"] * bits <= 2  # no two points of the sphere's octant are farther


def test_lfq_codes_are_corners_of_the_cube():
    codes = Binary(3, spherical=False).codes_of(torch.arange(8)[None])[0]
    assert codes.tolist() == [
        [(1.0 if i >> bit & 1 else -1.0) for bit in range(3)] for i in range(8)
    ]


@pytest.mark.parametrize("kind", ["lfq", "bsq"])
def test_a_quarter_of_a_million_codes_are_affordable(kind):
    quantizer = make(kind, codebook_size=2**18).train()
    assert sum(value.numel() for value in quantizer.state_dict().values()) < 1000
    assert sum(value.numel() for value in quantizer.buffers()) == 18  # and no hidden table
    x, times = features(2, 8, 16, 16).requires_grad_(), []
    for _ in range(3):
        start = time.perf_counter()
        out = quantizer(x)
        out.loss.backward()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    assert out.ids.max() > 2**17
    torch.testing.assert_close(quantizer.decode(out.ids), out.quantized, atol=1e-5, rtol=1e-5)


def test_commitment_weight_counts():
    losses = []
    for weight in (0.25, 0.5):
        torch.manual_seed(1)
        losses.append(make("vq", commitment_weight=weight).train()(features()).loss.item())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-4)


def products(limit: int) -> set[int]:
    """All products of 3 to 8 up to a limit."""
    found, new = set(), {1}
    while new:
        new = {n * level for n in new for level in range(3, 9) if n * level <= limit} - found
        found |= new
    return found


PRODUCTS = products(70_000)


@given(size=st.one_of(st.integers(2, 70_000), st.sampled_from(sorted(PRODUCTS))))
def test_fsq_levels_multiply_to_the_size(size):
    try:
        levels = fsq_levels(size)
    except ValueError as error:
        reason = str(error)
        near = eval(reason[reason.index("[") :], {})
        assert 1 <= len(near) <= 2
        for other in near:
            assert math.prod(fsq_levels(other)) == other
            assert other != size
        assert size not in PRODUCTS
    else:
        assert math.prod(levels) == size
        assert all(3 <= level <= 8 for level in levels)
        assert len(levels) >= math.log(size, 8) - 1e-9


@pytest.mark.parametrize("size, levels", [(8192, 5), (4096, 4), (64, 2), (1000, 4), (512, 3)])
def test_fsq_takes_few_levels(size, levels):
    assert len(fsq_levels(size)) == levels


def test_fsq_size_that_cannot_be():
    with pytest.raises(ValueError, match=r"codebook_size 4099 .*\[4096, 4116\]"):
        make("fsq", codebook_size=4099)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("lfq", dict(codebook_size=1000), "codebook_size 1000 is not a power of two.*LFQ.*1024"),
        ("bsq", dict(codebook_size=48), "codebook_size 48 is not a power of two.*BSQ.*64"),
        ("vq", dict(codebook_size=0), "codebook_size must be at least 2, not 0"),
        ("vq", dict(codebook_size=1), "codebook_size must be at least 2, not 1"),
        ("fsq", dict(levels=[5, 5]), r"fsq_levels \[5, 5\] give 25 codes, codebook_size says 60"),
        ("vqq", dict(codebook_size=8), "quantizer 'vqq' is unknown: use vq, simvq, lfq, bsq or"),
    ],
)
def test_bad_arguments(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **changes)


def test_levels_without_fsq_are_refused():
    with pytest.raises(ValueError, match="fsq_levels are given, but the quantizer is 'vq'"):
        Quantizer(8, 64, "vq", levels=[8, 8])


@every_kind
def test_nothing_is_learnt_without_gradients(kind):
    """Ids asked of a tokenizer in training mode must not move its codebook."""
    quantizer = make(kind).train()
    rows = features()
    with torch.no_grad():
        first = quantizer(rows)
        assert torch.equal(quantizer(rows).ids, first.ids)
    assert first.terms.keys() <= {"commitment"}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(decay=1.0), r"codebook_decay must be in \[0, 1\), not 1.0"),
        (dict(commitment_weight=-1.0), "commitment_weight must not be negative"),
        (dict(entropy_weight=-0.1), "entropy_weight must not be negative"),
    ],
)
def test_weights_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        make("vq", **changes)


def test_forwards_of_one_batch_move_the_codes_once():
    """Two micro batches of 4 are one batch of 8; outside of the block each forward is a batch."""
    torch.manual_seed(0)
    whole, parts = (Quantizer(8, 16, "vq") for _ in range(2))
    inner: Any = parts.inner
    parts.load_state_dict(whole.state_dict())
    features = torch.randn(8, 8, 3, 3)
    for _ in range(3):
        whole(features)
        with parts.one_batch():
            before = inner.codes.clone()
            for half in features.split(4):
                parts(half)
            assert torch.equal(inner.codes, before)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, msg=name)
    before = inner.codes.clone()
    with suppress(RuntimeError), parts.one_batch():
        parts(features)
        raise RuntimeError
    assert torch.equal(inner.codes, before)  # nothing half-done
