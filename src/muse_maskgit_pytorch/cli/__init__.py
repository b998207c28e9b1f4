"""The `muse` command: `main` dispatches, `options` and `parser` read, the rest does it.

What stands in `main`, `options`, `declared`, `parser` and `recipe` imports no torch.
"""
