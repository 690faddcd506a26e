"""The former place of ``keepkv.embedded_model``, kept for a version."""

from keepkv.embedded import embedded_model

__all__ = ["embedded_model"]
