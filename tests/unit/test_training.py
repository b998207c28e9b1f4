"""Trainers: losses, averaged weights, data order, checkpoints, resume, refusals."""

from __future__ import annotations

import json
import math
import signal
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from muse_maskgit_pytorch import (
    CheckpointError,
    ImageFolder,
    MaskGit,
    MaskGitTrainer,
    MaskGitTransformer,
    TextEmbeds,
    TokenCache,
    TokenCritic,
    VQGanVAE,
    VQGanVAETrainer,
)
from muse_maskgit_pytorch.checkpoint import load_tree
from muse_maskgit_pytorch.training.ema import EMA
from muse_maskgit_pytorch.training.health import Health
from muse_maskgit_pytorch.training.perceptual import PerceptualLoss
from muse_maskgit_pytorch.training.trainer import Diverged, EndlessBatches, Trainer

CAPTIONS = ["one", "two owls", "three red kites", "four", "five plums in a bowl", "six", "seven"]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one precision per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven captioned images of 16 px."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, caption in enumerate(CAPTIONS):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def make_vae(seed: int = 0, **changes: Any) -> VQGanVAE:
    torch.manual_seed(seed)
    size: dict[str, Any] = dict(dim=8, vq_codebook_size=16, layers=2, num_res_blocks=1)
    return VQGanVAE(**(size | changes))


def first_weight(vae: VQGanVAE) -> Tensor:
    return vae.state_dict()["encoder.0.weight"]


def make_maskgit(t5: str, seed: int = 0, critic: bool = False, **changes: Any) -> MaskGit:
    vae = make_vae(123)
    torch.manual_seed(seed)
    size = dict(num_tokens=16, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5)
    token_critic = TokenCritic(**size) if critic else None
    transformer = MaskGitTransformer(**size)
    return MaskGit(
        vae=vae, transformer=transformer, image_size=16, token_critic=token_critic, **changes
    )


COMMON: dict[str, Any] = dict(
    batch_size=2, num_train_steps=2, lr=1e-3, warmup_steps=2, sample_every=0, log_every=1
)
RECONSTRUCTION: dict[str, Any] = dict(perceptual_weight=0, gan_weight=0)


def vae_trainer(
    images: Path, results: Path, vae: VQGanVAE | None = None, **changes: Any
) -> VQGanVAETrainer:
    size: dict[str, Any] = dict(image_size=16, discriminator_dim=8)
    arguments = COMMON | RECONSTRUCTION | size | changes
    vae = make_vae() if vae is None else vae
    return VQGanVAETrainer(vae, folder=str(images), results_folder=str(results), **arguments)


def maskgit_trainer(
    images: Path, results: Path, maskgit: MaskGit, **changes: Any
) -> MaskGitTrainer:
    arguments: dict[str, Any] = {**COMMON, "num_samples": 2, **changes}
    return MaskGitTrainer(maskgit, folder=str(images), results_folder=str(results), **arguments)


def metrics(results: Path) -> list[dict[str, float]]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    lines = (results / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def assert_same(a: Any, b: Any, at: str = "") -> None:
    """Equal to the last bit, in any nesting."""
    assert type(a) is type(b), at
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, at
        assert torch.equal(a, b), f"{at}: {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}.{i}")
    else:
        assert a == b, at


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Averaged weights --------------------------------------------------------------------------------


def test_ema_follows_its_formula():
    weight, counter = torch.zeros(3), torch.tensor(0)
    ema = EMA({"weight": weight, "counter": counter}, {"weight"}, decay=0.5)
    expected = torch.zeros(3)
    for step in range(1, 20):
        weight.fill_(float(step))
        counter.fill_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert torch.allclose(ema.average["weight"], expected)
        assert ema.average["counter"] == step
    assert torch.equal(weight, torch.full((3,), 19.0))


def test_ema_decay_is_obeyed():
    """With decay 0 the average is the weight itself, near 1 it hardly moves."""
    ends = {}
    for decay in (0.0, 0.999):
        weight = torch.zeros(1)
        ema = EMA({"weight": weight}, {"weight"}, decay)
        weight.fill_(1.0)
        ema.update(10**6)
        ends[decay] = ema.average["weight"].item()
    assert ends[0.0] == 1
    assert ends[0.999] == pytest.approx(0.001)


def test_ema_is_applied_within_the_block_alone():
    weight = torch.ones(2)
    ema = EMA({"weight": weight}, {"weight"}, 0.9)
    weight.fill_(5.0)

    def fail():
        with ema.applied():
            assert torch.equal(weight, torch.ones(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(weight, torch.full((2,), 5.0))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2])
def test_ema_refuses(decay: float):
    with pytest.raises(ValueError, match="ema_decay"):
        EMA({}, (), decay)


# Adversarial and perceptual parts ----------------------------------------------------------------


def test_the_switch_of_the_gradient_penalty_has_an_effect(images: Path, tmp_path: Path):
    states = []
    for weight in (0.0, 10.0):
        results = tmp_path / f"penalty {weight}"
        torch.manual_seed(5)
        trainer = vae_trainer(
            images, results, gan_weight=0.1, gan_start=0, gradient_penalty_weight=weight
        )
        trainer.train()
        assert ("gradient_penalty" in metrics(results)[0]) == (weight > 0)
        assert trainer.discriminator is not None
        states.append(trainer.discriminator.state_dict())
    assert any(not torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_discriminator_learns_to_tell_real_from_fake(images: Path, tmp_path: Path):
    """Of the tokenizer one bias alone moves, as an optimizer needs something."""
    trainer = vae_trainer(
        images, tmp_path / "r", gan_weight=0.1, gan_start=0, num_train_steps=30, lr=2e-3
    )
    trainer.vae.requires_grad_(False)
    trainer.vae.get_parameter("encoder.0.bias").requires_grad_(True)
    trainer.train()
    scores = [line["discriminator"] for line in metrics(tmp_path / "r") if "discriminator" in line]
    assert scores[-1] < 0.6 * scores[0]


def test_perceptual_network_is_frozen_normalised_and_in_eval_mode(resnet: str):
    loss = PerceptualLoss(resnet)
    loss.train()
    assert not any(module.training for module in loss.modules())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    seen: list[Tensor] = []
    loss.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    targets = torch.rand(2, 3, 32, 32)
    value = loss(images, targets)
    wanted = [(x - 0.5) / 0.25 for x in (targets, images)]  # what the model's own file says
    assert all(torch.allclose(a, b) for a, b in zip(seen, wanted, strict=True))
    value.backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert value > 0


def test_perceptual_distance_of_equal_images_is_zero(resnet: str):
    images = torch.rand(2, 3, 32, 32)
    assert PerceptualLoss(resnet)(images, images.clone()) == 0


def test_perceptual_model_without_preprocessing_takes_imagenets(resnet: str, tmp_path: Path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(resnet).iterdir():
        if file.name != "preprocessor_config.json":
            (bare / file.name).write_bytes(file.read_bytes())
    assert PerceptualLoss(str(bare)).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_a_perceptual_model_that_cannot_be_had(images: Path, tmp_path: Path):
    name = "nobody/nothing"
    with pytest.raises(ValueError, match="perceptual_weight=0") as caught:
        vae_trainer(images, tmp_path / "r", perceptual_weight=0.1, perceptual_model=name)
    message = str(caught.value)
    assert name in message
    assert "perceptual_model" in message
    assert "\n" not in message


def test_perceptual_network_stays_out_of_files(images: Path, tmp_path: Path, resnet: str):
    results = tmp_path / "r"
    trainer = vae_trainer(images, results, perceptual_weight=0.1, perceptual_model=resnet)
    assert trainer.perceptual is not None
    before = {k: v.clone() for k, v in trainer.perceptual.state_dict().items()}
    trainer.train()
    assert_same(dict(trainer.perceptual.state_dict()), before)
    tree, _ = load_tree(next(results.glob("*checkpoint*")))
    assert tree["modules"].keys() == {"vae"}
    assert tree["modules"]["vae"].keys() == trainer.vae.state_dict().keys()
    assert "perceptual" in metrics(results)[0]


@pytest.mark.parametrize("kind", ["vq", "simvq", "lfq", "bsq"])
def test_quantizer_loss_counts_without_the_gan(images: Path, tmp_path: Path, kind: str):
    """And moves the encoder: with both other terms off its weights still change."""
    results = tmp_path / "r"
    vae = make_vae(quantizer=kind)
    before = first_weight(vae).clone()
    vae_trainer(images, results, vae, recon_weight=0.0, weight_decay=0).train()
    line, weights = metrics(results)[0], vae.quantizer.weights
    terms = weights if kind in ("lfq", "bsq") else ["commitment"]
    assert all(line[name] != 0 for name in terms)
    assert line["loss"] == pytest.approx(sum(weights[name] * line[name] for name in terms))
    assert not torch.equal(before, first_weight(vae))


def test_each_network_is_clipped_by_its_own_gradients(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = vae_trainer(
        images, tmp_path / "r", gan_weight=0.1, gan_start=0, max_grad_norm=0.01, weight_decay=0
    )
    original, seen = trainer.optimizer_step, []

    def spy(name: str) -> Tensor:
        modules = trainer.modules()
        (other,) = modules.keys() - {name}
        assert all(p.grad is None for p in modules[other].parameters())
        grads = [p.grad for p in modules[name].parameters() if p.grad is not None]
        own = torch.stack([g.norm() for g in grads]).norm()
        norm = original(name)
        assert torch.allclose(norm, own)
        seen.append(name)
        return norm

    monkeypatch.setattr(trainer, "optimizer_step", spy)
    trainer.train()
    assert seen == ["vae", "discriminator"] * 2


def test_gan_starts_when_it_is_told(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results, gan_weight=0.1, gan_start=2, num_train_steps=4).train()
    lines = [line for line in metrics(results) if "loss" in line]
    assert ["generator" in line for line in lines] == [False, False, True, True]


# Data order --------------------------------------------------------------------------------------


def order(
    size: int, batch: int, count: int, *, seed=0, start=0, rank=0, world=1
) -> list[list[int]]:
    return list(islice(EndlessBatches(size, batch, seed, start, rank, world), count))


def test_each_epoch_has_every_image_once():
    flat = [i for batch in order(10, 4, 25) for i in batch]
    epochs = [flat[start : start + 10] for start in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_order_depends_on_the_seed_and_the_position_alone():
    assert order(10, 4, 20) == order(10, 4, 20)
    assert order(10, 4, 20)[7:] == order(10, 4, 13, start=7)
    assert order(10, 4, 20) != order(10, 4, 20, seed=1)
    assert order(3, 8, 2)[0].count(0) in (2, 3)  # a batch larger than the set


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_epoch(world: int):
    shares = [order(24, 2, 24 // (2 * world), rank=rank, world=world) for rank in range(world)]
    flat = [i for share in shares for batch in share for i in batch]
    assert sorted(flat) == list(range(24))
    whole = order(24, 2 * world, 24 // (2 * world))
    together = [[i for share in shares for i in share[k]] for k in range(len(whole))]
    assert together == whole


# The loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate(images: Path, tmp_path: Path, schedule: str):
    trainer = vae_trainer(
        images, tmp_path / "r", num_train_steps=110, warmup_steps=10, lr_schedule=schedule
    )
    factors = []
    for trainer.step in range(111):
        factors.append(trainer._lr_factor())
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    if schedule == "constant":
        assert set(factors[10:]) == {1.0}
    else:
        assert factors[60] == pytest.approx(0.505)
        assert factors[35] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
        assert factors[110] == pytest.approx(0.01)
        assert factors[10:] == sorted(factors[10:], reverse=True)


def test_the_optimizer_uses_the_scheduled_rate(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=4, warmup_steps=2, lr=0.5e-3)
    used, original = [], trainer.train_step

    def spy(batches: Iterator[Any]) -> dict[str, Tensor]:
        used.append(trainer.optimizers["vae"].param_groups[0]["lr"])
        return original(batches)

    trainer.train_step = spy  # type: ignore[method-assign]
    trainer.train()
    assert used[:3] == pytest.approx([0.25e-3, 0.5e-3, 0.5e-3])
    assert used[3] < used[2]
    logged = [line["lr"] for line in metrics(tmp_path / "r") if "lr" in line]
    assert logged == pytest.approx(used)


def test_weight_decay_is_on_matrices_alone(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r", weight_decay=0.1)
    trainer._prepare()
    matrices, rest = trainer.optimizers["vae"].param_groups
    assert matrices["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in rest["params"])


def test_optimizers_list_parameters_in_the_order_of_the_module(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r")
    trainer._prepare()
    names = {id(p): name for name, p in trainer.vae.named_parameters()}
    listed = [names[id(p)] for g in trainer.optimizers["vae"].param_groups for p in g["params"]]
    parameters = list(trainer.vae.named_parameters())
    expected = [n for n, p in parameters if p.ndim > 1] + [n for n, p in parameters if p.ndim <= 1]
    assert listed == expected


def test_accumulated_gradients_are_those_of_the_whole_batch(images: Path, tmp_path: Path):
    """FSQ has no batch statistics, so 2 x 2 images and 4 images are one mean."""
    gradients, losses = [], []
    for batch_size, accumulate in ((4, 1), (2, 2)):
        vae = make_vae(quantizer="fsq")
        trainer = vae_trainer(
            images,
            tmp_path / f"r{accumulate}",
            vae,
            batch_size=batch_size,
            grad_accum_every=accumulate,
            num_train_steps=1,
            valid_fraction=0,
        )
        original, grads = trainer.optimizer_step, {}

        def spy(name: str, trainer=trainer, original=original, grads=grads) -> Tensor:
            parameters = trainer.vae.named_parameters()
            grads.update({n: p.grad.clone() for n, p in parameters if p.grad is not None})
            return original(name)

        trainer.optimizer_step = spy  # type: ignore[method-assign]
        trainer.train()
        gradients.append(grads)
        losses.append(metrics(tmp_path / f"r{accumulate}")[0]["loss"])
    whole, parts = gradients
    assert losses[0] == pytest.approx(losses[1])
    assert whole.keys() == parts.keys()
    for name, grad in whole.items():
        assert torch.allclose(grad, parts[name], rtol=1e-3, atol=1e-6), name


def test_bf16(images: Path, tmp_path: Path, t5: str, resnet: str):
    trainer = vae_trainer(
        images, tmp_path / "vae", mixed_precision="bf16", gan_weight=0.1, gan_start=0,
        gradient_penalty_weight=1.0, perceptual_weight=0.1, perceptual_model=resnet,
    )  # fmt: skip
    trainer.train()
    assert {p.dtype for p in trainer.vae.parameters()} == {torch.float32}
    maskgit = make_maskgit(t5, critic=True)
    maskgit_trainer(images, tmp_path / "base", maskgit, mixed_precision="bf16").train()
    assert {p.dtype for p in maskgit.parameters()} == {torch.float32}
    for folder in ("vae", "base"):
        lines = metrics(tmp_path / folder)
        assert all(
            math.isfinite(value)
            for line in lines
            for name, value in line.items()
            if name != "stage"
        )


def test_a_time_limit_ends_the_run_and_saves(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    trainer = vae_trainer(
        images, results, num_train_steps=10**6, warmup_steps=0, max_minutes=0.01, save_every=10**6
    )
    trainer.train()
    assert 0 < trainer.step < 10**6
    assert last_checkpoint(results)["step"] == trainer.step
    assert (results / "vae-ema.safetensors").is_file()
    rates = [line["lr"] for line in metrics(results) if "lr" in line]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5 * COMMON["lr"]  # it follows the clock


def test_loading_processes_change_nothing(images: Path, tmp_path: Path):
    states = []
    for workers in (0, 1):
        vae = make_vae()
        vae_trainer(images, tmp_path / f"r{workers}", vae, num_workers=workers).train()
        states.append(dict(vae.state_dict()))
    assert_same(states[0], states[1])


def test_metrics_files_and_pictures(images: Path, tmp_path: Path, t5: str):
    results = tmp_path / "r"
    maskgit = make_maskgit(t5)
    maskgit_trainer(
        images, results, maskgit, num_train_steps=5, sample_every=2, valid_fraction=0.3
    ).train()
    lines = metrics(results)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert {line["step"] for line in lines if "valid_loss" in line} == {2, 4, 5}
    pictures = sorted(path.name for path in (results / "samples").iterdir())
    assert pictures == [f"base-0000000{i}.png" for i in (2, 4, 5)]
    with Image.open(results / "samples" / pictures[0]) as picture:
        picture.load()
    assert (results / "base.safetensors").is_file()
    assert not [path for path in results.rglob("*") if "tmp" in path.name]


def test_validation_does_not_touch_the_training(images: Path, tmp_path: Path, t5: str):
    states = []
    for every in (0, 1):
        maskgit = make_maskgit(t5)
        maskgit_trainer(
            images, tmp_path / f"r{every}", maskgit, sample_every=every, valid_fraction=0.3
        ).train()
        states.append(dict(maskgit.state_dict()))
    assert_same(states[0], states[1])


def test_a_perfect_reconstruction_is_still_valid_json(images: Path, tmp_path: Path):
    trainer = vae_trainer(images, tmp_path / "r", valid_fraction=0.3)
    trainer.health = Health("vae")  # as the run begins
    trainer._log({"psnr": math.inf, "loss": math.nan})
    assert metrics(tmp_path / "r")[0]["step"] == 0


def test_one_image_is_enough(images: Path, tmp_path: Path):
    """Nothing is left for validation then."""
    for path in sorted(images.glob("*.png"))[1:]:
        path.unlink()
    vae_trainer(images, tmp_path / "r").train()


def test_the_constructor_writes_nothing(
    images: Path, tmp_path: Path, t5: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    folders = sorted(tmp_path.rglob("*"))
    vae_trainer(images, Path("./results"))
    maskgit_trainer(images, Path("./results"), make_maskgit(t5)).cuda()
    assert snapshot(tmp_path) == before
    assert sorted(tmp_path.rglob("*")) == folders


def test_a_broken_image_does_not_end_the_run(images: Path, tmp_path: Path, t5: str):
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:300])
    (images / "3.png").write_bytes(b"no image")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vae_trainer(images, tmp_path / "vae", num_train_steps=6, valid_fraction=0).train()
        maskgit_trainer(images, tmp_path / "base", make_maskgit(t5), num_train_steps=6).train()
    messages = " ".join(str(w.message) for w in caught)
    assert "2.png" in messages
    assert "3.png" in messages
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "vae"))


# Checkpoints -------------------------------------------------------------------------------------


def interrupt(trainer: Trainer, step: int, number: int = signal.SIGINT) -> None:
    """Train, and press Ctrl-C within this step."""
    original = trainer.train_step

    def pressed(batches: Iterator[Any]) -> dict[str, Tensor]:
        if trainer.step == step - 1:
            signal.raise_signal(number)
        return original(batches)

    trainer.train_step = pressed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def last_checkpoint(results: Path) -> dict[str, Any]:
    return load_tree(sorted(results.glob("*checkpoint*"))[-1])[0]


def last_state(results: Path) -> dict[str, Any]:
    """The newest checkpoint without the names of those before it."""
    return {name: value for name, value in last_checkpoint(results).items() if name != "written"}


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_an_interrupted_tokenizer_run_ends_as_an_unbroken_one(
    images: Path, tmp_path: Path, resnet: str, quantizer: str
):
    def trainer(name: str, seed: int, **changes: Any) -> VQGanVAETrainer:
        vae = make_vae(seed, quantizer=quantizer)
        return vae_trainer(
            images, tmp_path / name, vae, num_train_steps=6, gan_weight=0.1, gan_start=1,
            gradient_penalty_weight=1.0, perceptual_weight=0.1, perceptual_model=resnet, **changes,
        )  # fmt: skip

    trainer("unbroken", 0).train()
    torch.manual_seed(0)
    interrupt(trainer("broken", 0), step=3)
    assert last_checkpoint(tmp_path / "broken")["step"] == 3
    assert not (tmp_path / "broken" / "vae.safetensors").exists()
    trainer("broken", seed=1, resume=True).train()
    assert_same(last_state(tmp_path / "broken"), last_state(tmp_path / "unbroken"))
    assert_same(
        load_tree(tmp_path / "broken" / "vae-ema.safetensors")[0]["state"],
        load_tree(tmp_path / "unbroken" / "vae-ema.safetensors")[0]["state"],
    )


@pytest.mark.parametrize("cached", [True, False])
def test_an_interrupted_transformer_run_ends_as_an_unbroken_one(
    images: Path, tmp_path: Path, t5: str, cached: bool
):
    def trainer(name: str, seed: int, **changes: Any) -> MaskGitTrainer:
        maskgit = make_maskgit(t5, seed, critic=True)
        changes |= dict(cache_tokens=cached, num_train_steps=6, grad_accum_every=2)
        return maskgit_trainer(images, tmp_path / name, maskgit, **changes)

    trainer("unbroken", 0).train()
    interrupt(trainer("broken", 0), step=3)
    trainer("broken", seed=1, resume=True).train()
    whole = last_state(tmp_path / "unbroken")
    assert_same(last_state(tmp_path / "broken"), whole)
    assert whole["step"] == 6
    steps = {float(s["step"]) for s in whole["optimizers"]["model"]["state"].values()}
    assert steps == {6.0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_saves(images: Path, tmp_path: Path, number: int):
    before = signal.getsignal(number)
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=9)
    interrupt(trainer, step=2, number=number)
    assert trainer.step == 2
    assert last_checkpoint(tmp_path / "r")["step"] == 2
    assert signal.getsignal(number) is before


def test_resuming_a_finished_run_changes_nothing(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    before = load_tree(results / "vae.safetensors")[0]
    vae_trainer(images, results, make_vae(1), resume=True).train()
    assert_same(load_tree(results / "vae.safetensors")[0], before)


def test_a_folder_with_a_run_is_refused_and_left_alone(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    before = snapshot(results)
    with pytest.raises(CheckpointError, match="resume=True") as caught:
        vae_trainer(images, results).train()
    assert "\n" not in str(caught.value)
    assert snapshot(results) == before


@pytest.mark.parametrize(
    "other", [dict(dim=12), dict(quantizer="fsq"), dict(num_res_blocks=2), dict(layers=1)]
)
def test_a_checkpoint_of_another_model_is_refused(
    images: Path, tmp_path: Path, other: dict[str, Any]
):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    before = snapshot(results)
    vae = make_vae(**other)
    weights = {k: v.clone() for k, v in vae.state_dict().items()}
    with pytest.raises(CheckpointError, match="another model"):
        vae_trainer(images, results, vae, resume=True).train()
    assert snapshot(results) == before
    assert_same(dict(vae.state_dict()), weights)


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path):
    results = tmp_path / "r"
    vae_trainer(images, results).train()
    path = next(results.glob("*checkpoint*"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=path.name):
        vae_trainer(images, results, resume=True).train()


def test_the_run_keeps_its_last_checkpoints_and_removes_nothing_else(images: Path, tmp_path: Path):
    """What it wrote before a resume counts; a checkpoint of another run is not its to delete."""
    results = tmp_path / "r"
    settings: dict[str, Any] = dict(num_train_steps=9, save_every=2, keep_checkpoints=2)
    interrupt(vae_trainer(images, results, **settings), step=5)
    assert checkpoints(results) == [4, 5]
    (results / "mine.safetensors").write_bytes(b"mine")
    (results / "vae-checkpoint-notes.txt").write_text("mine")
    (results / "vae-checkpoint-00000003.safetensors").write_bytes(b"another run's")
    (results / "base-checkpoint-00000002.safetensors").write_bytes(b"another stage's")
    vae_trainer(images, results, resume=True, **settings).train()
    left = sorted(path.name for path in results.iterdir() if path.is_file())
    assert left == [
        "base-checkpoint-00000002.safetensors",
        "metrics.jsonl",
        "mine.safetensors",
        "report.html",
        "vae-checkpoint-00000003.safetensors",
        "vae-checkpoint-00000008.safetensors",
        "vae-checkpoint-00000009.safetensors",
        "vae-checkpoint-notes.txt",
        "vae-ema.safetensors",
        "vae.safetensors",
    ]


def checkpoints(results: Path) -> list[int]:
    """Steps of the checkpoints that lie there."""
    return sorted(int(path.stem[-8:]) for path in results.glob("*checkpoint-*.safetensors"))


def test_saved_weights_load_as_models(images: Path, tmp_path: Path, t5: str):
    vae_results, results = tmp_path / "vae", tmp_path / "base"
    trainer = vae_trainer(images, vae_results)
    trainer.train()
    averaged = VQGanVAE.from_pretrained(vae_results / "vae-ema.safetensors")
    assert_same(dict(averaged.state_dict()), dict(trainer.ema.average))
    raw = VQGanVAE.from_pretrained(vae_results / "vae.safetensors")
    assert_same(dict(raw.state_dict()), dict(trainer.vae.state_dict()))
    assert not torch.equal(first_weight(raw), first_weight(averaged))
    make_vae(3).load(vae_results / "vae-ema.safetensors")

    maskgit = make_maskgit(t5)
    trainer = maskgit_trainer(images, results, maskgit)
    trainer.train()
    averaged = MaskGit.from_pretrained(results / "base-ema.safetensors")
    for name, value in trainer.ema.average.items():
        assert torch.equal(averaged.state_dict()[name], value)
    assert not any(name.startswith("vae.") for name in trainer.ema.average)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("batch_size", -1),
        ("grad_accum_every", 0),
        ("num_train_steps", 0),
        ("log_every", 0),
        ("save_every", -5),
        ("keep_checkpoints", 0),
        ("sample_every", -1),
        ("warmup_steps", -1),
        ("lr", -1e-3),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1.0),
        ("valid_fraction", 1.0),
        ("valid_fraction", -0.1),
        ("ema_decay", 1.0),
        ("max_minutes", -1.0),
        ("max_minutes", 0.0),
        ("num_workers", -1),
        ("lr_schedule", "cosin"),
        ("recon_loss", "huber"),
        ("recon_weight", -1.0),
        ("perceptual_weight", -1.0),
        ("gan_weight", -1.0),
        ("gan_start", -1),
        ("gradient_penalty_weight", -1.0),
        ("quantizer_weight", -1.0),
        ("discriminator_dim", 0),
        ("image_size", 0),
        ("image_size", 18),
    ],
)
def test_what_the_tokenizers_trainer_refuses(images: Path, tmp_path: Path, name: str, value: Any):
    arguments: dict[str, Any] = {"gan_weight": 0.1, name: value}
    with pytest.raises(ValueError, match=name.replace("_", ".")) as caught:
        vae_trainer(images, tmp_path / "r", **arguments)
    assert str(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, value", [("num_samples", 0), ("part", "critic"), ("part", "head")])
def test_what_the_transformers_trainer_refuses(
    images: Path, tmp_path: Path, t5: str, name: str, value: Any
):
    with pytest.raises(ValueError, match=name):
        maskgit_trainer(images, tmp_path / "r", make_maskgit(t5), **{name: value})


def test_a_missing_folder_is_refused(tmp_path: Path, t5: str):
    with pytest.raises(ValueError, match="does not exist"):
        vae_trainer(tmp_path / "nowhere", tmp_path / "r")
    with pytest.raises(ValueError, match="does not exist"):
        maskgit_trainer(tmp_path / "nowhere", tmp_path / "r", make_maskgit(t5))


def test_captions_are_needed(images: Path, tmp_path: Path, t5: str):
    for path in images.glob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match="caption"):
        maskgit_trainer(images, tmp_path / "r", make_maskgit(t5))


# Critics and caches ------------------------------------------------------------------------------


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("part", ["transformer", "critic", "all"])
def test_a_part_trains_alone(images: Path, tmp_path: Path, t5: str, part: str, own_head: bool):
    maskgit = make_maskgit(t5, critic=not own_head, self_token_critic=own_head)
    before = {k: v.clone() for k, v in maskgit.state_dict().items()}
    maskgit_trainer(
        images, tmp_path / "r", maskgit, part=part, num_train_steps=3, warmup_steps=0
    ).train()
    moved = {k.split(".")[0] for k, v in maskgit.state_dict().items() if (v != before[k]).any()}
    assert moved == ({"transformer", "critic"} if part == "all" else {part})


def test_training_leaves_the_tokenizer_alone(images: Path, tmp_path: Path, t5: str):
    """Neither its weights nor the codebook's running means move, and it stays in eval mode."""
    maskgit = make_maskgit(t5)
    before = {k: v.clone() for k, v in maskgit.vae.state_dict().items()}
    maskgit_trainer(images, tmp_path / "r", maskgit, sample_every=1, cache_tokens=False).train()
    assert_same(dict(maskgit.vae.state_dict()), before)
    assert not any(module.training for module in maskgit.vae.modules())


def superres(t5: str) -> MaskGit:
    torch.manual_seed(0)
    size = dict(num_tokens=16, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5)
    maskgit = MaskGit(
        vae=make_vae(1),
        cond_vae=make_vae(2, layers=1),
        transformer=MaskGitTransformer(**size),
        image_size=16,
        cond_image_size=8,
    )
    for module in maskgit.transformer.modules():  # zero at first: then nothing conditions
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    return maskgit


@pytest.mark.parametrize("high", [True, False])
def test_cached_tokens_give_the_loss_of_the_images(images: Path, t5: str, high: bool):
    maskgit = superres(t5) if high else make_maskgit(t5)
    dataset = ImageFolder(images, 16, captions=True)
    cache = TokenCache(maskgit, dataset, batch_size=3)
    assert len(cache) == len(dataset)
    rows = [4, 0, 6]
    items = [dataset[row] for row in rows]
    batch = cache.__getitems__(rows)
    losses = []
    for arguments in (
        dict(images_or_ids=batch.ids, text_embeds=batch.text_embeds, cond_ids=batch.cond_ids),
        dict(
            images_or_ids=torch.stack([item["image"] for item in items]),
            texts=[item["text"] for item in items],
        ),
    ):
        torch.manual_seed(3)
        losses.append(maskgit(**arguments).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # texts are kept in half precision


def test_cached_captions_keep_their_order(images: Path, t5: str):
    maskgit = make_maskgit(t5)
    dataset = ImageFolder(images, 16, captions=True)
    cache = TokenCache(maskgit, dataset, batch_size=2)
    for row in range(len(dataset)):
        item, cached = dataset[row], cache[row]
        alone = maskgit.embed_texts([item["text"]])
        assert item["text"] == CAPTIONS[row]
        assert cached.text_embeds is not None
        assert cached.text_embeds.mask.all()
        assert cached.text_embeds.embeds.shape == alone.embeds.shape
        assert torch.allclose(cached.text_embeds.embeds, alone.embeds, atol=2e-3)
        assert cached.ids is not None
        assert torch.equal(cached.ids, maskgit.vae.encode_to_ids(item["image"][None]).flatten(1))


def test_cached_texts_need_not_be_padded_on_the_right(
    images: Path, t5: str, monkeypatch: pytest.MonkeyPatch
):
    maskgit = make_maskgit(t5)

    def left(texts: list[str]) -> TextEmbeds:
        lengths = torch.tensor([len(text) for text in texts])
        at = torch.arange(25) - 25 + lengths[:, None]
        embeds = at.float()[..., None].expand(-1, -1, 16)
        return TextEmbeds(embeds, at >= 0)

    monkeypatch.setattr(maskgit, "embed_texts", left)
    text = TokenCache(maskgit, ImageFolder(images, 16, captions=True))[1].text_embeds
    assert text is not None
    assert text.embeds[0, :, 0].tolist() == list(range(len(CAPTIONS[1])))


def test_a_diverging_run_stops_with_a_sentence_and_keeps_its_checkpoint(
    images: Path, tmp_path: Path
):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=6, save_every=2)
    original = trainer.train_step

    def poisoned(batches: Iterator[Any]) -> dict[str, Tensor]:
        terms = original(batches)
        return terms if trainer.step < 3 else terms | {"loss": torch.tensor(torch.nan)}

    trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged, match="the loss is nan at step 4: lower lr"):
        trainer.train()
    assert last_checkpoint(tmp_path / "r")["step"] == 2


def test_precisions_may_differ_from_trainer_to_trainer(images: Path, tmp_path: Path, t5: str):
    vae = make_vae()
    forward = vae.forward
    vae_trainer(images, tmp_path / "vae", vae, mixed_precision="bf16").train()
    assert vae.forward == forward  # not wrapped for good
    maskgit_trainer(images, tmp_path / "base", make_maskgit(t5), mixed_precision="no").train()


def test_a_frozen_part_trains_again_with_the_next_trainer(images: Path, tmp_path: Path, t5: str):
    model = make_maskgit(t5, critic=True)
    maskgit_trainer(images, tmp_path, model, part="critic")
    assert not any(p.requires_grad for p in model.transformer.parameters())
    maskgit_trainer(images, tmp_path, model, part="all")
    assert all(p.requires_grad for p in model.transformer.parameters())
    assert not any(p.requires_grad for p in model.vae.parameters())


def test_no_checkpoint_is_written_over_a_good_one_once_the_loss_is_no_number(
    images: Path, tmp_path: Path
):
    trainer = vae_trainer(images, tmp_path / "r", num_train_steps=9, save_every=1, log_every=50)
    original = trainer.train_step

    def poisoned(batches: Iterator[Any]) -> dict[str, Tensor]:
        terms = original(batches)
        return terms if trainer.step < 4 else terms | {"loss": torch.tensor(torch.nan)}

    trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(Diverged):
        trainer.train()
    assert last_checkpoint(tmp_path / "r")["step"] == 4


def test_a_checkpoint_leaves_the_tokenizers_out(images: Path, tmp_path: Path, t5: str):
    vae = make_vae(123)
    size = dict(num_tokens=16, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5)
    model = MaskGit(
        vae=vae, transformer=MaskGitTransformer(**size), image_size=16, cond_image_size=8
    )
    maskgit_trainer(images, tmp_path / "r", model).train()
    saved = last_checkpoint(tmp_path / "r")["modules"]["model"]
    assert saved
    assert all(name.startswith("transformer.") for name in saved)


def test_resume_takes_the_settings_of_today(images: Path, tmp_path: Path):
    vae_trainer(images, tmp_path / "r", num_train_steps=2).train()
    again = vae_trainer(
        images, tmp_path / "r", num_train_steps=3, resume=True, betas=(0.5, 0.6), weight_decay=0.7
    )
    again.train()
    assert {group["betas"] for group in again.optimizers["vae"].param_groups} == {(0.5, 0.6)}
    assert [g["weight_decay"] for g in again.optimizers["vae"].param_groups] == [0.7, 0.0]
