"""Editing: inpaint, outpaint, vary, free; and the masks that say what to repaint."""

from .edits import free, inpaint, outpaint, vary
from .pixels import LARGEST, Mask, Picture, box, composite, spread, transparent, white

__all__ = [
    "LARGEST",
    "Mask",
    "Picture",
    "box",
    "composite",
    "free",
    "inpaint",
    "outpaint",
    "spread",
    "transparent",
    "vary",
    "white",
]
