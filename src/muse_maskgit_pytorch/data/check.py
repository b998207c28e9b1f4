"""What is in a data set, and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..arguments import whole
from ..images import Picture, check_image, header_size, read_reduced
from .source import BROKEN, Item, Source, check_mask
from .stream import RowStream
from .workers import leave_signals_to_the_run, starting_processes

HASHED = 32  # side in pixels at which pictures are compared
KEPT = 8  # of the DCT's frequencies along a side
NEAR = 6  # bits of 64 in which hashes of one picture may differ
FLAT = 2.0  # standard deviation in levels of 255, below which there is nothing to compare
POPCOUNT = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


@dataclass(frozen=True)
class Seen:
    """One item, looked at.

    Attributes:
        key: its name.
        broken: why it cannot be read; None: it can.
        size: width and height in pixels.
        kind: ending of its name, without the dot.
        digest: of its bytes, or of its pixels where there are no bytes.
        hash: `perceptual_hash`; None: it is of one colour.
        texts: its captions.
    """

    key: str
    broken: str | None = None
    size: tuple[int, int] = (0, 0)
    kind: str = ""
    digest: bytes = b""
    hash: int | None = None
    texts: tuple[str, ...] = ()


@dataclass
class DataReport:
    """What `check_data` found. Items are named by their keys.

    Attributes:
        source: name of the data.
        images: how many can be read.
        broken: reasons by key.
        left_out: what the source itself passes over, by the reason why.
        sizes: width and height of each image.
        kinds: counts of endings.
        small: images whose shorter side has fewer pixels than ``image_size``.
        image_size: in pixels; 0: not asked for.
        flat: images of one colour.
        captions: how many there are.
        empty: images with a caption that is empty.
        without: images without any caption.
        repeated: captions of several images, with their counts, the most frequent first.
        lengths: of the captions, in ``unit``.
        unit: "tokens" or "words".
        limit: how many tokens a text encoder reads; None: not known.
        too_long: captions beyond it: key and tokens, the longest first.
        same: groups of images with the same bytes.
        alike: groups of images that look alike, not all the same.
    """

    source: str
    images: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    small: list[str] = field(default_factory=list)
    image_size: int = 0
    flat: list[str] = field(default_factory=list)
    captions: int = 0
    empty: list[str] = field(default_factory=list)
    without: list[str] = field(default_factory=list)
    repeated: list[tuple[str, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    unit: str = "words"
    limit: int | None = None
    too_long: list[tuple[str, int]] = field(default_factory=list)
    same: list[list[str]] = field(default_factory=list)
    alike: list[list[str]] = field(default_factory=list)


def check_data(
    source: Source | RowStream,
    image_size: int = 0,
    *,
    count_tokens: Callable[[list[str]], list[int]] | None = None,
    token_limit: int | None = None,
    limit: int | None = None,
    num_workers: int = 0,
    progress: Callable[[Iterator[Any], int | None], Iterator[Any]] = lambda seen, total: seen,
) -> DataReport:
    """Look at every item: sizes, captions, broken and repeated pictures.

    Args:
        source: of images, with captions or without.
        image_size: name the images whose shorter side is less, in pixels.
        count_tokens: tokens of each text, by a text encoder's tokenizer; without it words count.
        token_limit: how many of these the encoder reads.
        limit: look at so many items; of a stream the first, else from all over.
        num_workers: processes that read images; a stream is read by this one.
        progress: wraps the items as they come, given their number.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is not None:
        whole("limit", limit, 1)
    report = DataReport(str(source), image_size=whole("image_size", image_size, 0))
    seen = list(progress(*_looked_at(source, limit, num_workers)))
    report.left_out = {
        reason: list(names) for reason, names in getattr(source, "left_out", {}).items() if names
    }
    folder = getattr(source, "folder", None)
    for name in report.left_out.pop(BROKEN, []):  # by their headers, which said why
        report.broken[name] = _why(folder / name) if isinstance(folder, Path) else BROKEN
    report.broken |= {item.key: item.broken for item in seen if item.broken}
    seen = [item for item in seen if item.broken is None]
    report.images = len(seen)
    report.sizes = [item.size for item in seen]
    report.kinds = dict(Counter(item.kind for item in seen).most_common())
    report.small = [item.key for item in seen if min(item.size) < image_size]
    report.flat = [item.key for item in seen if item.hash is None]
    report.same, report.alike = _repeated(seen)
    _captions(report, seen, count_tokens, token_limit)
    return report


def perceptual_hash(picture: Picture) -> int | None:
    """64 bits that stay nearly the same when a picture is scaled or compressed (pHash).

    The picture is scaled to 32 x 32 grey pixels; of the 8 x 8 lowest frequencies of its cosine
    transform each gives a bit: whether it is above their median.

    Returns:
        the bits as a number; None: the picture is of one colour.
    """
    reduced = read_reduced(picture, (HASHED, HASHED))
    small = reduced.part((0, 0, *reduced.size), (HASHED, HASHED)).convert("L")
    pixels = np.asarray(small, dtype=np.float64)
    if pixels.std() < FLAT:
        return None
    low = (DCT @ pixels @ DCT.T).flatten()
    bits = low > np.median(low[1:])  # the first is the mean brightness
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(hashes: np.ndarray, bits: int = NEAR) -> Iterator[tuple[int, int]]:
    """Pairs of hashes that differ in at most so many bits, each once.

    Two hashes that differ in fewer than eight bits agree in one of their eight bytes at least, so
    only those that share a byte are compared.

    Args:
        hashes: uint64 (N,).
        bits: below 8.
    """
    assert bits < 8
    parts = hashes.astype(">u8").view(np.uint8).reshape(-1, 8)
    for place in range(8):
        order = np.argsort(parts[:, place], kind="stable")
        ends = np.flatnonzero(np.diff(parts[order, place])) + 1
        for rows in np.split(order, ends):
            for i, row in enumerate(rows[:-1]):
                others = rows[i + 1 :]
                different = parts[others] ^ parts[row]
                near = POPCOUNT[different].sum(axis=1) <= bits
                # found before, where an earlier byte agrees
                first = (different[:, :place] != 0).all(axis=1)
                for other in others[near & first]:
                    yield int(row), int(other)


# What stands behind it ---------------------------------------------------------------------------


def _dct() -> np.ndarray:
    """The first rows of the orthonormal cosine transform (DCT-II): float64 (8, 32)."""
    k, n = np.arange(KEPT)[:, None], np.arange(HASHED)[None]
    matrix = np.cos(np.pi * k * (2 * n + 1) / (2 * HASHED)) * (2 / HASHED) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


DCT = _dct()


class _Looking(Dataset[Seen]):
    """The items of a source, looked at where they are read."""

    def __init__(self, source: Source, rows: Sequence[int]):
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Seen:
        row = self.rows[index]
        return _look(self.source.keys[row], lambda: self.source.item(row))


def _looked_at(
    source: Source | RowStream, limit: int | None, num_workers: int
) -> tuple[Iterator[Seen], int | None]:
    """The items, and how many there are."""
    if isinstance(source, RowStream):
        columns = source.columns
        rows = islice(filter(source.wanted, source.data), limit)
        found = (
            _look(key, lambda row=row, key=key: columns.item(row, key))  # type: ignore[misc]
            for key, row in ((source.key(row), row) for row in rows)
        )
        return found, limit
    count = min(len(source), limit or len(source))
    rows = [i * len(source) // count for i in range(count)]
    loader = DataLoader(
        _Looking(source, rows), batch_size=32, num_workers=num_workers, collate_fn=list,
        worker_init_fn=leave_signals_to_the_run,
    )  # fmt: skip
    with starting_processes():
        batches = iter(loader)
    return (item for batch in batches for item in batch), count


def _look(key: str, read: Callable[[], Item]) -> Seen:
    try:
        item = read()
        picture = item.image
        found = perceptual_hash(picture)
        size = header_size(picture)
        check_mask(item, f"item {key!r}")
    except ValueError as error:
        return Seen(key, broken=str(error))
    texts = () if item.text is None else (item.text,) if isinstance(item.text, str) else item.text
    kind = PurePosixPath(key).suffix.lower().lstrip(".")
    return Seen(
        key,
        None,
        size,
        kind,
        hashlib.sha256(_bytes(picture)).digest(),
        found,
        tuple(map(str, texts)),
    )


def _bytes(picture: Picture) -> bytes:
    """Of a file, or the pixels of what is decoded already."""
    if isinstance(picture, io.BytesIO):
        return picture.getvalue()
    return picture.tobytes() if isinstance(picture, Image.Image) else Path(picture).read_bytes()


def _why(path: Path) -> str:
    try:
        check_image(path)
    except ValueError as error:
        return str(error)
    return BROKEN


def _repeated(seen: Sequence[Seen]) -> tuple[list[list[str]], list[list[str]]]:
    """Groups of items with the same bytes, and of those that look alike."""
    by_digest = defaultdict(list)
    for item in seen:
        by_digest[item.digest].append(item)
    same = [[item.key for item in group] for group in by_digest.values() if len(group) > 1]
    by_hash = defaultdict(list)  # one of each, and only pictures that show something
    for item, *_ in by_digest.values():
        if item.hash is not None:
            by_hash[item.hash].append(item.key)
    hashes = list(by_hash)
    parent = list(range(len(hashes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for a, b in near_pairs(np.array(hashes, dtype=np.uint64)):
        parent[root(a)] = root(b)
    groups = defaultdict(list)
    for i, number in enumerate(hashes):
        groups[root(i)] += by_hash[number]
    alike = [group for group in groups.values() if len(group) > 1]
    return sorted(same, key=len, reverse=True), sorted(alike, key=len, reverse=True)


def _captions(
    report: DataReport,
    seen: Sequence[Seen],
    count_tokens: Callable[[list[str]], list[int]] | None,
    token_limit: int | None,
) -> None:
    report.without = [item.key for item in seen if not item.texts]
    report.empty = [item.key for item in seen if any(not text.strip() for text in item.texts)]
    pairs = [(item.key, text) for item in seen for text in item.texts]
    texts = [text for _, text in pairs]
    report.captions = len(texts)
    counts = Counter(text for text in texts if text.strip())
    report.repeated = [(text, count) for text, count in counts.most_common() if count > 1]
    if count_tokens is None:
        report.lengths = [len(text.split()) for text in texts]
        return
    report.unit, report.limit = "tokens", token_limit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tokenizer's, of texts that are too long for a model
        report.lengths = [
            n for i in range(0, len(texts), 1000) for n in count_tokens(texts[i : i + 1000])
        ]
    if token_limit is not None:
        long = [(key, n) for (key, _), n in zip(pairs, report.lengths, strict=True)]
        long = [(key, n) for key, n in long if n > token_limit]
        report.too_long = sorted(long, key=lambda pair: pair[1], reverse=True)
