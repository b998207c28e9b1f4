"""Write scenes to Parquet files, for the command line and other programs; or look at them.

    python examples/scenes/make_dataset.py --out data/scenes --scenes 100000 --size 128
    python examples/scenes/make_dataset.py --sheet sheet.png --split relation

writes OUT/SPLIT/*.parquet with the columns image, text and facts (JSON). It needs the sprites that
`sprites.py` makes. What is finished is kept, so an interrupted run is simply repeated.
"""

from __future__ import annotations

import argparse
import io
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from scenes import SPLITS, Scenes
from tqdm import tqdm

from muse_maskgit_pytorch.files import replacing
from muse_maskgit_pytorch.images import image_grid

SHARD = 5_000  # scenes in a file


def encode(data: Scenes, number: int) -> dict[str, object]:
    """One row of a Parquet file."""
    row, stream = data[number], io.BytesIO()
    row["image"].save(stream, "PNG", compress_level=3)
    image = {"bytes": stream.getvalue(), "path": f"{number:08}.png"}
    return {"image": image, "text": row["text"], "facts": json.dumps(row["facts"])}


def write_shard(data: Scenes, folder: Path, first: int) -> Path:
    """Write the scenes from ``first`` on to a file, unless it is there.

    Raises:
        ImportError: pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow") from error
    last = min(first + SHARD, len(data))
    path = folder / f"{shard_prefix(data)}-{first:08}-{last:08}.parquet"
    if not path.exists():
        rows = [encode(data, number) for number in range(first, last)]
        with replacing(path) as temporary:
            parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
    return path


def shard_prefix(data: Scenes) -> str:
    """What the names of one set's files begin with."""
    return f"seed{data.seed}-{data.size}px"


def make_dataset(data: Scenes, out: Path, workers: int = 1) -> Path:
    """Write all scenes of a set.

    Args:
        data: the set; its length says how many.
        out: a folder named after the split is made in it.
        workers: processes that compose.

    Returns:
        the folder of the files.

    Raises:
        ValueError: the folder holds files of something else, which a training would read too.
    """
    folder = out / data.split
    ours = shard_prefix(data) + "-"
    strangers = [file.name for file in folder.glob("*.parquet") if not file.name.startswith(ours)]
    if strangers:
        raise ValueError(f"{folder} holds other scenes, such as {min(strangers)}: clear it")
    firsts = range(0, len(data), SHARD)
    write = partial(write_shard, data, folder)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        written = pool.map(write, firsts) if workers > 1 else map(write, firsts)
        for _ in tqdm(written, total=len(firsts), desc="writing", unit="file"):
            pass
    return folder


def draw_sheet(data: Scenes, out: Path, count: int = 48) -> None:
    """Draw the first scenes of a set side by side, with their captions."""
    rows = [data[number] for number in range(count)]
    texts = [row["text"] for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    image_grid([row["image"] for row in rows], 8, texts).save(out, quality=80)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.safetensors"))
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, choices=(64, 128, 256), default=128)
    parser.add_argument("--scenes", type=int, default=100_000, help="how many to write")
    parser.add_argument("--workers", type=int, default=1, help="processes that compose")
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--sheet", type=Path, help="picture of the first 48 scenes (.png, .webp)")
    given = parser.parse_args()
    if not (given.out or given.sheet):
        parser.error("say what to make: --out FOLDER, --sheet FILE.png, or both")
    try:
        data = Scenes(given.sprites, given.split, given.seed, given.size, given.scenes)
        if given.sheet:
            draw_sheet(data, given.sheet)
            print(f"48 scenes in {given.sheet}")
        if given.out:
            folder = make_dataset(data, given.out, given.workers)
            print(f"{len(data):,} scenes in {folder}")
    except (ImportError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
