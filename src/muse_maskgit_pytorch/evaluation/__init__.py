"""How good a tokenizer is, in figures that can be compared."""

from .tokenizer import Metric, evaluate_tokenizer

__all__ = ["Metric", "evaluate_tokenizer"]
