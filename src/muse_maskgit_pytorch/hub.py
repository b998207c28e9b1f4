"""The Hugging Face hub: files of a repository come from there, folders of models go there.

A repository is named ``owner/name``, and at a branch, a tag or a commit ``owner/name@revision``, as
in huggingface_hub's file system: so that whatever names a model, on a command line or in another
model's file, can say which state of it is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from .arguments import as_path, printable, shown
from .files import without_hub
from .weights import ENDINGS, CheckpointError

LIBRARY = "muse-maskgit-pytorch"
_TOKEN: ContextVar[str | None] = ContextVar("token", default=None)


def is_repository(name: str) -> bool:
    """Whether a name can be that of a hub repository, and is not that of a file."""
    ours = name.startswith((".", "/", "~")) or name.endswith(ENDINGS)
    return name.partition("@")[0].count("/") == 1 and not ours


def at_revision(name: str | PathLike[str], revision: str | None) -> str | PathLike[str]:
    """The name of a repository with a revision; the name as it is where that is None.

    Raises:
        ValueError: a name that is none of a repository, or has another revision.
    """
    if revision is None:
        return name
    text = str(name)
    if not isinstance(revision, str) or not revision.strip():
        raise ValueError(
            f"revision must name a branch, a tag or a commit of the repository, not "
            f"{shown(revision)}"
        )
    if as_path(name).exists() or not is_repository(text):
        raise ValueError(
            f"revision {shown(revision)} is given, and {shown(text, 200)} is no repository on the "
            "Hugging Face hub (owner/name): leave it out"
        )
    repository, _, known = text.partition("@")
    if known not in ("", revision):
        raise ValueError(f"{shown(text, 200)} names another revision than {shown(revision)}")
    return f"{repository}@{revision}"


def asked(name: str) -> tuple[str, dict[str, Any]]:
    """What huggingface_hub and transformers are to be asked for by a name.

    Args:
        name: a path; or a repository, perhaps with its revision.

    Returns:
        path or repository, and ``revision`` and ``token`` (`signed_in`), where there are any.
    """
    repository, _, revision = (name, "", "") if as_path(name).exists() else name.partition("@")
    given = {"revision": revision, "token": _TOKEN.get()}
    return repository, {argument: value for argument, value in given.items() if value}


def cached_first(load: Callable[..., Any], name: str, *arguments: Any, **settings: Any) -> Any:
    """Call ``load``, of transformers, with a path or a name, which may have a revision.

    What lies in the hub's cache is taken from there, without a question to the hub.
    """
    place, which = asked(name)
    try:
        return load(place, *arguments, local_files_only=True, **which, **settings)
    except OSError:
        if without_hub(place):
            raise
        return load(place, *arguments, **which, **settings)


@contextmanager
def signed_in(token: str | None) -> Iterator[None]:
    """What is fetched in the block is fetched with this token of the hub.

    Args:
        token: None: as before, which is that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ValueError: something else than a text.
    """
    if token is not None and not (isinstance(token, str) and token):
        raise ValueError("token must be a text, one of your tokens of the Hugging Face hub")
    before = _TOKEN.set(token or _TOKEN.get())
    try:
        yield
    finally:
        _TOKEN.reset(before)


def hub_file(repository: str, file: str, local: bool | None = None) -> Path | None:
    """A file of a repository, out of the user's cache or from the hub; None: it has none.

    Where the hub is out of reach, None: it is not in the cache.

    Args:
        repository: ``owner/name``, perhaps ``@revision``.
        file: its path in there.
        local: whether to look in the cache alone; by default where the hub is out of reach, which
            takes a moment to find out.

    Raises:
        CheckpointError: the hub has no such repository or revision, or does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    local = without_hub(repository) if local is None else local
    try:
        name, which = asked(repository)
        return Path(hf_hub_download(name, file, local_files_only=local, **which))
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
    full = printable(repository, 200)
    name, _, revision = full.partition("@")
    folder = name.rpartition("/")[2]
    which = f" --revision {revision}" if revision else ""
    return (
        f"fetch it where there is a network (hf download {name}{which} --local-dir {folder}), copy "
        f"that folder here and give its path in the place of {full}"
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
