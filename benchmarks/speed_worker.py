"""One side of `speed.py`, in a process of its own: it builds a model, then works when told to.

`speed.py` starts this file with the Python and the ``PYTHONPATH`` of the package to be measured,
so nothing of any of them is imported before it is asked for. The argument is the JSON of a
`speed.Case` with the contender's ``package``, ``variant``, ``precision`` and ``device``. The first
line answered describes the model; every line read is a turn, answered with its time, or by parts
if it says "profile". A contender that cannot take part answers with the reason. What else is
printed goes to stderr.

Every weight is drawn from a generator seeded by its name: two versions of a package that name
their weights alike have the same ones.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

Spec = SimpleNamespace
Run = Callable[[], Any]  # one turn; returns the ids that it drew, if it draws any

GUIDANCE = 3.0
# The mean share of masked tokens over the steps of the cosine schedule is 2 / pi: a single step is
# measured on a canvas of which this much is given.
GIVEN = 1 - 2 / math.pi
PACKAGE = "muse_maskgit_pytorch"


class LeftOut(Exception):
    """Why a contender does not take part."""


# Ours, of this or of an older checkout -------------------------------------------------------


def our_transformer(muse: Any, spec: Spec) -> Any:
    windows = {}
    if "multi_axis" in inspect.signature(muse.MaskGitTransformer).parameters:
        windows["multi_axis"] = spec.multi_axis
    return muse.MaskGitTransformer(
        **windows,
        num_tokens=spec.codes,
        seq_len=spec.tokens,
        dim=spec.dim,
        depth=spec.depth,
        heads=spec.heads,
        dim_head=spec.dim // spec.heads,
        t5_name="none",
        text_embed_dim=spec.text_dim,
        max_text_len=spec.text_len,
        cond_depth=0,  # as in the release, which has no encoder of low-resolution tokens
    )


def our_maskgit(muse: Any, spec: Spec) -> Any:
    """A model around a tiny tokenizer, for only the transformer is measured."""
    factor = 4
    vae = muse.VQGanVAE(
        dim=4, num_res_blocks=0, factor=factor, codebook_size=spec.codes, quantizer="lfq"
    )
    sides = {"image_size": factor * math.isqrt(spec.tokens)}
    if spec.cond_tokens:
        sides["cond_image_size"] = factor * math.isqrt(spec.cond_tokens)
    return muse.MaskGit(vae=vae, transformer=our_transformer(muse, spec), **sides)


def at_precision(model: Any, spec: Spec) -> Any:
    """The model that draws in a precision: its own, if it has the choice, or cast as a whole."""
    if hasattr(type(model), "precision"):
        try:
            model.precision = spec.precision
        except ValueError as error:
            raise LeftOut(str(error)) from error
    elif spec.precision == "bfloat16":
        model = model.to(torch.bfloat16)
    elif spec.precision != "float32":
        raise LeftOut("this checkout knows no such precision")
    return model


def ours(spec: Spec) -> tuple[Run, nn.Module]:
    muse: Any = import_module(PACKAGE)
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "shipped":
        return our_shipped(muse, spec)
    if spec.variant == "compiled" and spec.kind not in ("generate", "train"):
        raise LeftOut("only models are compiled")
    if spec.kind == "tokenizer":
        return our_tokenizer_training(muse, spec)
    if spec.kind in ("encode", "decode"):
        vae: Any = muse.VQGanVAE(dim=spec.dim, codebook_size=spec.codes, quantizer="lfq")
        fill(vae).eval()
        images = torch.rand(spec.batch, 3, spec.size, spec.size, generator=generator)
        side = vae.fmap_size(spec.size)
        ids = torch.randint(spec.codes, (spec.batch, side, side), generator=generator)
        vae = at_precision(vae, spec).to(spec.device)
        images, ids = images.to(spec.device), ids.to(spec.device)
        if spec.kind == "encode":
            return lambda: vae.encode_to_ids(images), vae
        return lambda: discard(vae.decode_from_ids(ids)), vae

    model = fill(our_maskgit(muse, spec), int(spec.dim * 8 / 3)).to(spec.device)
    if spec.variant == "compiled":
        model.compile()
    text = embeddings(spec, generator)
    ids = torch.randint(spec.codes, (spec.batch, spec.tokens), generator=generator)
    low = torch.randint(spec.codes, (spec.batch, spec.cond_tokens), generator=generator)
    cond = {"cond_ids": low.to(spec.device)} if spec.cond_tokens else {}
    if spec.kind == "train":
        ids = ids.to(spec.device)
        loss = lambda: model.losses(ids, text_embeds=text, **cond).total  # noqa: E731
        return training(model.train().transformer, loss, spec), model.transformer
    model = at_precision(model.eval(), spec)
    options: dict[str, Any] = {"guidance_schedule": "constant", "cond_scale": GUIDANCE}
    options |= {"timesteps": spec.steps, "seeds": list(range(spec.batch))}
    if spec.top_k:
        options["top_k"] = math.ceil(0.1 * spec.codes)
    if spec.steps == 1:
        canvas = ids.clone()
        canvas[:, round(GIVEN * spec.tokens) :] = model.transformer.mask_id
        options["canvas"] = canvas.to(spec.device)

    def run() -> Tensor:
        return model.generate_ids(text_embeds=text, **cond, **options)

    return run, model.transformer


def our_shipped(muse: Any, spec: Spec) -> tuple[Run, nn.Module]:
    choice = {"precision": spec.precision}
    if "precision" not in inspect.signature(muse.Muse.from_pretrained).parameters:
        choice = {}
        if spec.precision != "float32":
            raise LeftOut("this checkout's Muse.from_pretrained has no precision")
    model = muse.Muse.from_pretrained("scenes", **choice).to(spec.device)
    colours, things = ("red", "green", "blue", "yellow"), ("apple", "circle")
    prompts = [f"{colour} {thing}" for thing in things for colour in colours][: spec.batch]
    seeds = list(range(len(prompts)))
    return lambda: discard(model(prompts, seeds=seeds)), model


def our_tokenizer_training(muse: Any, spec: Spec) -> tuple[Run, nn.Module]:
    """A step of the user's first example by images, with the discriminator."""
    images = some_images(spec)
    vae = fill(muse.VQGanVAE(dim=spec.dim, vq_codebook_size=spec.codes))
    with TemporaryDirectory() as folder:
        save_images(images, folder)
        trainer: Any = muse.VQGanVAETrainer(
            vae,
            folder=folder,
            image_size=spec.size,
            batch_size=spec.batch,
            grad_accum_every=1,
            num_train_steps=50_000,
            results_folder=f"{folder}/results",
            perceptual_model="efficientnet-lite0",  # the default's weights need a network
            gan_start=0,
        )
    trainer._prepare()
    batches = itertools.repeat({"image": images})
    return lambda: discard(trainer.train_step(batches)), vae


# The release ---------------------------------------------------------------------------------


def release(spec: Spec) -> tuple[Run, nn.Module]:
    """`muse-maskgit-pytorch` 0.3.5 by its own `MaskGit`; text embeddings are handed to it.

    Its default attention is tiled in Python. ``variant`` "best" puts PyTorch's fused kernel in its
    place, which is the fastest that it can be made without touching its model. It always draws
    from the best tenth of the codes.
    """
    import_module("transformers")  # before the stand-in, for it looks for torchvision's version
    if not find_spec("torchvision"):
        import_module("versus_old").stand_in_for_torchvision()
    import_module(f"{PACKAGE}.t5").T5_CONFIGS["none"] = {"config": Spec(d_model=spec.text_dim)}
    old: Any = import_module(PACKAGE)
    code: Any = import_module(f"{PACKAGE}.{PACKAGE}")
    code.tqdm = lambda steps, **_: steps
    if spec.variant == "best":
        import_module(f"{PACKAGE}.attend").Attend.flash_attn = fused_attention
    generator = torch.Generator().manual_seed(0)
    if spec.kind == "tokenizer":
        return release_tokenizer_training(old, spec)
    if spec.kind in ("encode", "decode"):
        vae = old.VQGanVAE(dim=spec.dim, codebook_size=spec.codes, use_vgg_and_gan=False)
        fill(vae).eval().to(spec.device)
        images = torch.rand(spec.batch, 3, spec.size, spec.size, generator=generator)
        images = images.to(spec.device)
        side = vae.get_encoded_fmap_size(spec.size)
        ids = torch.randint(spec.codes, (spec.batch, side, side), generator=generator)
        ids = ids.to(spec.device)
        if spec.kind == "encode":
            return without_gradient(lambda: vae.encode(images)[1], spec), vae.enc_dec
        return without_gradient(lambda: discard(vae.decode_from_ids(ids)), spec), vae.enc_dec

    transformer = old.MaskGitTransformer(
        num_tokens=spec.codes,
        seq_len=spec.tokens,
        dim=spec.dim,
        depth=spec.depth,
        heads=spec.heads,
        dim_head=spec.dim // spec.heads,
        t5_name="none",
    )
    vae = old.VQGanVAE(dim=16, codebook_size=spec.codes, use_vgg_and_gan=False)
    side = {"cond_image_size": 16} if spec.cond_tokens else {}
    model = old.MaskGit(image_size=16, transformer=transformer, vae=vae, **side)
    model = fill(model).to(spec.device)
    text = embeddings(spec, generator)
    low = torch.randint(spec.codes, (spec.batch, spec.cond_tokens), generator=generator)
    low = low.to(spec.device)
    if spec.kind == "train":
        ids = torch.randint(spec.codes, (spec.batch, spec.tokens), generator=generator)
        ids = ids.to(spec.device)
        loss = lambda: model(ids, text_embeds=text, cond_drop_prob=0.1)  # noqa: E731
        return training(transformer, loss, spec), transformer
    transformer.encode_text = lambda texts: text
    model.vae.decode_from_ids = lambda ids: ids
    cond: dict[str, Any] = {}
    if spec.cond_tokens:
        cond["cond_images"] = torch.zeros(1)
        model.cond_vae.encode = lambda images: (None, low, None)

    def run() -> Tensor:
        torch.manual_seed(0)
        return model.generate(
            [""] * spec.batch,
            fmap_size=math.isqrt(spec.tokens),
            timesteps=spec.steps,
            cond_scale=int(GUIDANCE),
            **cond,
        )

    return without_gradient(run, spec), transformer


def release_tokenizer_training(old: Any, spec: Spec) -> tuple[Run, nn.Module]:
    """As `our_tokenizer_training`; its perceptual network is a VGG16 at random weights."""
    if spec.variant == "best":
        raise LeftOut("its tokenizer has no attention")
    vae = fill(old.VQGanVAE(dim=spec.dim, vq_codebook_size=spec.codes))
    with TemporaryDirectory() as folder:
        save_images(some_images(spec), folder)
        trainer = old.VQGanVAETrainer(
            vae,
            folder=folder,
            image_size=spec.size,
            batch_size=spec.batch,
            grad_accum_every=1,
            num_train_steps=50_000,
            valid_frac=0,
            results_folder=f"{folder}/results",
            save_results_every=10**9,
            save_model_every=10**9,
        )
        images = next(trainer.dl_iter)
    trainer.dl_iter = itertools.repeat(images)
    trainer.steps += 1  # at 0 it saves pictures
    return lambda: discard(trainer.train_step()), vae.enc_dec


def fused_attention(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
    return F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=mask, scale=self.scale)


# aMUSEd --------------------------------------------------------------------------------------


def amused(spec: Spec) -> tuple[Run, nn.Module]:
    """The classes of aMUSEd in diffusers: `UVit2DModel` under its own scheduler, and `VQModel`.

    Two of the ``depth`` blocks are its convolutional ones, so that a token meets about as many
    weights as in the others.
    """
    if spec.kind == "tokenizer":
        raise LeftOut("diffusers does not train VQModel")
    if not find_spec("diffusers"):
        raise LeftOut("pip install diffusers")
    diffusers: Any = import_module("diffusers")
    generator = torch.Generator().manual_seed(0)
    if spec.kind in ("encode", "decode"):
        widths = [spec.dim * mult for mult in (1, 1, 2, 2, 4)]
        vae = diffusers.VQModel(
            block_out_channels=widths,
            down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            layers_per_block=2,
            latent_channels=64,
            norm_num_groups=4 if spec.dim % 32 else 32,
            num_vq_embeddings=spec.codes,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )
        fill(vae).eval().to(spec.device)
        images = torch.rand(spec.batch, 3, spec.size, spec.size, generator=generator)
        images = images.to(spec.device)
        side = spec.size // 16
        shape = (spec.batch, side, side, 64)
        ids = torch.randint(spec.codes, shape[:3], generator=generator).to(spec.device)

        def encode() -> Tensor:
            latents = vae.encode(images).latents
            return vae.quantize(latents)[2][2]

        def decode() -> None:
            vae.decode(ids, force_not_quantize=True, shape=shape)

        return without_gradient(encode if spec.kind == "encode" else decode, spec), vae
    if spec.cond_tokens:
        raise LeftOut("aMUSEd has no low-resolution tokens")

    model = diffusers.UVit2DModel(
        hidden_size=spec.dim,
        cond_embed_dim=spec.text_dim,
        encoder_hidden_size=spec.text_dim,
        vocab_size=spec.codes + 64,
        codebook_size=spec.codes,
        in_channels=spec.dim,
        block_out_channels=spec.dim,
        num_res_blocks=1,
        block_num_heads=spec.heads,
        num_hidden_layers=max(0, spec.depth - 2),
        num_attention_heads=spec.heads,
        intermediate_size=int(spec.dim * 8 / 3),
        sample_size=math.isqrt(spec.tokens),
    )
    fill(model).eval().to(spec.device)
    text = embeddings(spec, generator)
    pooled, side = text[:, 0], math.isqrt(spec.tokens)
    micro = torch.tensor([[256.0, 256.0, 0.0, 0.0, 6.0]], device=spec.device)
    if spec.kind == "train":
        ids = torch.randint(spec.codes, (spec.batch, side, side), generator=generator)
        ids = ids.to(spec.device)

        def loss() -> Tensor:
            ratio = torch.cos(torch.rand(spec.batch, 1, 1, device=spec.device) * math.pi / 2)
            mask = torch.rand(ids.shape, device=spec.device) < ratio
            logits = model(
                ids.masked_fill(mask, spec.codes), text, pooled, micro.expand(spec.batch, -1)
            )
            return F.cross_entropy(logits, ids.masked_fill(~mask, -100))

        return training(model.train(), loss, spec), model

    scheduler = diffusers.AmusedScheduler(mask_token_id=spec.codes)
    both = torch.cat([torch.zeros_like(text), text])

    def run() -> Tensor:
        noise = torch.Generator(spec.device).manual_seed(0)
        ids = torch.full((spec.batch, side, side), spec.codes, device=spec.device)
        scheduler.set_timesteps(spec.steps, device=spec.device)
        for time_step in scheduler.timesteps:
            logits = model(torch.cat([ids, ids]), both, both[:, 0], micro.expand(len(both), -1))
            null, drawn = logits.chunk(2)
            guided = null + GUIDANCE * (drawn - null)
            ids = scheduler.step(guided.float(), time_step, ids, generator=noise).prev_sample
        return ids.flatten(1)

    return without_gradient(run, spec), model


# What they share -----------------------------------------------------------------------------


def fill(model: Any, ff_dim: int | None = None) -> Any:
    """Random weights by name, no biases; norms and scales stay at their start.

    Args:
        model: is changed in place.
        ff_dim: width of its gated MLPs before widths were rounded up to a multiple of 8; what was
            added is zero and changes nothing, so that it equals a model of that width.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            if parameter.ndim < 2:
                continue
            filled = parameter
            if ff_dim and name.endswith("ff.to_hidden.weight"):
                filled = parameter.zero_().unflatten(0, (2, -1))[:, :ff_dim]
            elif ff_dim and name.endswith("ff.to_out.weight"):
                filled = parameter.zero_()[:, :ff_dim]
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            fan_in = filled[0].numel() if filled is parameter else filled.shape[-1]
            filled.copy_(torch.randn(filled.shape, generator=generator) * fan_in**-0.5)
    return model


def embeddings(spec: Spec, generator: torch.Generator) -> Tensor:
    text = torch.randn(spec.batch, spec.text_len, spec.text_dim, generator=generator)
    return text.to(spec.device)


def some_images(spec: Spec) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(spec.batch, 3, spec.size, spec.size, generator=generator)


def save_images(images: Tensor, folder: str) -> None:
    for i, image in enumerate(images):
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(f"{folder}/{i}.png")


def discard(_: Any) -> None:
    """For work whose result is no ids."""


def cast(spec: Spec) -> AbstractContextManager[Any]:
    if spec.precision == "float32":
        return nullcontext()
    if spec.precision != "bfloat16":
        raise LeftOut(f"it knows no {spec.precision}")
    return torch.autocast(spec.device, torch.bfloat16)


def without_gradient(run: Run, spec: Spec) -> Run:
    """The turn of another package; in bfloat16 under autocast."""
    autocast = cast(spec)

    def turn() -> Any:
        with torch.no_grad(), autocast:
            return run()

    return turn


def training(model: nn.Module, loss: Callable[[], Tensor], spec: Spec) -> Run:
    """One step: loss, gradients, AdamW."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    autocast = cast(spec)

    def turn() -> None:
        torch.manual_seed(0)
        with autocast:
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return turn


def products(spec: Spec) -> dict[str, float]:
    """GFLOP/s of the fastest square matrix product in float32 and the precisions asked for.

    It is the ceiling of this machine.

    Of the ways to compute one, the best counts; a build that lacks one goes without.
    """
    size = spec.size
    a, b = (torch.randn(size, size, device=spec.device) for _ in range(2))

    def packed() -> Run:  # oneDNN's, which leads on processors that MKL does not favour
        weight = torch.ops.mkldnn._reorder_linear_weight(b, size)
        return lambda: torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")

    def half() -> Run:
        x, y = a.bfloat16(), b.bfloat16()
        return lambda: x @ y

    def dynamic() -> Run:  # the activations are quantised within it
        torch.backends.quantized.engine = "onednn"
        zeros = torch.zeros(size, dtype=torch.long)
        whole = torch.quantize_per_channel(b, b.abs().amax(1) / 127, zeros, 0, torch.qint8)
        weight = torch.ops.quantized.linear_prepack(whole, None)
        return lambda: torch.ops.quantized.linear_dynamic(a, weight, True)

    def whole() -> Run:
        x, y = (t.mul(30).to(torch.int8) for t in (a, b))
        return lambda: torch._int_mm(x, y.T)

    makers: dict[str, list[Callable[[], Run]]] = {
        "float32": [lambda: lambda: a @ b, packed],
        "bfloat16": [half],
        "int8": [dynamic, whole],
    }
    found = {}
    asked = {"float32", *spec.precision.split()}
    for precision, ways in ((name, makers[name]) for name in makers if name in asked):
        rates = []
        for make in ways:
            with suppress(RuntimeError, AttributeError):
                run = make()
                run()
                seconds = [measured(run, spec.device)["seconds"] for _ in range(3)]
                rates.append(2 * size**3 / median(seconds) / 1e9)
        found[precision] = max(rates, default=0.0)
    return found


def command(spec: Spec) -> Callable[[], float]:
    """A `muse` command from a cold shell: processor time of the process and its children."""
    code = f"from {PACKAGE}.cli.main import main; main()"
    words = {"cold": ["generate", "red apple"], "help": ["generate", "--help"]}[spec.kind]

    def run() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=folder, stdout=2)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return run


class Counter(TorchDispatchMode):
    """Counts the operations of products: PyTorch's formulas, and those of kernels they lack.

    `FlopCounterMode` itself also follows modules, which fails where some run without gradients.
    """

    def __init__(self):
        super().__init__()
        self.flops = 0
        self.formulas: dict[Any, Any] = dict(flop_registry)

        def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
            return sdpa_flop_count(q.shape, k.shape, v.shape)

        def linear(x: Any, *_: Any, out_val: Any, **__: Any) -> int:
            return 2 * x.numel() * out_val.shape[-1]

        # raw formulas get the tensors instead of their shapes
        attention._get_raw = linear._get_raw = True  # type: ignore[attr-defined]
        self.formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = attention
        for package, name in (
            (torch.ops.mkldnn, "_linear_pointwise"),
            (torch.ops.onednn, "qlinear_pointwise"),
            (torch.ops.quantized, "linear_dynamic"),
        ):
            if hasattr(package, name):
                self.formulas[getattr(package, name)] = linear

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(func._overloadpacket)
        if formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


def measured(run: Run, device: str) -> dict[str, Any]:
    """Seconds of one run: of the process on a CPU, between two events on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize()
        return {"seconds": start.elapsed_time(end) / 1e3, "result": result}
    begin = time.process_time()
    result = run()
    return {"seconds": time.process_time() - begin, "result": result}


PARTS = {
    # a part of the work: what the names of its kernels hold; the first that fits counts
    "attention": ("scaled_dot_product", "flash_attention"),
    "products": ("mm", "linear", "conv", "mkldnn", "dot"),
    "norms": ("layer_norm", "group_norm", "batch_norm"),
    "optimizer": ("adam",),
}


def profiled(run: Run, network: type[nn.Module], sampling: bool) -> dict[str, float]:
    """Seconds of one run by part, from PyTorch's profiler (of the clock: it knows no other).

    Args:
        run: the work.
        network: class whose work, with products and norms wherever they are, is the network's.
        sampling: whether what else there is counts as the "sampler".

    What the profiler does not see at all is "Python".
    """
    plain = {n: vars(network)[n] for n in ("forward", "encode_context") if n in vars(network)}
    for name, method in plain.items():
        setattr(network, name, record_function("network")(method))
    begin = time.perf_counter()
    with torch.profiler.profile() as profile:
        run()
        total = time.perf_counter() - begin
    for name, method in plain.items():
        setattr(network, name, method)
    found = dict.fromkeys([*PARTS, "other", "sampler"], 0.0)
    for event in profile.events() or []:
        if event.name == "network":
            continue
        fitting = [p for p, words in PARTS.items() if any(w in event.name.lower() for w in words)]
        above, inside = event, not sampling
        while above is not None and not inside:
            inside, above = above.name == "network", above.cpu_parent
        part = fitting[0] if fitting else "other" if inside else "sampler"
        found[part] += event.self_cpu_time_total / 1e6
    return found | {"Python": max(0.0, total - sum(found.values()))}


def peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    spec = Spec(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    torch.set_num_threads(spec.threads)
    packages = {"ours": ours, "release": release, "amused": amused}
    try:
        if spec.package == "products":
            answer(torch=torch.__version__)
            for _ in sys.stdin:
                answer(rates=products(spec))
            return
        if spec.kind in ("cold", "help"):
            cold = command(spec)
            answer(torch=torch.__version__)
            for _ in sys.stdin:
                answer(seconds=cold())
            return
        run, model = packages[spec.package](spec)
        # the first run also warms up; graphs of a GPU are not captured under a counter
        counted = Counter()
        with counted if spec.device == "cpu" else nullcontext():
            run()
        if spec.device == "cuda":  # all graphs are recorded by the third run
            run(), run()
    except LeftOut as reason:
        return answer(left_out=str(reason))
    answer(
        torch=torch.__version__,
        parameters=sum(p.numel() for p in model.parameters()),
        flops=counted.flops or None,
    )
    for asked in sys.stdin:
        if asked.strip() == "profile":
            answer(parts=profiled(run, type(model), spec.kind == "generate"))
            continue
        found = measured(run, spec.device)
        ids = found.pop("result")
        drawn = None if ids is None else ids.flatten().tolist()
        answer(**found, peak_mb=peak_mb(spec.device), ids=drawn)


if __name__ == "__main__":
    main()
