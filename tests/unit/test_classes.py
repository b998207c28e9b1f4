"""Models of classes instead of captions, and of neither."""

import pytest
import torch

from muse_maskgit_pytorch import MaskGit, Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.images import record_of, save_png


def model(classes) -> MaskGit:
    return tiny.maskgit(tiny.transformer(classes=classes, text_embed_dim=None))


def ids(model: MaskGit, *args, **kwargs) -> list:
    return model.generate_ids(*args, timesteps=4, **kwargs).tolist()


def test_a_class_is_named_or_numbered():
    named = model(["cat", "dog", "a red car"])
    assert named.transformer.text_embed_dim == 3
    by_name = ids(named, ["dog", "a red car"], seeds=1)
    assert ids(named, [1, 2], seeds=1) == by_name
    assert ids(named, torch.tensor([1, 2]), seeds=1) == by_name
    assert ids(named, ["cat", "a red car"], seeds=1) != by_name
    counted = model(10)
    assert ids(counted, 7, seeds=1) == ids(counted, "7", seeds=1)


def test_the_classes_matter_to_the_loss_and_can_be_dropped():
    named, images = model(3), tiny.images(2)

    def loss(labels, drop=0.0):
        torch.manual_seed(0)
        return named(images, labels, cond_drop_prob=drop).item()

    assert loss([0, 1]) != loss([0, 2])
    assert loss([0, 1], 1.0) == loss([2, 2], 1.0)


def test_unconditional_models_take_no_texts():
    plain = model(0)
    assert plain(tiny.images()).isfinite()
    assert len(ids(plain, seeds=[1, 2, 3])) == 3
    muse = Muse(plain)
    assert len(muse(seeds=[1, 2, 3], timesteps=2)) == 3
    assert len(muse()) == 1
    with pytest.raises(ValueError, match="no classes: 'cat' must be left out"):
        muse("cat")


def test_records_and_files_know_the_classes(tmp_path):
    muse = Muse(model(["cat", "dog"]))
    again = Muse.from_pretrained(muse.save(tmp_path / "model.safetensors"))
    [picture] = again([1], seeds=3, timesteps=4)
    assert '"prompts": ["dog"]' in str(record_of(picture))
    path = save_png(picture, tmp_path / "dog.png")
    assert again.like(path)[0].tobytes() == picture.tobytes()
    assert muse("dog", seeds=3, timesteps=4)[0].tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "texts, message",
    [
        ("dgo", "class 'dgo' is unknown, did you mean 'dog'"),
        (2, "class must be at most 1, not 2"),
        (-1, "class must be at least 0, not -1"),
        ([True], "must be a string, not True"),
        ([1.0], "must be a string, not 1.0"),
        (None, "either texts or text_embeds"),
    ],
)
def test_what_is_no_class(texts, message):
    with pytest.raises(ValueError, match=message):
        Muse(model(["cat", "dog"]))(texts)


def test_what_are_no_classes():
    for classes, message in [
        (-1, "classes must be at least 0"),
        (["a", "a"], "a name twice"),
        (["a", ""], "must be names"),
        ("cat", "classes must be a whole number"),
        (2.0, "classes must be a whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(classes)
    with pytest.raises(ValueError, match="text_embed_dim 12 is given with 3 classes"):
        tiny.transformer(classes=3)
