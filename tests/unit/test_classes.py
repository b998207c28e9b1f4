"""Models of classes instead of captions, and of neither."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import MaskGit, Muse
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.images import record_of, save_png
from tests.runs import maskgit_trainer, metrics


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


def pictures(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i * 60, 100, 0)).save(path)
    return folder


@pytest.mark.parametrize("cached", [True, False])
def test_folders_are_classes_and_captions_may_name_them(tmp_path: Path, cached: bool):
    data = pictures(tmp_path / "data", "cat/1.png", "cat/2.png", "dog/1.png", "other/1.png")
    (data / "other/1.txt").write_text("dog")
    (data / "cat/2.txt").write_text("dog")  # a caption goes before the folder
    named = model(["cat", "dog"])
    trainer = maskgit_trainer(
        data, tmp_path / "run", named, cache_tokens=cached, sample_every=2, valid_fraction=0.3
    )
    texts = [trainer.dataset[i]["text"] for i in range(4)]
    assert dict(zip(trainer.dataset.keys, texts, strict=True)) == {
        "cat/1.png": "cat", "cat/2.png": "dog", "dog/1.png": "dog", "other/1.png": "dog",
    }  # fmt: skip
    before = named.transformer.state_dict()["text_proj.weight"].clone()
    trainer.train()
    assert (named.transformer.state_dict()["text_proj.weight"] != before).any()
    assert list((tmp_path / "run/samples").iterdir())


@pytest.mark.parametrize("cached", [True, False])
def test_an_unconditional_model_trains_on_images_alone(tmp_path: Path, cached: bool):
    data = pictures(tmp_path / "data", "1.png", "2.png", "3.png", "4.png")
    plain = model(0)
    maskgit_trainer(
        data, tmp_path / "run", plain, cache_tokens=cached, sample_every=2, valid_fraction=0.3
    ).train()
    assert list((tmp_path / "run/samples").iterdir())
    assert "valid_loss" in str(metrics(tmp_path / "run"))


def test_captions_of_no_class_are_noticed_before_the_run(tmp_path: Path):
    data = pictures(tmp_path / "data", "cat/1.png", "dgo/2.png")
    named = model(["cat", "dog"])
    with pytest.warns(UserWarning, match="left out 1 of 2 images that have no caption: dgo/2.png"):
        maskgit_trainer(data, tmp_path / "run", named)
    (data / "dgo/2.txt").write_text("dgo")
    with pytest.raises(ValueError, match="no class of this model: dgo; its classes are cat, dog"):
        maskgit_trainer(data, tmp_path / "run", named)
    with pytest.raises(ValueError, match=r"has a caption: .*, or a folder for each class: a, b"):
        maskgit_trainer(pictures(tmp_path / "x", "1.png"), tmp_path / "run", model(["a", "b"]))
