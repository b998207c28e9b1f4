"""All quantizers behind one interface: ids and codes say the same thing."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muse_maskgit_pytorch.quantizer import Quantizer, fsq_levels

KINDS = {"vq": 48, "simvq": 48, "lfq": 64, "fsq": 60}
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
def test_only_training_moves_the_codebook(kind):
    quantizer = make(kind).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(features())
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())
    if kind == "vq":
        quantizer.train()(features())
        assert not all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())


def test_training_revives_dead_codes():
    quantizer = make("vq").train()
    x = torch.randn(8, 8, 8, 8)
    usage = [quantizer(x).usage.item() for _ in range(100)]
    assert usage[-1] > max(0.9, usage[0])


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
        ("lfq", dict(codebook_size=1000), "codebook_size 1000 is no power of two.*1024"),
        ("vq", dict(codebook_size=0), "codebook_size must be at least 2, not 0"),
        ("vq", dict(codebook_size=1), "codebook_size must be at least 2, not 1"),
        ("fsq", dict(levels=[5, 5]), r"fsq_levels \[5, 5\] give 25 codes, codebook_size says 60"),
        ("vqq", dict(codebook_size=8), "quantizer 'vqq' is unknown: use vq, simvq, lfq or fsq"),
    ],
)
def test_bad_arguments(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **changes)


def test_levels_without_fsq_are_refused():
    with pytest.raises(ValueError, match="fsq_levels are given, but the quantizer is 'vq'"):
        Quantizer(8, 64, "vq", levels=[8, 8])
