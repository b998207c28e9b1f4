"""How fast this package is: against the machine, its own past, the 0.3.5 release and aMUSEd.

    python benchmarks/speed.py                                # the case "generate"
    python benchmarks/speed.py --case train decode --pairs 5
    python benchmarks/speed.py --case generate --against ../before/src   # an older checkout
    python benchmarks/speed.py --sweep tokens                 # how cost grows
    python benchmarks/speed.py --case generate train --profile
    python benchmarks/speed.py --device cuda --case gpu-100m  # bfloat16, CUDA events
    python benchmarks/speed.py --list                         # what else there is

Every contender is a process of its own (`speed_worker.py`), for the release's package has our
name, and so has an older checkout's. They work in turns, one at a time, so that whatever slows the
machine down slows all of them. A round is one turn of each, after a first one that does not count,
and one of matrix products, the ceiling. Times are those of the process on one thread, or between
CUDA events; medians over the rounds, and of ratios within a round.

All get the same random text embeddings and equally many tokens, codes, steps, and weights (random,
but the same for every checkout of ours, which also get the same noise: the table says how many of
their ids agree with the first row's). The release has its own environment; name it with
``--release-python``:

    python -m venv release-env
    release-env/bin/pip install torch==2.13.0 accelerate beartype einops ema-pytorch pillow \
        memory-efficient-attention-pytorch sentencepiece tqdm transformers vector-quantize-pytorch
    release-env/bin/pip install --no-deps muse-maskgit-pytorch==0.3.5

GFLOP/s are those of the products that were executed, as PyTorch's counter sees them; "dense" ones
are those of the plain algorithm, which computes every logit of every token in both branches, over
the time that the contender took. "of GEMM" compares the executed ones with the ceiling in the same
precision.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
INSTALL = "give --release-python (how to make that environment stands at the top of this file)"


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        kind: "generate", "train", "encode", "decode", "tokenizer" (a training step of it),
            "shipped" (the model that comes with the package), "cold" (`muse generate` as a process)
            or "help" (`muse generate --help`).
        tokens: N of the image; a perfect square.
        cond_tokens: M of the low-resolution image; 0: no super-resolution.
        codes: V.
        steps: with one, a canvas is given that is filled as it is in the mean step.
        text_len, text_dim: L and E.
        top_k: draw from the best tenth of the codes, as the release always does.
        size: side of the picture in pixels ("encode", "decode" and "tokenizer").
        multi_axis: of ours, where it has it; the others attend in full.
    """

    kind: str = "generate"
    batch: int = 1
    tokens: int = 256
    cond_tokens: int = 0
    codes: int = 8192
    steps: int = 1
    dim: int = 512
    depth: int = 8
    heads: int = 8
    text_len: int = 32
    text_dim: int = 768
    top_k: bool = False
    size: int = 256
    multi_axis: int | None = None

    def __str__(self) -> str:
        """What differs from one guided step of 256 tokens and 8,192 codes."""
        usual = asdict(Case())
        changed = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return ", ".join(f"{name} {value}" for name, value in changed.items()) or "as by default"

    def dense_flops(self) -> int:
        """Of the plain way with our architecture: every token's logits, in both branches.

        Text and low-resolution tokens are projected once; backward costs two forwards. 0 where
        no transformer of this size runs.
        """
        if self.kind not in ("generate", "train"):
            return 0
        n, d, hidden = self.tokens, self.dim, int(self.dim * 8 / 3)
        context = 1 + self.text_len + self.cond_tokens
        products = 4 * d * d + 2 * d * d + 3 * d * hidden  # self-, cross-attention, gated MLP
        one_pass = self.depth * (2 * n * products + 4 * n * (n + context) * d)
        one_pass += 2 * n * d * self.codes
        once = 2 * self.text_len * self.text_dim * d + self.depth * 4 * (context - 1) * d * d
        if self.kind == "train":
            return 3 * self.batch * (once + one_pass)
        return 2 * self.batch * (once + self.steps * one_pass)


GPU = {
    "100m": Case(dim=768, depth=12, heads=12, steps=24),
    "632m": Case(dim=1280, depth=24, heads=20, steps=24),
    "3b": Case(dim=2048, depth=48, heads=32, steps=24),
}
GPU_SUPERRES = Case(tokens=4096, cond_tokens=256, dim=1024, depth=32, heads=16, steps=8)
CASES = {
    "generate": Case(steps=18),
    "generate-4": Case(batch=4),
    "codes": Case(codes=65536),
    "codes-top-k": Case(codes=65536, top_k=True),
    "superres": Case(tokens=1024, cond_tokens=256),
    "superres-multi-axis": Case(tokens=1024, cond_tokens=256, multi_axis=8),
    "superres-4096": Case(tokens=4096, cond_tokens=1024),
    "superres-4096-multi-axis": Case(tokens=4096, cond_tokens=1024, multi_axis=8),
    "train": Case("train", batch=4),
    "encode": Case("encode", dim=64),
    "decode": Case("decode", dim=64),
    # one of the 32 images of a step of the user's first example
    "first-example": Case("tokenizer", dim=256, codes=512, size=128),
    "shipped": Case("shipped"),
    "shipped-8": Case("shipped", batch=8),
    "cold": Case("cold"),
    "help": Case("help"),
    **{f"gpu-{name}": case for name, case in GPU.items()},
    **{f"gpu-{name}-64": replace(case, batch=64) for name, case in GPU.items()},
    "gpu-superres": GPU_SUPERRES,
    "gpu-superres-multi-axis": replace(GPU_SUPERRES, multi_axis=8),
    # with AdamW's state, a batch of 32 at 3 B would take more than 80 GB
    **{
        f"gpu-train-{name}": replace(case, kind="train", batch=16 if name == "3b" else 32, steps=1)
        for name, case in GPU.items()
    },
}
HALF = Case(dim=256, depth=4, heads=4)  # what a sweep changes one thing of
SWEEPS: dict[str, tuple[str, list[int]]] = {
    "tokens": ("tokens", [64, 256, 1024, 4096]),
    "batch": ("batch", [1, 2, 4, 8, 16]),
    "width": ("dim", [128, 256, 512, 1024]),
    "vocabulary": ("codes", [512, 4096, 32768, 262144]),
    "steps": ("steps", [2, 4, 8, 16]),
    "text": ("text_len", [1, 16, 64, 256]),
}
COMMON = ("float32", "bfloat16")  # precisions that every contender knows
OURS = ("int8", "float8", "auto", "reference")
QUICK = dict(tokens=16, codes=64, dim=32, depth=3, heads=2, text_len=4, text_dim=24, size=64)


def quick(case: Case) -> Case:
    """The same on a tiny model."""
    steps, batch = min(case.steps, 2), min(case.batch, 2)
    return replace(case, **QUICK, cond_tokens=min(case.cond_tokens, 4), steps=steps, batch=batch)


def series(name: str, small: bool) -> dict[str, Case]:
    """The cases of a sweep by the value that changes."""
    field, values = SWEEPS[name]
    if small:
        values = dict(tokens=[16, 64], dim=[64, 128], codes=[64, 128]).get(field, [2, 4])
    cases = {}
    for value in values:
        change: dict[str, Any] = {field: value}
        if field == "dim":
            change["heads"] = value // 64
        cases[str(value)] = replace(quick(Case()) if small else HALF, **change)
    return cases


@dataclass(frozen=True)
class Contender:
    """Who takes part: a package in an environment, in a variant and a precision."""

    name: str
    package: str
    python: str = sys.executable
    path: str = ""
    precision: str = "float32"
    variant: str = ""


def contenders(args: argparse.Namespace) -> list[Contender]:
    """All that were asked for and can be started; of the others it says why not."""
    source = str(HERE.parent / "src")
    found = []
    for precision in args.precision:
        found.append(Contender("ours", "ours", path=source, precision=precision))
        if args.compile:
            compiled = dict(path=source, precision=precision, variant="compiled")
            found.append(Contender("ours, compiled", "ours", **compiled))
        for path in args.against:
            if not (Path(path) / "muse_maskgit_pytorch").is_dir():
                raise SystemExit(f"--against {path}: no muse_maskgit_pytorch in it; name its src")
            name = Path(path).resolve().parent.name
            found.append(Contender(name, "ours", path=path, precision=precision))
        if precision not in COMMON:
            continue
        if args.release_python:
            old = Contender("release", "release", args.release_python, precision=precision)
            found += [old, replace(old, name="release, SDPA", variant="best")]
        found.append(Contender("aMUSEd", "amused", precision=precision))
    return [c for c in found if c.package not in args.skip and c.name not in args.skip]


class Worker:
    """A contender's process, which works only when told to.

    Attributes:
        facts: what it said of its model, or "left_out": why it does not take part.
        turns: its answers.
    """

    def __init__(self, contender: Contender, case: Case, args: argparse.Namespace):
        self.contender = contender
        spec = asdict(case) | dict(threads=args.threads, device=args.device)
        spec |= {n: getattr(contender, n) for n in ("package", "precision", "variant")}
        environment = os.environ | {"PYTHONPATH": contender.path}
        environment |= {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
        log = None if args.verbose else subprocess.PIPE
        self.process = subprocess.Popen(
            [contender.python, str(HERE / "speed_worker.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        self.turns: list[dict[str, Any]] = []
        self.facts = self.listen()

    def listen(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        said = self.process.communicate()[1] or ""
        return {"left_out": f"it has ended: {(said.strip().splitlines() or ['?'])[-1]}"}

    def work(self, asked: str = "") -> dict[str, Any]:
        """Take a turn, or do what else is asked."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{asked}\n")
        self.process.stdin.flush()
        answer = self.listen()
        if "left_out" in answer:
            raise SystemExit(f"{self.contender.name}: {answer['left_out']}")
        return answer

    def end(self) -> None:
        self.process.communicate()


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders of a case in turns: a row of figures for each, and the ceilings."""
    ceiling_case = replace(
        case, size=4096 if args.device == "cuda" else 256 if args.quick else 1024
    )
    asked = " ".join(args.precision)
    ceiling = Worker(Contender("products", "products", precision=asked), ceiling_case, args)
    workers = []
    own = case.kind in ("shipped", "cold", "help")
    for contender in contenders(args):
        if own and contender.package != "ours":
            continue
        worker = Worker(contender, case, args)
        if reason := worker.facts.get("left_out"):
            print(f"left out: {contender.name}, {contender.precision}: {reason}")
            worker.end()
        else:
            workers.append(worker)
    for _ in range(args.pairs):
        for worker in [ceiling, *workers]:
            worker.turns.append(worker.work())
    for worker in workers:
        if args.profile and case.kind not in ("cold", "help"):
            worker.facts |= worker.work("profile")
    for worker in [ceiling, *workers]:
        worker.end()
    rates = {
        precision: median(turn["rates"][precision] for turn in ceiling.turns)
        for precision in ceiling.turns[0]["rates"]
    }
    rows = [figures(worker, workers[0], case, rates) for worker in workers]
    return {"case": asdict(case), "gemm_gflops": rates, "rows": rows}


def figures(worker: Worker, first: Worker, case: Case, rates: dict[str, float]) -> dict[str, Any]:
    contender, facts = worker.contender, worker.facts
    seconds = [turn["seconds"] for turn in worker.turns]
    pairs = zip(worker.turns, first.turns, strict=True)
    found: dict[str, Any] = {
        "contender": contender.name,
        "precision": contender.precision,
        "seconds": median(seconds),
        "all_seconds": seconds,
        "ratio": median(a["seconds"] / b["seconds"] for a, b in pairs),
        "images_per_s": case.batch / median(seconds),
        "peak_mb": worker.turns[-1].get("peak_mb"),
        **facts,
    }
    counts = {"gflops": facts.get("flops"), "dense_gflops": case.dense_flops() or None}
    for name, count in counts.items():
        found[name] = count and count / median(seconds) / 1e9
    rate = rates.get(contender.precision.replace("reference", "float32"))
    if found["gflops"] and rate:
        found["of_gemm"] = found["gflops"] / rate
    ids, wanted = worker.turns[-1].get("ids"), first.turns[-1].get("ids")
    if ids and wanted and contender.package == first.contender.package and worker is not first:
        same = sum(a == b for a, b in zip(ids, wanted, strict=True))
        found["same_ids"] = same / len(wanted)
    return found


def shown(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


COLUMNS = {
    # heading: figure, factor, format
    "seconds": ("seconds", 1, ".4g"),
    "× first": ("ratio", 1, ".2f"),
    "images/s": ("images_per_s", 1, ".3g"),
    "parameters, M": ("parameters", 1e-6, ".1f"),
    "GFLOP": ("flops", 1e-9, ".4g"),
    "GFLOP/s": ("gflops", 1, ".1f"),
    "of GEMM": ("of_gemm", 1, ".0%"),
    "dense GFLOP/s": ("dense_gflops", 1, ".1f"),
    "peak MB": ("peak_mb", 1, ".0f"),
    "same ids": ("same_ids", 1, ".1%"),
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(found: dict[str, Any]) -> str:
    """The figures of a case, one contender a row; columns that nobody fills are left out."""
    columns = {
        heading: column
        for heading, column in COLUMNS.items()
        if any(row.get(column[0]) is not None for row in found["rows"])
    }
    rows = []
    for row in found["rows"]:
        cells = [row["contender"], row["precision"]]
        for figure, factor, form in columns.values():
            value = row.get(figure)
            cells.append(shown(value if value is None else value * factor, form))
        rows.append(cells)
    return markdown(["", "precision", *columns], rows)


def profile(found: dict[str, Any]) -> str:
    """Which part of the time goes where, one contender a row."""
    profiled = [row for row in found["rows"] if "parts" in row]
    rows = []
    for row in profiled:
        total = sum(row["parts"].values())
        shares = [f"{seconds / total:.1%}" for seconds in row["parts"].values()]
        rows.append([row["contender"], row["precision"], f"{total:.4g}", *shares])
    return markdown(["", "precision", "seconds", *profiled[0]["parts"]], rows) if rows else ""


def summary(cases: dict[str, dict[str, Any]]) -> str:
    """A case a line: the first contender's seconds and share of the ceiling, factors to others."""
    firsts = {name: found["rows"][0] for name, found in cases.items()}
    others = {
        (row["contender"], row["precision"]): None
        for found in cases.values()
        for row in found["rows"][1:]
    }
    rows = []
    for name, found in cases.items():
        first = firsts[name]
        factors = {(row["contender"], row["precision"]): row["ratio"] for row in found["rows"][1:]}
        cells = [f"`{name}`", f"{first['seconds']:.4g} s", shown(first.get("of_gemm"), ".0%")]
        rows.append(cells + [shown(factors.get(key), ".2f") for key in others])
    first = next(iter(firsts.values()))
    head = ["case", f"{first['contender']}, {first['precision']}", "of GEMM"]
    return markdown([*head, *(f"× {name}, {precision}" for name, precision in others)], rows)


def growth(name: str, found: dict[str, dict[str, Any]]) -> str:
    """A sweep: seconds of each contender; in brackets the power of the value that they grew by."""
    who = {(row["contender"], row["precision"]): [] for f in found.values() for row in f["rows"]}
    rows, before = [], {}
    for value, result in found.items():
        times = {(r["contender"], r["precision"]): r for r in result["rows"]}
        cells = [f"{int(value):,}"]
        for key in who:
            row = times.get(key)
            cell = "" if row is None else f"{row['seconds']:.4g} s"
            old_value, old = before.get(key, (0, None))
            if row and old and int(old_value) > 0:
                power = math.log(row["seconds"] / old) / math.log(int(value) / int(old_value))
                cell += f" ({power:.2f})"
            if row:
                before[key] = value, row["seconds"]
                cell += "" if row.get("of_gemm") is None else f", {row['of_gemm']:.0%}"
            cells.append(cell)
        rows.append(cells)
    return markdown([name, *(f"{n}, {precision}" for n, precision in who)], rows)


def processor() -> str:
    """Its name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = set(found.get("flags", "").split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
    return ", ".join(
        [found.get("model name", platform.machine()), *(f for f in known if f in flags)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=[], metavar="NAME")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=[], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="the cases and sweeps, and no more")
    parser.add_argument("--show", nargs="+", type=Path, help="JSON files: their cases as one table")
    parser.add_argument("--pairs", type=int, default=3, help="rounds that count")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--precision", nargs="+", choices=COMMON + OURS)
    parser.add_argument("--against", nargs="+", default=[], help="src of older checkouts of ours")
    parser.add_argument("--release-python", help="of the environment of the 0.3.5 release")
    parser.add_argument("--skip", nargs="+", default=[], help="contenders to do without")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="ours also by torch.compile")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="also which part takes how long")
    parser.add_argument("--verbose", action="store_true", help="show what the contenders print")
    parser.add_argument("--out", type=Path, help="JSON of every figure")
    args = parser.parse_args()
    if args.list:
        print(f"unless said otherwise: {Case()!r}")
        for name, case in CASES.items():
            print(f"{name:20}{case}")
        for name, (field, values) in SWEEPS.items():
            print(f"--sweep {name:12}{field} {values} ({HALF})")
        return
    if args.profile and args.device != "cpu":
        parser.error("--profile tells the parts of a CPU's time: leave --device cuda out")
    if args.show:
        reports = [json.loads(path.read_text()) for path in args.show]
        return print(summary({n: c for report in reports for n, c in report["cases"].items()}))
    args.precision = args.precision or ["bfloat16" if args.device == "cuda" else "float32"]
    names = args.case or ([] if args.sweep else ["generate"])
    report: dict[str, Any] = {"processor": processor(), "cases": {}, "sweeps": {}}
    report |= {"arguments": {k: str(v) for k, v in vars(args).items()}}
    if not args.release_python and "release" not in args.skip:
        print(f"left out: release: {INSTALL}")
    print(f"{report['processor']}; {args.threads} thread(s), {args.pairs} round(s)")
    for name in names:
        case = quick(CASES[name]) if args.quick else CASES[name]
        found = report["cases"][name] = measure(case, args)
        rates = ", ".join(f"{p} {rate:.0f}" for p, rate in found["gemm_gflops"].items())
        print(f"\n**{name}** ({case}); GEMM, GFLOP/s: {rates}\n\n{table(found)}", flush=True)
        print(f"\n{profile(found)}", flush=True)
    for name in args.sweep:
        points = {value: measure(case, args) for value, case in series(name, args.quick).items()}
        report["sweeps"][name] = points
        print(
            f"\n**{name}**, seconds (growth), share of GEMM\n\n{growth(name, points)}", flush=True
        )
    if len(names) > 1:
        print(f"\n{summary(report['cases'])}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
