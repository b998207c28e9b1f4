"""Captions as people have them: other encodings, tables that do not quite meet their images."""

import codecs
import json
import warnings
from pathlib import Path

import pytest
from PIL import Image

from muse_maskgit_pytorch.data import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, one of them deeper."""
    for name in ("a", "b", "c", "deep/d"):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return tmp_path / "images"


def captions(folder: Path) -> dict[str, str]:
    source = Folder(folder, captions=True)
    assert source.texts is not None
    return dict(zip(source.names, source.texts, strict=True))


def quiet_captions(folder: Path) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return captions(folder)


# Files beside images -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_files_whose_encoding_is_certain(folder: Path):
    (folder / "a.TXT").write_bytes("a red café".encode("utf-16"))  # with its mark
    (folder / "b.caption").write_bytes(codecs.BOM_UTF8 + "два яблока".encode())
    (folder / "c.txt").write_bytes("three apples, drôle\n".encode("utf-16-le"))  # without one
    (folder / "c.caption").write_text("not this one")
    (folder / "deep" / "d.Txt").write_bytes("四つ".encode("utf-32"))
    assert captions(folder) == {
        "a.png": "a red café",
        "b.png": "два яблока",
        "c.png": "three apples, drôle",
        "deep/d.png": "四つ",
    }


@pytest.mark.parametrize(
    "encoding, texts",
    [
        (
            "cp1252",
            ["une pomme décorée, à l’ombre", "ein grünes Häuschen", "café", "maçã vermelha"],
        ),
        ("cp1251", ["красное яблоко на столе", "кошка сидит", "дом", "a plain one"]),
        ("gb18030", ["一个红苹果在桌子上", "一只猫在睡觉", "房子在山上", "plain"]),
        ("cp932", ["赤いりんごがテーブルの上にある", "猫です", "家", "plain"]),
        ("cp949", ["빨간 사과가 테이블 위에 있다", "고양이", "집", "plain"]),
    ],
)
def test_files_in_an_encoding_of_their_country(folder: Path, encoding: str, texts: list[str]):
    """They are taken together, since a single word may be anything."""
    for name, text in zip(("a", "b", "c", "deep/d"), texts, strict=True):
        (folder / f"{name}.txt").write_bytes(text.encode(encoding))
    with pytest.warns(
        UserWarning, match=rf"caption files are not UTF-8 and .* as {encoding} .*a\.t"
    ):
        assert list(captions(folder).values()) == texts


def test_bytes_that_are_no_text_are_named_and_never_trained_on(folder: Path):
    (folder / "a.txt").write_text("an apple")
    (folder / "b.txt").write_bytes(b"a red\0 apple")
    (folder / "c.txt").write_bytes(bytes(range(256)))
    (folder / "deep" / "d.txt").write_bytes(codecs.BOM_UTF16_LE + b"\0\xd8\0")
    with (
        pytest.warns(
            UserWarning,
            match=r"cannot read 3 .*: b\.txt \(it has NUL .*c\.txt .*d\.txt \(it is marked as utf",
        ),
        pytest.warns(UserWarning, match="3 of 4 images that have no caption"),
    ):
        assert captions(folder) == {"a.png": "an apple"}


# Tables ------------------------------------------------------------------------------------------


def table(folder: Path, *rows: str, header: str = "file_name,text") -> None:
    (folder / "metadata.csv").write_text("\n".join([header, *rows, ""]))


def test_paths_of_a_table(folder: Path):
    """Windows' separators, detours and absolute paths mean what they say."""
    table(
        folder, "./a.png,one", "deep\\d.png,four", "deep/../b.png,two", f"{folder / 'c.png'},three"
    )
    texts = ["one", "two", "three", "four"]
    assert list(captions(folder).values()) == texts
    (folder / "metadata.csv").unlink()
    rows = [{"file_name": f"../{n}.png", "text": n} for n in "abc"]
    lines = [json.dumps(row) for row in rows]
    (folder / "deep" / "METADATA.jsonl").write_bytes("\r\n".join(lines).encode("utf-16"))
    (folder / "deep" / "d.txt").write_text("d")
    assert list(captions(folder).values()) == list("abcd")


def test_rows_without_an_image_are_counted_and_named_with_the_nearest(folder: Path):
    table(folder, "a.png,one", "B.PNG,two", "c,three", "deep/gone.png,four", "d.png,five")
    with (
        pytest.warns(
            UserWarning,
            match=r"4 of 5 rows .*'B\.PNG' \(metadata\.csv, line 3\), the nearest is 'b\.png'; "
            r"'c' \(.*line 4\), the nearest is 'c\.png'; 'deep/gone\.png' \(.*\); \.\.\.",
        ),
        pytest.warns(UserWarning, match="3 of 4 images that have no caption"),
    ):
        assert captions(folder) == {"a.png": "one"}


def test_a_table_that_meets_no_image_is_not_asked_for_again(folder: Path):
    table(folder, "a,one", "b,two")
    with pytest.raises(
        ValueError, match=r"none of the 4.*caption: 2 of 2 rows .*'a\.png'"
    ) as error:
        captions(folder)
    assert "write a metadata.csv" not in str(error.value)


def test_an_image_that_is_named_twice(folder: Path):
    table(folder, "a.png,one", "b.png,two", "./a.png,again")
    with (
        pytest.warns(UserWarning, match=r"name 1 images more than once, the last counts: a\.png"),
        pytest.warns(UserWarning, match="no caption"),
    ):
        assert captions(folder) == {"a.png": "again", "b.png": "two"}


@pytest.mark.parametrize(
    "rows, says",
    [
        (["a.png,one", "b.png,red, round apple"], r"line 3 has 3 fields, but the header 2.*quotes"),
        (["a.png,one", 'b.png,"red apple', "c.png,three"], r"line \d.*unexpected end"),
        (["a.png,one", 'b.png,"red" apple'], "line 3"),
    ],
)
def test_a_caption_is_never_cut_short_or_joined(folder: Path, rows: list[str], says: str):
    table(folder, *rows)
    with pytest.raises(ValueError, match=rf"metadata\.csv': .*{says}"):
        captions(folder)


def test_the_wrong_separator_shows_the_columns(folder: Path):
    table(folder, "a.png;one", header="file_name;text")
    with pytest.raises(ValueError, match=r"separated by commas.*\['file_name;text'\]"):
        captions(folder)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le"])
def test_tables_in_other_encodings(folder: Path, encoding: str):
    text = "file_name,text\na.png,une pomme rouge décorée\nb.png,ein grünes Häuschen\n"
    (folder / "metadata.csv").write_bytes(text.encode(encoding))
    assert list(quiet_captions(folder).values()) == [
        "une pomme rouge décorée",
        "ein grünes Häuschen",
    ]
    if encoding == "cp1252":
        with pytest.warns(UserWarning, match=r"metadata\.csv' is not UTF-8 .* as cp1252"):
            Folder(folder, captions=True)


def test_halves_of_characters_become_whole(folder: Path):
    rows = [
        {"file_name": "a.png", "text": "an apple \ud83d"},
        {"file_name": "b.png", "text": "\0b"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (
        pytest.warns(UserWarning, match=r"the caption of 'a\.png' has .*U\+FFFD: 'an apple"),
        pytest.warns(UserWarning, match="no caption"),
    ):
        assert captions(folder) == {"a.png": "an apple \ufffd", "b.png": "\ufffdb"}


def test_deep_json_is_an_error_with_its_line(folder: Path):
    (folder / "metadata.jsonl").write_text('\n{"file_name": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"metadata\.jsonl': line 2 is not JSON"):
        captions(folder)
