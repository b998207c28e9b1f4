"""Reading files, tensors and sheets: no pixel is lost, invented or turned."""

import io
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import (
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    ImageFont,
    JpegImagePlugin,
    PngImagePlugin,
)
from skimage import data

from muse_maskgit_pytorch import images
from muse_maskgit_pytorch.images import (
    RECORD,
    check_image,
    header_size,
    image_grid,
    read_image,
    read_record,
    read_with_alpha,
    record_of,
    resize,
    save_gif,
    save_png,
    set_record,
    to_pil,
    to_tensor,
)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture
def photo() -> Image.Image:
    """A smooth picture without symmetry, 40 x 24."""
    y, x = np.mgrid[:24, :40]
    return Image.fromarray(np.stack([x * 6, y * 10, (x + y) * 3], -1).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "gif", "jpg"])
def test_reads_every_format(tmp_path: Path, photo: Image.Image, suffix: str):
    path = tmp_path / f"a.{suffix}"
    photo.save(path, lossless=True)  # webp knows the word, the others ignore it
    tolerance = {"jpg": 12, "gif": 24}.get(suffix, 0)
    difference = np.abs(pixels(read_image(path)).astype(int) - np.asarray(photo))
    assert difference.mean() <= tolerance


def test_16_bit_grey_keeps_its_brightness(tmp_path: Path):
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode.startswith("I")
    expected = np.repeat(np.array([[0, 1, 128, 255]])[..., None], 3, -1)
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "a.png")), expected)


@pytest.mark.parametrize("mode", ["I;16B", "I"])
def test_other_16_bit_modes(tmp_path: Path, mode: str):
    grey = np.array([[0, 257, 32768, 65535]], ">u2" if mode == "I;16B" else np.int32)
    image = Image.frombytes(mode, (4, 1), grey.tobytes())
    image.save(tmp_path / "a.tif")
    assert pixels(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_float_grey(tmp_path: Path, top: float):
    values = np.array([[0, 0.25, 0.5, 1]], np.float32) * top
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert pixels(read_image(tmp_path / "a.tif"))[0, :, 1].tolist() == [0, 64, 128, 255]


def test_float_grey_with_holes(tmp_path: Path):
    values = np.array([[0, np.nan, 0.5, 1]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert pixels(read_image(tmp_path / "a.tif"))[0, :, 1].tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, photo: Image.Image, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo.save(tmp_path / "a.png", exif=exif)
    expected = upright(np.asarray(photo))
    np.testing.assert_array_equal(pixels(read_image(tmp_path / "a.png")), expected)


def test_transparency_is_laid_on_white(tmp_path: Path):
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    got = pixels(read_image(tmp_path / "a.png"))[0]
    np.testing.assert_allclose(got, [[200, 0, 0], [255, 255, 255], [127, 127, 127]], atol=1)


def test_grey_with_alpha(tmp_path: Path):
    Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA").save(tmp_path / "a.png")
    assert pixels(read_image(tmp_path / "a.png"))[0].tolist() == [[10] * 3, [255] * 3]


def test_palette_with_transparency(tmp_path: Path):
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 90, 80, 70])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert pixels(read_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [90, 80, 70]]


def test_colour_that_means_transparent(tmp_path: Path):
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (1, 2, 3))
    image.save(tmp_path / "a.png", transparency=(9, 9, 9))
    assert pixels(read_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [1, 2, 3]]


def test_cmyk(tmp_path: Path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(pixels(read_image(tmp_path / "a.jpg"))[8, 8], [255, 0, 0], atol=6)


def test_one_bit_and_grey(tmp_path: Path):
    Image.new("1", (2, 2), 1).save(tmp_path / "a.png")
    Image.new("L", (2, 2), 77).save(tmp_path / "b.png")
    assert pixels(read_image(tmp_path / "a.png")).min() == 255
    assert np.unique(pixels(read_image(tmp_path / "b.png"))).tolist() == [77]


def test_an_animation_gives_its_first_frame(tmp_path: Path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as image:
        image.seek(2)  # there are three
    assert pixels(read_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


def test_half_a_jpeg_is_refused(tmp_path: Path, photo: Image.Image, monkeypatch):
    path = tmp_path / "half.jpg"
    photo.resize((400, 240)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"half\.jpg"):
        read_image(path)
    # another library may have allowed it for the whole process
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match=r"half\.jpg"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_no_image_at_all(tmp_path: Path, content: bytes):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png"):
        read_image(tmp_path / "bad.png")


def test_missing_file_and_folder(tmp_path: Path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError, match=path.name):
            read_image(path)


@pytest.mark.filterwarnings("ignore")  # Pillow tells of the damage
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp"])
def test_damage_gives_a_picture_or_a_value_error(tmp_path: Path, photo: Image.Image, suffix: str):
    buffer = io.BytesIO()
    Image.init()
    photo.save(buffer, Image.EXTENSION[f".{suffix}"])
    whole = buffer.getvalue()
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / f"damaged.{suffix}"
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (8,), generator=generator).tolist():
            damaged[place] ^= 0x5A
        path.write_bytes(damaged)
        try:
            assert read_image(path).mode == "RGB"
        except ValueError as error:
            refused += "damaged" in str(error)
    assert refused > 0


# Limits, formats, metadata, colours --------------------------------------------------------------


def test_too_many_pixels(tmp_path: Path, monkeypatch):
    """From a file, from its header alone, and as a PIL image; the switch is the environment's."""
    bomb = Image.new("L", (64, 64))
    bomb.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)  # Pillow itself would open it
    for read in (read_image, check_image, read_record, read_with_alpha):
        with pytest.raises(ValueError, match=r"bomb\.png.*64 x 64.*MUSE_MAX_MEGAPIXELS"):
            read(tmp_path / "bomb.png")
    for take in (read_image, to_tensor):
        with pytest.raises(ValueError, match=r"the given image is too large.*MAX_IMAGE_PIXELS"):
            take(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses it
    with pytest.raises(ValueError, match=r"bomb\.png.*MUSE_MAX_MEGAPIXELS"):
        read_image(tmp_path / "bomb.png")
    for switch in ("0.005", "0"):
        monkeypatch.setenv("MUSE_MAX_MEGAPIXELS", switch)
        assert read_image(tmp_path / "bomb.png").size == (64, 64)
    monkeypatch.setenv("MUSE_MAX_MEGAPIXELS", "0.001")
    with pytest.raises(ValueError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png")
    monkeypatch.setenv("MUSE_MAX_MEGAPIXELS", "many")
    with pytest.raises(ValueError, match=r"MUSE_MAX_MEGAPIXELS must be a number.*'many'"):
        read_image(tmp_path / "bomb.png")


def test_other_formats_are_not_opened_whatever_they_are_called(tmp_path: Path, photo, monkeypatch):
    def run(*_, **__):
        raise AssertionError("another program is started")

    monkeypatch.setattr(subprocess, "check_call", run)
    monkeypatch.setattr(subprocess, "Popen", run)
    for format in ("EPS", "TGA", "PCX", "ICO"):
        path = tmp_path / f"{format}.png"
        photo.save(path, format)
        for read in (read_image, check_image, read_record):
            with pytest.raises(ValueError, match=rf"{format}\.png"):
                read(path)


def exif_block(*entries: tuple[int, int, bytes]) -> bytes:
    """EXIF with entries (tag, type, value); a value of eight bytes stands behind them."""
    behind = 8 + 2 + 12 * len(entries) + 4
    table, values = struct.pack("<H", len(entries)), b""
    for tag, kind, value in entries:
        if len(value) > 4:
            place = struct.pack("<I", behind + len(values))
            values += value
        else:
            place = value.ljust(4, b"\0")
        table += struct.pack("<HHI", tag, kind, 1) + place
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + table + struct.pack("<I", 0) + values


SIDEWAYS = (0x0112, 3, struct.pack("<H", 6))
ODD_RATIONAL = (0x011A, 10, struct.pack("<ii", -1, 0))


@pytest.mark.filterwarnings("error")  # Pillow's, of metadata, do not say which file it is
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
@pytest.mark.parametrize(
    "exif, turned",
    [
        (b"Exif\0\0no TIFF at all", False),
        (exif_block(SIDEWAYS, ODD_RATIONAL), True),
        (exif_block(SIDEWAYS)[:-9], False),
        (exif_block((0x0112, 2, b"up\0")), False),
    ],
)
def test_metadata_never_cost_a_picture(
    tmp_path: Path, photo: Image.Image, suffix: str, exif: bytes, turned: bool
):
    path = tmp_path / f"a.{suffix}"
    photo.save(path, exif=exif, lossless=True)
    expected = np.rot90(np.asarray(photo), -1) if turned else np.asarray(photo)
    for read in (read_image(path), read_image(Image.open(path))):
        assert read.size == expected.shape[1::-1]
        assert np.abs(pixels(read).astype(int) - expected).mean() < (12 if suffix == "jpg" else 0.1)
        assert read_image(read) is read  # upright once and for all


def test_texts_of_any_length_and_broken_ones_cost_no_png(tmp_path: Path, photo: Image.Image):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("workflow", "x" * 2**22, zip=True)
    photo.save(tmp_path / "long.png", pnginfo=chunks)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", "red apple")
    photo.save(tmp_path / "broken.png", pnginfo=chunks)
    raw = (tmp_path / "broken.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(raw.replace(b"red apple", b"red tomat"))
    for name in ("long.png", "broken.png"):
        check_image(tmp_path / name)
        np.testing.assert_array_equal(pixels(read_image(tmp_path / name)), np.asarray(photo))


def profile_of(space: str, *tags: tuple[str, bytes]) -> bytes:
    """An ICC profile of a display, version 2."""
    table, data = struct.pack(">I", len(tags)), b""
    first = 128 + 4 + 12 * len(tags)
    for name, body in tags:
        table += name.encode() + struct.pack(">II", first + len(data), len(body))
        data += body.ljust(-(-len(body) // 4) * 4, b"\0")
    head = bytearray(128)
    head[8:12] = struct.pack(">I", 0x02100000)
    head[12:24] = f"mntr{space:<4}XYZ ".encode()
    head[36:40] = b"acsp"
    head[68:80] = struct.pack(">iii", 0xF6D6, 0x10000, 0xD32D)  # D50
    head[0:4] = struct.pack(">I", len(head) + len(table) + len(data))
    return bytes(head) + table + data


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


WHITE = ("wtpt", xyz(0.9642, 1, 0.8249))
ADOBE_RGB = profile_of(
    "RGB",
    WHITE,
    ("rXYZ", xyz(0.60974, 0.31111, 0.01947)),
    ("gXYZ", xyz(0.20528, 0.62567, 0.06087)),
    ("bXYZ", xyz(0.14919, 0.06322, 0.74457)),
    *((f"{channel}TRC", gamma(2.19921875)) for channel in "rgb"),
)
GREY_18 = profile_of("GRAY", WHITE, ("kTRC", gamma(1.8)))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_colours_are_those_that_the_profile_means(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    image = Image.new("RGB", (8, 8), (60, 200, 60))
    image.save(path, icc_profile=ADOBE_RGB, lossless=True)
    read = read_image(path)
    np.testing.assert_allclose(pixels(read)[0, 0], (0, 201, 37), atol=1)  # as browsers show it
    assert read_image(read) is read  # and no second time
    opened = Image.open(path)
    np.testing.assert_array_equal(pixels(read_image(opened)), pixels(read))
    np.testing.assert_array_equal(to_tensor(opened), to_tensor(read))


def test_profiles_of_other_modes(tmp_path: Path):
    faint = Image.new("RGBA", (4, 4), (60, 200, 60, 0))
    faint.putpixel((0, 0), (60, 200, 60, 255))
    faint.save(tmp_path / "alpha.png", icc_profile=ADOBE_RGB)
    read = pixels(read_image(tmp_path / "alpha.png"))
    np.testing.assert_allclose(read[0, 0], (0, 201, 37), atol=1)
    assert read[1, 1].tolist() == [255] * 3
    assert np.asarray(read_with_alpha(tmp_path / "alpha.png"))[1, 1, 3] == 0
    faint.convert("P").save(tmp_path / "palette.png", icc_profile=ADOBE_RGB)
    assert pixels(read_image(tmp_path / "palette.png"))[0, 0, 0] < 20
    seen = round(255 * (1.055 * (100 / 255) ** (1.8 / 2.4) - 0.055))  # by the formula of sRGB
    deep = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))
    for grey in (Image.new("L", (4, 4), 100), Image.new("LA", (4, 4), (100, 255)), deep):
        grey.save(tmp_path / "grey.png", icc_profile=GREY_18)
        np.testing.assert_allclose(pixels(read_image(tmp_path / "grey.png")), seen, atol=1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"no profile",
        ADOBE_RGB[:200],
        profile_of("CMYK", WHITE),
        b"",
    ],
    ids=["sRGB", "nonsense", "cut short", "another mode", "empty"],
)
def test_srgb_and_broken_profiles_change_no_pixel(
    tmp_path: Path, photo: Image.Image, mode: str, profile: bytes
):
    photo.convert(mode).save(tmp_path / "plain.png")
    photo.convert(mode).save(tmp_path / "a.png", icc_profile=profile)
    plain, read = (pixels(read_image(tmp_path / name)) for name in ("plain.png", "a.png"))
    np.testing.assert_array_equal(read, plain)


def test_what_is_no_picture_is_refused_in_words():
    for wrong in (None, 3, b"a.png", np.zeros((4, 4, 3)), ""):
        with pytest.raises(ValueError, match=r"cannot read .*image must be a path"):
            read_image(wrong)  # type: ignore[arg-type]
    for spoilt in (torch.full((1, 3, 4, 4), torch.nan), torch.eye(4).log().log().expand(3, 4, 4)):
        with pytest.raises(ValueError, match="not NaN"):
            to_pil(spoilt)
    spoilt = torch.zeros(1, 3, 64, 64)
    spoilt[0, 1, 20, 20] = torch.nan
    for size in ((64, 64), (8, 8), (80, 80)):
        with pytest.raises(ValueError, match="not NaN"):
            resize(spoilt, size)


def test_reading_closes_the_file(tmp_path: Path, photo: Image.Image):
    info = PngImagePlugin.PngInfo()
    photo.save(tmp_path / "a.png", pnginfo=info)
    image = read_image(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    assert pixels(image).shape == (24, 40, 3)


def test_to_tensor_keeps_pixels_that_fit(photo: Image.Image):
    square = photo.crop((0, 0, 24, 24))
    exact = torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255
    for tensor in (to_tensor(square, 24), to_tensor(square)):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact)
    assert to_tensor(photo).shape == (3, 24, 40)
    # the centre of a wide image is cut out, not blurred
    middle = torch.from_numpy(np.array(photo)[:, 8:32]).permute(2, 0, 1) / 255
    assert torch.equal(to_tensor(photo, 24), middle)


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (61, 60), (7, 7), (1, 2000)])
def test_to_tensor_is_square(size: tuple[int, int]):
    tensor = to_tensor(Image.new("RGB", size, (255, 128, 0)), 32)
    assert tensor.shape == (3, 32, 32)
    torch.testing.assert_close(tensor.amin((1, 2)), torch.tensor([1, 128 / 255, 0]))
    torch.testing.assert_close(tensor.amax((1, 2)), torch.tensor([1, 128 / 255, 0]))


def test_to_tensor_scales_without_aliasing():
    """Black and white lines one pixel wide turn grey when scaled to an eighth."""
    lines = np.zeros((256, 256, 3), np.uint8)
    lines[:, ::2] = 255
    tensor = to_tensor(Image.fromarray(lines), 32)[:, 4:-4, 4:-4]
    assert (tensor - 0.5).abs().max() < 0.02


def test_to_tensor_refuses_no_size(photo: Image.Image):
    for size in (0, -4):
        with pytest.raises(ValueError, match="image_size"):
            to_tensor(photo, size)


def test_to_pil_clamps_and_rounds():
    values = torch.tensor([-0.5, 0.0, 0.499 / 255, 0.501 / 255, 0.5, 1.0, 1.004, 30.0])
    images = values.expand(1, 3, 1, 8).clone().requires_grad_()
    [image] = to_pil(images)
    assert pixels(image)[0, :, 2].tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_to_pil_and_back(photo: Image.Image):
    tensor = to_tensor(photo)
    [one] = to_pil(tensor)
    assert torch.equal(to_tensor(one), tensor)
    two = to_pil(torch.stack([tensor, 1 - tensor]).to(torch.bfloat16))
    assert [image.size for image in two] == [(40, 24)] * 2


@pytest.mark.parametrize("shape", [(3, 4), (1, 4, 4), (2, 4, 4, 3), (1, 1, 3, 4, 4)])
def test_to_pil_refuses_other_shapes(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="images must be"):
        to_pil(torch.zeros(shape))


def test_grid_places_images_row_by_row():
    levels = torch.tensor([10, 20, 30, 40, 50]) / 255
    sheet = pixels(image_grid(levels[:, None, None, None].expand(-1, 3, 6, 4), 3, padding=2))
    assert sheet.shape == (2 + 2 * 8, 2 + 3 * 6, 3)
    for index in range(5):
        row, column = divmod(index, 3)
        cell = sheet[2 + 8 * row : 8 + 8 * row, 2 + 6 * column : 6 + 6 * column]
        assert np.unique(cell).tolist() == [10 * (index + 1)]
    assert sheet[10:, 14:].min() == 255  # the empty cell
    assert sheet[:2].min() == 255
    assert sheet[:, :2].min() == 255


def test_grid_with_labels_stays_within_its_cells():
    images = [Image.new("RGB", (64, 64), "white") for _ in range(4)]
    labels = ["short", "a much longer caption that takes several lines of text here", "x" * 99, ""]
    sheet = pixels(image_grid(images, 2, labels, padding=2))
    plain = pixels(image_grid(images, 2, padding=2))
    assert sheet.shape[1] == plain.shape[1]
    assert sheet.shape[0] > plain.shape[0]
    height = (sheet.shape[0] - 2) // 2
    cell = [
        sheet[2 + height * (i // 2) + 64 :, 2 + 66 * (i % 2) :][: height - 64, :66]
        for i in range(4)
    ]
    assert all(cell[i].min() < 128 for i in range(3))
    assert cell[3].min() == 255
    assert sheet[:, 66:68].min() == 255  # nothing runs over into the neighbour


def test_grid_of_different_sizes_and_few_images():
    images = [Image.new("RGB", (4, 6)), Image.new("RGB", (8, 2))]
    assert image_grid(images, 5, padding=0).size == (16, 6)


@pytest.mark.parametrize(
    "images, columns, labels, message",
    [
        ([], 1, None, "at least one image"),
        (torch.zeros(2, 3, 4, 4), 0, None, "columns"),
        (torch.zeros(2, 3, 4, 4), 2, ["one"], "labels"),
    ],
)
def test_grid_bad_input(images, columns, labels, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, columns, labels)


@pytest.fixture
def fresh_fonts() -> Iterator[None]:
    """The fonts are looked for once."""
    images._fonts.cache_clear()
    yield
    images._fonts.cache_clear()


def labelled(label: str) -> bytes:
    return image_grid(torch.ones(1, 3, 64, 256), 1, [label]).tobytes()


@pytest.mark.parametrize(
    "label, shown",
    [
        ("a 🍎", "a [red apple]"),
        ("赤い", "[U+8D64][U+3044]"),
        ("a\x1bb", "a[U+001B]b"),
        ("👩\u200d🚀 \u202etxt", "[woman][rocket] txt"),
    ],
)
def test_letters_that_no_font_has_are_named(fresh_fonts, monkeypatch, label: str, shown: str):
    monkeypatch.setattr(images, "FONTS", ("none.ttf",))
    assert labelled(label) == labelled(shown)
    assert labelled(label) != labelled("plain")


def test_letters_are_written_in_a_font_that_has_them(fresh_fonts):
    try:
        ImageFont.truetype("DejaVuSans.ttf")
    except OSError:
        pytest.skip("no font with further letters is installed")
    names = "".join(f"[U+{ord(letter):04X}]" for letter in "яблоко")
    assert labelled("яблоко") not in (labelled(names), labelled("\uffff" * 6))
    assert labelled("яблоко") != labelled("молоко")


def test_halves_of_characters_in_a_label():
    with pytest.warns(UserWarning, match="labels"):
        labelled("half \ud83d")


# Writing ---------------------------------------------------------------------------------------


def test_a_png_keeps_its_record(tmp_path: Path, photo: Image.Image):
    set_record(photo, '{"prompt": "日本語 ❤️"}')
    path = save_png(photo, tmp_path / "deep" / "a.PNG")
    assert read_record(path) == '{"prompt": "日本語 ❤️"}'
    with Image.open(path) as image:
        assert image.tobytes() == photo.tobytes()
        assert record_of(image) == read_record(path)
        save_png(image, tmp_path / "again.png")  # opened and written, it is still the picture
    assert read_record(tmp_path / "again.png") == read_record(path)
    assert [file.name for file in path.parent.iterdir()] == ["a.PNG"]  # no temporary file


def test_a_record_behind_the_pixels(tmp_path: Path, photo: Image.Image):
    """Where some programs put texts when they write a file anew."""
    set_record(photo, "words")
    path = save_png(photo, tmp_path / "a.png")
    raw = path.read_bytes()
    start = raw.index(b"iTXt") - 4
    end = start + 12 + int.from_bytes(raw[start : start + 4])
    chunk, last = raw[start:end], raw.index(b"IEND") - 4
    path.write_bytes(raw[:start] + raw[end:last] + chunk + raw[last:])
    assert read_record(path) == "words"


def test_a_picture_without_a_record(tmp_path: Path, photo: Image.Image):
    assert record_of(photo) is None
    assert read_record(save_png(photo, tmp_path / "a.png")) is None
    photo.save(tmp_path / "a.jpg")
    assert read_record(tmp_path / "a.jpg") is None


def test_records_too_long(tmp_path: Path, photo: Image.Image, monkeypatch):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(RECORD, "x" * 2**22, zip=True)  # four kilobytes in the file
    photo.save(tmp_path / "bomb.png", pnginfo=chunks)
    with pytest.raises(ValueError, match=r"bomb\.png"):
        read_record(tmp_path / "bomb.png")
    set_record(photo, "x" * 101)
    save_png(photo, tmp_path / "long.png")
    monkeypatch.setattr("muse_maskgit_pytorch.images.RECORD_LIMIT", 100)
    with pytest.raises(ValueError, match=r"long\.png' has a record of 101 characters: not ours"):
        read_record(tmp_path / "long.png")


def test_a_gif_shows_every_frame_and_holds_the_last(tmp_path: Path):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
    path = save_gif(frames, tmp_path / "deep" / "a.gif", milliseconds=50, hold=700)
    shown = []
    with GifImagePlugin.GifImageFile(path) as gif:
        assert gif.info["loop"] == 0  # for ever
        for number in range(gif.n_frames):
            gif.seek(number)
            shown.append((gif.convert("RGB").getpixel((0, 0)), gif.info["duration"]))
    assert shown == [((255, 0, 0), 50), ((0, 128, 0), 50), ((0, 0, 255), 700)]
    assert [file.name for file in path.parent.iterdir()] == ["a.gif"]


@pytest.mark.parametrize("write, name", [(save_png, "a.jpg"), (save_gif, "a.png")])
def test_other_endings(write, name: str, tmp_path: Path, photo: Image.Image):
    with pytest.raises(ValueError, match=f"{name}' must end in"):
        write(photo if write is save_png else [photo], tmp_path / name)
    with pytest.raises(ValueError, match="at least one frame"):
        save_gif([], tmp_path / "a.gif")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, photo: Image.Image, monkeypatch):
    path = save_png(photo, tmp_path / "a.png")
    before = path.read_bytes()

    write = Path.write_bytes

    def broken(self: Path, data: bytes):
        write(self, data[:10])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(OSError, match="disk full"):
        save_png(photo, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


# The one low resolution --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("size", [64, 256])
def test_tensors_are_scaled_as_files(name: str, size: int):
    photo = Image.fromarray(getattr(data, name)()).crop((0, 0, 300, 300))
    expected = to_tensor(photo, size)
    scaled = resize(to_tensor(photo)[None], (size, size))[0]
    difference = ((scaled - expected) * 255).abs()
    assert difference.max() <= 1.001
    assert (difference > 0.5).float().mean() < 3e-4
    assert torch.equal(scaled, (scaled * 255).round() / 255)  # as a file would be read


def test_scaling_keeps_what_fits_and_clamps(photo: Image.Image):
    whole = to_tensor(photo)[None]
    assert torch.equal(resize(whole, (24, 40)), whole)
    edge = torch.cat([torch.full((1, 3, 8, 8), -0.5), torch.full((1, 3, 8, 8), 1.5)], -1)
    assert set(resize(edge, (4, 9)).unique().tolist()) >= {0.0, 1.0}
    assert resize(edge, (4, 9)).shape == (1, 3, 4, 9)
    with pytest.raises(ValueError, match="size must be"):
        resize(whole, (0, 8))


@pytest.mark.parametrize("turn", [1, 6])
def test_large_jpegs_are_decoded_at_reduced_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
):
    """A fraction of the pixels is decoded; the square is the same to less than a level."""
    exif = Image.Exif()
    exif[274] = turn
    sizes = {"even": (1008, 672), "odd": (1003, 677)}
    asked: list[tuple[int, int]] = []
    original = JpegImagePlugin.JpegImageFile.draft

    def draft(self, mode, size):
        asked.append(size)
        return original(self, mode, size)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", draft)
    for name, size in sizes.items():
        path = tmp_path / f"{name}.jpg"
        photo = Image.fromarray(data.astronaut()).resize(size, Image.Resampling.LANCZOS)
        photo.save(path, quality=92, exif=exif)
        whole = to_tensor(read_image(path), 64)
        assert not asked
        difference = (to_tensor(path, 64) - whole).abs() * 255
        if turn == 6 and name == "odd":  # only the first column and row are at block edges
            assert not asked
            assert not difference.any()
        else:
            assert asked.pop() == (size[0] // 4, size[1] // 4)
            assert difference.mean() < 1
        assert header_size(path) == (size if turn == 1 else size[::-1])
        assert torch.equal(to_tensor(path, 500), to_tensor(read_image(path), 500))

    png = Image.fromarray(data.astronaut())
    png.save(tmp_path / "a.png")
    assert torch.equal(to_tensor(tmp_path / "a.png", 64), to_tensor(png, 64))
