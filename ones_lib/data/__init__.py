"""Named data sets behind one small interface: embedded, local folders, the Hugging Face hub.

:func:`image_data` gives an :class:`ImageData`, whose splits are indexed by *keys* [batch, 2] of (index, seed): the seed
decides the random augmentation of that one drawing of that image, -1 asks for none. :func:`training_keys` makes them, so
the whole stream of training batches is a function of (seed, step): it can go on from any step, with any number of workers.
"""

from ones_lib.data.images import ImageData, image_data
from ones_lib.data.keys import Share, evaluation_keys, training_keys

__all__ = ["ImageData", "Share", "evaluation_keys", "image_data", "training_keys"]
