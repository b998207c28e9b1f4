"""The Hugging Face hub: files of a repository come from there, folders of models go there."""

from __future__ import annotations

from pathlib import Path

import yaml

from .arguments import printable, shown
from .files import without_hub
from .weights import ENDINGS, CheckpointError

LIBRARY = "muse-maskgit-pytorch"


def is_repository(name: str) -> bool:
    """Whether a name can be that of a hub repository, and is not that of a file."""
    ours = name.startswith((".", "/", "~")) or name.endswith(ENDINGS)
    return name.count("/") == 1 and not ours


def hub_file(repository: str, file: str, local: bool | None = None) -> Path | None:
    """A file of a repository, out of the user's cache or from the hub; None: it has none.

    Where the hub is out of reach, None: it is not in the cache.

    Args:
        repository: ``owner/name``.
        file: its path in there.
        local: whether to look in the cache alone; by default where the hub is out of reach, which
            takes a moment to find out.

    Raises:
        CheckpointError: the hub has no such repository, or does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    local = without_hub(repository) if local is None else local
    try:
        return Path(hf_hub_download(repository, file, local_files_only=local))
    except Exception as error:
        lost = isinstance(error, LocalEntryNotFoundError) and not local  # on the way
        if isinstance(error, EntryNotFoundError) and not lost:
            return None
        raise CheckpointError(
            f"{file} of {printable(repository, 200)} could not be had from the Hugging Face hub "
            f"({type(error).__name__}): check the name, the network and, of a repository that is "
            f"not public, your token (hf auth login), or {_elsewhere(repository)}"
        ) from error


def not_on_hub(repository: str, file: str) -> CheckpointError:
    """What to raise where `hub_file` finds nothing and there must be something."""
    name = printable(repository, 200)
    if without_hub(repository):
        return CheckpointError(
            f"{file} of {name} is not in this machine's cache, and the Hugging Face hub could not "
            f"be reached: {_elsewhere(repository)}"
        )
    return CheckpointError(f"{name} has no {file} on the Hugging Face hub: check the name")


def _elsewhere(repository: str) -> str:
    name = printable(repository, 200)
    folder = name.rpartition("/")[2]
    return (
        f"fetch it where there is a network (hf download {name} --local-dir {folder}), copy "
        f"that folder here and give its path in the place of {name}"
    )


def card(
    name: str,
    kind: str,
    home: str,
    task: str | None = None,
    license: str | None = None,
    body: str = "",
) -> str:
    """A model card: what the hub reads of it, a title, and how to load the model.

    Args:
        name: of the repository, or of the folder.
        kind: class of the model.
        home: module that the class is imported from.
        task: what the model is for, by the hub's name, such as "text-to-image".
        license: of the weights, by the hub's name for it, such as "mit".
        body: the rest.
    """
    about = {"license": license} if license else {}
    about |= {"library_name": LIBRARY, "tags": ["muse", "maskgit", "masked-image-modeling"]}
    about |= {"pipeline_tag": task} if task else {}
    return (
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n# {name.rpartition('/')[2]}\n\n"
        f"A `{kind}` of [{LIBRARY}](https://pypi.org/project/{LIBRARY}/).\n\n"
        f"```python\nfrom {home} import {kind}\n\n"
        f'model = {kind}.from_pretrained("{name}")\n```\n{body}'
    )


def check_repository(repository: str) -> str:
    """Refuse a name that no repository can have.

    Raises:
        ValueError: naming it.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(
            f"{shown(repository)} cannot be the name of a repository, which is owner/name"
        ) from error
    return repository


def upload(
    folder: Path,
    repository: str,
    *,
    commit_message: str = f"Push model using {LIBRARY}",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
) -> str:
    """Put a folder's files into a repository, in one commit; the repository is made if need be.

    Args:
        folder: whose files to upload.
        repository: ``owner/name``, or a name among your own.
        commit_message: of the commit.
        private: of a repository that is made; None: as your account has it.
        token: of the hub; None: the one of ``hf auth login``, or ``HF_TOKEN``.
        branch: to commit to, made if need be; None: the main one.
        create_pr: propose the commit, instead of making it.

    Returns:
        the address of the commit.

    Raises:
        ValueError: no name of a repository.
        OSError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    check_repository(repository)
    api = HfApi(token=token, library_name=LIBRARY)
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if branch is not None and not create_pr:
            api.create_branch(name, branch=branch, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    except Exception as error:
        said = printable(" ".join(str(error).split()), 300)
        raise OSError(
            f"{repository} could not be pushed to the Hugging Face hub ({type(error).__name__}: "
            f"{said}): check the network and that your token may write there (hf auth login)"
        ) from error
    return str(commit)
