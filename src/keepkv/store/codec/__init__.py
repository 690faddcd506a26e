"""Codecs, one number format per file; importing this package registers them all."""

from keepkv.store.codec import fp8, hadamard, int8, lloyd_max, none, per_channel, per_token, sals, tada  # noqa: F401
from keepkv.store.codec.base import CODECS, Codec, register_codec
from keepkv.store.codec.none import Plain

__all__ = ["CODECS", "Codec", "Plain", "register_codec"]
