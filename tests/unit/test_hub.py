import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.errors import EntryNotFoundError

from muse_maskgit_pytorch import CheckpointError, MaskGit, Muse, VQGanVAE, hub, testing
from muse_maskgit_pytorch.foreign import load_tokenizer
from muse_maskgit_pytorch.loading import open_model, open_stage
from tests.hub import make_hub


@pytest.fixture
def muse() -> Muse:
    vae = testing.vae()
    return Muse(testing.maskgit(vae=vae), testing.superres(vae=vae)).eval()


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_folder_comes_back(tmp_path: Path, muse: Muse):
    folder = muse.save_pretrained(tmp_path / "mine")
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors"
    }  # fmt: skip
    for again in (Muse.from_pretrained(folder), open_model(folder, "cpu")):
        assert equal(again, muse)
        assert not again.training
    assert equal(open_stage(f"{folder}:superres"), muse.stages["superres"])
    assert equal(load_tokenizer(f"{folder}:base"), muse.base.vae)
    stated = json.loads((folder / "config.json").read_text())
    assert (stated["kind"], stated["version"]) == ("Muse", 1)
    assert stated["config"]["base"]["config"]["image_size"] == 16
    assert front_matter(folder)["pipeline_tag"] == "text-to-image"
    assert 'Muse.from_pretrained("mine")' in (folder / "README.md").read_text()


def test_every_kind_of_model(tmp_path: Path, muse: Muse):
    vae, base = muse.base.vae, muse.base
    assert equal(VQGanVAE.from_pretrained(vae.save_pretrained(tmp_path / "vae")), vae)
    assert equal(load_tokenizer(tmp_path / "vae"), vae)
    assert "pipeline_tag" not in front_matter(tmp_path / "vae")
    assert equal(MaskGit.from_pretrained(base.save_pretrained(tmp_path / "base")), base)
    classes = testing.maskgit(testing.transformer(classes=3, text_embed_dim=None))
    folder = classes.save_pretrained(tmp_path / "classes")
    assert front_matter(folder)["pipeline_tag"] == "unconditional-image-generation"


def test_half_precision_and_files_that_stay(tmp_path: Path, muse: Muse):
    full = muse.save_pretrained(tmp_path / "mine")
    (full / "README.md").write_text("my own card")
    (full / "notes.txt").write_text("notes")
    size = (full / "model.safetensors").stat().st_size
    muse.save_pretrained(full, torch.bfloat16)
    assert (full / "model.safetensors").stat().st_size < size
    assert (full / "README.md").read_text() == "my own card"
    assert (full / "notes.txt").exists()
    Muse.from_pretrained(full)


def test_a_folder_with_a_missing_or_a_foreign_part(tmp_path: Path, muse: Muse):
    folder = muse.save_pretrained(tmp_path / "mine")
    other = muse.base.save_pretrained(tmp_path / "other")
    shutil.copyfile(other / "config.json", folder / "config.json")
    with pytest.raises(CheckpointError, match=r"mine/config\.json is not what .*another model"):
        Muse.from_pretrained(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"mine/config\.json"):
        Muse.from_pretrained(folder)
    (folder / "config.json").unlink()  # for people alone
    Muse.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "renamed.safetensors")
    message = r"mine has no model\.safetensors, .* there are renamed\.safetensors"
    with pytest.raises(CheckpointError, match=message):
        Muse.from_pretrained(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory"):
        muse.save_pretrained(tmp_path / "file")


def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path):
    vae, path = testing.vae(), tmp_path / "vae.pt"
    torch.save(vae.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"vae\.pt is a pickle .*model\.load\(\)"):
        VQGanVAE.from_pretrained(path)
    torch.save(vae.state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"vae\.pt is a pickle"):
        VQGanVAE.from_pretrained(path)
    again = testing.randomise(testing.vae())
    assert equal(again.load(path), vae)  # as it says


def test_an_adapter_as_a_pickle(tmp_path: Path, muse: Muse):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        muse.load_lora(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"as a pickle, .*weights_only=True"):
        muse.load_lora(tmp_path)


def test_from_the_hub(tmp_path: Path, muse: Muse, monkeypatch: pytest.MonkeyPatch):
    folder = muse.save_pretrained(tmp_path / "mine")
    make_hub(tmp_path / "home", {"me/mine": folder})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    assert equal(Muse.from_pretrained("me/mine"), muse)
    assert equal(load_tokenizer("me/mine:superres"), muse.stages["superres"].vae)
    message = (
        r"model\.safetensors of me/yours is not in this machine's cache, .* could not be reached"
        r".*hf download me/yours --local-dir yours.* give its path in the place of me/yours"
    )
    with pytest.raises(CheckpointError, match=message):
        Muse.from_pretrained("me/yours")
    monkeypatch.setattr(hub, "without_hub", lambda name: False)
    with pytest.raises(CheckpointError, match=r"model\.safetensors of me/yours could not be had"):
        Muse.from_pretrained("me/yours")


def test_a_revision(tmp_path: Path, muse: Muse, monkeypatch: pytest.MonkeyPatch):
    """A repository's name, or an argument, says which state of it is meant."""
    newer = Muse(testing.maskgit(vae=testing.randomise(testing.vae()))).eval()
    folders = {"me/mine": muse.save_pretrained(tmp_path / "old")}
    folders["me/mine@v2"] = newer.save_pretrained(tmp_path / "new")
    make_hub(tmp_path / "home", folders)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    assert equal(Muse.from_pretrained("me/mine"), muse)
    for again in (Muse.from_pretrained("me/mine", revision="v2"), open_model("me/mine@v2", "cpu")):
        assert equal(again, newer)
    assert equal(load_tokenizer("me/mine@v2:base"), newer.base.vae)
    message = r"me/mine@v3 is not in .*hf download me/mine --revision v3 --local-dir mine\)"
    with pytest.raises(CheckpointError, match=message):
        Muse.from_pretrained("me/mine", revision="v3")


@pytest.mark.parametrize(
    "name, revision, message",
    [
        ("scenes", "v2", "'scenes' is no repository on the Hugging Face hub .*: leave it out"),
        ("mine.safetensors", "v2", "revision 'v2' is given, and .* is no repository"),
        ("me/mine@v1", "v2", "'me/mine@v1' names another revision than 'v2'"),
        ("me/mine", "", "revision must name a branch, a tag or a commit"),
        ("me/mine", 3, "revision must name a branch, a tag or a commit"),
    ],
)
def test_what_is_no_revision(name: str, revision: str, message: str):
    with pytest.raises(ValueError, match=message):
        Muse.from_pretrained(name, revision=revision)


def test_a_folder_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="is no repository"):
        MaskGit.from_pretrained("me/mine", revision="main")


def test_what_the_hub_is_asked_for(tmp_path: Path, muse: Muse, monkeypatch: pytest.MonkeyPatch):
    """The token goes to the hub, while a model is loaded, and nowhere else."""
    folder, seen = muse.save_pretrained(tmp_path / "mine"), []

    def download(repository: str, file: str, **arguments):
        if not (folder / file).is_file():
            raise EntryNotFoundError(file)
        seen.append((repository, file, arguments))
        return folder / file

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(hub, "without_hub", lambda name: False)
    Muse.from_pretrained("me/mine", revision="v2", token="secret")
    how = {"local_files_only": False, "revision": "v2", "token": "secret"}
    assert seen == [("me/mine", file, how) for file in ("model.safetensors", "config.json")]
    seen.clear()
    Muse.from_pretrained("me/mine")
    assert {tuple(arguments) for *_, arguments in seen} == {("local_files_only",)}
    with pytest.raises(ValueError, match="token must be a text"):
        Muse.from_pretrained("me/mine", token=True)  # type: ignore[arg-type]


class Api:
    """What `huggingface_hub.HfApi` is asked for."""

    calls: list

    def __init__(self, **arguments):
        self.calls.append(("HfApi", arguments))

    def create_repo(self, name, **arguments):
        self.calls.append(("create_repo", {"name": name, **arguments}))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def create_branch(self, name, **arguments):
        self.calls.append(("create_branch", {"name": name, **arguments}))

    def upload_folder(self, folder_path, **arguments):
        folder = Path(folder_path)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.calls.append(("upload_folder", {"files": files, **arguments}))
        return f"https://hub/{arguments['repo_id']}/commit/1"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setattr(Api, "calls", [], raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return Api.calls


def test_push_to_hub(tmp_path: Path, muse: Muse, calls: list):
    url = muse.push_to_hub("me/mine", private=True, token="secret", commit_message="First")
    assert url == "https://hub/me/mine/commit/1"
    (_, made), (_, repository), (name, sent) = calls
    assert name == "upload_folder"
    assert made["token"] == "secret"
    assert repository == {"name": "me/mine", "private": True, "exist_ok": True}
    assert sent["commit_message"] == "First"
    assert sent["repo_id"] == "me/mine"
    assert not sent["create_pr"]
    assert sent["files"].keys() == {"README.md", "config.json", "model.safetensors"}
    assert b'Muse.from_pretrained("me/mine")' in sent["files"]["README.md"]
    (tmp_path / "model.safetensors").write_bytes(sent["files"]["model.safetensors"])
    assert equal(Muse.from_pretrained(tmp_path), muse)


def test_push_to_a_branch_and_as_a_proposal(muse: Muse, calls: list):
    muse.base.vae.push_to_hub("vae", branch="next", dtype=torch.float16)
    assert ("create_branch", {"name": "me/vae", "branch": "next", "exist_ok": True}) in calls
    assert calls[-1][1]["revision"] == "next"
    calls.clear()
    muse.base.vae.push_to_hub("me/vae", create_pr=True)
    assert "create_branch" not in dict(calls)
    assert calls[-1][1]["create_pr"]


def test_what_cannot_be_pushed(muse: Muse, calls: list, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="a/b/c' cannot be the name of a repository"):
        muse.push_to_hub("a/b/c")
    assert not calls

    def refuse(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(Api, "create_repo", refuse)
    message = r"me/mine could not be pushed .*ConnectionError: no network\): .*hf auth login"
    with pytest.raises(OSError, match=message):
        muse.push_to_hub("me/mine")
