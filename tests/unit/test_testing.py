"""The tiny models and inputs for tests."""

import torch

from muse_maskgit_pytorch import testing


def test_inputs_are_the_same_whatever_the_seed_and_the_default_device():
    makers = (testing.ids, testing.images, lambda: testing.text().embeds)
    first = [make() for make in makers]
    torch.manual_seed(7)
    with torch.device("meta"):
        again = [make() for make in makers]
        assert testing.text().mask.device.type == "cpu"
    assert all(map(torch.equal, first, again))
