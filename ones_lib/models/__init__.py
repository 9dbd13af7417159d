"""Models: WideNet for images (timm) and text (transformers), causal models of transformers, upcycling.

Imports the core, nothing else of ones_lib. Importing it registers the models with timm and transformers.
"""

from ones_lib.models import images, text  # noqa: F401  registers the models
from ones_lib.models.upcycling import upcycle

__all__ = ["upcycle"]
