"""How good a tokenizer or a generator is, in figures that can be compared."""

from .drawing import Drawer, Pictures
from .figures import Metric
from .scores import Evaluation, FactJudge, evaluate
from .tokenizer import evaluate_tokenizer
from .truth import Prompt, Truth

__all__ = [
    "Drawer",
    "Evaluation",
    "FactJudge",
    "Metric",
    "Pictures",
    "Prompt",
    "Truth",
    "evaluate",
    "evaluate_tokenizer",
]
