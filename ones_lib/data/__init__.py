"""Data sets: images and text, made here, read from local files, or from the Hugging Face hub.

Imports nothing else of ones_lib.
"""

from ones_lib.data.images import ImageData, image_data
from ones_lib.data.keys import Share, evaluation_keys, training_keys

__all__ = ["ImageData", "Share", "evaluation_keys", "image_data", "training_keys"]
