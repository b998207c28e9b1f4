"""Files: what comes out is what went in, and a crash leaves the old file."""

import json
import os
import pickle  # noqa: TID251  (to make the file that must be refused)
import stat
import struct
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from muse_maskgit_pytorch import (
    CheckpointError,
    MaskGit,
    MaskGitTransformer,
    Muse,
    VQGanVAE,
    load_tokenizer,
)
from muse_maskgit_pytorch import checkpoint as module
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.checkpoint import Saveable, find_file, load_tree, save_tree, weights_key
from muse_maskgit_pytorch.weights import is_finite


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


TREE = {
    "step": 7,
    "rate": 1e-4,
    "name": "Muse ✨",
    "none": None,
    "flag": True,
    "state": {0: {"exp_avg": torch.randn(3, 2)}, 1: {"step": torch.tensor(5.0)}},
    "groups": [{"betas": [0.9, 0.96], "params": [0, 1]}, []],
    "rng": torch.randint(255, (16,), dtype=torch.uint8),
    "mask": torch.tensor([True, False]),
    "half": torch.randn(4).bfloat16(),
    "empty": torch.zeros(0, 3),
    "nothing": {},
}


def test_trees_come_back(tmp_path):
    path = save_tree(tmp_path / "new" / "a.safetensors", TREE, "thing")
    tree, kind = load_tree(path, "thing")
    assert kind == "thing"
    assert equal(tree, TREE)
    assert load_tree(path)[1] == "thing"


def test_tuples_come_back_as_lists(tmp_path):
    save_tree(tmp_path / "a", {"betas": (0.9, torch.ones(2))}, "thing")
    betas = load_tree(tmp_path / "a")[0]["betas"]
    assert betas[0] == 0.9
    assert torch.equal(betas[1], torch.ones(2))


def test_names_that_coincide(tmp_path):
    tree: dict[Any, Any] = {
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1), "": torch.full((1,), 2.0)},
        1: 2,
    }
    tree |= {"1": torch.full((1,), 3.0), "c": {1: torch.ones(2), "1": torch.zeros(2)}}
    save_tree(tmp_path / "a", tree, "thing")
    assert equal(load_tree(tmp_path / "a")[0], tree)


def test_equal_tensors_are_stored_once(tmp_path):
    big = torch.randn(1000)
    tree = {"a": big, "b": big.clone(), "view": big[:500], "other": big.view(10, 100)}
    tree["bits"] = big.view(torch.int32)
    save_tree(tmp_path / "a", tree, "thing")
    assert len(load_file(tmp_path / "a")) == 4
    assert equal(load_tree(tmp_path / "a")[0], tree)


def test_views_and_strides(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    tree = {"t": base.T, "slice": base[:, 1], "expanded": base[0, 0].expand(5), "all": base}
    save_tree(tmp_path / "a", tree, "thing")
    assert equal(load_tree(tmp_path / "a")[0], tree)


@pytest.mark.parametrize("where", ["save_file", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch, where, error):
    path = save_tree(tmp_path / "a.safetensors", {"x": torch.ones(3)}, "thing")
    real = module.save_file

    def crash(*args, **kwargs):
        if where == "save_file":
            real(*args, **kwargs)  # written, perhaps in part, under the temporary name
        raise error("disk full")

    monkeypatch.setattr(*((module, where) if where == "save_file" else (os, where)), crash)
    with pytest.raises(error):
        save_tree(path, {"x": torch.zeros(3)}, "thing")
    monkeypatch.undo()
    assert torch.equal(load_tree(path)[0]["x"], torch.ones(3))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        save_tree(tmp_path / "a", {"x": object()}, "thing")
    assert os.listdir(tmp_path) == []


def test_a_file_has_the_usual_permissions(tmp_path):
    path = save_tree(tmp_path / "a", {}, "thing")
    (tmp_path / "b").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        load_tree(tmp_path / "none")
    path = save_tree(tmp_path / "a.safetensors", TREE, "thing")
    with pytest.raises(CheckpointError, match="holds a thing, not a VQGanVAE"):
        tiny.vae().load(path)

    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            load_tree(path)

    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    header["__metadata__"]["version"] = "2"
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + whole[8 + size :])
    with pytest.raises(CheckpointError, match="version 2, this package reads up to 1: upgrade"):
        load_tree(path)

    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not one of this package"):
        load_tree(path)


# Models


def test_a_state_dict_of_torch_is_read(tmp_path):
    vae, other = tiny.vae(), tiny.vae()
    for content in (vae.state_dict(), {"model": vae.state_dict(), "step": 3}):
        torch.save(content, tmp_path / "vae.pt")
        tiny.randomise(other)
        assert other.load(tmp_path / "vae.pt") is other
        assert equal(dict(other.state_dict()), dict(vae.state_dict()))


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "owned"))
    torch.save({"encoder": Evil()}, tmp_path / "vae.pt")
    with pytest.raises(CheckpointError, match="executed, which is refused"):
        tiny.vae().load(tmp_path / "vae.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        tiny.vae().load(tmp_path / "old.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {"epoch": 3}])
def test_a_torch_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no state dict"):
        tiny.vae().load(tmp_path / "a.pt")


def test_another_geometry_is_named(tmp_path):
    path = tiny.vae(dim=16).save(tmp_path / "vae.safetensors")
    vae = tiny.vae(dim=8)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    message = r"does not fit this VQGanVAE: \S+ is \(\S.*\) there and \(.*\) here.*from_pretrained"
    with pytest.raises(CheckpointError, match=message):
        vae.load(path)
    assert equal(dict(vae.state_dict()), before)  # not half loaded

    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is missing there"):
        vae.load(tmp_path / "x.pt")
    torch.save({**vae.state_dict(), "zzz": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="zzz is unknown here"):
        vae.load(tmp_path / "x.pt")


def same_ids(a: MaskGit, b: MaskGit, **conditioning) -> bool:
    ids = [
        m.generate_ids(text_embeds=tiny.text(), seeds=[1, 2], timesteps=3, **conditioning)
        for m in (a, b)
    ]
    return torch.equal(*ids)


def test_models_are_rebuilt_without_a_config(tmp_path):
    vae = tiny.vae(quantizer="lfq", codebook_size=64, channel_mults=(1, 2, 2))
    again = VQGanVAE.from_pretrained(vae.save(tmp_path / "vae.safetensors"))
    assert again.config == vae.config | {"channel_mults": [1, 2, 2]}
    assert not again.training
    assert torch.equal(again.encode_to_ids(tiny.images()), vae.encode_to_ids(tiny.images()))

    maskgit = tiny.superres(
        vae=tiny.vae(),
        cond_vae=tiny.vae(codebook_size=100),
        token_critic=tiny.critic(seq_len=64),
        sample_options=dict(timesteps=3, cond_scale=2.0),
    )
    again = MaskGit.from_pretrained(str(maskgit.save(tmp_path / "superres.safetensors")))
    assert again.default_options == maskgit.default_options
    assert not again.training
    assert same_ids(again, maskgit, cond_images=tiny.images())


def test_the_self_critic_is_saved_too(tmp_path):
    maskgit = tiny.maskgit(self_token_critic=True)
    again: Any = MaskGit.from_pretrained(maskgit.save(tmp_path / "a.safetensors"))
    assert same_ids(again, maskgit)
    assert again.critic._transformer[0] is again.transformer


def test_a_superres_transformer_alone(tmp_path):
    """Its low-resolution encoder is no constructor argument, and comes back all the same."""
    transformer = tiny.superres().transformer
    path = transformer.save(tmp_path / "transformer.safetensors")
    again = MaskGitTransformer.from_pretrained(path)
    assert equal(dict(again.state_dict()), dict(transformer.state_dict()))


def test_tokenizers_of_a_cascade_are_stored_once(tmp_path):
    vae = tiny.vae(dim=32)
    size = vae.save(tmp_path / "vae.safetensors").stat().st_size
    muse = Muse(tiny.maskgit(vae=vae), tiny.superres(vae=vae))
    base = MaskGit(vae=vae, transformer=tiny.transformer(), image_size=16)
    whole = muse.save(tmp_path / "muse.safetensors").stat().st_size
    one = base.save(tmp_path / "base.safetensors").stat().st_size
    assert whole < one + size
    assert equal(dict(Muse.from_pretrained(tmp_path / "muse.safetensors").state_dict()),
                 dict(muse.state_dict()))  # fmt: skip


def test_half_precision_files(tmp_path):
    vae = tiny.vae(dim=32)
    full = vae.save(tmp_path / "full.safetensors").stat().st_size
    path = vae.save(tmp_path / "half.safetensors", torch.float16)
    assert path.stat().st_size < 0.6 * full
    again = VQGanVAE.from_pretrained(path)
    for name, value in vae.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-3, rtol=1e-3)


def test_types_that_would_destroy_the_weights(tmp_path):
    vae = tiny.vae()
    path = tmp_path / "a.safetensors"
    for dtype in (torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64, "float16"):
        with pytest.raises(ValueError, match="save: dtype must be one of"):
            vae.save(path, dtype)
    weight = vae.decoder[0].weight.data
    weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"decoder\.0\.weight has values up to 1e\+06, beyond the"):
        vae.save(path, torch.float16)
    assert not path.exists()
    again = VQGanVAE.from_pretrained(vae.save(path, torch.bfloat16))  # as the message advises
    assert float(again.state_dict()["decoder.0.weight"][0, 0, 0, 0]) == pytest.approx(1e6, rel=0.01)
    weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"decoder\.0\.weight has values that are not finite"):
        vae.save(tmp_path / "b.safetensors")


def test_any_name_holds_safetensors(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_NOTED", [])
    vae, other = tiny.vae(), tiny.randomise(tiny.vae())
    with pytest.warns(UserWarning, match=r"vae\.pt is a safetensors file, whatever its name"):
        path = vae.save(tmp_path / "vae.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        vae.save(tmp_path / "vae.ckpt")
    usual = vae.save(tmp_path / "vae.safetensors")
    assert path.read_bytes() == usual.read_bytes() == (tmp_path / "vae.ckpt").read_bytes()
    torch.save(vae.state_dict(), tmp_path / "torch.safetensors")
    for name in ("vae.pt", "vae.ckpt", "torch.safetensors"):
        tiny.randomise(other)
        assert equal(dict(other.load(tmp_path / name).state_dict()), dict(vae.state_dict()))
    for again in (VQGanVAE.from_pretrained(path), load_tokenizer(path)):
        assert equal(dict(again.state_dict()), dict(vae.state_dict()))


def test_wrong_class(tmp_path):
    path = tiny.vae().save(tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="holds a VQGanVAE, not a MaskGit"):
        MaskGit.from_pretrained(path)


@pytest.mark.parametrize(
    "name, said",
    [
        ("emojy", r"unknown model .*\['mine'\]"),
        ("a/b/c", "no such model file: a/b/c; in . there are mine.safetensors"),
        ("./none.safetensors", "no such model file"),
        ("results/x.safetensors", "no such model file"),
    ],
)
def test_unknown_names_list_the_shipped_models(name, said, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHIPPED", tmp_path)
    monkeypatch.chdir(tmp_path)
    vae = tiny.vae()
    vae.save(tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=said):
        VQGanVAE.from_pretrained(name)
    assert VQGanVAE.from_pretrained("mine").config == vae.config


def test_the_name_of_a_former_model_gives_the_one_in_its_place(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "SHIPPED", tmp_path)
    tiny.vae().save(tmp_path / "scenes.safetensors")
    with pytest.warns(UserWarning, match="'emoji' is no longer shipped: this is 'scenes'"):
        assert find_file("emoji") == tmp_path / "scenes.safetensors"


def test_a_missing_file_names_what_lies_near_it(tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(
        CheckpointError, match=f"no such model file: .*; in {tmp_path} there is non"
    ):
        find_file(run / "vae-ema.safetensors")
    (run / "older").mkdir(parents=True)
    for name in ("vae.safetensors", "vae-best.safetensors", "notes.txt", "older/b.pt"):
        (run / name).write_bytes(b"")
    (run / "vae-checkpoint-00000002.safetensors").write_bytes(b"")
    near = f"in {run} there are vae-best.safetensors, vae.safetensors, older/b.pt"
    with pytest.raises(CheckpointError, match=f"{near}$"):
        find_file(run / "vae-bets.safetensors")
    with pytest.raises(CheckpointError, match=r"older there are b\.pt"):
        find_file(run / "older" / "c.pt")


def test_a_checkpoint_is_no_model(tmp_path: Path):
    path = tmp_path / "vae-checkpoint-00000002.safetensors"
    save_tree(path, {"step": 2}, kind="VQGanVAETrainer checkpoint")
    tiny.vae().save(tmp_path / "vae-ema.safetensors")
    for opened in (find_file, load_tokenizer, VQGanVAE.from_pretrained):
        with pytest.raises(CheckpointError, match=r"to go on from, and no model; in .* vae-ema"):
            opened(path)


def test_hub_without_network():
    with pytest.raises(
        CheckpointError, match=r"of nobody/nothing is not in .*could not be reached"
    ):
        VQGanVAE.from_pretrained("nobody/nothing")


def test_arguments_of_another_release(tmp_path):
    vae = tiny.vae()
    tree = {"config": {**vae.config, "wings": 2}, "state": dict(vae.state_dict())}
    path = save_tree(tmp_path / "a.safetensors", tree, "VQGanVAE")
    with pytest.raises(CheckpointError, match=r"saved VQGanVAE has other arguments.*wings"):
        VQGanVAE.from_pretrained(path)


def test_a_module_that_does_not_exist_here(tmp_path):
    maskgit = tiny.maskgit()
    config = {**maskgit.config, "transformer": {"kind": "Mamba", "config": {}}}
    tree = {"config": config, "state": {}}
    path = save_tree(tmp_path / "a.safetensors", tree, "MaskGit")
    with pytest.raises(CheckpointError, match="Mamba"):
        MaskGit.from_pretrained(path)


def test_copies_are_independent(tmp_path: Path):
    import copy

    maskgit = tiny.maskgit(self_token_critic=True)
    twin = copy.deepcopy(maskgit)
    tiny.randomise(twin.transformer)
    assert twin.critic._transformer[0] is twin.transformer
    assert twin.save(tmp_path / "a.safetensors")
    assert not same_ids(twin, maskgit)


def test_equal_tensors_come_back_as_tensors_of_their_own(tmp_path: Path):
    steps = {"a": torch.zeros(3), "b": torch.zeros(3)}
    save_tree(tmp_path / "x.safetensors", steps, kind="x")
    tree, _ = load_tree(tmp_path / "x.safetensors")
    tree["a"] += 1
    assert tree["b"].tolist() == [0, 0, 0]


# Files of earlier releases -----------------------------------------------------------------------


class Part(Saveable):
    def __init__(self, width: int = 2):
        super().__init__()
        self.new = torch.nn.Parameter(torch.zeros(width))

    def _upgrade(self, state, prefix):
        if f"{prefix}old" in state:
            state[f"{prefix}new"] = state.pop(f"{prefix}old")


class Whole(Saveable):
    _retired: ClassVar = {"colour": None}

    def __init__(self, part: Part, size: int = 1):
        super().__init__()
        self.part, self.size = part, size

    @classmethod
    def _upgraded(cls, config, state):
        config = dict(config)
        if "length" in config:
            config["size"] = config.pop("length") * len(state["part.old"])
        return config


def test_files_of_earlier_releases_are_upgraded(tmp_path: Path):
    config: dict[str, Any] = {
        "part": {"kind": "Part", "config": {"width": 3}},
        "length": 5,
        "colour": None,
    }
    tree = {"config": config, "state": {"part.old": torch.ones(3)}}
    path = save_tree(tmp_path / "a.safetensors", tree, "Whole")
    again = Whole.from_pretrained(path)
    assert torch.equal(again.part.new, torch.ones(3))
    assert again.size == 15
    assert again.config == {"part": {"kind": "Part", "config": {"width": 3}}, "size": 15}
    new = Whole(Part(3)).load(path)
    assert torch.equal(new.part.new, torch.ones(3))

    config["colour"] = "red"
    save_tree(path, tree, "Whole")
    with pytest.raises(CheckpointError, match=r"has colour 'red', which .* no longer supports"):
        Whole.from_pretrained(path)


def test_a_model_loaded_in_inference_mode_draws_and_trains(tmp_path: Path):
    path = tiny.maskgit().save(tmp_path / "a.safetensors")
    other = tiny.maskgit()
    with torch.inference_mode():
        models = [MaskGit.from_pretrained(path), other.load(path)]
        models[0].vae = load_tokenizer(path)
    for model in models:
        model.generate_ids(text_embeds=tiny.text(), seeds=1, timesteps=2)
        optimizer = torch.optim.SGD(model.transformer.parameters(), lr=0.1)
        model(tiny.images(), text_embeds=tiny.text()).backward()
        optimizer.step()


@torch.no_grad()
def test_the_key_of_weights_changes_with_them(tmp_path: Path):
    model = tiny.maskgit()
    path = model.save(tmp_path / "a.safetensors")
    weight = model.transformer.state_dict(keep_vars=True)

    def swap():
        model.vae.encoder[0].bias = torch.nn.Parameter(torch.zeros_like(model.vae.encoder[0].bias))

    seen = {weights_key(model)}
    assert weights_key(model) in seen
    for change in (
        lambda: next(iter(weight.values())).add_(1),
        lambda: model.load_state_dict(model.state_dict()),
        lambda: model.load(path),
        lambda: model.vae.load_state_dict(model.vae.state_dict()),
        lambda: model.half().float(),
        lambda: model.transformer.half().float(),
        swap,
    ):
        change()
        assert weights_key(model) not in seen
        seen.add(weights_key(model))
    with torch.inference_mode():  # its tensors do not count their changes
        vae = tiny.vae()
        before = weights_key(vae)
        vae.load_state_dict(vae.state_dict())
        assert weights_key(vae) != before

    keys = set()
    for _ in range(20):  # the memory of the last one is used again
        keys.add(weights_key(tiny.vae()))
    assert len(keys) == 20


def test_widths_of_before_they_were_rounded(tmp_path: Path):
    """Files that do not state the width of their MLPs have it in their weights; as before, they
    are the same model, in a cascade too.
    """
    muse = Muse(base=tiny.maskgit(tiny.transformer(ff_dim=42)))
    muse.save(tmp_path / "muse.safetensors")
    tree, _ = load_tree(tmp_path / "muse.safetensors")
    transformer = tree["config"]["base"]["config"]["transformer"]["config"]
    assert transformer.pop("ff_dim") == 42
    save_tree(tmp_path / "old.safetensors", tree, kind="Muse")
    old = Muse.from_pretrained(tmp_path / "old.safetensors")
    assert old.base.transformer.config["ff_dim"] == 42
    assert old.fingerprint == muse.fingerprint
    assert tiny.transformer().blocks[0].ff.to_out.in_features == 48


# Made of a file's weights


class Table(Saveable):
    """Draws its weights, and a table of its own from a generator, which no file holds."""

    table: torch.Tensor

    def __init__(self, size: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size))
        torch.nn.init.normal_(self.weight)
        self.linear = torch.nn.Linear(size, size)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(3))
        self.register_buffer("table", noise, persistent=False)
        scale = torch.nn.init.constant_(torch.empty(size), 2.0)
        self.register_buffer("scale", scale, persistent=False)


def test_loading_draws_no_weights_and_keeps_what_no_file_holds(tmp_path):
    model = Table(4)
    model.save(tmp_path / "a.safetensors")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = Table.from_pretrained(tmp_path / "a.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(again.state_dict(), model.state_dict())
    assert torch.equal(again.table, model.table)
    assert torch.equal(again.scale, model.scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_among_huge_ones_is_found(value):
    huge = torch.full((1000,), 3e38)  # their sum is not finite
    assert is_finite(huge)
    assert is_finite(torch.tensor([3e38, 3e38, -3e38]))
    assert not is_finite(torch.cat([huge, torch.tensor([value])]))
    assert not is_finite(torch.tensor([1.0, value]))
    assert not is_finite(torch.tensor([1.0, value], dtype=torch.float16))
