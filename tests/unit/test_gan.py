"""The adversarial part: each loss at chosen scores, and a discriminator that sees no grid."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muse_maskgit_pytorch.training.gan import (
    BlurPool,
    Discriminator,
    accuracy,
    balance,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    lecam,
    move_anchors,
)

# The network -------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(8, 8), (6, 10), (5, 7), (2, 2)])
def test_blur_pool_is_a_binomial_convolution(height: int, width: int):
    x = torch.randn(2, 3, height, width)
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(line, line).expand(3, 1, 4, 4)
    wanted = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, stride=2, groups=3)
    torch.testing.assert_close(BlurPool()(x), wanted)


def test_blur_pool_does_not_alias():
    """A checkerboard is grey at half the resolution; a stride alone would make it white."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    board = ((y + x) % 2 * 2.0 - 1)[None, None]
    assert board[..., ::2, ::2].abs().min() == 1
    assert BlurPool()(board)[..., 1:-1, 1:-1].abs().max() < 1e-6
    flat = torch.full((1, 1, 16, 16), 0.7)
    torch.testing.assert_close(BlurPool()(flat), flat[..., ::2, ::2])  # what is even stays


def test_blur_pool_can_be_differentiated_twice():
    x = torch.randn(1, 2, 4, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: BlurPool()(x).square(), x)


@pytest.mark.parametrize(
    "size, layers, side", [(32, 3, 4), (16, 3, 2), (16, 1, 8), (64, 5, 2), (24, 2, 6)]
)
def test_discriminator_scores_patches(size: int, layers: int, side: int):
    scores = Discriminator(8, layers)(torch.rand(2, 3, size, size))
    assert scores.shape == (2, 1, side, side)


def test_images_of_a_batch_are_judged_alone():
    """So real and generated images may share a forward pass."""
    net, images = Discriminator(8), torch.rand(4, 3, 16, 16)
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(net(images), alone, atol=1e-5, rtol=1e-4)


# The losses --------------------------------------------------------------------------------------

REAL, FAKE = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])


def test_hinge():
    # real: 0 and 0.5 below the margin; fake: 0 and 1.5 above it
    assert discriminator_loss(REAL, FAKE, "hinge") == pytest.approx((0.25 + 0.75) / 2)
    assert discriminator_loss(torch.ones(2), -torch.ones(2), "hinge") == 0
    assert discriminator_loss(torch.zeros(2), torch.zeros(2), "hinge") == 1
    assert generator_loss(FAKE, "hinge") == pytest.approx(1.25)


def test_non_saturating():
    def log(*scores: float) -> float:
        return sum(math.log1p(math.exp(score)) for score in scores) / len(scores)

    wanted = (log(-2, -0.5) + log(-3, 0.5)) / 2
    assert discriminator_loss(REAL, FAKE, "non_saturating") == pytest.approx(wanted)
    nothing = discriminator_loss(torch.zeros(2), torch.zeros(2), "non_saturating")
    assert nothing == pytest.approx(math.log(2))
    assert generator_loss(FAKE, "non_saturating") == pytest.approx(log(3, -0.5))
    # where the discriminator is sure, the generator's gradient does not vanish
    sure = torch.tensor([-20.0], requires_grad=True)
    generator_loss(sure, "non_saturating").backward()
    assert sure.grad is not None
    assert sure.grad.item() == pytest.approx(-1)


@pytest.mark.parametrize("kind", ["hinge", "non_saturating"])
def test_losses_are_float32(kind: Any):
    for loss in (discriminator_loss(REAL.half(), FAKE.half(), kind), generator_loss(FAKE, kind)):
        assert loss.dtype == torch.float32


def test_accuracy_is_the_share_judged_rightly():
    real, fake = torch.tensor([1.0, -1.0, 2.0, 3.0]), torch.tensor([-1.0, 1.0])
    assert accuracy(real, fake) == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert accuracy(real, -real) == pytest.approx(3 / 4)
    assert accuracy(torch.ones(3), -torch.ones(3)) == 1
    assert accuracy(-torch.ones(3), torch.ones(3)) == 0


def test_lecam_pulls_each_kind_towards_the_others_average():
    real, fake = torch.tensor([1.0, -1.0]), torch.tensor([0.5, -2.0])
    anchors = torch.tensor([0.8, -0.3])  # of real, of fake
    # real above -0.3 by 1.3 and 0; fake below 0.8 by 0.3 and 2.8
    assert lecam(real, fake, anchors) == pytest.approx((1.3**2 + 0.3**2 + 2.8**2) / 2)
    assert lecam(torch.tensor([-0.4]), torch.tensor([0.9]), anchors) == 0


def test_anchors_are_moving_averages():
    anchors = torch.tensor([1.0, -1.0])
    move_anchors(anchors, torch.tensor([3.0, 0.0]), decay=0.75)
    assert anchors.tolist() == [1.5, -0.75]
    move_anchors(anchors, torch.tensor([1.5, 1.25]), decay=0.75)
    assert anchors.tolist() == [1.5, -0.25]


def test_gradient_penalty_of_a_linear_discriminator():
    """Two patches, whose scores add up: the gradient is the sum of their weights."""
    images = torch.rand(3, 3, 4, 4, requires_grad=True)
    weight = torch.randn(3, 2, 48, requires_grad=True)
    scores = torch.einsum("bd,pd->bp", images.flatten(1), weight[0])
    penalty = gradient_penalty(images, scores)
    assert penalty.item() == pytest.approx(weight[0].sum(0).square().sum().item(), rel=1e-5)
    penalty.backward()  # and the penalty trains it: d |w1 + w2|^2 = 2 (w1 + w2)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], (2 * weight[0].detach().sum(0)).expand(2, -1))


def test_gradient_penalty_is_that_of_a_known_function():
    """The sum of a x^2 has the gradient 2 a x."""
    x = torch.rand(2, 3, 4, 4, requires_grad=True)
    a = torch.tensor(0.7, requires_grad=True)
    penalty = gradient_penalty(x, (a * x**2).sum(dim=(1, 2, 3)))
    assert torch.allclose(penalty, (2 * 0.7 * x).square().sum(dim=(1, 2, 3)).mean())
    penalty.backward()
    assert a.grad is not None
    assert torch.allclose(a.grad, 2 * penalty.detach() / 0.7)


def test_gradient_penalty_reaches_the_discriminators_weights():
    net, images = Discriminator(8), torch.rand(2, 3, 16, 16, requires_grad=True)
    gradient_penalty(images, net(images)).backward()
    first = net.net[0].weight
    assert isinstance(first, nn.Parameter)
    assert first.grad is not None
    assert first.grad.abs().sum() > 0


def test_balance_is_the_ratio_of_the_gradients_norms():
    weight = nn.Parameter(torch.randn(4))
    images = 2 * weight
    recon = torch.full((4,), 1.5)  # (3, 3, 3, 3) with respect to the weight, norm 6
    adversarial = torch.tensor([0.25, -0.6, 0, 0])  # norm 1.3
    ratio = balance(images, recon, adversarial, weight)
    assert ratio == pytest.approx(6 / (1.3 + 1e-4))
    assert not ratio.requires_grad
    assert weight.grad is None
    doubled = balance(images, recon, adversarial, weight, mean=lambda gradient: 2 * gradient)
    assert doubled == pytest.approx(12 / (2.6 + 1e-4))  # the mean comes before the norm
    assert balance(images, recon, adversarial, weight, scale=2.0**16) == pytest.approx(ratio)
    images.sum().backward()  # the graph is still there
    assert balance(2 * weight, recon, 0 * recon, weight) == 1e4
    assert balance(2 * weight, 0 * recon, recon, weight) == 0
