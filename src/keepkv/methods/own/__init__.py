"""Ours: KeepKV's merging with votes, and the selections that followed it."""

from keepkv.methods.own import keepkv, keepkv2, keepkv3

__all__ = ["keepkv", "keepkv2", "keepkv3"]
