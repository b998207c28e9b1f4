"""Where training images and their captions come from."""

from .folder import ImageFolder, split

__all__ = ["ImageFolder", "split"]
