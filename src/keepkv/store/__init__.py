"""Stores: a layout, one per file, times a codec; importing this package registers them all."""

from keepkv.store import dense, ragged, static  # noqa: F401
from keepkv.store.base import STORES, Held, SlotBytes, Store, choose, register_store
from keepkv.store.canary import guarded
from keepkv.store.codec import AUTO, CODECS, Codec, register_codec, settled

__all__ = [
    "AUTO", "CODECS", "STORES", "Codec", "Held", "SlotBytes", "Store", "choose", "guarded", "register_codec",
    "register_store", "settled",
]  # fmt: skip
