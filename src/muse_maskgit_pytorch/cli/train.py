"""`muse train vae | decoder | base | superres`: a recipe into models and their trainer."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import Namespace

from ..checkpoint import find_file, load_tree
from ..foreign import load_tokenizer
from ..maskgit import MaskGit
from ..sampling import SampleOptions
from ..training.loop import Trainer
from ..training.maskgit_trainer import MaskGitTrainer
from ..training.vae_trainer import VQGanVAETrainer
from ..transformer import MaskGitTransformer, TokenCritic
from ..vqgan_vae import VQGanVAE
from .parser import Parser, stated

# Arguments that follow from the tokenizer and the image size; stated, they are checked.
DERIVED = ("num_tokens", "seq_len")


def _train(trainer: Trainer, config: Namespace) -> None:
    """Train; the run's description has the whole recipe, defaults and all."""
    trainer.recipe = {key: value for key, value in config.as_dict().items() if key != "config"}
    trainer.train()


def vae_parser() -> Parser:
    parser = Parser("muse train vae", "Train an image tokenizer on a folder of images.")
    parser.add_argument("--init_from", type=str | None, help="saved tokenizer to start from")
    parser.add_section(VQGanVAE, "vae")
    parser.add_section(VQGanVAETrainer, "trainer", skip={"vae", "data"})
    return parser


def train_vae(argv: list[str]) -> None:
    config = vae_parser().read(argv)
    torch.manual_seed(config.trainer.seed)
    vae = VQGanVAE(**config.vae.as_dict())
    if config.init_from:
        vae.load(find_file(config.init_from))
    _train(VQGanVAETrainer(vae, **config.trainer.as_dict()), config)


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
        type=str,
        required=True,
        help="saved tokenizer, ours or another project's (see load_tokenizer)",
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
        help="saved stage to start from, tokenizers included; a critic that it lacks starts anew",
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


def make_maskgit(config: Namespace) -> MaskGit:
    """The stage that a recipe describes, with new weights or those of ``init_from``."""
    vae = load_tokenizer(config.vae)
    cond_vae = config.get("cond_vae") and load_tokenizer(config.cond_vae)
    settings = config.maskgit.as_dict()
    settings["sample_options"] = stated(config.maskgit.sample_options)
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
    if config.init_from:
        saved = load_tree(find_file(config.init_from), kind="MaskGit")[0]["state"]
        new = {k: v for k, v in model.state_dict().items() if k.startswith("critic.")}
        model._load_state(new | saved, config.init_from)
    return model


def _train_maskgit(argv: list[str], superres: bool) -> None:
    config = maskgit_parser(superres).read(argv)
    torch.manual_seed(config.trainer.seed)
    _train(MaskGitTrainer(make_maskgit(config), **config.trainer.as_dict()), config)


def train_base(argv: list[str]) -> None:
    _train_maskgit(argv, superres=False)


def train_superres(argv: list[str]) -> None:
    _train_maskgit(argv, superres=True)
