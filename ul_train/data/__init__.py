"""Training images from any source: prepared once into a memory-mapped set, read by index."""

from ul_runtime.images import Rejected
from ul_train.data.imageset import ImageSet, Splits, epoch_order, sample_ids
from ul_train.data.prepare import open_data

__all__ = ["ImageSet", "Rejected", "Splits", "epoch_order", "open_data", "sample_ids"]
