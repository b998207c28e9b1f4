"""Files, PIL images and tensors: the only place where pixels change their representation.

Inside the project an image is a float tensor, RGB, in [0,1]. This module reads files into that
form without losing or inventing pixels, and turns tensors back into PIL images and sheets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from os import PathLike
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFile, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor

from .files import replacing

# Formats by Pillow's names that are opened, with the endings of their files, and no others: among
# those are some that start other programs, and some that take any bytes for a picture.
FORMATS = {
    "PNG": ".png .apng",
    "JPEG": ".jpg .jpeg .jpe .jfif .mpo",
    "WEBP": ".webp",
    "AVIF": ".avif",
    "BMP": ".bmp",
    "GIF": ".gif",
    "TIFF": ".tif .tiff",
    "JPEG2000": ".jp2 .j2k .jpf .jpx",
    "PPM": ".ppm .pgm .pbm .pnm",
    "QOI": ".qoi",
}
LABEL_LINES = 3
RECORD = "muse"  # name of the PNG chunk that says how a picture was drawn
PIXELS = "muse pixels"  # in memory: the digest of the pixels that the record belongs to
RECORD_LIMIT = 2**24  # characters of it that are read


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def suffixes() -> frozenset[str]:
    """Endings of the files that `read_image` opens, in lower case."""
    return frozenset(" ".join(FORMATS[name] for name in formats()).split())


def read_image(path: str | PathLike[str]) -> Image.Image:
    """Read a whole image file as upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid on white, and of an animation the first
    frame is taken. 16-bit grey is scaled to 8 bits. Float grey is taken to reach to 1, 255 or
    65535, whichever is the first that holds its largest value.

    Args:
        path: an image file in any format that Pillow reads.

    Returns:
        An image of mode "RGB".

    Raises:
        ValueError: the file is missing, not an image, damaged, cut short, or has so many pixels
            that Pillow takes it for a decompression bomb; the message names the file.
    """
    # Other libraries switch this on for the whole process: half a JPEG would then pass as an image.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(path, formats=formats()) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"image {str(path)!r} is too large: {error}; scale it down, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except Exception as error:  # on damaged files decoders raise all sorts of errors
        raise ValueError(f"cannot read image {str(path)!r}: {error}") from error


def check_image(path: str | PathLike[str]) -> None:
    """Check, from the header alone, that a file is an image: cheap, but blind to a cut-off end.

    Raises:
        ValueError: as `read_image`.
    """
    try:
        Image.open(path, formats=formats()).close()
    except Exception as error:  # as above
        raise ValueError(f"cannot read image {str(path)!r}: {error}") from error


def to_tensor(image: Image.Image, image_size: int | None = None) -> Float[Tensor, "3 H W"]:
    """Turn a PIL image into a tensor, optionally as a square of a given size.

    Args:
        image: any mode; converted to RGB.
        image_size: side of the square in pixels: the shorter side is scaled to it (bicubic,
            antialiased; smaller images are enlarged) and the centre is kept. None keeps the image
            as it is. An image that already has the size keeps its pixels exactly.

    Returns:
        float32 in [0,1].

    Raises:
        ValueError: image_size is not positive.
    """
    image = to_rgb(image)
    if image_size is not None:
        image = center_square(image, image_size)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def center_square(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle of an image, scaled to ``size`` pixels a side.

    Raises:
        ValueError: size is not positive.
    """
    if size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {size}")
    # Cropping first gives the same picture and keeps a 1 x 10,000 image from growing huge.
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def resize(images: Float[Tensor, "B 3 H W"], size: tuple[int, int]) -> Float[Tensor, "B 3 h w"]:
    """Scale tensors as files are scaled: the one way to a low-resolution image.

    A stage that reads low-resolution images must see those that the stage below was trained on,
    and these are files scaled by Pillow (`to_tensor`). So this does what Pillow does: antialiased
    bicubic, first along the width, then along the height, rounded to 8 bits before, between and
    after. Of reduced photographs about 1 value in 10,000 differs from Pillow's, by 1 / 255.
    Pillow still reads the files: on a CPU it is nine times as fast for a large photograph.

    Args:
        images: in [0,1], on any device; values outside are clamped.
        size: height and width in pixels.

    Returns:
        float32 in [0,1], multiples of 1/255. No gradient passes the rounding.

    Raises:
        ValueError: another shape, or a size that is not positive.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B,3,H,W), got {tuple(images.shape)}")
    if min(size) < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    pixels = (images.detach().float().clamp(0, 1) * 255).round()  # as `to_pil`
    for step in ((pixels.shape[-2], size[1]), size):
        if pixels.shape[-2:] != step:
            pixels = F.interpolate(pixels, step, mode="bicubic", antialias=True)
            pixels = (pixels.clamp(0, 255) + 0.5).floor()  # halves up, as Pillow
    return pixels / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn a batch of images, or one image, into PIL images.

    Args:
        images: (B,3,H,W) or (3,H,W), RGB; values outside [0,1] are clamped.

    Raises:
        ValueError: another shape.
    """
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B,3,H,W) or (3,H,W), got {tuple(images.shape)}")
    # Clamp before the bytes: 1.004 * 255 would wrap round to 0.
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def save_png(image: Image.Image, path: str | PathLike[str]) -> Path:
    """Write a PNG, atomically, with the record of how it was drawn (`provenance`) if it has one.

    Pillow's own ``image.save`` leaves the record out.

    Args:
        image: pictures of a `Muse` carry their record (`record_of`).
        path: where to, ending in ``.png``; the folder is made.

    Raises:
        ValueError: another ending.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path {str(path)!r} must end in .png")
    chunks = PngImagePlugin.PngInfo()
    if record := record_of(image):
        chunks.add_itxt(RECORD, record)  # UTF-8; plain, so that any tool shows it
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)
    return Path(path)


def set_record(image: Image.Image, record: str) -> None:
    """Attach the text that `save_png` will write.

    It stands in ``image.info``, which Pillow copies into cropped and otherwise changed pictures, so
    a digest of the pixels says of which picture it is true.
    """
    image.info[RECORD], image.info[PIXELS] = record, _digest(image)


def record_of(image: Image.Image) -> str | None:
    """How an image was drawn, as text: of one that was just drawn, or opened from a PNG."""
    record = image.info.get(RECORD)
    changed = PIXELS in image.info and image.info[PIXELS] != _digest(image)
    return record if isinstance(record, str) and not changed else None


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def read_record(path: str | PathLike[str]) -> str | None:
    """The text that `save_png` wrote along with the pixels, or None.

    Raises:
        ValueError: as `read_image`, or a text too long to be one of ours.
    """
    try:
        with Image.open(path, formats=formats()) as image:
            image.load()  # some programs write such texts behind the pixels
            record = record_of(image)
    except Exception as error:  # as in `read_image`
        raise ValueError(f"cannot read image {str(path)!r}: {error}") from error
    if record is not None and len(record) > RECORD_LIMIT:
        raise ValueError(f"{str(path)!r} has a record of {len(record)} characters: not ours")
    return record


def save_gif(
    frames: Sequence[Image.Image],
    path: str | PathLike[str],
    milliseconds: int = 120,
    hold: int = 2000,
) -> Path:
    """Write an endless animation, atomically.

    Args:
        frames: of one size; colours are reduced to 256 in each.
        path: where to, ending in ``.gif``; the folder is made.
        milliseconds: how long each frame stands.
        hold: how long the last one does.

    Raises:
        ValueError: another ending, or no frames.
    """
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"path {str(path)!r} must end in .gif")
    if not frames:
        raise ValueError("save_gif needs at least one frame")
    first, *rest = (frame.quantize(dither=Image.Dither.NONE) for frame in frames)
    times = [milliseconds] * len(rest) + [hold]
    with replacing(path) as temporary:
        first.save(
            temporary, format="GIF", save_all=True, append_images=rest, duration=times, loop=0
        )
    return Path(path)


def image_grid(
    images: Tensor | Sequence[Image.Image],
    columns: int,
    labels: Sequence[str] | None = None,
    padding: int = 2,
) -> Image.Image:
    """Lay images out on a white sheet, row by row, each with an optional caption below it.

    Args:
        images: (B,3,H,W) in [0,1], or PIL images; cells take the size of the largest.
        columns: images per row.
        labels: one caption per image, wrapped to the cell and cut after three lines.
        padding: white pixels around every cell.

    Raises:
        ValueError: no images, no columns, or another number of labels than of images.
    """
    images = to_pil(images) if isinstance(images, Tensor) else list(images)
    if not images:
        raise ValueError("image_grid needs at least one image")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels: got {len(labels)} for {len(images)} images")

    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    font = ImageFont.load_default(max(10, width // 12))
    texts = ["\n".join(_wrap(label, width, font)) for label in labels or []]
    sheet = Image.new("RGB", (1, 1), "white")
    draw = ImageDraw.Draw(sheet)
    bottoms = [draw.multiline_textbbox((0, 0), text, font)[3] for text in texts]
    cell_width = width + padding
    cell_height = height + padding + int(max(bottoms, default=0))

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * cell_width + padding, rows * cell_height + padding)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip_longest(images, texts, fillvalue="")):
        assert isinstance(image, Image.Image)
        row, column = divmod(index, columns)
        x, y = padding + column * cell_width, padding + row * cell_height
        sheet.paste(image, (x, y))
        draw.multiline_text((x, y + height), text, "black", font)
    return sheet


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB on white; Pillow's own `convert` would clip 16 bits to 255."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":  # I;16 in its byte orders, I (how some files hold 16 bits), F
        pixels = np.nan_to_num(np.asarray(image, dtype=np.float64))
        full = 65535.0
        if image.mode == "F":
            full = next((top for top in (1.0, 255.0) if pixels.max(initial=0) <= top), full)
        grey = np.rint(pixels.clip(0, full) * (255 / full)).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Break a caption into lines that fit; what does not fit is cut and marked with dots."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LABEL_LINES:
        lines = [*lines[: LABEL_LINES - 1], " ".join(lines[LABEL_LINES - 1 :])]
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
