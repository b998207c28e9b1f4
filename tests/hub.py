"""Tiny, randomly initialised models in the Hugging Face hub's format.

They stand for the real weights where there is no network: what loads them is the real code.
"""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path
from typing import Any

import torch

COMMIT = "0" * 40


def make_t5(folder: Path, dim: int = 16, seed: int = 0) -> Path:
    """A whole T5 (encoder, decoder, caption tokenizer) that reads letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(c, -3.0) for c in "▁" + string.ascii_letters + string.digits + ",.'-"]
    reader = Tokenizer(models.Unigram([*special, *letters], unk_id=2, byte_fallback=False))
    reader.pre_tokenizer = pre_tokenizers.Metaspace()
    reader.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(
        vocab_size=reader.get_vocab_size(),
        d_model=dim,
        d_kv=8,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=2,
    )
    _save(T5ForConditionalGeneration, config, folder, seed)
    tokenizer.save_pretrained(folder)
    return folder


def make_resnet(folder: Path, seed: int = 0, mean: float = 0.5, std: float = 0.25) -> Path:
    """A classifier with batch norm whose preprocessing has this mean and this deviation."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
    )
    config.num_labels = 7
    _save(ResNetForImageClassification, config, folder, seed)
    preprocessing = {"image_mean": [mean] * 3, "image_std": [std] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def make_clip(folder: Path, sigmoid: bool = False, seed: int = 0) -> Path:
    """A network of two towers that reads letters: CLIP, or with ``sigmoid`` SigLIP."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPConfig,
        CLIPModel,
        PreTrainedTokenizerFast,
        SiglipConfig,
        SiglipModel,
    )

    letters = ["<pad>", "<bos>", "<eos>", " ", *string.ascii_lowercase]
    reader = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<pad>"))
    reader.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    reader.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    size = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    text = dict(**size, vocab_size=len(letters), max_position_embeddings=12)
    text |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, projection_size=24)
    vision = dict(**size, image_size=32, patch_size=8)
    config: Any = SiglipConfig if sigmoid else CLIPConfig
    made = config(text_config=text, vision_config=vision, projection_dim=20)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = (SiglipModel if sigmoid else CLIPModel)(made)
        for value in model.parameters():  # large enough to tell inputs apart
            if value.ndim > 1:
                torch.nn.init.normal_(value, std=value.shape[-1] ** -0.5)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bring_code(folder: Path) -> Path:
    """Let a saved model ask for code of its own, which lies next to it.

    Returns:
        a path that exists once the code has run.
    """
    mark = folder / "the-code-ran"
    (folder / "own_code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own_code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    return mark


def make_vqmodel(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """A diffusers VQModel, saved to ``folder``: factor 4, 50 codes, all of them near the latents.

    Args:
        folder: a new one.
        seed: of the weights.
        changes: of the model's arguments.

    Returns:
        the model, in eval mode.
    """
    from diffusers import VQModel

    widths = changes.get("block_out_channels", [32, 64, 64])
    arguments: dict[str, Any] = dict(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        layers_per_block=1,
        latent_channels=8,
        num_vq_embeddings=50,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = VQModel(**(arguments | changes))
        for value in model.parameters():
            if value.ndim == 1:  # norms and biases would start as ones and zeros
                value.add_(torch.randn_like(value), alpha=0.1)
        latents = model.encode(torch.rand(8, 3, 32, 32)).latents.transpose(0, 1).flatten(1)
        rows = torch.randint(latents.shape[1], (model.config["num_vq_embeddings"],))
        model.quantize.embedding.weight.copy_(latents[:, rows].T)
    model.eval().save_pretrained(folder)
    return model


def make_amused(folder: Path, seed: int = 0, variant: str | None = None, **changes: Any) -> Any:
    """An aMUSEd in diffusers' layout, saved by its own pipeline: 32 px, 64 tokens of 50 codes.

    Args:
        folder: a new one.
        seed: of the weights.
        variant: "fp16" saves half precision under its names.
        changes: of the transformer's arguments.

    Returns:
        the pipeline, in eval mode; with ``variant``, its weights are those of the files.
    """
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel

    made: dict[str, Any] = dict(
        hidden_size=32, encoder_hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
        in_channels=16, block_out_channels=24, codebook_size=50, vocab_size=64, sample_size=8,
        intermediate_size=40, cond_embed_dim=20, micro_cond_encode_dim=8, micro_cond_embed_dim=40,
        num_res_blocks=2, block_num_heads=2,
    ) | changes  # fmt: skip
    folder.mkdir(parents=True)
    diffusers_class: Any = UVit2DModel
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        tokenizer, text_encoder = _pooled_clip(folder, projection_dim=20)
        parts: dict[str, Any] = dict(text_encoder=text_encoder, transformer=diffusers_class(**made))
        for part in parts.values():
            _shake(part)
        parts["vqvae"] = make_vqmodel(folder / "vqvae", seed)
    scheduler: Any = AmusedScheduler(mask_token_id=made["vocab_size"] - 1)
    pipeline_class: Any = AmusedPipeline
    pipeline = pipeline_class(tokenizer=tokenizer, scheduler=scheduler, **parts)
    for part in parts.values():
        part.eval().to(torch.float16 if variant else torch.float32)
    if variant:
        shutil.rmtree(folder / "vqvae")
    pipeline.save_pretrained(folder, variant=variant)
    for part in parts.values():
        part.float()
    return pipeline


def make_meissonic(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """A Meissonic as its repository has it: 128 px, 32 x 32 positions of 50 codes.

    With ``downsample`` and ``upsample``, the tokens are twice as many each way.

    Args:
        folder: a new one.
        seed: of the weights.
        changes: of the transformer's arguments.

    Returns:
        its parts, in eval mode: ``transformer`` (tests/meissonic.py), ``text_encoder``,
        ``tokenizer`` and ``vqvae``.
    """
    from types import SimpleNamespace

    from tests.meissonic import reference

    made: dict[str, Any] = dict(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=32, axes_dims_rope=[4, 6, 6],
        vocab_size=64, codebook_size=50,
    ) | changes  # fmt: skip
    folder.mkdir(parents=True)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        tokenizer, text_encoder = _pooled_clip(folder, made["pooled_projection_dim"])
        transformer = reference()(**made)
        for part in (text_encoder, transformer):
            _shake(part)
            part.eval()
        vqvae = make_vqmodel(folder / "vqvae", seed)
    tokenizer.save_pretrained(folder / "tokenizer")
    text_encoder.save_pretrained(folder / "text_encoder")
    transformer.save_pretrained(folder / "transformer")
    (folder / "scheduler").mkdir()
    schedule = dict(_class_name="Scheduler", mask_token_id=made["vocab_size"] - 1)
    schedule |= dict(masking_schedule="cosine")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    index = dict(
        _class_name="Pipeline",
        scheduler=["scheduler", "Scheduler"],
        text_encoder=["transformers", "CLIPTextModelWithProjection"],
        tokenizer=["transformers", "CLIPTokenizer"],
        transformer=["transformer", "Transformer2DModel"],
        vqvae=["diffusers", "VQModel"],
    )
    (folder / "model_index.json").write_text(json.dumps(index))
    return SimpleNamespace(
        transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer, vqvae=vqvae
    )


def _pooled_clip(folder: Path, projection_dim: int) -> tuple[Any, Any]:
    """A CLIP's tokenizer that reads letters, and its text encoder; nothing of them is saved."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    letters = [*string.ascii_lowercase, *string.digits, ",", ".", "'", "-"]
    names = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = [str(folder / "vocab.json"), str(folder / "merges.txt")]
    tokenizer: Any = CLIPTokenizer(*files, model_max_length=12)
    for file in files:
        Path(file).unlink()
    text: Any = CLIPTextConfig(
        vocab_size=len(names), hidden_size=12, intermediate_size=24, projection_dim=projection_dim,
        num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=12,
        bos_token_id=len(names) - 2, eos_token_id=len(names) - 1,
    )  # fmt: skip
    return tokenizer, CLIPTextModelWithProjection(text)


def _shake(part: Any) -> None:
    """Make weights large enough to tell inputs apart, and norms not all ones."""
    for value in part.parameters():
        std = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
        value.add_(torch.randn_like(value), alpha=std)


def _save(model_class, config, folder: Path, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model_class(config).save_pretrained(folder)


def make_hub(home: Path, models: dict[str, Path]) -> dict[str, str]:
    """Lay models out as the hub's cache does.

    Args:
        home: a new folder.
        models: hub name, perhaps ``@revision`` -> folder of the model.

    Returns:
        environment variables with which these names, and no others, can be loaded.
    """
    for name, folder in models.items():
        repository, _, revision = name.partition("@")
        place = home / "hub" / ("models--" + repository.replace("/", "--"))
        (place / "refs").mkdir(parents=True, exist_ok=True)
        commit = COMMIT[:-1] + str(len([*place.glob("refs/*")]))
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs" / (revision or "main")).write_text(commit)
    return {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
