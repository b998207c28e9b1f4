"""Where training images and their captions come from."""

from .dataset import ImageDataset, split
from .folder import Folder, ImageFolder
from .source import Item, Source

__all__ = ["Folder", "ImageDataset", "ImageFolder", "Item", "Source", "split"]
