"""Frozen image networks: what comes out is what the network itself says, and it never changes."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from torch import Tensor

from muse_maskgit_pytorch import features
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.features import (
    LITE,
    FeatureNet,
    FeatureNetError,
    HubNet,
    TextImageNet,
    lpips_distance,
    open_network,
)
from muse_maskgit_pytorch.images import to_tensor
from muse_maskgit_pytorch.training.perceptual import PerceptualLoss
from tests import hub

SMALL = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
VIT = dict(**SMALL, image_size=32, patch_size=8)


@pytest.fixture(scope="module")
def lite() -> FeatureNet:
    return FeatureNet(LITE)


def photo(name: str, size: int = 224) -> Tensor:
    return to_tensor(Image.fromarray(getattr(data, name)()), size)[None]


def saved(model: Any, folder: Path) -> str:
    """Save a small random model with weights large enough to tell images apart."""
    tiny.randomise(model).eval().save_pretrained(folder)
    return str(folder)


def vit(folder: Path, **changes: Any) -> tuple[str, Any]:
    config = transformers.ViTConfig(**VIT, **changes)
    config.num_labels = 7
    model = transformers.ViTForImageClassification(config)
    return saved(model, folder), model


# EfficientNet-Lite0 --------------------------------------------------------------------------


def test_lite_gives_the_logits_of_the_published_network(lite: FeatureNet):
    ramp = torch.linspace(0, 1, 224)
    image = torch.stack([ramp.expand(224, 224), ramp.expand(224, 224).T, ramp * ramp[:, None]])
    # of the package efficientnet_lite_pytorch 0.1.0 with the same weights and (x * 255 - 127) / 128
    golden = [-0.633009, 0.171751, 0.132483, -0.972866, 0.286211, 1.115574]
    logits = lite.logits(image[None])[0]
    assert torch.allclose(logits[:6], torch.tensor(golden), atol=1e-4)
    assert logits.argmax() == 818
    assert float(logits.max()) == pytest.approx(5.3898, abs=1e-4)


@pytest.mark.parametrize("name, classes", [("chelsea", {281, 282, 285}), ("coffee", {967, 968})])
def test_lite_knows_a_cat_and_a_coffee(lite: FeatureNet, name, classes):
    top = lite.logits(photo(name))[0].topk(len(classes)).indices
    assert set(top.tolist()) == classes  # tabby, tiger cat, Egyptian cat; espresso, cup


@pytest.mark.parametrize("size", [32, 33, 64, 100])
def test_lite_takes_any_size(lite: FeatureNet, size):
    maps = lite.maps(tiny.images(2, size))
    sides = [-(-size // 2**level) for level in range(1, 6)]  # "same" padding rounds up
    channels = (16, 24, 40, 112, 320)
    assert [m.shape for m in maps] == [
        (2, c, side, side) for c, side in zip(channels, sides, strict=True)
    ]
    assert lite.logits(tiny.images(2, size)).shape == (2, 1000)
    assert lite.pooled(tiny.images(2, size)).shape == (2, 1280)


def test_the_logits_are_the_head_on_the_pooled_features(lite: FeatureNet):
    images = tiny.images(2, 64)
    assert lite.net.head is not None
    assert torch.equal(lite.net.head(lite.pooled(images, resize=False)), lite.logits(images))


def test_pooled_features_are_those_of_the_networks_own_size(lite: FeatureNet):
    images = torch.nn.functional.interpolate(photo("chelsea", 64), (448, 448), mode="nearest")
    small = torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", antialias=True)
    assert torch.equal(lite.pooled(images), lite.pooled(small, resize=False))
    assert not torch.equal(lite.pooled(images), lite.pooled(images, resize=False))
    # a checkerboard of single pixels is grey when made smaller, not a checkerboard
    board = (torch.arange(448)[:, None] + torch.arange(448)) % 2
    board = board.float().expand(1, 3, 448, 448)
    grey = torch.full((1, 3, 224, 224), 0.5)
    inner = (lite.pooled(board) - lite.pooled(grey)).norm() / lite.pooled(grey).norm()
    assert inner < 0.1


def test_lite_without_its_package(monkeypatch):
    monkeypatch.setattr(features, "LITE_PACKAGE", "no_such_package")
    with pytest.raises(FeatureNetError, match=r"muse-maskgit-pytorch\[perceptual\]"):
        FeatureNet(LITE)


def test_lite_with_other_weights_is_refused(monkeypatch):
    monkeypatch.setattr(features, "LITE_SHA256", "0" * 64)
    with pytest.raises(FeatureNetError, match="sha256 5793442"):
        FeatureNet(LITE)


# Hugging Face networks -----------------------------------------------------------------------


def test_a_convolutional_classifier(resnet: str):
    net = FeatureNet(resnet)
    model = transformers.ResNetForImageClassification.from_pretrained(resnet).eval()
    images = tiny.images(3, 48)
    with torch.no_grad():
        wanted = model((images - 0.5) / 0.25, output_hidden_states=True)  # as its file says
        body = model.resnet((images - 0.5) / 0.25)
    assert torch.allclose(net.logits(images), wanted.logits, atol=1e-6)
    assert torch.allclose(net.pooled(images, resize=False), body.pooler_output.flatten(1))
    for found, stage in zip(net.maps(images), wanted.hidden_states, strict=True):
        assert torch.allclose(found, stage)


def test_a_vision_transformer_is_given_its_own_size(tmp_path: Path):
    name, model = vit(tmp_path)
    net = FeatureNet(name)
    images = tiny.images(2, 48)
    small = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    wanted = model((small - net.mean) / net.std, output_hidden_states=True)
    assert torch.allclose(net.logits(images), wanted.logits, atol=1e-5)
    last = model.vit((small - net.mean) / net.std).last_hidden_state
    assert torch.allclose(net.pooled(images), last[:, 0], atol=1e-5)
    maps = net.maps(images)
    assert [m.shape for m in maps] == [(2, 24, 4, 4)] * 3
    patches = wanted.hidden_states[1][:, 1:]  # after the class token
    assert torch.allclose(maps[1][:, :, 1, 2], patches[:, 1 * 4 + 2], atol=1e-5)


def test_register_tokens_are_no_part_of_the_maps(tmp_path: Path):
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=42,
        patch_size=14,
        num_register_tokens=4,
    )
    model = transformers.Dinov2WithRegistersModel(config)
    net = FeatureNet(saved(model, tmp_path))
    images = tiny.images(2, 42)
    wanted = model((images - net.mean) / net.std, output_hidden_states=True)
    tokens = wanted.hidden_states[-1][:, 1 + 4 :]
    assert torch.allclose(net.maps(images)[-1].flatten(2).mT, tokens, atol=1e-5)
    assert torch.allclose(net.pooled(images), wanted.pooler_output, atol=1e-5)


def test_of_two_towers_the_vision_tower(tmp_path: Path):
    config = transformers.CLIPConfig(
        text_config=dict(**SMALL, vocab_size=50, max_position_embeddings=8), vision_config=VIT
    )
    model = transformers.CLIPModel(config)
    net = FeatureNet(saved(model, tmp_path))
    images = tiny.images(2, 32)
    wanted = model.vision_model((images - net.mean) / net.std)
    assert torch.allclose(net.pooled(images), wanted.pooler_output, atol=1e-5)
    assert net.maps(images)[-1].shape == (2, 24, 4, 4)
    with pytest.raises(ValueError, match="no classification head"):
        net.logits(images)


def test_windowed_transformers_give_maps_too(tmp_path: Path):
    config = transformers.SwinConfig(
        image_size=64, embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    net = FeatureNet(saved(transformers.SwinForImageClassification(config), tmp_path))
    assert [m.shape for m in net.maps(tiny.images(2, 32))] == [
        (2, 12, 16, 16),
        (2, 24, 8, 8),
        (2, 24, 8, 8),
    ]


def test_without_a_trained_pooler_the_class_token_counts(tmp_path: Path):
    model = transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False)
    name = saved(model, tmp_path)
    images = tiny.images(2, 32)
    first, second = FeatureNet(name), FeatureNet(name)
    wanted = model((images - first.mean) / first.std).last_hidden_state[:, 0]
    assert torch.allclose(first.pooled(images), wanted, atol=1e-5)
    assert torch.equal(first.pooled(images), second.pooled(images))  # and no random one


def test_weights_that_are_missing_from_a_file_are_not_made_up(resnet: str, tmp_path: Path):
    for file in Path(resnet).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["classifier.1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FeatureNetError, match=r"lacks weights.*classifier"):
        FeatureNet(str(tmp_path))


def test_a_classifier_without_a_linear_head_is_refused(tmp_path: Path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    config.num_labels = 0  # transformers then puts the identity there
    name = saved(transformers.ResNetForImageClassification(config), tmp_path)
    with pytest.raises(FeatureNetError, match="no linear layer"):
        FeatureNet(name)


@pytest.mark.parametrize(
    "settings, mean, std, size",
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3}, [0.1, 0.2, 0.3], [0.5] * 3, 32),
        ({"do_normalize": False, "image_mean": [0.1] * 3}, [0.0] * 3, [1.0] * 3, 32),
        ({"size": {"shortest_edge": 40}}, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 40),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, None, None, 32),
        ({"size": 24}, None, None, 24),
        (None, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 32),  # no file: ImageNet's
    ],
)
def test_how_a_checkpoint_wants_its_images(tmp_path: Path, settings, mean, std, size):
    name, _ = vit(tmp_path)
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    net = FeatureNet(name)
    assert net.input_size == size
    if mean is not None:
        assert net.mean.flatten().tolist() == pytest.approx(mean)
        assert net.std.flatten().tolist() == pytest.approx(std)


def test_half_precision_files_and_autocast_give_float32(tmp_path: Path):
    name, model = vit(tmp_path)
    model.half().save_pretrained(name)
    net = FeatureNet(name)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        images = tiny.images(2, 32)
        outputs = [net.logits(images), net.pooled(images), *net.maps(images)]
    assert {output.dtype for output in outputs} == {torch.float32}


def test_a_network_that_cannot_be_had_names_the_remedies():
    with pytest.raises(FeatureNetError) as caught:
        FeatureNet("nobody/nothing")
    message = str(caught.value)
    for part in ("nobody/nothing", "local copy", LITE, "muse-maskgit-pytorch[perceptual]"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("make", [hub.make_resnet, hub.make_clip])
def test_a_revision(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = {
        "me/net": make(tmp_path / "old", seed=1),
        "me/net@v2": make(tmp_path / "new", seed=2),
    }
    hub.make_hub(tmp_path / "home", folders)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    images = tiny.images(2, 32)
    for name, folder in folders.items():
        wanted = open_network(str(folder))
        found = open_network(name)
        assert type(found) is type(wanted)
        assert torch.equal(found.pooled(images), wanted.pooled(images))
        assert torch.equal(found.mean, wanted.mean)
    with pytest.raises(FeatureNetError, match="me/net@v3"):
        open_network("me/net@v3")


# Two towers ----------------------------------------------------------------------------------

TEXTS = ["red fox", "owl", "a text of more letters than are read"]


@pytest.mark.parametrize("sigmoid", [False, True])
def test_two_towers_give_their_own_vectors_of_images_and_texts(tmp_path: Path, sigmoid: bool):
    folder = hub.make_clip(tmp_path / "clip", sigmoid)
    net = open_network(str(folder))
    assert isinstance(net, TextImageNet)
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    images = tiny.images(3, 32)
    reader: Any = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = reader(TEXTS, padding="max_length", truncation=True, max_length=12)
    inputs = {"input_ids": torch.tensor(tokens["input_ids"])}
    if not sigmoid:
        inputs["attention_mask"] = torch.tensor(tokens["attention_mask"])
    with torch.no_grad():
        wanted = model(pixel_values=(images - net.mean) / net.std, **inputs)
    pairs = [
        (net.pooled(images), wanted.image_embeds),
        (net.embed_texts(TEXTS), wanted.text_embeds),
    ]
    for found, embeds in pairs:
        unit = torch.nn.functional.normalize(embeds, dim=1)
        assert torch.allclose(torch.nn.functional.normalize(found, dim=1), unit, atol=1e-5)
    assert not torch.allclose(pairs[1][0][0], pairs[1][0][1], atol=1e-2)
    with pytest.raises(ValueError, match="no classification head"):
        net.logits(images)


def test_padding_changes_no_text(clip: str):
    net = open_network(clip)
    assert isinstance(net, TextImageNet)
    alone = net.embed_texts(["owl"])
    assert torch.allclose(net.embed_texts(TEXTS)[1:2], alone, atol=1e-6)


def test_one_tower_is_opened_as_one(resnet: str, tmp_path: Path):
    assert type(open_network(resnet)) is FeatureNet
    assert type(open_network(LITE)) is FeatureNet
    with pytest.raises(FeatureNetError, match="'nobody/nothing' cannot be had"):
        open_network("nobody/nothing")


# Both ----------------------------------------------------------------------------------------


@pytest.fixture(params=["lite", "resnet", "vit"])
def net(request, resnet: str, lite: FeatureNet, tmp_path: Path) -> FeatureNet:
    if request.param == "lite":
        return lite
    return FeatureNet(resnet if request.param == "resnet" else vit(tmp_path)[0])


def test_frozen_whatever_happens_around_it(net: FeatureNet):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.nn.ModuleList([net]).train()
    net.logits(tiny.images(2, 32))
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("what", ["logits", "pooled", "maps"])
def test_the_gradient_reaches_the_images(net: FeatureNet, what):
    images = tiny.images(2, 32).requires_grad_()
    output = getattr(net, what)(images)
    parts = output if isinstance(output, list) else [output]
    torch.stack([part.square().mean() for part in parts]).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


# Distance --------------------------------------------------------------------------------------


def test_distance_of_single_places_by_hand():
    def one(*channels: float) -> Tensor:
        return torch.tensor(channels, dtype=torch.float32).view(1, -1, 1, 1)

    assert float(lpips_distance([one(3, 4)], [one(6, 8)])) == pytest.approx(0, abs=1e-6)
    assert float(lpips_distance([one(1, 0)], [one(0, 5)])) == pytest.approx(2)
    assert float(lpips_distance([one(1, 0)], [one(-7, 0)])) == pytest.approx(4)
    # mean over space: one place of four differs; mean over the two stages
    maps, others = torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    others[:, :, 0, 1] = -1
    assert float(lpips_distance([maps], [others])) == pytest.approx(1)
    assert float(lpips_distance([maps, one(1)], [others, one(1)])) == pytest.approx(0.5)


def test_distance_where_nothing_responds_has_a_finite_gradient():
    maps = torch.zeros(1, 3, 2, 2, requires_grad=True)
    lpips_distance([maps], [torch.ones(1, 3, 2, 2)]).sum().backward()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


def test_distance_grows_with_noise_and_belongs_to_each_image(lite: FeatureNet):
    image = photo("chelsea", 64)
    noise = torch.randn(image.shape) * torch.tensor([0, 0.02, 0.1, 0.4]).view(-1, 1, 1, 1)
    maps = [stage.expand(4, -1, -1, -1) for stage in lite.maps(image)]
    distances = lpips_distance(maps, lite.maps((image + noise).clamp(0, 1)))
    assert distances.shape == (4,)
    assert distances[0] < 1e-6
    assert (distances.diff() > 0.01).all()


def test_perceptual_loss_by_logits_and_by_maps(resnet: str):
    images, targets = tiny.images(2, 32), tiny.images(2, 32, seed=1)
    net = FeatureNet(resnet)
    logits = (net.logits(images) - net.logits(targets)).square().mean()
    assert torch.allclose(PerceptualLoss(resnet)(images, targets), logits)
    maps = lpips_distance(net.maps(images), net.maps(targets)).mean()
    assert torch.allclose(PerceptualLoss(resnet, kind="lpips")(images, targets), maps)
    assert PerceptualLoss(resnet, kind="lpips")(images, images) == 0


@pytest.mark.parametrize("kind", ["logits", "lpips"])
def test_perceptual_loss_moves_the_images_and_not_the_targets(resnet: str, kind):
    images, targets = tiny.images(2, 32).requires_grad_(), tiny.images(2, 32, 1).requires_grad_()
    PerceptualLoss(resnet, kind)(images, targets).backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert targets.grad is None


def test_perceptual_loss_of_a_kind_that_cannot_be(resnet: str, tmp_path: Path):
    wrong: Any = "l2"
    with pytest.raises(ValueError, match=r"perceptual_kind.*'logits', 'lpips'.*'l2'"):
        PerceptualLoss(resnet, kind=wrong)
    bare = saved(transformers.ViTModel(transformers.ViTConfig(**VIT)), tmp_path)
    with pytest.raises(ValueError, match="perceptual_kind=lpips"):
        PerceptualLoss(bare)
    assert isinstance(PerceptualLoss(bare, kind="lpips").net, HubNet)


def test_code_that_a_network_brings_along_never_runs(resnet, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(resnet, folder)
    mark = hub.bring_code(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    with pytest.raises(FeatureNetError, match=r"model' wants to run code of its own, .*refused"):
        FeatureNet(str(folder))
    assert not mark.exists()
