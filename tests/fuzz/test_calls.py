"""Calls at random: pictures, or one sentence that names the argument.

Arguments are drawn from what works, from what nearly works and from what nobody expects, and most
calls have one or two of them wrong.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import MaskGit, Muse, SampleOptions, TextEmbeds, VQGanVAE, editing, words
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.transformer import MaskGitTransformer
from tests.fuzz.driver import Random, odd, run
from tests.shapes import unchecked

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), unchecked():
        warnings.simplefilter("ignore")
        yield


# Values ------------------------------------------------------------------------------------------


def numbers(*good: Any) -> list[Any]:
    """The same in the types of other libraries, in lists, and out of range."""
    kinds = [np.int64, np.float32, torch.tensor, lambda x: [x], lambda x: [x, x], np.array]
    made = [kind(x) for x in good if not isinstance(x, str) for kind in kinds]
    return [*good, *made, -1, 0, 10**30, math.nan, -math.inf, "1", str(good[0]), None, True]


TEXTS = [
    "a red car", ["a red car"], ["a red car", "two cats"], ("a", "b"), np.array(["a", "b"]), "",
    [], ["a", None], 3, [""], "caf\udce9", "a\0b", {"a": 1}, "word " * 50, b"a red car", None,
]  # fmt: skip
TENSORS = [
    torch.rand(1, 3, 16, 16), torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16).numpy(),
    torch.rand(3, 16, 16), torch.rand(1, 1, 16, 16), torch.rand(1, 3, 15, 16),
    torch.rand(0, 3, 16, 16), torch.full((1, 3, 16, 16), math.nan),
    torch.rand(1, 3, 16, 16).half(), torch.zeros(1, 3, 16, 16).int(),
    torch.rand(1, 3, 16, 16).double(), torch.rand(()), torch.rand(1, 3, 16, 16, dtype=torch.cfloat),
]  # fmt: skip
IDS = [
    torch.zeros(1, 16).long(), torch.zeros(2, 16).int(), np.zeros((1, 4, 4), dtype=np.uint8),
    torch.full((1, 16), 60), torch.full((1, 16), 61), torch.full((1, 16), -1), torch.zeros(1, 16),
    torch.zeros(1, 15).long(), torch.zeros(16).long(), torch.zeros(()).long(), [[0] * 16],
    torch.full((1, 4, 4), 59), torch.zeros(0, 16).long(), torch.zeros(1, 16).bool(),
]  # fmt: skip
EMBEDS = [
    tiny.text(1), tiny.text(2), tiny.text(2).embeds, tiny.text(1).embeds.numpy(),
    torch.zeros(1, 5, 11), torch.zeros(1, 12), torch.full((1, 5, 12), math.nan),
    torch.zeros(1, 5, 12).long(), TextEmbeds(torch.rand(1, 5, 12), torch.zeros(1, 5).bool()),
    torch.zeros(1, 0, 12), torch.zeros(0, 5, 12), torch.rand(1, 5, 12).half(),
]  # fmt: skip
SIZES = [
    16, (16, 32), [32, 16], np.array([16, 16]), torch.tensor(32), 15, 0, -16, 2**40, "16", (16,),
    (16, 16, 16), 16.0,
]  # fmt: skip
OPTIONS: dict[str, list[Any]] = {
    "timesteps": [*numbers(1, 3, 40), 10**7],
    "temperature": numbers(0, 1.0, 2.5),
    "temperature_end": numbers(0, 1.0),
    "cond_scale": numbers(1, 3.0),
    "choice_temperature": numbers(0, 4.5),
    "top_k": numbers(0, 5),
    "top_p": numbers(0.5, 1),
    "min_p": numbers(0, 0.1),
    "remask": numbers(0, 0.5),
    "policy": ["confidence", "halton", "critic", None, "best", lambda logits, log_prob: log_prob,
                lambda logits, log_prob: log_prob[0], lambda logits, log_prob: None],
    "noise_schedule": ["cosine", "square", [0.5, 0.2], [0.2, 0.5], lambda t: 1 - t, lambda t: None,
                       lambda t: t * math.nan, [], "cos", np.array([0.7, 0.3])],
    "guidance_schedule": ["linear", "constant", [0, 1], [math.nan], lambda p: p, lambda p: "x"],
    "seeds": [1, [1], [1, 2], np.int64(3), 2**63, 2**64, -1, 1e20, "1", b"2", [1, 1], None],
    "timestep": [3],
}  # fmt: skip
PICTURES = [
    Image.new("RGB", (16, 16), (9, 99, 199)), [Image.new("L", (32, 16))], Image.new("RGBA", (5, 3)),
    Image.new("RGB", (1, 1)), torch.rand(3, 16, 16), torch.rand(1, 3, 16, 16), "a.png", [],
    np.zeros((16, 16, 3), np.uint8), Image.new("I;16", (16, 16)), torch.full((3, 16, 16), math.nan),
]  # fmt: skip
MASKS = [
    torch.ones(16, 16).bool(), torch.zeros(16, 16).bool(), torch.ones(1, 16, 16).bool(),
    torch.ones(4, 4).bool(), Image.new("L", (16, 16), 255), np.ones((16, 16), bool),
    torch.rand(16, 16), torch.ones(2, 1, 16, 16).bool(), torch.ones(16, 16).int(),
]  # fmt: skip
EDITING: dict[str, list[Any]] = {
    "seeds": OPTIONS["seeds"], "grow": numbers(0, 3), "feather": numbers(0, 4),
    "blend": [True, False, "cosine", 1],
}  # fmt: skip


def drawn(random: Random, values: dict[str, list[Any]], share: float = 0.3) -> dict[str, Any]:
    """Some of the arguments; of each usually one of the values listed, now and then anything."""
    return {name: pick(random, of) for name, of in values.items() if random.random() < share}


def pick(random: Random, values: list[Any]) -> Any:
    return odd(random) if random.random() < 0.05 else values[random.integers(len(values))]


def good(random: Random, values: list[Any], chance: float = 0.7) -> Any:
    """Usually the first, which works."""
    return values[0] if random.random() < chance else pick(random, values)


# Calls -------------------------------------------------------------------------------------------


def told(call: Callable[[], Any]) -> str:
    """How it went: "done", or "refused" in one sentence without control characters."""
    done, said = None, None
    try:
        done = call()
    except ValueError as error:
        said = str(error)
    if said is not None:
        assert said.strip(), "an empty message"
        assert not CONTROL.search(said), repr(said)
        assert len(said) < 1000, said
        assert "Tensor" not in said or "\n" not in said
        return "refused"
    for tensor in [done] if isinstance(done, torch.Tensor) else []:
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all())
    return "done"


@pytest.fixture(scope="module")
def muse(t5: str) -> Any:
    torch.manual_seed(0)
    text = dict(t5_name=t5, text_embed_dim=None)
    vae = tiny.vae()
    base = tiny.maskgit(tiny.transformer(**text), vae=vae, sample_options=dict(timesteps=2))
    superres = tiny.superres(
        model=tiny.transformer(seq_len=64, **text), vae=vae, sample_options=dict(timesteps=2)
    )
    return Muse(base, superres).eval()


def test_drawing(muse: Any):
    models = [tiny.maskgit(self_token_critic=True).eval(), tiny.superres().eval()]
    mappings = [{"timesteps": 2}, {}, SampleOptions(timesteps=2), {"steps": 2}, [], None, "fast"]

    def cascade(random: Random) -> Callable[[], Any]:
        arguments = drawn(random, OPTIONS, 0.12)
        more = dict(
            negative_texts=[None, "dogs", ["dogs"], ["a", "b"], [None], 3, ["\ud83d"]],
            base_options=mappings, superres_options=mappings, image_size=[32, *SIZES],
            preset=["default", "fast", None, 3], return_lowres=[True, False],
            superres_timesteps=numbers(2), base_temperature=numbers(1.0), large=[False, 0, "x"],
            canvases=[None, {}, {"base": IDS[0]}, {"base": IDS[4]}, {"bas": IDS[0]}, {"base": 1}],
        )  # fmt: skip
        texts = good(random, TEXTS)
        return lambda: muse(texts, **arguments, **drawn(random, more, 0.08))

    def stage(random: Random) -> Callable[[], Any]:
        arguments = drawn(random, OPTIONS, 0.12)
        model = models[random.integers(2)]
        more = dict(canvas=IDS, image_size=[16, 32, *SIZES[:3], *SIZES[5:8], *SIZES[9:]])
        if random.random() < 0.5:
            key = "cond_images" if random.random() < 0.5 else "cond_ids"
            arguments[key] = good(random, TENSORS if key == "cond_images" else IDS, 0.5)
        embeds = good(random, EMBEDS)
        method = [model.generate, model.generate_ids][random.integers(2)]
        return lambda: method(text_embeds=embeds, **arguments, **drawn(random, more, 0.1))

    def loss(random: Random) -> Callable[[], Any]:
        model = models[0] if random.random() < 0.7 else models[1]
        images = pick(random, [*TENSORS, *IDS, torch.rand(1, 3, 32, 32)])
        more = dict(
            cond_images=TENSORS, cond_ids=IDS, cond_drop_prob=numbers(0.5), part=["all", "x"]
        )
        embeds, arguments = good(random, EMBEDS), drawn(random, more, 0.15)
        return lambda: model(images, text_embeds=embeds, **arguments)

    def tokenizer(random: Random) -> Callable[[], Any]:
        vae = models[0].vae
        value = pick(random, [*TENSORS, *IDS])
        method = [vae.encode_to_ids, vae.decode_from_ids, vae.encode][random.integers(3)]
        return lambda: method(value)

    def best(random: Random) -> Callable[[], Any]:
        score = pick(
            random, [lambda *_: 1, lambda *_: np.float32(2), lambda *_: None, lambda *_: math.nan]
        )
        n, texts = good(random, [1, *numbers(2)[:6], "2", None]), good(random, TEXTS)
        seeds = good(random, [None, 1, np.int64(2), [1], "1"])
        return lambda: muse.best_of(n, score, texts, seeds=seeds, timesteps=1)

    def edited(random: Random) -> Callable[[], Any]:
        picture, texts, mask = (good(random, of) for of in (PICTURES, TEXTS, MASKS))
        options = drawn(random, EDITING, 0.15)
        options |= drawn(random, {"base_options": mappings, "negative_texts": TEXTS}, 0.1)
        match random.integers(4):
            case 0:
                return lambda: editing.inpaint(muse, picture, texts, mask, **options)
            case 1:
                sides = drawn(
                    random, dict.fromkeys(["left", "top", "aspect"], numbers(8, 1.5)), 0.4
                )
                return lambda: editing.outpaint(muse, picture, texts, **sides, **options)
            case 2:
                strength = good(random, numbers(0.5, 1))
                return lambda: editing.vary(muse, picture, texts, strength=strength, **options)
            case _:
                options |= drawn(random, {"share": numbers(0.3), "top_k": numbers(2)}, 0.2)
                at = good(random, [[2], (1, 2), *numbers(2), [2, 1], []])
                return lambda: editing.free(muse, picture, texts, at=at, **options)

    def worded(random: Random) -> Callable[[], Any]:
        scale = good(random, [2.0, *numbers(0.5)])
        arguments = drawn(random, {"seeds": OPTIONS["seeds"], "timesteps": numbers(2)}, 0.3)
        if random.random() < 0.5:
            weights = good(random, [{"red": scale}, {"rad": scale}, {}, None, ["red"], {3: 1.0}])
            return lambda: words.emphasise(muse, "a red car", weights, **arguments)
        new = good(random, ["a green car", "", None, ["a", "b"], 3, "a green car with a roof"])
        return lambda: words.replace_words(muse, "a red car", new, **arguments)

    kinds = [cascade, cascade, cascade, stage, stage, loss, tokenizer, best, edited, edited, worded]

    def one(random: Random) -> str:
        return told(kinds[random.integers(len(kinds))](random))

    found = run("calls", 5, one, default=250)
    assert min(found["refused"], found["done"]) > 0.2 * sum(found.values())


def test_constructors():
    size = [8, *numbers(16), 2**20, "8", {}, (8,)]
    vae = dict(
        dim=size, codebook_size=[16, *numbers(64)], factor=[4, *numbers(8)], layers=numbers(2),
        channel_mults=[None, [1, 2], (1, 1, 1), [0, 1], "12", [1.5, 2, 1]],
        num_res_blocks=numbers(1), patch_size=numbers(1, 2), codebook_dim=numbers(4),
        quantizer=["vq", "lfq", "bsq", "simvq", "fsq", "rvq", None, 3],
        l2_norm=[True, False, 1, "yes"], fsq_levels=[[4, 4], (8, 8), [1], "44", 4],
        commitment_weight=numbers(0.25), entropy_weight=numbers(0.1), codebook_decay=numbers(0.9),
        decoder_dim=size, decoder_res_blocks=numbers(1),
    )  # fmt: skip
    transformer = dict(
        num_tokens=[60, *numbers(20)], seq_len=[16, *numbers(4)], dim=[16, *numbers(24)],
        depth=[1, *numbers(2)], dim_head=[8, *numbers(4)], heads=[2, *numbers(1)],
        text_embed_dim=[12, *numbers(3)], classes=[None, 3, ["a", "b"], ["a", "a"], -1, "ab", 2.0],
        max_text_len=numbers(8), self_cond=[True, "x"], ff_mult=numbers(2), ff_dim=numbers(8),
        multi_axis=numbers(2), rotary=[True, "x"],
        code_levels=[[5, 4, 3], [60], "60", [5, "4"], 60],
    )  # fmt: skip
    maskgit = dict(
        image_size=[16, *numbers(32), "16", (16, 16)], cond_image_size=[None, 8, *numbers(4)],
        cond_drop_prob=numbers(0.1), noise_schedule=OPTIONS["noise_schedule"],
        label_smoothing=numbers(0.1),
        token_critic=[None, 1, "critic"], self_token_critic=[True, False, "x"],
        critic_target=["truth", "lies"], sample_options=[{"timesteps": 2}, {"steps": 1}, [], "x"],
        presets=[{"fast": {"timesteps": 2}}, {"fast": 2}, [], {3: {}}],
    )  # fmt: skip
    options = {name: values for name, values in OPTIONS.items() if name != "timestep"}

    def one(random: Random) -> str:
        arguments: dict[str, Any]
        match random.integers(4):
            case 0:
                arguments = dict(dim=8, codebook_size=16, layers=1)
                arguments |= drawn(random, vae, 0.12)
                return told(lambda: VQGanVAE(**arguments) and None)
            case 1:
                arguments = dict(num_tokens=60, seq_len=16, dim=16, depth=1, dim_head=8, heads=2)
                arguments |= dict(text_embed_dim=12, t5_name="none") | drawn(
                    random, transformer, 0.12
                )
                return told(lambda: MaskGitTransformer(**arguments) and None)
            case 2:
                arguments = dict(vae=tiny.vae(), transformer=tiny.transformer(), image_size=16)
                arguments |= drawn(random, maskgit, 0.12)
                return told(lambda: MaskGit(**arguments) and None)
            case _:
                return told(lambda: SampleOptions(**drawn(random, options, 0.15)) and None)

    found = run("constructors", 6, one, default=200)
    assert min(found["refused"], found["done"]) > 0.1 * sum(found.values())
