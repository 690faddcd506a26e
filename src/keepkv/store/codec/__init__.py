"""Codecs, one number format per file; importing this package registers them all."""

from keepkv.store.codec import int8, none
from keepkv.store.codec.base import CODECS, Codec, register_codec
from keepkv.store.codec.none import Plain

__all__ = ["CODECS", "Codec", "Plain", "int8", "none", "register_codec"]
