"""ONNX files, run by onnxruntime, against the models they are of."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from muse_maskgit_pytorch import Muse, testing
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.onnx_export import export_onnx

pytestmark = pytest.mark.slow  # torch's exporter takes seconds for a graph
onnxruntime: Any = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def muse() -> Muse:
    parts = testing.transformer(self_cond=True, depth=1, patch_size=2)
    base = testing.maskgit(parts, vae=testing.vae(local_encoder=True))
    # a low resolution read by another tokenizer than the high one
    low, high = base.vae, testing.randomise(testing.vae(quantizer="vq", codebook_size=40))
    transformer = testing.transformer(num_tokens=40, seq_len=64, multi_axis=2, depth=1)
    return Muse(base, testing.superres(vae=high, cond_vae=low, model=transformer)).eval()


@pytest.fixture(scope="module")
def folder(muse: Muse, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the command, since assertions on shapes would fix what may be of any size."""
    folder = tmp_path_factory.mktemp("onnx")
    file = muse.save(folder / "muse.safetensors")
    command = ["export", "--model", file, "--format", "onnx", "--out", folder]
    module = [sys.executable, "-m", "muse_maskgit_pytorch.cli.main"]
    done = subprocess.run([*module, *map(str, command)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(folder), "")
    return folder


def run(path: Path, **inputs: Any) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path)
    assert {given.name for given in session.get_inputs()} == inputs.keys()
    return [
        torch.from_numpy(x) for x in session.run(None, {k: v.numpy() for k, v in inputs.items()})
    ]


@torch.no_grad()
@pytest.mark.parametrize("stage, size", [("base", 16), ("superres", 32)])
def test_tokenizers(muse: Muse, folder: Path, stage: str, size: int):
    vae = muse.stages[stage].vae
    images = testing.images(3, size)
    [ids] = run(folder / stage / "encoder.onnx", images=images)
    assert torch.equal(ids, vae.encode_to_ids(images))
    [pixels] = run(folder / stage / "decoder.onnx", ids=ids)
    torch.testing.assert_close(pixels, vae.decode_from_ids(ids), rtol=0, atol=1e-5)
    if stage == "superres":
        low = testing.images(3, 16)
        [ids] = run(folder / stage / "cond_encoder.onnx", images=low)
        assert torch.equal(ids, muse.base.vae.encode_to_ids(low))


@torch.no_grad()
def test_steps(muse: Muse, folder: Path):
    """With a row that sees no text, and another length than that of the export."""
    text, ids = testing.text(3, 7), testing.ids(3)
    text.mask[1] = False
    ids[:, ::2] = muse.base.transformer.mask_id
    transformer = muse.base.transformer
    context = transformer.encode_context(testing.conditioning(text))
    zeros = torch.zeros(3, 16, transformer.dim)
    path = folder / "base" / "step.onnx"
    given = dict(ids=ids, text=text.embeds, text_mask=text.mask)
    for past in (zeros, transformer(ids, context)[0]):
        hidden = transformer(ids, context, past[None])[0]
        logits, state = run(path, **given, self_cond=past)
        torch.testing.assert_close(state, hidden, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits, transformer.to_logits(hidden), rtol=0, atol=1e-4)

    transformer, low = muse.stages["superres"].transformer, ids.clamp(max=59)
    ids = testing.ids(3, 64, codes=40)
    hidden = transformer(ids, transformer.encode_context(testing.conditioning(text, low)))[0]
    [logits] = run(folder / "superres" / "step.onnx", **given | {"ids": ids}, cond_ids=low)
    torch.testing.assert_close(logits, transformer.to_logits(hidden), rtol=0, atol=1e-4)


def test_what_lies_beside_them(muse: Muse, folder: Path):
    facts = json.loads((folder / "base" / "config.json").read_text())
    assert (facts["mask_id"], facts["seq_len"], facts["grid"]) == (60, 16, [4, 4])
    assert facts["classes"] is None
    assert facts["sample_options"]["timesteps"] == muse.base.default_options.timesteps


def test_what_cannot_be_exported(muse: Muse, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(ValueError, match="image_size is not given"):
        export_onnx(muse.base.vae, tmp_path / "out")
    with pytest.raises(ValueError, match="image_size 24 is not the 16 that the stage was trained"):
        export_onnx(muse.base, tmp_path / "out", 24)
    with pytest.raises(ValueError, match="a MaskGitTransformer cannot be exported as onnx alone"):
        export_onnx(muse.base.transformer, tmp_path / "out")
    muse.base.vae.save(tmp_path / "vae.safetensors")
    command = ["export", "--model", str(tmp_path / "vae.safetensors"), "--out", str(tmp_path / "o")]
    assert main([*command, "--format", "onnx", "--image_size", "17"]) == 2
    assert "17" in capsys.readouterr().err
    assert main([*command, "--format", "diffusers", "--image_size", "16"]) == 2


def test_without_the_extra(muse: Muse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'muse-maskgit-pytorch\[onnx\]'"):
        export_onnx(muse, tmp_path)
