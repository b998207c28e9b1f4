"""In which precision a network draws: copies of it whose linear layers compute faster.

Nine tenths of a step's time are products with weights. A copy shares everything with the network
but the linear layers of its blocks and its head, and follows the same code, so that whatever works
with one works with the other:

- *float32*: weights laid out once as oneDNN's kernels read them, where that is faster here. Exact:
  only the order of sums differs. The copy takes as much memory as the network.
- *bfloat16*: weights held in bfloat16. The residual stream, norms, softmax and sampling stay
  float32, and so does the head on a CPU.
- *int8*: products of 8-bit integers in the blocks, one scale for each row of the activations and
  each output of the weights; the embedding, the head and the projection of texts are left alone. On
  a CPU by oneDNN, on a GPU by torchao, where the rest is bfloat16.
- *float8*: the same with 8-bit floats, on GPUs that multiply them.
- *auto*: the faster of float32 and bfloat16, by measurement. int8 moves pictures, so it is used
  where it is asked for.
- *reference*: the network itself, without any of this and without the other savings of generation.

What products cost is measured once for a machine (`products`), not guessed from its name.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..arguments import one_of
from ..checkpoint import SPREADING, weights_key
from ..devices import exact, fast_precisions
from ..files import cache_folder, replacing
from ..layers import CodeHead, CrossAttention, SelfAttention
from ..linears import (
    QUANTISED,
    Bfloat16Linear,
    Int8Linear,
    PackedLinear,
    TorchaoLinear,
    check_available,
    works,
)
from ..transformer import MaskedTransformer, SelfCritic

Precision = Literal["float32", "bfloat16", "int8", "float8", "auto", "reference"]

LEAST_WIDTH = 128  # of a network whose products are large enough to be prepared
MOST_WEIGHTS = 10**9  # beyond which a second copy in float32 may not fit in memory
CACHED = 2**21  # numbers of a layer's input that a CPU is given at once
WORTH_IT = 1.05  # how much faster something must be measured to be chosen


# Copies ------------------------------------------------------------------------------------------

_copies: WeakKeyDictionary[nn.Module, dict[str, tuple[Any, Any]]] = WeakKeyDictionary()


def prepared(network: Any, precision: Precision) -> Any:
    """The network, or the copy of it that computes in a precision; made once for its weights.

    A network that is compiled, spread over devices, being trained with adapters or without
    ``block_types`` (`MaskedTransformer`) stays as it is.

    Args:
        network: a transformer or a critic, in eval mode.
        precision: see above.

    Raises:
        ValueError: a precision that this machine or this build of torch does not have.
    """
    one_of("precision", precision, Precision)
    if isinstance(network, SelfCritic):
        return network.reading(prepared(network.transformer, precision))
    if not isinstance(network, MaskedTransformer) or not network.block_types:
        return network
    device = network.device
    chosen = resolved(precision, device)
    if SPREADING & {cls.__name__ for cls in type(network).__mro__}:
        return network
    if any("base_layer" in module._modules for module in network.modules()):  # peft's adapters
        return network
    if network.dtype != torch.float32:  # cast as a whole, which decides its precision
        return network
    if chosen == "reference":
        plain = copy.copy(network)
        plain.partial = False
        return plain
    if network.dim < LEAST_WIDTH and chosen in QUANTISED:
        warnings.warn(
            f"precision {chosen!r} does not pay for a network of width {network.dim} (from "
            f"{LEAST_WIDTH} on): it computes in float32",
            stacklevel=2,
        )
        chosen = "float32"
    if chosen == "float32":
        size = sum(weight.numel() for weight in network.parameters())
        if device.type != "cpu" or network.dim < LEAST_WIDTH or size > MOST_WEIGHTS:
            return network
    key = weights_key(network)
    kept = _copies.setdefault(network, {})
    if chosen not in kept or kept[chosen][0] != key:
        kept[chosen] = key, _copy(network, chosen)
    return kept[chosen][1]


def rows_at_once(network: Any, branches: int, tokens: int) -> int | None:
    """Rows of one pass: on a CPU as many as its caches like, elsewhere all.

    Measured for widths of 512 and 256 tokens, guided: rows of 8 took 503 ms each, of 16 and more
    640 to 690 (docs/log.md).
    """
    if network.device.type != "cpu":
        return None
    return max(1, CACHED // (branches * tokens * network.dim))


def resolved(precision: Precision, device: torch.device) -> str:
    """The precision that "auto" means on a device; others as they are.

    Raises:
        ValueError: one that there is not; the message names those there are.
    """
    if precision == "auto":
        return "bfloat16" if _fastest(device, "bfloat16", "packed", "plain") else "float32"
    check_available(precision, device)
    return precision


def _copy(network: MaskedTransformer, kind: str) -> MaskedTransformer:
    """The network with other linear layers, sharing everything else."""
    device = network.device

    def float32(place: str) -> Any:
        packed = device.type == "cpu" and _fastest(device, "packed", "plain", place=place)
        return PackedLinear if packed else KINDS["plain"]

    on_gpu, low = device.type != "cpu", kind != "float32"
    layer: Callable[[nn.Linear], nn.Module]
    if on_gpu and kind in QUANTISED:
        layer = partial(TorchaoLinear, kind=kind)
    else:
        layer = {"bfloat16": Bfloat16Linear, "int8": Int8Linear}.get(kind) or float32("blocks")
    # logits are what is drawn from: float32, where that is not half of the time
    head = Bfloat16Linear if on_gpu and low else float32("head")

    def of(module: nn.Module, inside: bool) -> nn.Module:
        if type(module) is nn.Linear:
            return layer(module) if inside else module
        made = copy.copy(module)
        inside = inside or isinstance(module, network.block_types)
        made._modules = {
            name: child and of(child, inside) for name, child in module._modules.items()
        }
        half = kind == "bfloat16" or (on_gpu and low)
        if half and isinstance(module, (SelfAttention, CrossAttention)):
            for name in ("q_norm", "k_norm"):  # of queries and keys that are in bfloat16
                made._modules[name] = copy.deepcopy(getattr(module, name)).bfloat16()
        return made

    with torch.no_grad():
        made = of(network, inside=False)
        to_logits = network.to_logits
        to_logits = to_logits.plain() if isinstance(to_logits, CodeHead) else to_logits
        if type(to_logits) is nn.Linear:
            made._modules["to_logits"] = head(to_logits)
    assert isinstance(made, MaskedTransformer)
    return made


# Measuring ---------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "plain": lambda layer: layer,
    "packed": PackedLinear,
    "bfloat16": Bfloat16Linear,
    "int8": Int8Linear,
}


# Of a transformer of width 512: inputs and outputs.
PLACES = {"blocks": ((512, 1536), (512, 2736), (1368, 512)), "head": ((512, 8192),)}
ROWS, TURNS = 256, 5


@cache
def products(device: torch.device) -> dict[str, float]:
    """What products in the blocks and in the head achieve here, in GFLOP/s, by kind and place.

    Measured once (half a second) and kept in the user's cache folder, under the names of the
    processor, the release of torch and the number of threads. Kinds that do not work, or work in
    software only, are left out.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    key = f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    path = cache_folder() / "products.json"
    known: dict[str, dict[str, float]] = {}
    with suppress(OSError, ValueError):
        read = json.loads(path.read_text(encoding="utf-8"))
        known = read if isinstance(read, dict) else {}
    measured = known.get(key)
    if not isinstance(measured, dict) or not all(
        isinstance(number, (int, float)) for number in measured.values()
    ):
        measured = known[key] = _measured(device)
        with suppress(OSError), replacing(path) as new:  # else it is measured again next time
            new.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return measured


def _measured(device: torch.device) -> dict[str, float]:
    kinds = ["plain"]
    kinds += ["bfloat16"] if "bf16" in fast_precisions(device) else []
    if device.type == "cpu":
        kinds += [kind for kind in ("packed", "int8") if works(KINDS[kind])]
    made = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), exact(device):
        for place, shapes in PLACES.items():
            seconds = dict.fromkeys(kinds, 0.0)
            for shape in shapes:
                plain = nn.Linear(*shape, bias=False).to(device)
                layers = {kind: KINDS[kind](plain) for kind in kinds}
                x = torch.randn(ROWS, shape[0]).to(device)
                best = dict.fromkeys(kinds, math.inf)  # whatever else runs only makes it slower
                for _ in range(TURNS):
                    for kind, layer in layers.items():
                        before = time.perf_counter()
                        layer(x)
                        if device.type == "cuda":
                            torch.cuda.synchronize(device)
                        best[kind] = min(best[kind], time.perf_counter() - before)
                for kind, time_taken in best.items():
                    seconds[kind] += time_taken
            work = sum(2 * ROWS * width * outputs for width, outputs in shapes) / 1e9
            made |= {f"{kind}, {place}": round(work / seconds[kind], 1) for kind in kinds}
    return made


def _fastest(device: torch.device, kind: str, *others: str, place: str = "blocks") -> bool:
    """Whether a kind of product is worth it."""
    costs = products(device)
    rest = [costs.get(f"{other}, {place}", 0.0) for other in others]
    return costs.get(f"{kind}, {place}", 0.0) > WORTH_IT * max(rest)


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
