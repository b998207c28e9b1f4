"""`muse train vae | decoder | base | superres`: a recipe into models and their trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from ..arguments import as_path
from ..foreign import load_tokenizer
from ..loading import open_stage
from ..maskgit import MaskGit
from ..sampling import SampleOptions
from ..training.loop import Trainer
from ..training.maskgit_trainer import MaskGitTrainer
from ..training.vae_trainer import VQGanVAETrainer
from ..transformer import MaskGitTransformer, TokenCritic
from ..vqgan_vae import VQGanVAE
from ..weights import CheckpointError, is_safetensors
from .parser import Parser, stated

# Arguments that follow from the tokenizer and the image size; stated, they are checked.
DERIVED = ("num_tokens", "seq_len")


def _train(trainer: Trainer, config: Namespace) -> None:
    """Train; the run's description has the whole recipe, defaults and all."""
    trainer.recipe = {key: value for key, value in config.as_dict().items() if key != "config"}
    trainer.train()


def vae_parser() -> Parser:
    parser = Parser("muse train vae", "Train an image tokenizer on a folder of images.")
    parser.add_argument(
        "--init_from",
        type=str | None,
        help="saved tokenizer to start from, named as for load_tokenizer (emoji:base), which also "
        "says what is not stated under vae",
    )
    parser.add_section(VQGanVAE, "vae")
    parser.add_section(VQGanVAETrainer, "trainer", skip={"vae", "data"})
    return parser


def train_vae(argv: list[str]) -> None:
    parser = vae_parser()
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
    elif name:  # torch.save's, which states no arguments
        vae.load(name)
    _train(VQGanVAETrainer(vae, **config.trainer.as_dict()), config)


def _set_defaults(parser: Parser, section: str, config: dict[str, Any]) -> None:
    """What a recipe leaves open is as in the model that it starts from."""
    known = parser.keys()
    wanted = {f"{section}.{key}": value for key, value in config.items()}
    parser.set_defaults({key: value for key, value in wanted.items() if key in known})


def decoder_parser() -> Parser:
    parser = Parser(
        "muse train decoder",
        "Train a larger decoder on a saved tokenizer; its ids stay what they are.",
    )
    parser.add_argument("--vae", type=str, required=True, help="saved tokenizer")
    parser.add_argument(
        "--decoder_dim",
        type=int | None,
        default=256,
        help="channels of the new decoder; null: as now",
    )
    parser.add_argument(
        "--decoder_res_blocks",
        type=int | None,
        default=4,
        help="its residual blocks per resolution; null: as now",
    )
    parser.add_section(VQGanVAETrainer, "trainer", skip={"vae", "data", "decoder_only"})
    return parser


def train_decoder(argv: list[str]) -> None:
    config = decoder_parser().read(argv)
    torch.manual_seed(config.trainer.seed)
    vae = load_tokenizer(config.vae)
    if not isinstance(vae, VQGanVAE):
        raise ValueError(f"--vae {config.vae}: only decoders of our own VQGanVAE can be trained")
    vae = vae.with_decoder(config.decoder_dim, config.decoder_res_blocks)
    _train(VQGanVAETrainer(vae, decoder_only=True, **config.trainer.as_dict()), config)


def maskgit_parser(superres: bool) -> Parser:
    name = "superres" if superres else "base"
    parser = Parser(f"muse train {name}", f"Train the {name} stage on a folder with captions.")
    parser.add_argument(
        "--vae",
        type=str | None,
        help="saved tokenizer, ours or another project's (see load_tokenizer); that of init_from "
        "where there is one",
    )
    if superres:
        parser.add_argument(
            "--cond_vae",
            type=str | None,
            help="saved tokenizer of the low-resolution images; the same one by default",
        )
    parser.add_argument(
        "--init_from",
        type=str | None,
        help="saved stage to start from: a file, emoji or emoji:base, a hub repository. It also "
        "says what is not stated here; a critic that it lacks starts anew",
    )
    parser.add_section(MaskGitTransformer, "transformer", skip=DERIVED)
    parser.add_optional(MaskGitTransformer, "transformer", only=DERIVED)
    # what is stated here makes a critic; the rest of it is as in the transformer
    parser.add_optional(TokenCritic, "token_critic")
    made_here = {"vae", "cond_vae", "transformer", "token_critic"}
    skip = made_here | {"cond_image_size", "sample_options"}
    parser.add_section(MaskGit, "maskgit", skip=skip)
    if superres:
        parser.add_argument(
            "--maskgit.cond_image_size",
            type=int,
            required=True,
            help="side of the low-resolution images",
        )
    parser.add_optional(SampleOptions, "maskgit.sample_options")
    parser.add_section(MaskGitTrainer, "trainer", skip={"maskgit", "data"})
    return parser


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


def make_maskgit(config: Namespace, start: MaskGit | None = None) -> MaskGit:
    """The stage that a recipe describes, with new weights or those of the one it starts from."""
    if config.vae is None and start is None:
        raise ValueError("--vae is missing: name a saved tokenizer, or a stage as --init_from")
    vae = start.vae if config.vae is None else load_tokenizer(config.vae)  # type: ignore
    cond_vae = config.get("cond_vae") and load_tokenizer(config.cond_vae)
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
    return model


def _train_maskgit(argv: list[str], superres: bool) -> None:
    parser = maskgit_parser(superres)
    start = open_start(parser, argv, superres)
    config = parser.read(argv)
    torch.manual_seed(config.trainer.seed)
    _train(MaskGitTrainer(make_maskgit(config, start), **config.trainer.as_dict()), config)


def train_base(argv: list[str]) -> None:
    _train_maskgit(argv, superres=False)


def train_superres(argv: list[str]) -> None:
    _train_maskgit(argv, superres=True)
