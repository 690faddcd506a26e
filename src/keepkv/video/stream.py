"""``keepkv.VideoStream``: one object that owns a model's cache, its positions and what is known of its frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepkv.core.options import taken
from keepkv.engine.cache import Cache
from keepkv.engine.receipt import held_bytes
from keepkv.errors import BudgetError, CacheStateError, KeepKVError
from keepkv.score import Score
from keepkv.video.family import family_of
from keepkv.video.frames import Frames, frames_of
from keepkv.video.moves import mode_of, steps_held
from keepkv.video.policies import method_of
from keepkv.video.reader import Counts, Reader

CACHE_FILE, STATE_FILE = "cache.safetensors", "stream.json"


@dataclass(frozen=True)
class Pushed:
    """After a push. steps: time steps seen so far. compressions: so far. entries: slots of a KV head. bytes: of all."""

    steps: int
    compressions: int
    entries: int
    bytes: int


class VideoStream:
    """A stream of video that a model watches, under a hard cap; frames come forever, questions at any time.

    cap_tokens: slots of a KV head that no layer ever exceeds: prefix, vision, questions and answers. processor: what
        turns text into ids (a tokenizer will do); None: text is given as ids. What of vision may be held is the cap
        less the prefix and ``text_reserve``; a compression, before a step that would pass it, leaves ``target`` of it.
    policy: what survives: "infinipot-v" (``score.vision.infinipot``; alpha: its share for what is new in time), "tar",
        "van", "uniform" or "sliding" frames, "random", the name of another score, or a score.
    recent: share of the vision that may be held which the newest steps take; they stay whole.
    positions: "absolute": as they were given, until the model's limit; "time_compact" (M-RoPE) and "rerank" (other
        models): before that limit, slots move together. "auto": one of these. limit: other than the model's own.
    ticks: positions in time from one step to the next. block: steps of one forward at most; None: as many as fit.
    size: (height, width) that frames are resized to; None: that of the first, to the nearest that the model takes.
    Other options are those of the score: alignment, space, pool, thresholds.

    Pixels and features of a block are freed before the next one. Text and frames leave the model's own state alone, so
    streams on one model do not meet. For inference, one row.
    """

    def __init__(
        self,
        model: Any,
        cap_tokens: int,
        processor: Any = None,
        *,
        target: float = 0.75,
        alpha: float = 0.5,
        recent: float = 0.125,
        text_reserve: int = 256,
        policy: str | Score = "infinipot-v",
        positions: str = "auto",
        limit: int | None = None,
        ticks: int = 1,
        block: int | None = None,
        size: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        self.processor = processor
        family = family_of(model, processor, size)
        mode = mode_of(positions, family.axes)
        if not 0 < target < 1 or not 0 <= alpha <= 1 or not 0 < recent < target:
            raise KeepKVError(
                f"target={target}, alpha={alpha}, recent={recent}: give shares, recent below target, target below 1"
            )
        if min(ticks, text_reserve + 1, block or 1) < 1 or cap_tokens <= text_reserve:
            raise KeepKVError(
                f"cap_tokens={cap_tokens}, text_reserve={text_reserve}, ticks={ticks}, block={block}: give a cap above "
                "the reserve, and whole numbers from 1"
            )
        made = {"alpha": alpha, **options} if policy == "infinipot-v" else options
        self.method = method_of(policy, cap_tokens, recent / target, mode != "absolute", made)
        text = model.config.get_text_config(decoder=True)
        most = limit or getattr(text, "max_position_embeddings", None) or 1 << 30
        self.asked = dict(
            cap_tokens=cap_tokens, target=target, alpha=alpha, recent=recent, text_reserve=text_reserve, policy=policy,
            positions=positions, limit=limit, ticks=ticks, block=block, size=size, **options,
        )  # fmt: skip
        self.cap, self.target, self.alpha, self.recent = cap_tokens, target, alpha, recent
        self.reserve, self.block = text_reserve, block
        cache = Cache(model, self.method, max(1, int(target * (cap_tokens - text_reserve))))
        self.reader = Reader(model, family, cache, most, ticks, mode != "absolute")
        self._waiting: list[Tensor] = []
        self._size: tuple[int, int] | None = None

    # --- what comes in -------------------------------------------------------------------------------------------

    def prefix(self, text: str | Tensor) -> None:
        """Text that comes before all frames and stays: once."""
        if self.counts.edge:
            raise CacheStateError("prefix(…) comes first and once: call reset() for another stream")
        ids = self._ids(text)
        self._check_room(ids.shape[1])
        self.reader.text(ids)
        self.counts.prefix = ids.shape[1]

    def push(self, frames: Frames) -> Pushed:
        """Watch any number of raw frames: an array, an iterator, or a file. What is not a whole time step waits."""
        look, each = self.reader.family.look, self.reader.family.frames
        for frame in frames_of(frames):
            self._size = self._size or look.sized(frame)
            self._waiting.append(look(frame.to(self.reader.device), self._size))
            if len(self._waiting) == self._block_steps() * each:
                self._watch(len(self._waiting))
        self._watch(len(self._waiting) // each * each)
        return self._pushed()

    def flush(self) -> Pushed:
        """Watch frames that wait for their step to be whole: the last one is repeated."""
        if self._waiting:
            self._waiting += [self._waiting[-1]] * (-len(self._waiting) % self.reader.family.frames)
            self._watch(len(self._waiting))
        return self._pushed()

    @torch.no_grad()
    def ask(
        self,
        text: str | Tensor,
        max_new_tokens: int = 32,
        keep: bool = False,
        on_token: Callable[[int], None] | None = None,
    ) -> str | Tensor:
        """The greedy answer, as text or as ids (1,n) where there is no processor. keep: question and answer stay, as
        part of ``text_reserve``, for which the oldest turns that were kept go; else nothing remembers them. on_token:
        called with every token as it comes."""
        ids = self._ids(text)
        if max_new_tokens < 1:
            raise KeepKVError(f"max_new_tokens={max_new_tokens}: give at least 1")
        length = ids.shape[1] + max_new_tokens
        if keep and length > self.reserve:
            raise BudgetError(
                f"a turn of {length} tokens does not fit text_reserve={self.reserve}: ask with keep=False, or give a "
                "larger reserve."
            )
        while keep and self.counts.kept + length > self.reserve:
            self.reader.drop_turn()
        self._check_room(length)
        self.reader.make_way(self.reader.text_start + length)
        asked = self.reader.keep if keep else self.reader.passing
        answer = asked(ids, max_new_tokens, on_token)
        said = torch.tensor([answer], device=self.reader.device)
        return said if self.processor is None else str(self._tokenizer.decode(answer, skip_special_tokens=True))

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self.reader.counts, self.reader.grid = Counts(), None
        self._waiting, self._size = [], None

    # --- what is held --------------------------------------------------------------------------------------------

    @property
    def cache(self) -> Cache:
        """The cache; it is the stream's own."""
        return self.reader.cache

    @property
    def counts(self) -> Counts:
        """How far the stream has come."""
        return self.reader.counts

    @property
    def entries(self) -> int:
        """Slots that a KV head holds."""
        return self.reader.entries

    @property
    def peak_entries(self) -> int:
        """The most slots that a KV head has ever held."""
        return self.counts.peak

    @property
    def bytes(self) -> int:
        """Bytes of all that the cache holds."""
        return held_bytes(self.cache.layers, self.cache.shared)

    def timeline(self) -> list[dict[int, int]]:
        """For each layer, how many slots of its heads together each time step still has."""
        known = self.cache.shared.positions.known
        return [
            steps_held(known, x.store.view().positions) if x.is_initialized else {} for x in self.cache.compressible
        ]

    def save(self, path: str | Path) -> None:
        """Write the stream to a folder; ``load`` goes on with it."""
        if self._waiting:
            raise CacheStateError("a frame waits for its step to be whole: call flush() before save()")
        if not isinstance(self.asked["policy"], str):
            raise CacheStateError("a policy without a name cannot be written: register it with register_score")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.cache.save(folder / CACHE_FILE)
        state = {"asked": self.asked, "counts": asdict(self.counts), "size": self._size, "grid": self.reader.grid}
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, model: Any, processor: Any = None) -> VideoStream:
        """The stream that ``save`` wrote."""
        state = json.loads((Path(path) / STATE_FILE).read_text(encoding="utf-8"))
        asked: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in state["asked"].items()}
        stream = cls(model, processor=processor, **asked)
        stream.reader.cache = Cache.load(Path(path) / CACHE_FILE, model, stream.method)
        stream.reader.counts = Counts(**state["counts"])
        stream._size, stream.reader.grid = (None if state[x] is None else tuple(state[x]) for x in ("size", "grid"))
        return stream

    # --- steps ---------------------------------------------------------------------------------------------------

    @property
    def _room(self) -> int:
        """M: vision slots that may be held."""
        return self.cap - self.counts.prefix - self.reserve

    @property
    def _left(self) -> int:
        """C: vision slots that a compression leaves."""
        return int(self.target * self._room)

    def _block_steps(self) -> int:
        """Steps of one forward at most; says what does not fit, once the size of a step is known."""
        if self.reader.grid is None:
            assert self._size is not None
            self.reader.grid = self.reader.family.grid(self.reader.model, self._size)
            self._check_sizes()
        most = max(1, (self._room - self._left) // self.reader.cells)
        return min(most, self.block or most)

    def _check_sizes(self) -> None:
        cells, left = self.reader.cells, self._left
        new = int(self.recent / self.target * left / cells + 1e-9) * cells
        share = self.alpha if self.asked["policy"] == "infinipot-v" and self.alpha else 1.0
        most = left - round((1 - share) * left)
        if new < cells or new > most or self._room - left < cells:
            self.reader.grid = self._size = None
            self._waiting = []
            raise BudgetError(
                f"cap_tokens={self.cap}: {self._room} vision slots may be held, a compression leaves {left} "
                f"(target={self.target}), and a step has {cells}. Of these {new} are recent (recent={self.recent}): a "
                f"step at least, and {most} slots at most (alpha={self.alpha}); and one step must fit beside what is "
                "left. Give a larger cap, or other shares."
            )

    def _watch(self, count: int) -> None:
        """Read the first ``count`` frames that wait, whole steps."""
        while count:
            part = min(count, self._block_steps() * self.reader.family.frames)
            steps = part // self.reader.family.frames
            if self.counts.vision + steps * self.reader.cells > self._room:
                self.reader.compress(self._left)
            end = self.counts.edge + self.reader.advance(steps)
            self.reader.make_way(max(end, self.counts.issued), self.reserve - self.counts.kept)
            frames, self._waiting[:part] = torch.stack(self._waiting[:part]), []
            self.reader.steps(frames)
            count -= part

    # --- text ----------------------------------------------------------------------------------------------------

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def _ids(self, text: str | Tensor) -> Tensor:
        if isinstance(text, str):
            if self.processor is None:
                raise KeepKVError(
                    "text is a str, and there is no processor: VideoStream(…, processor=tokenizer), or ids"
                )
            text = torch.tensor([self._tokenizer(text, add_special_tokens=False)["input_ids"]])
        ids: Tensor = taken("VideoStream", "text", text, Tensor).to(self.reader.device)
        if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise KeepKVError(f"ids of shape {tuple(ids.shape)}: give (1,n), one token at least")
        return ids

    def _check_room(self, length: int) -> None:
        held = self.counts.held
        if held + length > self.cap:
            raise BudgetError(
                f"{length} tokens of text do not fit: {held} of cap_tokens={self.cap} are held. Ask for less, or give "
                f"a larger text_reserve ({self.reserve}) or cap."
            )

    def _pushed(self) -> Pushed:
        return Pushed(self.counts.steps, self.counts.compressions, self.entries, self.bytes)
