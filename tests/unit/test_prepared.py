"""Copies of networks that compute faster, against the networks themselves."""

import json
import re
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muse_maskgit_pytorch import Muse, linears, save_png
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.inference import precision as module
from muse_maskgit_pytorch.inference.precision import prepared, products, resolved
from muse_maskgit_pytorch.linears import Bfloat16Linear, Int8Linear, PackedLinear, available

CPU = torch.device("cpu")
# packed products pay everywhere, and bfloat16 is there
COSTS = {"plain, blocks": 50, "packed, blocks": 80, "bfloat16, blocks": 300, "int8, blocks": 150}
COSTS |= {"plain, head": 50, "packed, head": 80, "bfloat16, head": 300, "int8, head": 150}


@pytest.fixture(autouse=True)
def _costs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "products", lambda device: COSTS)
    monkeypatch.setattr(linears, "available", lambda device: ["float32", "bfloat16", "int8"])
    with torch.no_grad():
        yield


def wide(**changes: Any) -> Any:
    return tiny.transformer(dim=128, heads=2, dim_head=16, depth=3, **changes).eval()


def layers(network: nn.Module) -> set[str]:
    return {type(part).__name__ for part in network.modules() if "Linear" in type(part).__name__}


def cascade() -> Any:
    base = tiny.maskgit(wide(), token_critic=tiny.critic(dim=128, dim_head=16))
    return Muse(base, tiny.superres(model=wide(seq_len=64))).eval()


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", ["base", "superres"])
def test_float32_is_exact(kind):
    changes = dict(seq_len=64, cond_num_tokens=30, cond_seq_len=16) if kind == "superres" else {}
    network = wide(**changes)
    ids = tiny.ids(num_tokens=network.seq_len)
    given = tiny.conditioning(tiny.text(), tiny.ids(codes=30) if changes else None)
    fast = prepared(network, "float32")
    assert layers(fast) == {"PackedLinear", "Linear"}  # the text's projection is left alone
    found = [n.to_logits(n(ids, n.encode_context(given))) for n in (fast, network)]
    torch.testing.assert_close(*found, atol=2e-5, rtol=2e-5)
    assert layers(network) == {"Linear"}


@pytest.mark.parametrize("policy", ["confidence", "critic"])
def test_the_same_noise_gives_the_same_ids(policy):
    """Through both stages, with guidance, negative texts and all that generation saves."""
    muse = cascade()
    arguments: dict[str, Any] = dict(
        text_embeds=tiny.text(), seeds=1, timesteps=[6, 3], cond_scale=3.0, base_policy=policy,
        return_pil_images=False, temperature=0.7, top_k=20,
    )  # fmt: skip
    drawn = {}
    for precision in ("reference", "float32"):
        muse.precision = precision
        drawn[precision] = muse(**arguments)
    torch.testing.assert_close(drawn["float32"], drawn["reference"], atol=1e-5, rtol=0)


def test_the_reference_saves_nothing():
    """All branches written out, all positions computed: what the others are compared with."""
    model = tiny.maskgit(wide())
    model.precision = "reference"
    denoiser = model.denoiser(tiny.text(), model.default_options.replace(cond_scale=2.0))
    assert not denoiser.network.partial
    assert denoiser.context.blank == 0
    model.precision = "float32"
    denoiser = model.denoiser(tiny.text(), model.default_options.replace(cond_scale=2.0))
    assert denoiser.network.partial
    assert denoiser.context.blank == 1


@pytest.mark.parametrize("precision, most", [("bfloat16", 0.02), ("int8", 0.07)])
def test_lower_precisions_are_near(precision, most):
    network, ids = wide(), tiny.ids()
    given = tiny.conditioning(tiny.text())
    low = prepared(network, precision)
    hidden = [n(ids, n.encode_context(given)) for n in (low, network)]
    assert hidden[0].dtype == torch.float32  # the residual stream
    assert 1e-5 < apart(*hidden) < most
    expected = {"bfloat16": "Bfloat16Linear", "int8": "Int8Linear"}[precision]
    assert layers(low) == {expected, "PackedLinear", "Linear"}
    assert isinstance(low.to_logits, PackedLinear)


@pytest.mark.parametrize("vnni", [True, False])
def test_integers_are_multiplied_exactly(monkeypatch, vnni):
    """No sum of two products overflows 16 bits, where a processor adds them up in as many."""
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("needs a processor with VNNI")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    plain = nn.Linear(512, 64)
    x = torch.randn(3, 5, 512) * torch.tensor([0.01, 1, 100])[:, None, None]
    layer = Int8Linear(plain)
    most = 127 if vnni else 63
    scale = plain.weight.abs().amax(dim=1, keepdim=True) / most
    weight = (plain.weight / scale).round() * scale
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    expected = ((x / step).round() * step).double() @ weight.double().T + plain.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-4, rtol=1e-4)
    assert apart(layer(x), plain(x)) < 0.03
    assert layer(x[:0]).shape == (0, 5, 64)


def test_packed_and_bfloat16_layers():
    plain = nn.Linear(70, 33)
    x = torch.randn(4, 9, 70)
    torch.testing.assert_close(PackedLinear(plain)(x), plain(x), atol=2e-5, rtol=2e-5)
    assert PackedLinear(plain)(x[:0]).shape == (0, 9, 33)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's choice stands
        assert PackedLinear(plain)(x).dtype == torch.bfloat16
    low = Bfloat16Linear(plain)(x)
    assert low.dtype == torch.bfloat16
    assert apart(low.float(), plain(x)) < 0.01


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.filterwarnings("ignore")
def test_torchao_layers():
    """What a GPU computes with, on a CPU."""
    plain = nn.Linear(64, 32)
    x = torch.randn(3, 20, 64)
    layer = linears.TorchaoLinear(plain, "int8")
    assert layer(x).dtype == torch.bfloat16
    assert apart(layer(x).float(), plain(x)) < 0.03
    assert layer(x[:0]).shape == (0, 20, 32)
    assert plain.weight.dtype == torch.float32


def test_a_decoder_is_the_same_in_channels_last():
    """The layout of compiled decoding on a GPU."""
    vae = tiny.randomise(tiny.vae())
    latents = vae.quantizer.decode(tiny.ids(codes=vae.codebook_size).view(2, 4, 4))
    last = latents.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(vae.decode(last), vae.decode(latents), atol=1e-4, rtol=1e-4)


def test_what_a_gpu_has(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.undo()
    for there, capability, expected in (
        (False, (9, 0), []),
        (True, (7, 5), []),
        (True, (8, 6), ["int8"]),
        (True, (8, 9), ["int8", "float8"]),
    ):
        monkeypatch.setattr(linears, "has_torchao", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, had=capability: had)
        assert available(gpu) == ["float32", "bfloat16", *expected]
        if "float8" not in expected:
            hint = "" if there else ", and more with pip install torchao"
            wanted = re.escape(f"there are {available(gpu)}{hint}") + "$"
            with pytest.raises(ValueError, match=f"'float8' is not to be had .*{wanted}"):
                resolved("float8", gpu)


def test_a_copy_lasts_as_long_as_its_weights():
    network = wide()
    first = prepared(network, "float32")
    assert prepared(network, "float32") is first
    network.blocks[0].ff.to_out.weight.mul_(2)
    changed = prepared(network, "float32")
    assert changed is not first
    given, ids = tiny.conditioning(tiny.text()), tiny.ids()
    torch.testing.assert_close(
        *(n(ids, n.encode_context(given)) for n in (changed, network)), atol=2e-5, rtol=2e-5
    )


def test_what_is_left_as_it_is(monkeypatch):
    network = wide()
    compiled = torch.compile(network, backend="eager")
    assert prepared(compiled, "float32") is compiled
    half = wide().bfloat16()
    assert prepared(half, "int8") is half
    small = tiny.transformer()
    assert prepared(small, "float32") is small
    monkeypatch.setattr(module, "MOST_WEIGHTS", 1000)  # it might not fit in memory twice
    assert prepared(network, "float32") is network
    with pytest.warns(UserWarning, match="does not pay for a network of width 16"):
        assert prepared(small, "int8") is small


def test_a_self_critic_reads_the_copy():
    model = tiny.maskgit(wide(), self_token_critic=True)
    critic = prepared(model.critic, "float32")
    assert layers(critic.transformer) == {"PackedLinear", "Linear"}
    assert critic.to_logits is model.critic.to_logits
    assert model.critic.transformer is model.transformer


def test_auto_takes_what_is_measured_to_be_faster(monkeypatch):
    assert resolved("auto", CPU) == "bfloat16"
    monkeypatch.setattr(module, "products", lambda d: COSTS | {"bfloat16, blocks": 81})
    assert resolved("auto", CPU) == "float32"  # not worth it
    monkeypatch.setattr(module, "products", lambda d: {"plain, blocks": 50, "plain, head": 50})
    assert resolved("auto", CPU) == "float32"
    assert layers(prepared(wide(), "auto")) == {"Linear"}


def test_precisions_that_there_are_not(monkeypatch):
    model = tiny.maskgit()
    with pytest.raises(ValueError, match=r"precision must be one of .*bfloat16.* not 'fp8'"):
        model.precision = "fp8"
    monkeypatch.setattr(linears, "available", lambda device: ["float32"])
    with pytest.raises(ValueError, match=r"'int8' is not to be had on this cpu.*\['float32'\]"):
        model.precision = "int8"
    assert model.precision == "float32"


def test_it_is_measured_once_for_a_machine(monkeypatch, tmp_path: Path):
    calls = []

    def measured(device: torch.device) -> dict[str, float]:
        calls.append(device)
        return dict(COSTS)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_measured", measured)
    assert products.__wrapped__(CPU) == COSTS
    assert products.__wrapped__(CPU) == COSTS
    assert len(calls) == 1
    [path] = tmp_path.glob("*/products.json")
    for damaged in ("{", "[]", json.dumps(dict.fromkeys(json.loads(path.read_text()), "fast"))):
        path.write_text(damaged)
        assert products.__wrapped__(CPU) == COSTS
    assert len(calls) == 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be kept there
    assert products.__wrapped__(CPU) == COSTS


def test_what_this_machine_measures():
    costs = module._measured(CPU)
    assert {"plain, blocks", "plain, head"} <= costs.keys()
    assert all(number > 0 for number in costs.values())
    assert "float32" in available(CPU)


def test_a_record_names_the_precision(tmp_path: Path, t5: str):
    muse = Muse(tiny.maskgit(wide(t5_name=t5, text_embed_dim=None))).eval()
    muse.save(tmp_path / "muse.safetensors")
    muse = Muse.from_pretrained(tmp_path / "muse.safetensors", precision="int8")
    assert muse.precision == muse.base.precision == "int8"
    [picture] = muse("a red house", seeds=3, timesteps=3)
    save_png(picture, tmp_path / "picture.png")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*precision")
        [again] = muse.like(tmp_path / "picture.png")
    assert again.tobytes() == picture.tobytes()
    muse.precision = "float32"
    with pytest.warns(UserWarning, match="drawn with precision int8, this is float32"):
        muse.like(tmp_path / "picture.png")
