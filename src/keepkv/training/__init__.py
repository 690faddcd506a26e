"""Training a model for its compressed cache: what a cache did is recorded, and replayed with gradients."""

from keepkv.training.feed import feed
from keepkv.training.record import NEVER, Record, joined
from keepkv.training.recorder import Recorder, record
from keepkv.training.replay import replay, replaying

__all__ = ["NEVER", "Record", "Recorder", "feed", "joined", "record", "replay", "replaying"]
