"""Codecs, one number format per file; importing this package registers them all."""

from keepkv.store.codec import (  # noqa: F401
    fp8,
    hadamard,
    int8,
    lloyd_max,
    none,
    oscar,
    per_channel,
    per_token,
    sals,
    tada,
    think,
)
from keepkv.store.codec.auto import AUTO, settled
from keepkv.store.codec.base import CODECS, Codec, register_codec
from keepkv.store.codec.none import Plain

__all__ = ["AUTO", "CODECS", "Codec", "Plain", "register_codec", "settled"]
