"""Models: WideNet for images (timm) and text (transformers), causal models of transformers, upcycling.

Imports the core, nothing else of the library.
"""

from ones_lib.models import images, text  # noqa: F401  registers with timm and transformers
from ones_lib.models.upcycling import upcycle

__all__ = ["upcycle"]
