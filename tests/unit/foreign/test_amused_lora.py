"""Adapters of aMUSEd, there and back: diffusers' and peft's files here, ours there."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from muse_maskgit_pytorch import CheckpointError, MaskGitTrainer, Muse, testing
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.images import to_pil
from muse_maskgit_pytorch.lora import Lora, add_lora, save_lora, with_text_lora
from muse_maskgit_pytorch.structures import Conditioning
from tests import hub

FILE = "pytorch_lora_weights.safetensors"
TEXTS = ["a cat", "two dogs"]
IDS = torch.arange(128).view(2, 64) % 60
# the training script's targets, a layer outside of the blocks, and two 1x1 convolutions
TARGETS = ["to_q", "to_k", "to_v", "cond_embed.linear_1", "embed.conv", "mlm_layer.conv1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder, and diffusers' pipeline of it."""
    folder = tmp_path_factory.mktemp("amused") / "model"
    return folder, hub.make_amused(folder)


@pytest.fixture
def pipeline(made: tuple[Path, Any]) -> Any:
    """Diffusers' networks, to be changed."""
    return copy.deepcopy(made[1])


@torch.no_grad()
def theirs(pipeline: Any) -> Tensor:
    """Logits of two texts, and without a text.

    Transformers compute in double precision: an adapter is a product beside its layer there and a
    part of its weight here, and in float32 how far these roundings lie apart depends on the
    processor.
    """
    reader = pipeline.tokenizer
    tokens = reader([*TEXTS, "", ""], padding="max_length", truncation=True, return_tensors="pt")
    read = pipeline.text_encoder(tokens.input_ids, output_hidden_states=True)
    states, pooled = read.hidden_states[-2].double(), read.text_embeds.double()
    micro = torch.tensor([[32.0, 32, 0, 0, 6]]).expand(4, -1)
    rows = IDS.repeat(2, 1).view(4, 8, 8)
    logits = copy.deepcopy(pipeline.transformer).double()(rows, states, pooled, micro)
    return logits.flatten(2).transpose(1, 2).unflatten(0, (2, 2))


@torch.no_grad()
def ours(muse: Muse) -> Tensor:
    """The same; see there."""
    model: Any = copy.deepcopy(muse.base.transformer).double()
    seen = torch.ones(2, dtype=torch.bool)
    branches = [Conditioning(t, None, seen) for t in (muse.base.embed_texts(TEXTS), None)]
    return model.to_logits(model(IDS, model.encode_context(*branches)))


def train(pipeline: Any, folder: Path, text: bool = False, **config: Any) -> Path:
    """The file that diffusers' examples/amused/train_amused.py writes, of random adapters."""
    from diffusers.loaders.lora_pipeline import AmusedLoraLoaderMixin

    def adapted(network: Any, targets: list[str]) -> dict[str, Tensor]:
        how: dict[str, Any] = dict(r=4, lora_alpha=4, init_lora_weights=False) | config
        network.add_adapter(peft.LoraConfig(target_modules=targets, **how))
        with torch.no_grad():
            for name, value in network.named_parameters():
                if "lora_B" in name:
                    value *= 0.5
        return peft.get_peft_model_state_dict(network)

    layers: dict[str, Any] = {"transformer_lora_layers": adapted(pipeline.transformer, TARGETS)}
    if text:
        layers["text_encoder_lora_layers"] = adapted(pipeline.text_encoder, ["q_proj", "fc1"])
    AmusedLoraLoaderMixin.save_lora_weights(folder, **layers)
    return folder / FILE


@pytest.mark.parametrize("text", [False, True])
def test_what_diffusers_trained_is_drawn_with_here(
    text: bool, made: tuple[Path, Any], pipeline: Any, tmp_path: Path
):
    plain, muse = theirs(pipeline), Muse.from_pretrained(made[0])
    before, fingerprint = ours(muse), muse.fingerprint
    file = train(pipeline, tmp_path / "cats", text)
    expected = theirs(pipeline)
    assert ((expected - plain).abs().amax((1, 2, 3)) > 0.05).all()  # without a text, too
    for place in (file, file.parent):
        muse.load_lora(place)
        torch.testing.assert_close(ours(muse), expected, rtol=0, atol=1e-5)
        assert muse.loras[0].startswith("cats (base) x 1")
        assert muse.fingerprint != fingerprint
        muse.unload_lora()
        assert torch.equal(ours(muse), before)
    assert muse.fingerprint == fingerprint


def test_what_was_trained_here_is_read_by_peft_and_by_diffusers(
    made: tuple[Path, Any], pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from diffusers.loaders.lora_pipeline import AmusedLoraLoaderMixin

    muse = Muse.from_pretrained(made[0])
    model: Any = muse.base.transformer
    encoder = muse.base.own_encoder = with_text_lora(model.text_reader(), 3, 6.0)
    add_lora(model, 3, 6.0, [*TARGETS, "ff.net.0.proj"])
    with torch.no_grad():
        for network in (model, encoder.model):
            for name, value in network.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(value, std=0.1)
        model.text_encoder_changed(encoder)
    folder = save_lora(model, tmp_path / "cats", "base", encoder)
    assert main(["export", f"--model={folder}", "--format=diffusers", f"--out={tmp_path}/out"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / FILE)
    pipeline.transformer.load_lora_adapter(str(tmp_path / "out"), weight_name=FILE)
    AmusedLoraLoaderMixin.load_lora_into_text_encoder(
        load_file(tmp_path / "out" / FILE), None, pipeline.text_encoder
    )
    expected = ours(muse)
    assert (expected - theirs(made[1])).abs().max() > 0.1
    torch.testing.assert_close(theirs(pipeline), expected, rtol=0, atol=1e-5)
    for place in (folder, tmp_path / "out"):  # and here
        again = Muse.from_pretrained(made[0]).load_lora(place)
        torch.testing.assert_close(ours(again), expected, rtol=0, atol=1e-5)


def test_peft_reads_our_folder(made: tuple[Path, Any], pipeline: Any, tmp_path: Path):
    model: Any = Muse.from_pretrained(made[0]).base.transformer
    add_lora(model, 2, 3.0)  # all linear layers of the blocks
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
    folder = save_lora(model, tmp_path / "cats", "base")
    muse = Muse.from_pretrained(made[0]).load_lora(folder)
    pipeline.transformer = peft.PeftModel.from_pretrained(pipeline.transformer, str(folder))
    torch.testing.assert_close(theirs(pipeline), ours(muse), rtol=0, atol=1e-5)


def test_older_names_and_alpha(made: tuple[Path, Any], pipeline: Any, tmp_path: Path):
    """Without alpha it counts as the rank, as in diffusers; with it, it is taken."""
    state = load_file(train(pipeline, tmp_path, lora_alpha=8))
    muse = Muse.from_pretrained(made[0])
    older = {}
    for name, value in state.items():
        layer, _, matrix = name.partition(".lora_")
        older[f"{layer}.lora.{'down' if matrix[0] == 'A' else 'up'}.weight"] = value
        older[f"{layer}.alpha"] = torch.tensor(8.0)
    save_file(older, tmp_path / "old.safetensors")
    torch.testing.assert_close(
        ours(muse.load_lora(tmp_path / "old.safetensors")), theirs(pipeline), rtol=0, atol=1e-5
    )
    muse.unload_lora().load_lora(tmp_path, 2.0)  # the file says none: 8 / 4
    torch.testing.assert_close(ours(muse), theirs(pipeline), rtol=0, atol=1e-5)


Q = "transformer.transformer_layers.0.attn1.to_q"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({f"{Q}.lora_A.weight": torch.ones(4, 5)}, r"to_q' has matrices \(4, 5\) and \(32, 4\)"),
        ({f"{Q}.lora_B.weight": None}, "to_q' is no linear layer of it, or lacks one of A"),
        ({"transformer.other.lora_A.weight": torch.ones(4, 5)}, "other' is no linear layer of it"),
        ({"prior.to_q.lora_A.weight": torch.ones(4, 5)}, "prior.to_q.* is not known here: read"),
        ({"unet.to_q.lora_A.weight": torch.ones(4, 5)}, "to_q' is no linear layer of it"),
        ({f"{Q}.weight": torch.ones(3)}, "to_q.weight' is not known here: read are weights"),
        ({f"{Q}.alpha": torch.ones(3)}, "to_q.alpha' must be one number"),
        ({f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)}, "must hold finite numbers"),
        ({"text_encoder.no.lora_A.weight": torch.ones(2, 2)}, "another text encoder .* no linear"),
    ],
)
def test_files_that_do_not_fit(
    changes: dict[str, Any], message: str, made: tuple[Path, Any], tmp_path: Path
):
    state = {f"{Q}.lora_A.weight": torch.ones(4, 32), f"{Q}.lora_B.weight": torch.ones(32, 4)}
    state = {n: value for n, value in (state | changes).items() if value is not None}
    save_file(state, tmp_path / FILE)
    muse = Muse.from_pretrained(made[0])
    fingerprint = muse.fingerprint
    with pytest.raises(CheckpointError, match=message):
        muse.load_lora(tmp_path)
    assert muse.fingerprint == fingerprint
    assert muse.loras == []


def test_other_files(made: tuple[Path, Any], tmp_path: Path):
    muse = Muse.from_pretrained(made[0])
    with pytest.raises(CheckpointError, match=rf"is no adapter: .*, and no {FILE} \(diffusers\)"):
        muse.load_lora(tmp_path)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"as a pickle, .*\.bin, and not as {FILE}: write"):
        muse.load_lora(tmp_path)
    (tmp_path / FILE).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=FILE):
        muse.load_lora(tmp_path)
    transformer = testing.transformer()
    add_lora(transformer, 2)
    adapter = Lora.read(save_lora(transformer, tmp_path / "ours", "base"))
    with pytest.raises(ValueError, match=r"blocks\.0\..* is no layer of aMUSEd's transformer"):
        adapter.export(tmp_path / "out")


def test_one_is_trained_here(made: tuple[Path, Any], tmp_path: Path):
    muse = Muse.from_pretrained(made[0])
    rows = [{"image": image, "text": "a cat"} for image in to_pil(torch.rand(4, 3, 32, 32))]
    trainer = MaskGitTrainer(
        muse.base, data=rows, results_folder=str(tmp_path), lora_rank=2, num_train_steps=2,
        batch_size=2, lr=1e-2, num_workers=0, mixed_precision="no",
    )  # fmt: skip
    trainer.train()
    drawn = Muse.from_pretrained(made[0]).load_lora(tmp_path / "base-lora")
    torch.testing.assert_close(ours(drawn), ours(Muse(muse.base)), rtol=0, atol=1e-5)
    assert not torch.equal(ours(drawn), ours(Muse.from_pretrained(made[0])))
