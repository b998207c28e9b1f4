"""The options of every command, without the models that they are about."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from typing import Any, Literal

from .declared import declared
from .parser import Parser

# What `muse generate` and `muse edit` share -----------------------------------------------------

SHIPPED_MODEL = "scenes"
LORA = "adapter to draw with, and its weight (1): FOLDER or FOLDER:0.8; may stand several times"


def add_options(parser: Parser, base: Collection[str] | None = None) -> None:
    """The model, the sampling and the files.

    Args:
        parser: the command's.
        base: the sampling options of the base stage that count; None: all.
    """
    add_model(parser)
    parser.add_argument(
        "--negative",
        type=_texts,
        help='what to stay away from, for all; or for each, as a list: \'["a text", ""]\'',
    )
    parser.add_argument(
        "--seed", type=int | list[int] | None, help="s for s, s + 1, ..., or one for each picture"
    )
    parser.add_argument(
        "--out", type=str, default="out.png", help="the picture, or a sheet of all, with captions"
    )
    parser.add_argument("--each", type=str | None, help="folder for every picture as its own PNG")
    add_sampling(parser, {"base": base, "superres": None})


def add_model(parser: Parser, lora: bool = True) -> None:
    """What draws, and whether with adapters."""
    parser.add_argument(
        "--model",
        type=str,
        default=SHIPPED_MODEL,
        help="name of a shipped model, file of a whole model or of a base stage, or hub repository "
        "(owner/name, owner/name@revision)",
    )
    if lora:
        parser.add_argument("--lora", type=str, action="append", default=[], help=LORA)


def add_sampling(parser: Parser, stages: Mapping[str, Collection[str] | None]) -> None:
    """How it draws.

    Args:
        parser: the command's.
        stages: names, and the sampling options of each that count; None: all.
    """
    single = " and ".join(f"--{stage}.*" for stage in stages)
    parser.add_argument(
        "--preset",
        type=str | None,
        help=f"sampling options by name, such as fast; {single} change single ones",
    )
    parser.add_argument(
        "--image_size",
        type=int | tuple[int, int] | None,
        help="side, or [height, width], in pixels, if not the trained square",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="pictures drawn together")
    parser.add_argument(
        "--large",
        type=bool,
        default=False,
        help="allow more pixels, steps and pictures in a batch than is sensible (true)",
    )
    parser.add_argument("--device", type=str | None, help="by default a GPU where there is one")
    add_precision(parser)
    add_text_compute(parser)
    parser.add_argument(
        "--free_text_encoder",
        type=bool,
        default=False,
        help="give the text encoder's memory back when the prompts are read (true)",
    )
    for stage, only in stages.items():
        parser.add_optional(declared("sampling.SampleOptions"), stage, skip={"seeds"}, only=only)


def add_precision(parser: Parser) -> None:
    """Of the transformers."""
    parser.add_argument(
        "--precision",
        type=declared("inference.precision.Precision"),
        default="float32",
        help="float32 repeats bits; bfloat16, int8 and float8 are faster where the machine has "
        "them; auto: the faster of float32 and bfloat16, as measured here",
    )


def add_text_compute(parser: Parser) -> None:
    """How texts are encoded."""
    parser.add_argument(
        "--text_precision",
        type=declared("text.TextPrecision"),
        default="float32",
        help="of the text encoder: bfloat16 and int8 take less memory and are less exact",
    )
    parser.add_argument(
        "--text_device", type=str | None, help="of the text encoder, where it is not the model's"
    )


def _texts(value: Any) -> list[str] | str:
    """A text, or a list of texts in YAML or in JSON; "[a, b]" is a text."""
    if not isinstance(value, str):
        return [str(text) for text in value]
    try:
        listed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    good = isinstance(listed, list) and all(isinstance(text, str) for text in listed)
    return listed if good else value


# muse generate, inspect, bundle -----------------------------------------------------------------


def generate_parser() -> Parser:
    parser = Parser("muse generate", "Draw pictures of prompts.")
    parser.add_argument(
        "prompts",
        type=str,
        nargs="*",
        help="what to draw, one picture each; - stands for the lines of standard input",
    )
    parser.add_argument(
        "--file",
        type=str | None,
        help="text file with a prompt on each line, without empty lines and # comments",
    )
    parser.add_argument(
        "--like",
        type=str | None,
        help="PNG of this package: draw it, or all of a sheet, again; prompts, --negative, --seed "
        "and sampling options replace its own",
    )
    add_options(parser)
    parser.add_argument("--gif", type=str | None, help="the sampling step by step, as a GIF")
    return parser


def inspect_parser() -> Parser:
    parser = Parser("muse inspect", "Show how the pictures of a PNG were drawn.")
    parser.add_argument("pictures", type=str, nargs="+", help="PNG files of this package")
    parser.add_argument("--json", type=bool, default=False, help="as it stands in the file")
    return parser


def bundle_parser() -> Parser:
    parser = Parser("muse bundle", "Join trained stages into one file for `muse generate`.")
    parser.add_argument(
        "--base", type=str, required=True, help="saved base stage, or a model to take apart"
    )
    parser.add_argument("--superres", type=str | None, help="saved super-resolution stage")
    parser.add_argument(
        "--lora", type=str, action="append", default=[], help=LORA.replace("draw with", "merge")
    )
    parser.add_argument(
        "--vae",
        nargs="*",
        type=str,
        default=[],
        help="tokenizers with fine-tuned decoders, for the places of those with the same ids",
    )
    parser.add_argument("--out", type=str, required=True, help="file to write, .safetensors")
    add_dtype(parser)
    return parser


def serve_parser() -> Parser:
    parser = Parser("muse serve", "Serve a model over HTTP, as OpenAI's image clients ask for it.")
    add_model(parser)
    parser.add_argument("--name", type=str | None, help="of the model, for clients; as --model's")
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to listen at; 0.0.0.0 for all"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen at")
    parser.add_argument("--device", type=str | None, help="by default a GPU where there is one")
    add_precision(parser)
    add_text_compute(parser)
    parser.add_argument(
        "--rows", type=int | None, help="pictures drawn at once; by default measured at the start"
    )
    parser.add_argument(
        "--memory_gb", type=float | None, help="memory that drawing may take; default: half of it"
    )
    parser.add_argument("--queue", type=int, default=64, help="pictures that may wait")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds after which a request is given up"
    )
    parser.add_argument(
        "--tokens", type=str | None, help="YAML file of bearer tokens and their limits"
    )
    parser.add_argument("--most_n", type=int, default=10, help="pictures of one request")
    parser.add_argument("--most_prompt", type=int, default=4000, help="characters of a prompt")
    parser.add_argument(
        "--most_connections", type=int, default=1000, help="clients connected at the same time"
    )
    parser.add_argument(
        "--replicas",
        type=int | str | None,
        help="engines, each in a process of its own and with a GPU where there are: a number, or "
        "the fewest and the most, as 1-4; on Ray Serve (the extra ray)",
    )
    parser.add_argument(
        "--c2pa",
        nargs=2,
        type=str,
        help="sign pictures with Content Credentials: PEM files of a certificate, with those up to "
        "its root, and of its key (the extra c2pa)",
    )
    parser.add_argument(
        "--check",
        type=str | None,
        help="safety checker, FILE.py:NAME: a class, or a function that gives one; called with a "
        "text and pictures, returns the reason to refuse them or None",
    )
    return parser


def push_parser() -> Parser:
    parser = Parser("muse push", "Write a model's folder with its card, and push it to the hub.")
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="file, folder or hub repository of a model, a stage or a tokenizer, or shipped model",
    )
    parser.add_argument("--out", type=str | None, help="folder to write")
    parser.add_argument(
        "--repo", type=str | None, help="repository on the Hugging Face hub to push to, owner/name"
    )
    parser.add_argument(
        "--runs", nargs="*", type=str, default=[], help="results folders of the trainings"
    )
    parser.add_argument(
        "--figures", nargs="*", type=str, default=[], help="JSON files of figures of muse eval"
    )
    parser.add_argument(
        "--pictures", nargs="*", type=str, default=[], help="PNGs to show that this model drew"
    )
    parser.add_argument("--license", type=str | None, help="of the weights, such as mit")
    parser.add_argument(
        "--limits", nargs="*", type=str, default=[], help="sentences on what it cannot do"
    )
    add_dtype(parser)
    parser.add_argument("--private", type=bool | None, help="a repository that is made is private")
    parser.add_argument("--message", type=str | None, help="of the commit")
    parser.add_argument("--branch", type=str | None, help="to commit to, in the place of main")
    parser.add_argument(
        "--create_pr", type=bool, default=False, help="propose the commit, instead of making it"
    )
    return parser


def export_parser() -> Parser:
    parser = Parser("muse export", "Write a model in another program's format.")
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="file, folder or hub repository of a model, a stage or a tokenizer, or a shipped "
        "model; a stage of several is named as scenes:base; or the folder of an adapter",
    )
    parser.add_argument(
        "--format",
        type=Literal["diffusers", "onnx"],
        required=True,
        help="diffusers: its tokenizer as a VQModel, or an adapter of aMUSEd; onnx: encoder, "
        "decoder and one sampling step",
    )
    parser.add_argument(
        "--image_size", type=int | None, help="side of a tokenizer's pictures in onnx, in pixels"
    )
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    return parser


def add_dtype(parser: Parser) -> None:
    """How weights are stored."""
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "float16", "bfloat16"],
        default="float32",
        help="type of the stored weights; float16 halves the file",
    )


# muse edit --------------------------------------------------------------------------------------

SEAM = {
    "feather": "pixels of the new part over which the seam is smoothed",
    "grow": "how many pixels around the new part have their tokens drawn anew",
}


def inpaint_parser() -> Parser:
    parser = edit_parser(
        "inpaint",
        "Repaint the part of a picture that one of --white, --transparent and --box says.",
        {"blend": "give kept pixels back exactly; false: as the tokenizer decodes them", **SEAM},
    )
    parser.add_argument(
        "--white",
        type=str | None,
        help="image file: repaint what is white in it, keep what is black or transparent",
    )
    parser.add_argument(
        "--transparent",
        type=str | None,
        help="image file, also the picture itself: repaint what is transparent in it",
    )
    parser.add_argument(
        "--box",
        type=int,
        nargs=4,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="repaint these columns from LEFT to before RIGHT, and rows from TOP to before BOTTOM",
    )
    return parser


def outpaint_parser() -> Parser:
    sides = ("left", "top", "right", "bottom")
    parser = edit_parser(
        "outpaint",
        "Continue a picture beyond its edges.",
        {**dict.fromkeys(sides, "pixels to add there, counted at the model's size"), **SEAM},
    )
    parser.add_argument(
        "--aspect",
        type=str | float | None,
        help="instead of sides: width:height or their ratio to reach, such as 16:9 or 1.5",
    )
    return parser


def free_parser() -> Parser:
    parser = edit_parser(
        "free",
        "Change a whole picture by a prompt, without a mask, a few tokens at a time.",
        {
            "share": "of the tokens, to be drawn anew in each iteration",
            "cond_scale": "guidance of these iterations",
            "top_k": "number of most likely tokens to choose from; 0 means all",
        },
        base={"temperature", "top_p", "min_p"},
    )
    parser.add_argument(
        "--at",
        type=list[int] | int,
        nargs="+",
        default=list(default_of("free", "at")),
        help="iterations after which results are drawn, such as 50 75 100; the last is the end",
    )
    return parser


def vary_parser() -> Parser:
    return edit_parser(
        "vary",
        "Draw variations of a picture, with prompts or without.",
        {"strength": "share of the tokens to draw anew: 0 keeps the picture, 1 nothing of it"},
    )


def edit_parser(
    edit: str, description: str, settings: dict[str, str], base: set[str] | None = None
) -> Parser:
    """A parser with the options of all edits, and some arguments of one with their defaults.

    Args:
        edit: name of a function of `editing`.
        description: of the command.
        settings: names of the arguments, and what they mean.
        base: the sampling options of the base stage that count; None: all.
    """
    parser = Parser(
        f"muse edit {edit}",
        f"{description} The picture and the prompts stand before the options.",
    )
    parser.add_argument("picture", type=str, help="image file; it stays as it is")
    parser.add_argument(
        "prompts", type=str, nargs="*", help="what the whole picture is to show; none: no caption"
    )
    parser.add_argument("--count", type=int, default=1, help="results of each prompt")
    for name, text in settings.items():
        default = default_of(edit, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    add_options(parser, base)
    return parser


def default_of(edit: str, name: str) -> Any:
    return inspect.signature(declared(f"editing.{edit}")).parameters[name].default


# muse train -------------------------------------------------------------------------------------

# Arguments that follow from the tokenizer and the image size; stated, they are checked.
DERIVED = ("num_tokens", "seq_len")
VAE_TRAINER = "training.vae_trainer.VQGanVAETrainer"


def add_data(parser: Parser) -> None:
    """Where the training data are."""
    parser.add_argument(
        "--data",
        type=str | None,
        help="what to train on, in the place of trainer.folder: Parquet files or WebDataset tars "
        "(one, a glob, {00..31}, or their folder), a folder of save_to_disk or of images, a data "
        "set on the hub, owner/name, or FILE.py:NAME, what that file calls so; with "
        "trainer.streaming read as the training goes on",
    )


def train_vae_parser() -> Parser:
    parser = Parser("muse train vae", "Train an image tokenizer on a folder of images.")
    parser.add_argument(
        "--init_from",
        type=str | None,
        help="saved tokenizer to start from, named as for load_tokenizer (scenes:base), which also "
        "says what is not stated under vae",
    )
    parser.add_section(declared("vqgan_vae.VQGanVAE"), "vae")
    add_data(parser)
    parser.add_section(declared(VAE_TRAINER), "trainer", skip={"vae", "data"})
    return parser


def train_decoder_parser() -> Parser:
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
    add_data(parser)
    skip = {"vae", "data", "decoder_only"}
    parser.add_section(declared(VAE_TRAINER), "trainer", skip=skip)
    return parser


def train_base_parser() -> Parser:
    return maskgit_parser(superres=False)


def train_superres_parser() -> Parser:
    return maskgit_parser(superres=True)


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
        help="saved stage to start from: a file, scenes or scenes:base, a hub repository. It also "
        "says what is not stated here; a critic that it lacks starts anew",
    )
    transformer = declared("transformer.MaskGitTransformer")
    parser.add_section(transformer, "transformer", skip=DERIVED)
    parser.add_optional(transformer, "transformer", only=DERIVED)
    # what is stated here makes a critic; the rest of it is as in the transformer
    parser.add_optional(declared("transformer.TokenCritic"), "token_critic")
    made_here = {"vae", "cond_vae", "transformer", "token_critic"}
    skip = made_here | {"cond_image_size", "sample_options"}
    parser.add_section(declared("maskgit.MaskGit"), "maskgit", skip=skip)
    if superres:
        parser.add_argument(
            "--maskgit.cond_image_size",
            type=int,
            required=True,
            help="side of the low-resolution images",
        )
    parser.add_optional(declared("sampling.SampleOptions"), "maskgit.sample_options")
    add_data(parser)
    trainer = declared("training.maskgit_trainer.MaskGitTrainer")
    parser.add_section(trainer, "trainer", skip={"maskgit", "data"})
    return parser


def check_parser() -> Parser:
    parser = Parser(
        "muse data check",
        "Look at every image and caption: what there is, what cannot be read, what is there twice.",
    )
    parser.add_argument("source", type=str, help="what to look at, as of --data of muse train")
    parser.add_argument(
        "--out", type=str | None, help="folder for check.html, check.json and sheet.png"
    )
    parser.add_argument(
        "--image_size", type=int, default=0, help="name the images with a shorter side, in pixels"
    )
    transformer: Any = inspect.signature(declared("transformer.MaskGitTransformer")).parameters
    parser.add_argument(
        "--t5_name",
        type=str,
        default=transformer["t5_name"].default,
        help="text encoder whose tokens are counted; none: words are",
    )
    parser.add_argument(
        "--max_text_len",
        type=int,
        default=transformer["max_text_len"].default,
        help="how many of them the model is to read",
    )
    parser.add_argument("--limit", type=int | None, help="look at so many, from all over")
    parser.add_argument(
        "--streaming", type=bool, default=False, help="read the first ones of it, see --limit"
    )
    parser.add_argument("--image_column", type=str | None, help="where the images stand")
    parser.add_argument("--text_column", type=str | None, help="where the captions stand")
    parser.add_argument("--min_size", type=int, default=0, help="leave out smaller images")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images")
    return parser


def cache_parser() -> Parser:
    parser = Parser(
        "muse cache",
        "Encode images and captions once, for the training of all stages that read them alike. It "
        "goes on where it was interrupted, and may run on many processes (accelerate launch).",
    )
    parser.add_argument(
        "--model",
        type=str,
        nargs="+",
        required=True,
        help="stages to be trained from it: recipes of muse train base and superres (.yaml), or "
        "saved stages, named as for init_from",
    )
    parser.add_argument("--folder", type=str | None, help="images with captions")
    parser.add_argument(
        "--data", type=str | None, help="in the place of a folder, as of muse train, not streamed"
    )
    parser.add_argument("--image_column", type=str | None, help="where the images stand")
    parser.add_argument("--text_column", type=str | None, help="where the captions stand")
    parser.add_argument("--min_size", type=int, default=0, help="leave out smaller images")
    parser.add_argument(
        "--cond_folder", type=str | None, help="low-resolution images, as of muse train superres"
    )
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    parser.add_argument(
        "--crops", type=int, default=0, help="random crops to keep of each image; 0: the centre"
    )
    view: Any = inspect.signature(declared("data.pixels.View")).parameters
    parser.add_argument(
        "--crop_scale",
        type=tuple[float, float],
        default=view["crop_scale"].default,
        help="smallest and largest side of a random crop, as a share of the picture's shorter side",
    )
    parser.add_argument("--flip", type=bool, default=False, help="mirror half of the crops")
    parser.add_argument(
        "--aspect_ratios",
        type=str,
        nargs="+",
        help="width:height of the shapes that pictures get instead of squares, 3:2 1:1 2:3 say",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--batch_size", type=int, default=64, help="images encoded at a time")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images")
    add_text_compute(parser)
    return parser


# muse estimate ----------------------------------------------------------------------------------

# Memory in GB, bfloat16 TFLOP/s without sparsity (float16 where there is none), and what an hour
# is taken to cost, in dollars: makers' figures, and a guess.
GPUS = {
    "h100": (80, 989, 2.5),
    "a100": (80, 312, 1.5),
    "a100-40": (40, 312, 1.2),
    "l4": (24, 121, 0.6),
    "rtx4090": (24, 165, 0.4),
    "rtx3090": (24, 71, 0.25),
    "rtx3060": (12, 25, 0.1),
    "t4": (16, 65, 0.3),
}


def estimate_parser() -> Parser:
    parser = Parser("muse estimate", "What a recipe takes of memory, arithmetic, time and money.")
    parser.add_argument("recipe", type=str, help="YAML file of `muse train`")
    gpu: Any = Literal[tuple(GPUS)]  # type: ignore[valid-type]
    parser.add_argument("--gpu", type=gpu, default="h100", help="what it is to run on")
    parser.add_argument("--gpus", type=int, default=1, help="how many of them")
    parser.add_argument(
        "--sharded", type=bool, default=False, help="weights divided among them (FSDP2)"
    )
    parser.add_argument("--memory", type=float | None, help="GB of a GPU, if not as of its kind")
    parser.add_argument("--tflops", type=float | None, help="its TFLOP/s, if not as of its kind")
    parser.add_argument("--price", type=float | None, help="of one for an hour, if not as guessed")
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the TFLOP/s that is used"
    )
    parser.add_argument("--text_len", type=int, default=64, help="text tokens of a caption")
    parser.add_argument(
        "--vae", type=str | None, help="recipe of the tokenizer, where it is not trained yet"
    )
    return parser


# muse eval, tune, report ------------------------------------------------------------------------


def eval_vae_parser() -> Parser:
    parser = Parser("muse eval vae", "Judge a tokenizer by what it makes of a folder of images.")
    parser.add_argument(
        "--vae",
        type=str,
        required=True,
        help="saved tokenizer, one stage's of a model (scenes:base), or another project's",
    )
    parser.add_argument("--folder", type=str, required=True, help="images, searched recursively")
    parser.add_argument("--image_size", type=int, required=True, help="side of the square crops")
    parser.add_argument(
        "--features",
        type=str,
        default=declared("features.LITE"),
        help="network for rFID and the perceptual distance: efficientnet-lite0, Hugging Face name "
        "or path, or none",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time")
    parser.add_argument("--limit", type=int | None, help="take this many images, in order of names")
    parser.add_argument("--out", type=str | None, help="file for the figures, .json")
    parser.add_argument(
        "--picture", type=str | None, help="sheet of images above their reconstructions, .png"
    )
    parser.add_argument("--device", type=str | None, help="by default a GPU where there is one")
    return parser


def eval_base_parser() -> Parser:
    return _generator_parser(
        "base", "Judge the first stage by what it draws of captions.", {"base": None}
    )


def eval_superres_parser() -> Parser:
    return _generator_parser(
        "superres",
        "Judge the super-resolution stage by what it makes of true low-resolution images.",
        {"superres": None},
    )


def eval_model_parser() -> Parser:
    return _generator_parser(
        "model",
        "Judge a whole model by what it draws of captions.",
        {"base": None, "superres": None},
    )


def _generator_parser(part: str, description: str, stages: dict[str, None]) -> Parser:
    parser = Parser(
        f"muse eval {part}",
        f"{description} Pictures are kept in --out, and an interrupted evaluation goes on.",
    )
    add_model(parser, lora=part != "superres")
    parser.add_argument(
        "--data",
        type=str | None,
        help="captioned true images, as of --data of muse train: what is drawn, and what it is "
        "compared with",
    )
    parser.add_argument("--image_column", type=str | None, help="where the images stand")
    parser.add_argument("--text_column", type=str | None, help="where the captions stand")
    parser.add_argument(
        "--streaming", type=bool, default=False, help="take the first ones of it, see --samples"
    )
    parser.add_argument("--min_size", type=int, default=0, help="leave out smaller images")
    if part != "superres":
        parser.add_argument(
            "--prompts",
            type=str | None,
            help="in the place of data: text file with a prompt on each line, without empty lines "
            "and # comments; figures that need true images are left out",
        )
    parser.add_argument("--samples", type=int | None, help="captions to draw; by default all")
    parser.add_argument(
        "--references",
        type=int | None,
        help="true images to compare with; by default those of the captions",
    )
    parser.add_argument("--seeds", type=int, default=1, help="pictures of each caption")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first picture; the next ones have the next"
    )
    parser.add_argument("--negative", type=str | None, help="what to stay away from")
    parser.add_argument(
        "--features",
        type=str,
        nargs="+",
        default=[declared("features.LITE")],
        help="networks that judge: efficientnet-lite0, Hugging Face names or paths; of those with "
        "two towers (CLIP, SigLIP) also agreement with the captions; or none",
    )
    parser.add_argument(
        "--judge",
        type=str | None,
        help="judge of facts of your own, FILE.py:NAME; see evaluation.FactJudge",
    )
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        help="folder for pictures, figures.json and evaluation.html",
    )
    parser.add_argument(
        "--cache",
        type=str | None,
        help="folder for the features of true images; by default the user's cache",
    )
    add_sampling(parser, dict(stages))
    return parser


def tune_parser() -> Parser:
    policy: Any = declared("sampling.Policy")
    parser = Parser("muse tune", "Search a stage's sampling options, store them as a preset.")
    parser.add_argument(
        "--model",
        type=str,
        required=True,
        help="name of a shipped model, file of a model or of a stage, or hub repository",
    )
    parser.add_argument(
        "--data",
        type=str,
        required=True,
        help="images with captions, as of muse train, not streamed: half are searched on, half "
        "reported on",
    )
    parser.add_argument(
        "--gallery",
        type=str | None,
        help="folder of further real images, for R@1: the true one is looked for among all",
    )
    parser.add_argument(
        "--preset",
        type=str,
        required=True,
        help="name of the preset, also where the search starts; default: the stage's own options",
    )
    parser.add_argument(
        "--timesteps", type=int | None, help="sampling steps; by default those of the preset"
    )
    parser.add_argument(
        "--stage",
        type=declared("loading.Stage"),
        default="base",
        help="of a cascade; superres is given the true images reduced",
    )
    parser.add_argument(
        "--policies",
        type=list[policy] | None,
        help="to choose from, [confidence,halton], in addition to the preset's; by default all",
    )
    parser.add_argument(
        "--score",
        type=declared("evaluation.tuning.Score") | None,
        help="what is better: balanced, the lowest FID with no fewer captions met (R@1) than at "
        "the start; fid; recall, R@1; or facts, the most pictures with all facts right, which is "
        "the default with --judge, as balanced is without",
    )
    parser.add_argument("--judge", type=str | None, help="judge of facts, as of muse eval")
    parser.add_argument("--rounds", type=int, default=3, help="through all settings, at most")
    parser.add_argument("--captions", type=int | None, help="so many of each half; by default all")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each caption")
    parser.add_argument(
        "--network",
        type=str,
        default=declared("features.LITE"),
        help="features of FID: efficientnet-lite0, Hugging Face name or path",
    )
    parser.add_argument(
        "--out",
        type=str | None,
        help="model file to write, new or that of --model; without it the preset is only printed",
    )
    parser.add_argument(
        "--results",
        type=str | None,
        help="file of all figures, a line each: an interrupted search goes on from it",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images drawn together")
    parser.add_argument(
        "--bf16", type=bool, default=False, help="draw in bfloat16: faster on many machines"
    )
    parser.add_argument("--device", type=str | None, help="by default a GPU where there is one")
    return parser


def average_parser() -> Parser:
    parser = Parser("muse average", "Average the weights of a training, after it.")
    parser.add_argument(
        "sources",
        type=str,
        nargs="+",
        help="with --length a run's results folder; else saved models or checkpoints of one "
        "training, the earliest first",
    )
    parser.add_argument(
        "--length",
        type=float | None,
        help="of a run with posthoc_every: how far back to reach, as a share of the training "
        "(sigma_rel, up to 0.2887)",
    )
    parser.add_argument("--stage", type=str | None, help="of the run, where it has several")
    parser.add_argument(
        "--decay",
        type=float | Literal["uniform"] | None,
        help="over files: weight of the average so far (the paper's 0.7 if not given), or uniform",
    )
    parser.add_argument("--out", type=str, required=True, help="file to write, .safetensors")
    return parser


def bench_serve_parser() -> Parser:
    parser = Parser(
        "muse bench-serve",
        "Ask a running server for pictures at random times, and say how it does.",
    )
    parser.add_argument("--url", type=str, default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--token", type=str | None, help="for a server that wants one")
    parser.add_argument("--prompts", type=str | None, help="file with a prompt on each line")
    parser.add_argument(
        "--timesteps", nargs="*", type=int, default=[], help="one of them for each request"
    )
    parser.add_argument(
        "--sizes", nargs="*", type=str, default=[], help="likewise, in pixels: 256x256"
    )
    parser.add_argument(
        "--loads",
        nargs="*",
        type=float,
        default=[0.5, 0.9, 1.5],
        help="requests, as shares of the capacity",
    )
    parser.add_argument(
        "--rate",
        type=float | None,
        help="requests per second in the place of the capacity, which is measured by default",
    )
    parser.add_argument("--clients", type=int, default=16, help="that measure the capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="for which each load lasts")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one answer")
    parser.add_argument("--seed", type=int, default=0, help="of the times, kinds and pictures")
    parser.add_argument("--out", type=str, default="runs/load", help="folder for JSON and page")
    return parser


def doctor_parser() -> Parser:
    parser = Parser(
        "muse doctor",
        "Say what was found on this machine, what is chosen of it, what is broken and what helps.",
    )
    parser.add_argument("--json", type=bool, default=False, help="as JSON (true)")
    return parser


def report_parser() -> Parser:
    parser = Parser("muse report", "Draw a training run's curves and pictures as one HTML page.")
    parser.add_argument("results_folder", type=str, help="where the training wrote metrics.jsonl")
    parser.add_argument("--stage", type=str | None, help="only this stage, of several in the run")
    parser.add_argument(
        "--out", type=str | None, help="file to write; report.html in the folder if not given"
    )
    return parser
