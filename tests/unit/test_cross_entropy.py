"""The loss in chunks, against the one of all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muse_maskgit_pytorch import cross_entropy as module
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cross_entropy import cross_entropy


@pytest.mark.parametrize("smoothing, z_loss", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.02)])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_it_is_the_loss_of_all_logits(monkeypatch, smoothing, z_loss, rows):
    monkeypatch.setattr(module, "ROWS", rows)
    head, hidden = nn.Linear(12, 50, bias=False), torch.randn(29, 12, requires_grad=True)
    labels = torch.randint(50, (29,))
    labels[::3] = -100  # these do not count
    given = [hidden, head.weight]
    expected = F.cross_entropy(head(hidden), labels, label_smoothing=smoothing)
    expected = expected + z_loss * head(hidden)[labels >= 0].exp().sum(-1).log().square().mean()
    loss = cross_entropy(head, hidden, labels, smoothing, z_loss)
    torch.testing.assert_close(loss, expected)
    slopes = [torch.autograd.grad(3 * value, given) for value in (loss, expected)]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])  # in chunks, and with all logits
def test_rows_count_by_their_weights(monkeypatch, bias):
    """As often as they would stand there; all alike is bit for bit what it is without weights."""
    monkeypatch.setattr(module, "ROWS", 4)
    head, hidden = nn.Linear(12, 50, bias=bias), torch.randn(9, 12, requires_grad=True)
    labels, often = torch.arange(9), torch.tensor([3, 0, 1, 2, 0, 1, 1, 5, 1])
    labels[2] = -100
    given = [hidden, head.weight]
    loss = cross_entropy(head, hidden, labels, 0.1, 0.02, weights=often / 4)
    more, again = (x.repeat_interleave(often, 0) for x in (hidden, labels))
    expected = cross_entropy(head, more, again, 0.1, 0.02)
    torch.testing.assert_close(loss, expected)
    slopes = [torch.autograd.grad(value, given) for value in (loss, expected)]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-5)
    assert not slopes[0][0][[1, 2, 4]].any()
    assert cross_entropy(head, hidden, labels, weights=torch.zeros(9)) == 0
    if not bias:
        assert torch.equal(
            cross_entropy(head, hidden, labels, weights=torch.ones(9)),
            cross_entropy(head, hidden, labels),
        )


def test_what_needs_no_gradient_gets_none():
    head, labels = nn.Linear(12, 50, bias=False), torch.randint(50, (9,))
    for learns in ([True, False], [False, True]):
        hidden = torch.randn(9, 12, requires_grad=learns[0])
        head.weight.requires_grad_(learns[1])
        head.weight.grad = None
        cross_entropy(head, hidden, labels).backward()
        assert [hidden.grad is not None, head.weight.grad is not None] == learns
    with torch.no_grad():
        assert not cross_entropy(head, hidden, labels).requires_grad


def test_under_autocast_products_are_in_its_type():
    head, labels = nn.Linear(64, 50, bias=False), torch.randint(50, (9,))
    hidden = torch.randn(9, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(head, hidden, labels)
        expected = F.cross_entropy(head(hidden).float(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)
    [slope], [other] = (torch.autograd.grad(value, [hidden]) for value in (loss, expected))
    assert slope.dtype == torch.float32
    assert (slope - other).norm() < 0.02 * other.norm()


def test_no_more_than_a_chunk_of_logits_is_held(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)
    seen, linear = [], F.linear
    monkeypatch.setattr(module.F, "linear", lambda x, w: seen.append(len(x)) or linear(x, w))
    head = nn.Linear(12, 50, bias=False)
    cross_entropy(head, torch.randn(20, 12), torch.randint(50, (20,)))
    assert seen == [8, 8, 4]


@pytest.mark.parametrize("head", [nn.Linear(12, 50), nn.Sequential(nn.Linear(12, 50, bias=False))])
def test_other_heads_give_all_their_logits(head):
    hidden, labels = torch.randn(9, 12), torch.randint(50, (9,))
    expected = F.cross_entropy(head(hidden), labels)
    torch.testing.assert_close(cross_entropy(head, hidden, labels), expected)
    expected = expected + 0.5 * head(hidden).logsumexp(-1).square().mean()
    torch.testing.assert_close(cross_entropy(head, hidden, labels, z_loss=0.5), expected)


def test_training_goes_through_it(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 3)
    model = tiny.maskgit()
    torch.manual_seed(0)
    loss = model(tiny.ids(), text_embeds=tiny.text())
    monkeypatch.setattr(module, "ROWS", 10_000)
    torch.manual_seed(0)
    torch.testing.assert_close(loss, model(tiny.ids(), text_embeds=tiny.text()))
