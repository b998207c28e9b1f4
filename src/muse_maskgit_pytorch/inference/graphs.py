"""Sampling steps as CUDA graphs: one launch for a step, in place of some hundred.

At small batches a GPU computes a step faster than Python can ask for it. A graph is recorded once
for all steps of the same shapes and is then replayed over tensors at fixed places, so rows, tokens
with logits, keys and steps are rounded up to a few sizes: rows are added that nobody reads, keys
that nothing attends to, steps that are not taken. Between two steps nothing waits for the host, and
what a step returns is the caller's own, so callbacks see what they always see.

The first step of its shapes runs as it is, at the second one the graph is recorded, and its first
replay is compared with the step itself. Where recording fails or the results differ, a warning says
so, and the network goes on without graphs.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from ..checkpoint import SPREADING, unwrapped
from ..devices import arithmetic
from ..sampling import SamplePlan, SampleState, Step, step
from ..sampling.contract import Denoiser
from ..sampling.policies import ORDERS, SCORES, confidence, entropy, margin
from ..transformer import Context, MaskGitTransformer, SelfCritic

Replay = Callable[[], SampleState]
Capture = Callable[[Callable[[], SampleState], torch.device], Replay]

LEAST = 8  # steps and keys: multiples of it
SHARE = 4  # of the GPU's memory, one part in so many is the most that graphs may hold
SEEN = 4096  # shapes that are remembered
AGREE = 0.02  # share of the tokens that may differ: cumulative sums on CUDA repeat no bits


class CudaCapture:
    """Records what a function launches. All graphs of a device share their working memory.

    That is safe because they are replayed one at a time, and their results copied at once.
    """

    def __init__(self):
        self._own: dict[torch.device, tuple[Any, Any]] = {}

    def __call__(self, function: Callable[[], SampleState], device: torch.device) -> Replay:
        if device not in self._own:
            self._own[device] = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        stream, pool = self._own[device]
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
        # the outer block puts the stream back even where the inner one's end fails
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream()), recording:
            result = function()

        def replay() -> SampleState:
            graph.replay()
            return result

        return replay


@dataclass
class _Inputs:
    """Tensors at fixed places and the graphs that read them.

    Attributes:
        given: (plan, context, critic's context): what was copied to them last.
        critic: kept alive, since graphs hold the addresses of its weights.
    """

    state: SampleState
    fixed: tuple[SamplePlan, Any, Any]
    critic: Any
    size: int
    given: Any = None
    used: int = 0
    graphs: dict[Hashable, Replay] = field(default_factory=dict)


class Graphs:
    """The graphs of a process, at most so many bytes of them.

    Args:
        capture: makes of a function one that does the same to the same tensors.
        most: bytes; a share of the GPU's memory by default. Beyond it, what was unused for longest
            goes.
    """

    def __init__(self, capture: Capture | None = None, most: int | None = None):
        self.capture, self.most = capture or CudaCapture(), most
        self.lock = threading.RLock()
        self.kept: WeakKeyDictionary[nn.Module, dict[Hashable, _Inputs]] = WeakKeyDictionary()
        self.off: WeakSet[nn.Module] = WeakSet()
        self.growth = 0  # bytes of working memory
        self._seen: dict[Hashable, bool] = {}  # whether a graph of these shapes may be recorded
        self._clock = itertools.count()

    def step(self, denoiser: Denoiser, inner: Step = step) -> Step:
        """The step of one call: by graphs where they are safe, else ``inner``.

        They are with our own transformers and critics that no hook listens to, outside of autocast
        (whose cast weights go when it ends).

        Args:
            denoiser: of the call.
            inner: what is recorded: the plain step, or a compiled one.
        """
        networks = [n for n in (denoiser.network, denoiser.critic) if n is not None]
        bodies = [n.transformer if isinstance(n, SelfCritic) else unwrapped(n) for n in networks]
        if not all(isinstance(body, MaskGitTransformer) for body in bodies):
            return inner
        modules = [m for n in {*networks, *bodies} for m in n.modules()]
        if any(
            m._forward_hooks
            or m._forward_pre_hooks
            or SPREADING & {c.__name__ for c in type(m).__mro__}
            for m in modules
        ):
            return inner
        if torch.is_autocast_enabled(bodies[0].device.type):
            return inner
        return _GraphStep(self, modules, inner)

    def fits(self) -> bool:
        """Let go of what was unused for longest, until the rest is within the bound."""
        everything = [
            (inputs.used, network, key)
            for network, kept in self.kept.items()
            for key, inputs in kept.items()
        ]
        held = self.growth + sum(self.kept[n][key].size for _, n, key in everything)
        assert self.most is not None
        for _, network, key in sorted(everything, key=lambda one: one[0]):
            if held <= self.most:
                return True
            gone = self.kept[network].pop(key)
            held -= gone.size
            for name in gone.graphs:
                self._seen.pop((key, name), None)
        return held <= self.most

    def seen(self, key: Hashable) -> bool | None:
        return self._seen.get(key)

    def remember(self, key: Hashable, again: bool) -> None:
        if len(self._seen) >= SEEN:
            self._seen.clear()
        self._seen[key] = again


GRAPHS = Graphs()  # of this process


def by_graphs(device: torch.device) -> bool:
    """Whether a device has them."""
    return device.type == "cuda" and torch.version.hip is None


class _GraphStep:
    """`sampling.step` by graphs, for one call."""

    by_row = True  # see `sampling.loop.Step`

    def __init__(self, graphs: Graphs, modules: list[nn.Module], inner: Step):
        self.graphs, self.inner = graphs, inner
        # what a graph has fixed: the places of the weights and the ways to multiply
        tensors = itertools.chain.from_iterable(
            (*m.parameters(False), *m.buffers(False)) for m in modules
        )
        # (those of copies in other precisions are not listed, but such a copy is a new network)
        places = tuple(t.data_ptr() for t in tensors if type(t) in (Tensor, nn.Parameter))
        self.setting = id(inner), arithmetic(), places
        self._given: Any = (None, None, None)
        self._padded: Any = None

    @torch.no_grad()
    def __call__(
        self,
        state: SampleState,
        plan: SamplePlan,
        denoiser: Denoiser,
        *,
        guided: bool = True,
        num_logits: int | None = None,
    ) -> SampleState:
        graphs, network = self.graphs, denoiser.network
        how: dict[str, Any] = dict(guided=guided, num_logits=num_logits)
        if not all(map(_safe, plan.policies)) or network in graphs.off:
            return self.inner(state, plan, denoiser, **how)
        batch, tokens = state.ids.shape
        eighth = max(1, tokens // 8)
        how["num_logits"] = min(tokens, -(-(num_logits or tokens) // eighth) * eighth)
        given = plan, denoiser.context, denoiser.critic_context
        with graphs.lock:
            if any(new is not old for new, old in zip(given, self._given, strict=True)):
                padded = _padded(given, batch)
                shapes = _signature(padded) if padded else None
                self._given, self._padded, self._shapes = given, padded, shapes
            if self._padded is None:
                return self.inner(state, plan, denoiser, **how)
            more = _filled_up(state, batch)
            critic = denoiser.critic
            critic = critic.to_logits if isinstance(critic, SelfCritic) else critic
            stream = _stream(state.ids.device)
            shapes = self.setting, self._shapes, _signature(more), id(critic), stream
            name = how["guided"], how["num_logits"]
            inputs = graphs.kept.get(network, {}).get(shapes)
            replay = None if inputs is None else inputs.graphs.get(name)
            if inputs is None or replay is None:
                again = graphs.seen((shapes, name))
                if again is None:
                    graphs.remember((shapes, name), True)
                if not again:
                    return self.inner(state, plan, denoiser, **how)
                return self._recorded(shapes, name, more, denoiser, critic, how).rows(slice(batch))
            self._load(inputs, more)
            return _copy(replay()).rows(slice(batch))

    def _load(self, inputs: _Inputs, state: SampleState) -> None:
        inputs.used = next(self.graphs._clock)
        for place, value in zip(_tensors(inputs.state), _tensors(state), strict=True):
            place.copy_(value)
        if inputs.given is not self._padded:
            for place, value in zip(_tensors(inputs.fixed), _tensors(self._padded), strict=True):
                place.copy_(value)
            inputs.given = self._padded

    def _recorded(
        self, shapes: Hashable, name: Hashable, state: SampleState, denoiser: Denoiser,
        critic: Any, how: dict[str, Any],
    ) -> SampleState:  # fmt: skip
        """The step itself, and its graph for the next time, if that does the same."""
        graphs, network, device = self.graphs, denoiser.network, state.ids.device
        if not any(graphs.kept.values()):
            graphs.growth = 0  # the last graph's end frees what all of them shared
        kept = graphs.kept.setdefault(network, {})
        if graphs.most is None:
            graphs.most = torch.cuda.get_device_properties(device).total_memory // SHARE
        if shapes not in kept:
            with torch.inference_mode(False):  # else they could not be written to outside of it
                places = _copy(state), _copy(self._padded)
            size = sum(t.numel() * t.element_size() for t in _tensors(places))
            kept[shapes] = _Inputs(*places, critic, size)
        inputs = kept[shapes]
        self._load(inputs, state)
        plan, context, critic_context = inputs.fixed
        contexts = dict(context=context, critic_context=critic_context)
        still = replace(denoiser, **contexts, repeats=None, distinct=None)

        def function() -> SampleState:
            return self.inner(inputs.state, plan, still, **how)

        expected = function()  # also what prepares kernels that are used for the first time
        before, replay = _reserved(device), None
        try:
            with torch.inference_mode(False), torch.no_grad():
                replay = graphs.capture(function, device)
            agrees = _agree(replay(), expected)
            reason = "a replayed step gave other tokens than the step itself"
        except RuntimeError as error:
            agrees, said = False, (str(error).splitlines() or ["?"])[0]
            reason = f"a step cannot be recorded ({said})"
        if replay is None or not agrees:
            graphs.off.add(network)
            del graphs.kept[network]
            warnings.warn(
                f"sampling goes on without CUDA graphs, which is slower: {reason}", stacklevel=6
            )
            return expected
        graphs.growth += _reserved(device) - before
        inputs.graphs[name] = replay
        alone = graphs.growth + inputs.size > graphs.most
        graphs.fits()
        if alone:
            graphs.remember((shapes, name), False)
        return expected


# Rounding up -------------------------------------------------------------------------------------


def rounded(count: int, least: int = 1) -> int:
    """The next of a few sizes: multiples of ``least``, four for each doubling."""
    size = max(least, 1 << max(0, count.bit_length() - 3))
    return -(-count // size) * size


def _padded(given: tuple[SamplePlan, Any, Any], batch: int) -> Any:
    """Plan and contexts at sizes that graphs have; None where they hold what is unknown."""
    plan, *contexts = given
    padded: list[Any] = [plan.lasting(rounded(plan.num_steps, LEAST))]
    for context in contexts:
        if type(context) is Context and context.sees is None:
            length = context.mask.shape[-1]
            context = context.padded(rounded(length, LEAST)) if len(context.mask) else context
        elif context is not None:
            return None
        padded.append(context)
    return tuple(each and _filled_up(each, batch) for each in padded)


def _filled_up(value: Any, batch: int) -> Any:
    """With the last row again, as many times as there are too few."""
    rows = rounded(batch)
    if rows == batch:
        return value
    device = next(_tensors(value)).device
    return value.rows(torch.arange(rows, device=device).clamp(max=batch - 1))


def _safe(policy: Any) -> bool:
    """Whether a policy is ours: a function of one's own may do more than compute."""
    score = SCORES.get(policy) if isinstance(policy, str) else policy
    named = policy in (None, "critic") or (isinstance(policy, str) and policy in ORDERS)
    return named or score in (confidence, margin, entropy)


# Tensors inside of other things ------------------------------------------------------------------


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from _leaves(getattr(value, part.name))
    else:
        yield value


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, Tensor))


def _signature(value: Any) -> Hashable:
    """What two values share that one graph can read."""
    return tuple(
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
        for leaf in _leaves(value)
    )


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(part) for part in value)
    if is_dataclass(value):
        parts = {part.name: _copy(getattr(value, part.name)) for part in fields(value)}
        return replace(value, **parts)  # type: ignore[type-var]
    return value


def _agree(one: SampleState, other: SampleState) -> bool:
    """Whether all but a few of the tokens, and what was thought of them, are the same."""
    near = torch.isclose(one.log_probs, other.log_probs, rtol=1e-2, atol=1e-2, equal_nan=True)
    wrong = (one.ids != other.ids) | ~near
    return float(wrong.float().mean()) <= AGREE


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
