"""The sampler: what it asks of a model, options, plan, policies, token choice, step and loop."""

from .choose import choose_tokens
from .contract import Context, Denoiser, Network
from .loop import Callback, SampleState, Sampling, Step, sample_tokens, step
from .options import (
    ROW_WISE,
    GuidanceSchedule,
    SampleOptions,
    known_fields,
    per_row,
    row_seeds,
    upgraded,
)
from .plan import SamplePlan, make_plan, masked_counts, stream_seed
from .policies import ORDERS, SCORES, Policy

__all__ = [
    "ORDERS",
    "ROW_WISE",
    "SCORES",
    "Callback",
    "Context",
    "Denoiser",
    "GuidanceSchedule",
    "Network",
    "Policy",
    "SampleOptions",
    "SamplePlan",
    "SampleState",
    "Sampling",
    "Step",
    "choose_tokens",
    "known_fields",
    "make_plan",
    "masked_counts",
    "per_row",
    "row_seeds",
    "sample_tokens",
    "step",
    "stream_seed",
    "upgraded",
]
