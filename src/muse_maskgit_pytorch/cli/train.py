"""`muse train vae | decoder | base | superres`: a recipe into models and their trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from ..arguments import as_path
from ..foreign import load_tokenizer
from ..loading import open_stage
from ..maskgit import MaskGit
from ..training.loop import Trainer
from ..training.maskgit_trainer import MaskGitTrainer
from ..training.vae_trainer import VQGanVAETrainer
from ..transformer import MaskGitTransformer, TokenCritic
from ..vqgan_vae import ImageTokenizer, VQGanVAE
from ..weights import CheckpointError, is_safetensors
from .options import DERIVED
from .parser import Parser, stated


def _train(trainer: Trainer, config: Namespace) -> None:
    """Train; the run's description has the whole recipe, defaults and all."""
    trainer.recipe = {key: value for key, value in config.as_dict().items() if key != "config"}
    trainer.train()


def trainer_arguments(config: Namespace) -> dict[str, Any]:
    """What a recipe says of its trainer; ``data`` stands in the place of its folder."""
    arguments = config.trainer.as_dict()
    return arguments if config.data is None else {**arguments, "data": config.data, "folder": None}


def train_vae(parser: Parser, argv: list[str]) -> None:
    name, start = parser.said(argv, "init_from"), None
    weights_alone = name is not None and as_path(name).is_file() and not is_safetensors(Path(name))
    if name and not weights_alone:
        start = load_tokenizer(name)
        if not isinstance(start, VQGanVAE):
            raise ValueError(f"--init_from {name}: only our own VQGanVAE can be trained")
        _set_defaults(parser, "vae", start.config)
    config = parser.read(argv)
    torch.manual_seed(config.trainer.seed)
    vae = VQGanVAE(**config.vae.as_dict())
    if start is not None:
        vae._load_state(start.state_dict(), config.init_from)
        vae.license = start.license  # what is made from weights stays under it
    elif name:  # torch.save's, which states no arguments
        vae.load(name)
    _train(VQGanVAETrainer(vae, **trainer_arguments(config)), config)


def _set_defaults(parser: Parser, section: str, config: dict[str, Any]) -> None:
    """What a recipe leaves open is as in the model that it starts from."""
    known = parser.keys()
    wanted = {f"{section}.{key}": value for key, value in config.items()}
    parser.set_defaults({key: value for key, value in wanted.items() if key in known})


def train_decoder(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    torch.manual_seed(config.trainer.seed)
    vae = load_tokenizer(config.vae)
    if not isinstance(vae, VQGanVAE):
        raise ValueError(f"--vae {config.vae}: only decoders of our own VQGanVAE can be trained")
    vae = vae.with_decoder(config.decoder_dim, config.decoder_res_blocks)
    _train(VQGanVAETrainer(vae, decoder_only=True, **trainer_arguments(config)), config)


def open_start(parser: Parser, argv: list[str], superres: bool) -> MaskGit | None:
    """The stage that ``init_from`` names: what is not stated is as in it.

    Raises:
        CheckpointError: not found, or not the stage that is to be trained.
    """
    name = parser.said(argv, "init_from")
    if not name:
        return None
    start = open_stage(name, "superres" if superres else "base")
    if superres != (start.cond_image_size is not None):
        raise CheckpointError(
            f"--init_from {name} is {'a base' if superres else 'a super-resolution stage'}: use "
            f"muse train {'base' if superres else 'superres'}"
        )
    _set_defaults(parser, "transformer", start.transformer.config)
    parser.set_defaults({f"transformer.{key}": None for key in DERIVED})
    _set_defaults(parser, "maskgit", start.config)
    if isinstance(start.critic, TokenCritic):
        _set_defaults(parser, "token_critic", start.critic.config)
    return start


def make_maskgit(
    config: Namespace,
    start: MaskGit | None = None,
    load: Callable[[str], ImageTokenizer] = load_tokenizer,
) -> MaskGit:
    """The stage that a recipe describes, with new weights or those of the one it starts from.

    ``load`` finds the tokenizers that it names.
    """
    if config.vae is None and start is None:
        raise ValueError("--vae is missing: name a saved tokenizer, or a stage as --init_from")
    vae = start.vae if config.vae is None else load(config.vae)  # type: ignore
    cond_vae = config.get("cond_vae") and load(config.cond_vae)
    settings = config.maskgit.as_dict()
    options = stated(config.maskgit.sample_options)
    if start is not None:
        cond_vae = cond_vae or (start.cond_vae if config.vae is None else None)
        if not vae.same_ids(start.vae):
            warnings.warn(
                f"--vae {config.vae} is not the tokenizer of --init_from {config.init_from}: its "
                "tokens mean something else, and the stage has to learn them anew",
                stacklevel=2,
            )
        known = vars(start.default_options)
        options = {k: v for k, v in known.items() if v is not None and k != "seeds"} | options
    settings["sample_options"] = options
    arguments: dict[str, Any] = {
        "num_tokens": vae.codebook_size,
        "seq_len": vae.fmap_size(config.maskgit.image_size) ** 2,
        **stated(config.transformer),
    }
    transformer = MaskGitTransformer(**arguments)
    critic = None
    if changes := stated(config.token_critic):
        critic = TokenCritic(**{**arguments, **changes})
    model = MaskGit(
        vae=vae, cond_vae=cond_vae, transformer=transformer, token_critic=critic, **settings
    )
    if start is not None:
        kept = ("vae.", "cond_vae.")
        saved = {k: v for k, v in start.state_dict().items() if not k.startswith(kept)}
        model._load_state(model.state_dict() | saved, config.init_from)
        model.license = start.license
    return model


def _train_maskgit(parser: Parser, argv: list[str], superres: bool) -> None:
    start = open_start(parser, argv, superres)
    config = parser.read(argv)
    torch.manual_seed(config.trainer.seed)
    _train(MaskGitTrainer(make_maskgit(config, start), **trainer_arguments(config)), config)


def train_base(parser: Parser, argv: list[str]) -> None:
    _train_maskgit(parser, argv, superres=False)


def train_superres(parser: Parser, argv: list[str]) -> None:
    _train_maskgit(parser, argv, superres=True)
