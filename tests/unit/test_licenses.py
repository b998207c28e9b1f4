"""Licenses of weights: found where they are stated, kept in files, said in records."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from muse_maskgit_pytorch import MaskGit, Muse, load_tokenizer, open_model
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.checkpoint import load_tree, save_tree
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.images import record_of
from muse_maskgit_pytorch.licenses import license_of
from muse_maskgit_pytorch.loading import open_stage
from muse_maskgit_pytorch.provenance import from_json
from tests import hub


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: mit\n---\n# A model\n", "mit"),
        ("---\nlicense: other\nlicense_name: of-my-own\n---\n", "of-my-own"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: mit\n", None),  # the head does not end
        ("---\n{broken: [\n---\n", None),
        ("# A model\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: 'm\x1bit'\n---\n", None),
    ],
)
def test_what_a_card_says(card: str, expected: str | None, tmp_path: Path):
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "model.safetensors").touch()
    assert license_of(tmp_path) == license_of(tmp_path / "model.safetensors") == expected


def test_what_the_table_says(tmp_path: Path):
    assert license_of("amused/amused-512") == "openrail++"
    assert license_of("google/flan-t5-xxl") == license_of("google/flan-t5-xxl@v1") == "apache-2.0"
    assert license_of("nobody/none") is None
    assert license_of("not a name of a repository") is None
    snapshot = tmp_path / "models--amused--amused-256" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    assert license_of(snapshot / "model.safetensors") == "openrail++"
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    assert license_of(snapshot) == "mit"  # the card is newer


def test_a_file_keeps_the_licenses_of_all_parts(tmp_path: Path):
    vae = tiny.vae()
    vae.license = "openrail++"
    model = tiny.maskgit(vae=vae)
    assert model.licenses == {"weights": "not stated", "tokenizer": "openrail++"}
    model.license = "mit"
    model.save(tmp_path / "base.safetensors")
    expected = {"weights": "mit", "tokenizer": "openrail++"}
    assert MaskGit.from_pretrained(tmp_path / "base.safetensors").licenses == expected
    muse = open_model(tmp_path / "base.safetensors")
    assert muse.licenses == expected
    muse.save_pretrained(tmp_path / "folder")
    assert "license: mit\n" in (tmp_path / "folder" / "README.md").read_text()
    assert Muse.from_pretrained(tmp_path / "folder").licenses == expected
    assert open_stage(tmp_path / "folder").licenses == expected
    assert load_tokenizer(tmp_path / "base.safetensors").license == "openrail++"


def test_stages_of_different_licenses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`muse bundle` says them, keeps them, and takes the base's out of a whole model."""
    vae = tiny.vae()
    base, superres = Muse(tiny.maskgit(vae=vae)), tiny.superres(vae=vae)
    base.license, superres.license = "mit", "openrail++"
    files = [
        base.save(tmp_path / "base.safetensors"),
        superres.save(tmp_path / "superres.safetensors"),
    ]
    names = [f"--{stage}={file}" for stage, file in zip(("base", "superres"), files, strict=True)]
    assert main(["bundle", *names, f"--out={tmp_path}/both.safetensors"]) == 0
    expected = {"weights": "mit", "weights of the super-resolution": "openrail++"}
    assert "weights mit, weights of the super-resolution openrail++" in capsys.readouterr().err
    both = Muse.from_pretrained(tmp_path / "both.safetensors")
    assert both.licenses == expected
    both.license = "mit"  # of the whole
    assert both.licenses == {"weights": "mit"}


def test_what_is_trained_from_weights_stays_under_their_license():
    vae = tiny.vae()
    vae.license = "openrail++"
    assert vae.with_decoder(decoder_res_blocks=3).license == "openrail++"


def test_a_file_that_says_nonsense(tmp_path: Path):
    tiny.vae().save(tmp_path / "vae.safetensors")
    tree, kind = load_tree(tmp_path / "vae.safetensors")
    for stated in ("mit", ["mit"], {"": 3}, {"no.such.part": "mit"}):
        save_tree(tmp_path / "vae.safetensors", {**tree, "licenses": stated}, kind)
        assert load_tokenizer(tmp_path / "vae.safetensors").license is None
    save_tree(tmp_path / "vae.safetensors", {**tree, "licenses": {"": "m\x1b" * 99}}, kind)
    license = load_tokenizer(tmp_path / "vae.safetensors").license
    assert license is not None
    assert len(license) <= 80
    assert "\x1b" not in license


def test_records_say_the_licenses(t5: str):
    muse = Muse(tiny.maskgit(tiny.transformer(t5_name=t5, text_embed_dim=None))).eval()
    muse.license = "mit"
    [record] = from_json(record_of(muse("a cat", seeds=1, timesteps=1)[0]) or "", "it")
    assert record.made_by["license"] == "weights: mit; text encoder: not stated"


def test_amused(tmp_path: Path):
    hub.make_amused(tmp_path / "amused")
    (tmp_path / "amused" / "README.md").write_text("---\nlicense: openrail++\n---\n")
    found = dict.fromkeys(("weights", "tokenizer", "text encoder"), "openrail++")
    assert open_model(tmp_path / "amused").licenses == found


def test_a_card_in_the_hubs_cache(tmp_path: Path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("---\nlicense: bsd\n---\n")
    home = hub.make_hub(tmp_path / "home", {"nobody/mine": tmp_path / "mine"})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", home["HF_HUB_CACHE"])
    monkeypatch.chdir(tmp_path)
    assert license_of("nobody/mine") == "bsd"
