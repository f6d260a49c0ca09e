"""Data in: a folder of images, arrays in a file, or whatever a loader gives; checked once, before any long work.

An image is decoded when it is asked for, a ``.npy`` is memory-mapped, a torch Dataset (alone or behind a DataLoader) is
asked sample by sample; only batches from another iterable are kept in memory.
"""

from deploykit.sources.checks import check_labels, check_magnitudes
from deploykit.sources.images import load_preprocess, preprocess_image
from deploykit.sources.load import from_python, load_data
from deploykit.sources.synthetic import data_of, is_made_up

__all__ = [
    "check_labels",
    "check_magnitudes",
    "data_of",
    "from_python",
    "is_made_up",
    "load_data",
    "load_preprocess",
    "preprocess_image",
]
