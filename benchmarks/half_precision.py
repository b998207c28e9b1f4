"""What weights stored in half precision cost: the file, logits, ids and pictures before and after.

    python benchmarks/half_precision.py --model runs/base/base-ema.safetensors "an apple" "two owls"

The model is saved in each type (`save(dtype=)`, `--dtype` of `muse bundle` and `muse push`) and
read back; it computes in float32 all the same. Pictures are drawn with the same seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from muse_maskgit_pytorch import Muse, open_model
from muse_maskgit_pytorch.structures import Conditioning

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().log10())


@torch.no_grad()
def facts(muse: Muse, texts: list[str], draws: int) -> dict[str, Tensor]:
    """What a model makes of prompts, of `draws` pictures each."""
    prompts = [text for text in texts for _ in range(draws)]
    base = muse.base
    text = base.embed_texts(prompts)
    generator = torch.Generator().manual_seed(0)
    transformer, codes = base.transformer, base.vae.codebook_size
    ids = torch.randint(codes, (len(prompts), transformer.seq_len), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.5
    keep = torch.ones(len(prompts), dtype=torch.bool)
    context = transformer.encode_context(Conditioning(text, None, keep))
    ids = ids.masked_fill(masked, transformer.mask_id)
    drawn = base.generate_ids(text_embeds=text, seeds=list(range(len(prompts))))
    return {
        "logits": transformer.to_logits(transformer(ids, context)[0])[masked],
        "drawn": drawn,
        "pictures": base.decode(drawn),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a base stage, or a whole model, of which")
    parser.add_argument("texts", nargs="+", help="prompts")
    parser.add_argument("--draws", type=int, default=8, help="pictures of each")
    config = parser.parse_args()
    muse = open_model(config.model, "cpu")
    before = facts(muse, config.texts, config.draws)
    vae = muse.base.vae
    with torch.no_grad():
        ids = vae.encode_to_ids(before["pictures"])
    print(f"{config.model}: {len(before['drawn'])} pictures of {before['drawn'].shape[1]} tokens")
    print(f"{'':10}{'MB':>8}{'logits: mean, most':>22}{'encoded ids':>13}{'drawn ids':>11}"
          f"{'decoded':>10}")  # fmt: skip
    for dtype in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            path = muse.save(Path(folder) / "model.safetensors", dtype)
            size, again = path.stat().st_size / 1e6, Muse.from_pretrained(path)
        after = facts(again, config.texts, config.draws)
        off = (after["logits"] - before["logits"]).abs()
        with torch.no_grad():
            encoded = (again.base.vae.encode_to_ids(before["pictures"]) == ids).double().mean()
            decoded = psnr(again.base.decode(before["drawn"]), before["pictures"])
        same = (after["drawn"] == before["drawn"]).double().mean()
        print(f"{str(dtype).removeprefix('torch.'):10}{size:8.1f}{off.mean():12.5f}{off.max():10.4f}"
              f"{encoded:13.2%}{same:11.2%}{decoded:7.1f} dB")  # fmt: skip


if __name__ == "__main__":
    main()
