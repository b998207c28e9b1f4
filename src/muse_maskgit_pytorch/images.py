"""Files, PIL images and tensors: the only place where pixels change their representation.

Inside the project an image is a float tensor, RGB, in [0,1]. This module reads files into that
form without losing or inventing pixels, and turns tensors back into PIL images and sheets.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import ExifTags, Image, ImageDraw, ImageFile, ImageFont, PngImagePlugin
from torch import Tensor

from .arguments import as_path, as_text, real, shown
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
MEGAPIXELS = "MUSE_MAX_MEGAPIXELS"  # in the environment: millions of pixels a picture may have
PNG = b"\x89PNG\r\n\x1a\n"
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NAN = "images must be numbers in [0, 1], not NaN: look where it comes from"
SIDEWAYS = {TURNS[number] for number in (5, 6, 7, 8)}
SPARE = 2.5  # pixels, on a side, that are decoded of a JPEG for each that is wanted
NO_DIFFERENCE = 2  # levels of 255 by which profiles that mean sRGB differ
_PILLOW = re.compile(r"PIL\.")
LABEL_LINES = 3
# Fonts with many letters, by the names of their files on Linux, macOS and Windows.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc")
FONTS += ("Arial Unicode.ttf", "Hiragino Sans GB.ttc", "msyh.ttc", "malgun.ttf", "seguisym.ttf")
RECORD = "muse"  # name of the PNG chunk that says how a picture was drawn
PIXELS = "muse pixels"  # in memory: the digest of the pixels that the record belongs to
RECORD_LIMIT = 2**24  # characters of it that are read


Picture = str | PathLike[str] | io.BytesIO | Image.Image  # what is opened: files, bytes, images


@cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def suffixes() -> frozenset[str]:
    """Endings of the files that `read_image` opens, in lower case."""
    return frozenset(" ".join(FORMATS[name] for name in formats()).split())


def read_image(source: Picture) -> Image.Image:
    """Open a picture as a viewer shows it: whole, upright, 8-bit RGB, in sRGB.

    Every picture comes in by this function. The EXIF orientation and an embedded colour profile
    are applied, transparency is laid on white, and of an animation the first frame is taken. 16-bit
    grey is scaled to 8 bits. Float grey is taken to reach to 1, 255 or 65535, whichever is the
    first that holds its largest value. Metadata that cannot be read are passed over. What has
    already come in by this function is returned as it is.

    Args:
        source: an image file in one of `formats`, its bytes, or a PIL image.

    Returns:
        An image of mode "RGB".

    Raises:
        ValueError: no image, or a file that is missing, not an image, damaged or cut short; the
            message names it. More pixels than `PIL.Image.MAX_IMAGE_PIXELS` (89 million), which the
            environment variable MUSE_MAX_MEGAPIXELS changes.
    """
    with _naming(source):
        return to_rgb(_open(source))


@dataclass(frozen=True)
class Reduced:
    """A picture as `read_image` gives it, or decoded to fewer pixels.

    Attributes:
        image: what was decoded.
        size: width and height of the whole picture.
        scale: its pixels, on a side, for each that was decoded.
    """

    image: Image.Image
    size: tuple[int, int]
    scale: int = 1

    def part(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
        """A part of the picture, scaled (bicubic, antialiased).

        Args:
            box: left, top, right and bottom, in pixels of the whole.
            size: width and height to scale it to.
        """
        if self.scale == 1:
            # Cropping first gives the same picture and keeps a 1 x 10,000 image from growing huge.
            return self.image.crop(box).resize(size, Image.Resampling.BICUBIC)
        # an edge may lie within a decoded pixel: rounded, it would move the whole picture
        left, top, right, bottom = (edge / self.scale for edge in box)
        return self.image.resize(size, Image.Resampling.BICUBIC, (left, top, right, bottom))


def read_reduced(source: Picture, size: tuple[int, int]) -> Reduced:
    """Open a picture as `read_image` does, to scale it down.

    A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where that leaves `SPARE` pixels for each
    that is wanted: several times as fast, and once scaled down less than a level of 255 away in
    the mean. Of any other picture all pixels are decoded.

    Args:
        source: as of `read_image`.
        size: height and width, in pixels, that it is to cover when it is scaled down.

    Raises:
        ValueError: as `read_image`.
    """
    if (scale := reduction(source, size)) == 1:
        image = read_image(source)
        return Reduced(image, image.size)
    with _naming(source):
        return Reduced(to_rgb(_open(source, scale)), header_size(source), scale)


def reduction(source: Picture, size: tuple[int, int]) -> int:
    """The scale at which `read_reduced` decodes a picture; from its header alone.

    Raises:
        ValueError: as `read_image`.
    """
    if isinstance(source, Image.Image):
        return 1
    with _naming(source):
        header = _decoded(source, pixels=False)
        if header.format not in ("JPEG", "MPO"):
            return 1
        (width, height), turn = header.size, _turn(header)
        rows, columns = size[::-1] if turn in SIDEWAYS else size
        room = min(width / columns, height / rows) / SPARE
        for scale in (8, 4, 2):
            # its last blocks may reach beyond the picture: to the right and below, until it turns
            if scale <= room and not (turn is not None and (width % scale or height % scale)):
                return scale
    return 1


def header_size(source: Picture) -> tuple[int, int]:
    """Width and height of a picture as a viewer shows it, from its header alone.

    Raises:
        ValueError: as `read_image`.
    """
    with _naming(source):
        image = source if isinstance(source, Image.Image) else _decoded(source, pixels=False)
        return image.size[::-1] if _turn(image) in SIDEWAYS else image.size


def read_with_alpha(source: str | PathLike[str] | Image.Image) -> Image.Image:
    """Open a picture as `read_image` does, but of any mode and with its transparency.

    Raises:
        ValueError: as `read_image`.
    """
    with _naming(source):
        return _open(source)


def check_image(path: str | PathLike[str]) -> None:
    """Check, from the header alone, that a file is an image: cheap, but blind to a cut-off end.

    Raises:
        ValueError: as `read_image`.
    """
    with _naming(path):
        _decoded(path, pixels=False)


@contextmanager
def _naming(source: Picture) -> Iterator[None]:
    """Whatever goes wrong within the block is a ValueError with the picture's name."""
    path = getattr(source, "filename", "") if isinstance(source, Image.Image) else source
    path = getattr(source, "name", "") if isinstance(source, io.BytesIO) else path
    given = isinstance(path, (str, PathLike)) and str(path)
    name = f"image {shown(given, 400)}" if given else "the given image"
    try:
        yield
    except (Image.DecompressionBombError, _TooLarge) as error:
        raise ValueError(
            f"{name} is too large: {error}; scale it down or, if you trust it, set the environment "
            f"variable {MEGAPIXELS} to the millions of pixels to allow (in Python: raise "
            "PIL.Image.MAX_IMAGE_PIXELS)"
        ) from error
    except Exception as error:  # on damaged files decoders raise all sorts of errors
        raise ValueError(f"cannot read {name}: {error}") from error


class _TooLarge(Exception):
    pass


def _open(source: Picture, scale: int = 1) -> Image.Image:
    if isinstance(source, Image.Image):
        _check_size(source)
        source.load()
        return _in_srgb(_upright(source))
    image = _decoded(source, scale=scale)
    seen = _in_srgb(_upright(image))
    return image.copy() if seen is image else seen  # not tied to the file any more


def _decoded(
    source: str | PathLike[str] | io.BytesIO, pixels: bool = True, scale: int = 1
) -> Image.Image:
    """An image file as it is stored; without ``pixels`` its header is read alone.

    A JPEG has, to a ``scale`` of 2, 4 or 8, so much fewer pixels on a side, rounded up.
    """
    path = source if isinstance(source, io.BytesIO) else as_path(source, "image")
    try:
        return _load(path, pixels, scale)
    except (Image.DecompressionBombError, _TooLarge):
        raise
    except Exception:
        with (
            io.BytesIO(path.getvalue())
            if isinstance(path, io.BytesIO)
            else open(path, "rb") as file
        ):
            if file.read(len(PNG)) != PNG:
                raise
            bare = _bare_png(file)
        return _load(bare, pixels)  # what was wrong may be in its texts


def _load(file: Path | io.BytesIO, pixels: bool = True, scale: int = 1) -> Image.Image:
    # Other libraries switch this on for the whole process: half a JPEG would then pass as an image.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if MEGAPIXELS in os.environ:
        Image.MAX_IMAGE_PIXELS = _allowed(os.environ[MEGAPIXELS])
    for warning in (UserWarning, Image.DecompressionBombWarning):
        # of metadata, without the file's name; changed once, since any change makes Python repeat
        # the warnings of other modules
        if ("ignore", None, warning, _PILLOW, 0) not in warnings.filters:
            warnings.filterwarnings("ignore", category=warning, module=_PILLOW.pattern)
    with Image.open(file, formats=formats()) as image:
        _check_size(image)
        if scale > 1:
            image.draft(image.mode, (image.width // scale, image.height // scale))
        if pixels:
            image.load()
    return image


def _allowed(megapixels: str) -> int | None:
    try:
        number = real(MEGAPIXELS, float(megapixels), 0)
    except ValueError as error:
        raise ValueError(
            f"{MEGAPIXELS} must be a number of millions of pixels, or 0 for no limit, not "
            f"{shown(megapixels)}"
        ) from error
    return round(number * 1e6) or None


def _bare_png(file: BinaryIO) -> io.BytesIO:
    """What a PNG's pixels need, without texts, EXIF and profile; the file stands at its chunks."""
    kept = io.BytesIO(PNG)
    kept.seek(0, io.SEEK_END)
    while len(head := file.read(8)) == 8:
        chunk = head + file.read(int.from_bytes(head[:4]) + 4)
        if head[4:] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.write(chunk)
    kept.seek(0)
    return kept


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says. Pillow's own way writes the EXIF anew, and fails if it is odd."""
    turn = _turn(image)
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        turned.info.pop(name, None)
    return turned


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:  # a PNG's own way would read all of a file of which the header is wanted
        return TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # programs write all sorts of things there
        return None


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours that its embedded profile means; as it is without one that is usable."""
    profile = image.info.get("icc_profile")
    if not profile or not isinstance(profile, bytes):
        return image
    if image.mode[0] in "IF":
        colours = _eight_bits(image)
    elif image.mode[0] == "L" and image.mode != "LAB":
        colours = image.convert("L")
    else:
        colours = image if image.mode == "CMYK" else image.convert("RGB")
    transform = _to_srgb(profile, colours.mode)
    if transform is None:
        return image
    seen = transform.apply(colours)
    if image.has_transparency_data:
        seen.putalpha(image.convert("RGBA").getchannel("A"))
    seen.info = {
        name: value
        for name, value in image.info.items()
        if name not in ("icc_profile", "transparency")
    }
    return seen


@lru_cache(maxsize=32)  # photographs of one camera have the same
def _to_srgb(profile: bytes, mode: str) -> Any:
    """The transform from a profile; None if it is broken, of another mode, or sRGB itself."""
    try:
        from PIL import ImageCms  # a Pillow built without it raises here or below

        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            # no cache: threads may share it
            ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,
        )
    except Exception:
        return None
    levels = np.arange(256, dtype=np.uint8)
    if mode == "RGB":
        some = levels[::15]
        levels = np.stack(np.meshgrid(some, some, some), -1).reshape(1, -1, 3)
    elif mode == "L":
        levels = levels[None]
    else:
        return transform
    probe = Image.fromarray(levels)
    given, seen = (
        np.asarray(image, np.int16) for image in (probe.convert("RGB"), transform.apply(probe))
    )
    return transform if np.abs(seen - given).max() > NO_DIFFERENCE else None


def _check_size(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise _TooLarge(
            f"its {image.width} x {image.height} pixels are more than {limit / 1e6:.0f} million"
        )


def to_tensor(
    image: Picture, image_size: int | tuple[int, int] | None = None
) -> Float[Tensor, "3 H W"]:
    """Turn a PIL image into a tensor, optionally of a given size.

    Args:
        image: comes in by `read_image`, or `read_reduced` where it is scaled.
        image_size: side of a square, or height and width, in pixels: the image is scaled until it
            covers them (bicubic, antialiased; smaller images are enlarged) and the centre is kept.
            None keeps the image as it is. One that already has the size keeps its pixels exactly.

    Returns:
        float32 in [0,1].

    Raises:
        ValueError: as `read_image`, or image_size is not positive.
    """
    if image_size is None:
        image = read_image(image)
    else:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        image = center_crop(image, size)
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).contiguous().float() / 255


def largest_crop(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The largest part of a picture that has the shape of another size.

    Args:
        picture: its width and height.
        size: height and width, whose ratio counts.

    Returns:
        width and height.
    """
    (width, height), (rows, columns) = picture, size
    if width * rows <= height * columns:
        return width, max(1, round(width * rows / columns))
    return max(1, round(height * columns / rows)), height


def center_crop(image: Picture | Reduced, size: tuple[int, int]) -> Image.Image:
    """The largest part in the middle of an image that has a shape, scaled to it.

    Args:
        image: of any size.
        size: height and width in pixels.

    Raises:
        ValueError: a size that is not positive.
    """
    if min(size) < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {min(size)}")
    picture = image if isinstance(image, Reduced) else read_reduced(image, size)
    width, height = largest_crop(picture.size, size)
    left, top = ((a - b) // 2 for a, b in zip(picture.size, (width, height), strict=True))
    return picture.part((left, top, left + width, top + height), size[::-1])


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
        ValueError: another shape, a size that is not positive, or, on a CPU, NaN. (A GPU would
            have to be waited for, in every training step.)
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
    # NaN has spread into these fewer pixels; another device would have to be waited for
    if pixels.device.type == "cpu" and bool(pixels.isnan().any()):
        raise ValueError(NAN)
    return pixels / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn a batch of images, or one image, into PIL images.

    Args:
        images: (B,3,H,W) or (3,H,W), RGB; values outside [0,1] are clamped.

    Raises:
        ValueError: another shape, or NaN.
    """
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B,3,H,W) or (3,H,W), got {tuple(images.shape)}")
    if bool(images.isnan().any()):
        raise ValueError(NAN)
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
    with replacing(path) as temporary:
        temporary.write_bytes(png_bytes(image))
    return Path(path)


def png_bytes(image: Image.Image) -> bytes:
    """The file that `save_png` writes."""
    chunks, file = PngImagePlugin.PngInfo(), io.BytesIO()
    if record := record_of(image):
        chunks.add_itxt(RECORD, record)  # UTF-8; plain, so that any tool shows it
    # half the time of zlib's default, 6, for half a per cent more bytes (docs/log.md)
    image.save(file, format="PNG", pnginfo=chunks, compress_level=4)
    return file.getvalue()


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
    with _naming(path):
        # some programs write such texts behind the pixels, so these are read too
        record = record_of(_load(as_path(path, "image")))
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
        labels: one caption per image, wrapped to the cell and cut after three lines. They are
            written in a font that has the letters where one is installed; letters that it lacks
            are named.
        padding: white pixels around every cell.

    Raises:
        ValueError: no images, no columns, or another number of labels than of images.
    """
    images = to_pil(images) if isinstance(images, Tensor) else [read_image(i) for i in images]
    if not images:
        raise ValueError("image_grid needs at least one image")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels: got {len(labels)} for {len(images)} images")

    width, height = (max(image.size[axis] for image in images) for axis in (0, 1))
    written = [_written(label, max(10, width // 12)) for label in labels or []]
    texts = [("\n".join(_wrap(text, width, font)), font) for text, font in written]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    bottoms = [draw.multiline_textbbox((0, 0), text, font)[3] for text, font in texts]
    cell_width = width + padding
    cell_height = height + padding + int(max(bottoms, default=0))

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (columns * cell_width + padding, rows * cell_height + padding)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        x, y = padding + column * cell_width, padding + row * cell_height
        sheet.paste(image, (x, y))
        if texts:
            text, font = texts[index]
            draw.multiline_text((x, y + height), text, "black", font)
    return sheet


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB on white; Pillow's own `convert` would clip 16 bits to 255."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of I;16 in its byte orders, of I (how some files hold 16 bits), or of F."""
    pixels = np.asarray(image)
    if image.mode != "F":
        table = np.rint(np.arange(65536) * (255 / 65535)).astype(np.uint8)
        return Image.fromarray(table[pixels.clip(0, 65535)])
    largest = np.nan_to_num(pixels).max(initial=0)
    full = next((top for top in (1.0, 255.0) if largest <= top), 65535.0)
    grey = np.empty(pixels.shape, np.uint8)
    for row, line in zip(grey, pixels, strict=True):  # a whole picture would take much memory
        row[:] = np.rint(np.nan_to_num(line.astype(np.float64)).clip(0, full) * (255 / full))
    return Image.fromarray(grey)


Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def _written(label: str, size: int) -> tuple[str, Font]:
    """A label and the font to write it in: the first that has most of its letters.

    A letter that this one lacks is named, since a box in its place would say nothing.
    """
    label = unicodedata.normalize("NFC", as_text(label, "labels"))
    # what joins and varies emoji, or turns the direction, is no letter of its own
    letters = [
        c for c in label if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f"
    ]
    beyond = {c for c in letters if not " " <= c <= "~" and not c.isspace()}
    fonts = _fonts(size) if beyond else _fonts(size)[:1]
    font = min(fonts, key=lambda font: sum(_lacks(font, c) for c in beyond))
    return "".join(_name(c) if c in beyond and _lacks(font, c) else c for c in letters), font


@lru_cache(maxsize=8)
def _fonts(size: int) -> list[Font]:
    """Pillow's own font, then those of `FONTS` that are installed."""
    fonts: list[Font] = [ImageFont.load_default(size)]
    for name in FONTS:
        with suppress(OSError):  # not there, or of fixed sizes
            fonts.append(ImageFont.truetype(name, size))
    return fonts


@lru_cache(maxsize=4096)
def _lacks(font: Font, letter: str) -> bool:
    """Whether a font draws a letter as it draws what is no character."""
    drawn, box = (font.getmask(text) for text in (letter, "\uffff"))
    return drawn.size == box.size and bytes(drawn) == bytes(box)  # type: ignore[bad-argument-type]


def _name(letter: str) -> str:
    """A symbol by its name, another letter by its number."""
    name = unicodedata.name(letter, "") if unicodedata.category(letter)[0] == "S" else ""
    return f"[{name.lower() or f'U+{ord(letter):04X}'}]"


def _wrap(text: str, width: int, font: Font) -> list[str]:
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


def _cut(line: str, width: int, font: Font) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
