"""Streams of video under a hard memory cap: frames come forever, questions at any time."""

from keepkv.video.frames import frames_of
from keepkv.video.stream import Pushed, VideoStream

__all__ = ["Pushed", "VideoStream", "frames_of"]
