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
from keepkv.core.rope import AXES
from keepkv.core.tokens import VIDEO
from keepkv.engine.cache import Cache
from keepkv.engine.places import telling
from keepkv.engine.versions import CACHE
from keepkv.errors import BudgetError, CacheStateError, KeepKVError, UnsupportedInput
from keepkv.score import Score
from keepkv.video.family import family_of
from keepkv.video.frames import Frames, frames_of
from keepkv.video.moves import compact, forget, mode_of, steps_held
from keepkv.video.policies import method_of

CACHE_FILE, STATE_FILE = "cache.safetensors", "stream.json"


@dataclass(frozen=True)
class Pushed:
    """After a push. steps: time steps seen so far. compressions: so far. entries: slots of a KV head. bytes: of all."""

    steps: int
    compressions: int
    entries: int
    bytes: int


@dataclass
class _Counts:
    """prefix, kept: tokens of text before all frames, and of turns that were kept. vision: slots of a KV head. steps:
    time steps seen. edge: position in time of what comes next. issued: the next that no token has on any axis."""

    prefix: int = 0
    kept: int = 0
    vision: int = 0
    steps: int = 0
    edge: int = 0
    issued: int = 0
    compressions: int = 0
    peak: int = 0


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
        self.model, self.processor = model, processor
        self.family = family_of(model, processor, size)
        self.mode = mode_of(positions, self.family.axes)
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
        self.method = method_of(policy, cap_tokens, recent / target, self.mode != "absolute", made)
        text = model.config.get_text_config(decoder=True)
        self.limit: int = limit or getattr(text, "max_position_embeddings", None) or 1 << 30
        self.asked = dict(
            cap_tokens=cap_tokens, target=target, alpha=alpha, recent=recent, text_reserve=text_reserve, policy=policy,
            positions=positions, limit=limit, ticks=ticks, block=block, size=size, **options,
        )  # fmt: skip
        self.cap, self.target, self.alpha, self.recent = cap_tokens, target, alpha, recent
        self.reserve, self.ticks, self.block = text_reserve, ticks, block
        self.cache = Cache(model, self.method, max(1, int(target * (cap_tokens - text_reserve))))
        self.counts = _Counts()
        self._waiting: list[Tensor] = []
        self._size: tuple[int, int] | None = None
        self._grid: tuple[int, int] | None = None

    # --- what comes in -------------------------------------------------------------------------------------------

    def prefix(self, text: str | Tensor) -> None:
        """Text that comes before all frames and stays: once."""
        if self.counts.edge:
            raise CacheStateError("prefix(…) comes first and once: call reset() for another stream")
        ids = self._ids(text)
        self._check_room(ids.shape[1])
        self._read_text(ids)
        self.counts.prefix = ids.shape[1]

    def push(self, frames: Frames) -> Pushed:
        """Watch any number of raw frames: an array, an iterator, or a file. What is not a whole time step waits."""
        for frame in frames_of(frames):
            self._size = self._size or self.family.look.sized(frame)
            self._waiting.append(self.family.look(frame.to(self._device), self._size))
            if len(self._waiting) == self._block_steps() * self.family.frames:
                self._watch()
        whole = len(self._waiting) // self.family.frames * self.family.frames
        self._watch(whole)
        return self._pushed()

    def flush(self) -> Pushed:
        """Watch frames that wait for their step to be whole: the last one is repeated."""
        if self._waiting:
            self._waiting += [self._waiting[-1]] * (-len(self._waiting) % self.family.frames)
            self._watch()
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
        part of ``text_reserve``; else nothing remembers them. on_token: called with every token as it comes."""
        ids = self._ids(text)
        if max_new_tokens < 1:
            raise KeepKVError(f"max_new_tokens={max_new_tokens}: give at least 1")
        length = ids.shape[1] + max_new_tokens
        if keep and self.counts.kept + length > self.reserve:
            raise BudgetError(
                f"a turn of {length} tokens does not fit text_reserve={self.reserve}, of which {self.counts.kept} are "
                "taken by turns that were kept: ask with keep=False, give a larger reserve, or reset()."
            )
        self._check_room(length)
        self._make_way(self._text_start() + length)
        before = asdict(self.counts)
        if keep:
            answer = self._answer(ids, max_new_tokens, on_token, keep)
            self.counts.kept += ids.shape[1] + len(answer)
        else:
            try:
                with self.cache.transient():
                    answer = self._answer(ids, max_new_tokens, on_token, keep)
            finally:
                self.counts = _Counts(**{**before, "peak": self.counts.peak})
        said = torch.tensor([answer], device=self._device)
        return said if self.processor is None else str(self._tokenizer.decode(answer, skip_special_tokens=True))

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self.counts, self._waiting, self._size, self._grid = _Counts(), [], None, None

    # --- what is held --------------------------------------------------------------------------------------------

    @property
    def entries(self) -> int:
        """Slots that a KV head holds."""
        lengths = [int(x.store.lengths.max()) for x in self.cache.compressible if x.is_initialized]
        return max(lengths, default=0)

    @property
    def peak_entries(self) -> int:
        """The most slots that a KV head has ever held."""
        return self.counts.peak

    @property
    def bytes(self) -> int:
        """Bytes of all that the cache holds."""
        return int(self.cache.report().bytes)

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
        state = {"asked": self.asked, "counts": asdict(self.counts), "size": self._size, "grid": self._grid}
        (folder / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, model: Any, processor: Any = None) -> VideoStream:
        """The stream that ``save`` wrote."""
        state = json.loads((Path(path) / STATE_FILE).read_text(encoding="utf-8"))
        asked: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in state["asked"].items()}
        stream = cls(model, processor=processor, **asked)
        stream.cache = Cache.load(Path(path) / CACHE_FILE, model, stream.method)
        stream.counts = _Counts(**state["counts"])
        stream._size, stream._grid = (None if state[x] is None else tuple(state[x]) for x in ("size", "grid"))
        return stream

    # --- steps ---------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def _room(self) -> int:
        """M: vision slots that may be held."""
        return self.cap - self.counts.prefix - self.reserve

    def _block_steps(self) -> int:
        """Steps of one forward; says what does not fit, once the size of a step is known."""
        if self._grid is None:
            assert self._size is not None
            self._grid = self.family.grid(self.model, self._size)
            self._check_sizes()
        most = max(1, (self._room - int(self.target * self._room)) // (self._grid[0] * self._grid[1]))
        return min(most, self.block or most)

    def _check_sizes(self) -> None:
        assert self._grid is not None
        cells, left = self._grid[0] * self._grid[1], int(self.target * self._room)
        new = int(self.recent / self.target * left / cells + 1e-9) * cells
        share = self.alpha if self.asked["policy"] == "infinipot-v" and self.alpha else 1.0
        least = (left - round((1 - share) * left)) if share < 1 else left
        if new < cells or new > least or self._room - left < cells:
            raise BudgetError(
                f"cap_tokens={self.cap}: {self._room} vision slots may be held, a compression leaves {left} "
                f"(target={self.target}), and a step has {cells}. Of these {new} are recent (recent={self.recent}): "
                f"a step at least, and {least} slots at most (alpha={self.alpha}), and one step must fit beside "
                "what is left. Give a larger cap, or other shares."
            )

    @torch.no_grad()
    def _watch(self, count: int | None = None) -> None:
        """Read the first ``count`` frames that wait, whole steps; None: all of them."""
        count = len(self._waiting) if count is None else count
        if not count:
            return
        each = self._block_steps() * self.family.frames
        assert self._grid is not None
        (rows, columns), counts = self._grid, self.counts
        for start in range(0, count, each):
            part, self._waiting[: min(each, count - start)] = self._waiting[: min(each, count - start)], []
            steps = len(part) // self.family.frames
            size = rows * columns
            if counts.vision + steps * size > self._room:
                self._compress()
            self._make_way(max(counts.edge + steps * self.ticks, counts.issued), self.reserve)
            shape = (1, steps * size)
            ids = torch.full(shape, self.family.token, device=self._device)
            starts = (torch.arange(shape[1], device=self._device) % size == 0)[None]
            pixels = self.family.pixels(torch.stack(part).to(next(self.model.parameters()).dtype))
            del part
            with telling(self.cache, torch.full_like(ids, VIDEO), starts):
                self._forward(ids, self._places(steps, rows, columns), **pixels)
            counts.vision += shape[1]
            counts.steps += steps
            counts.edge += steps * self.ticks if self.family.axes == AXES else shape[1]
            counts.issued = max(counts.issued, counts.edge, counts.prefix + max(rows, columns))

    def _places(self, steps: int, rows: int, columns: int) -> Tensor:
        """Rotary positions (3,1,n) or (1,n) of some steps."""
        counts, device = self.counts, self._device
        if self.family.axes < AXES:
            return counts.edge + torch.arange(steps * rows * columns, device=device)[None]
        t, h, w = (torch.arange(n, device=device) for n in (steps, rows, columns))
        grid = torch.meshgrid(counts.edge + t * self.ticks, counts.prefix + h, counts.prefix + w, indexing="ij")
        return torch.stack(grid).reshape(AXES, 1, -1)

    def _compress(self) -> None:
        counts, left = self.counts, int(self.target * self._room)
        self.cache.compress(budget=counts.prefix + counts.kept + left)
        counts.vision = min(counts.vision, left)
        counts.compressions += 1
        forget(self.cache)

    def _make_way(self, end: int, spare: int = 0) -> None:
        """Positions below ``end`` are about to be given, and ``spare`` more are left to text: move slots together where
        these are beyond the limit."""
        if end + spare > self.limit and self.mode != "absolute":
            edge, counts = compact(self.cache, self.counts.prefix, self.ticks), self.counts
            end -= counts.edge - edge
            counts.edge = counts.issued = edge
            if self._grid is not None and self.family.axes == AXES:
                counts.issued = max(edge, counts.prefix + max(self._grid))
        if end + spare > self.limit:
            raise UnsupportedInput(
                f"the stream has come to rotary position {end}, and with {spare} left to text the limit is {self.limit}"
                + (": give positions='auto', which moves slots together" if self.mode == "absolute" else "")
                + ". A smaller cap, fewer ticks, or limit=… of a model that can do more."
            )

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
        ids: Tensor = taken("VideoStream", "text", text, Tensor).to(self._device)
        if ids.dim() != 2 or ids.shape[0] != 1 or not ids.shape[1]:
            raise KeepKVError(f"ids of shape {tuple(ids.shape)}: give (1,n), one token at least")
        return ids

    def _check_room(self, length: int) -> None:
        held = self.counts.prefix + self.counts.kept + self.counts.vision
        if held + length > self.cap:
            raise BudgetError(
                f"{length} tokens of text do not fit: {held} of cap_tokens={self.cap} are held. Ask for less, or give "
                f"a larger text_reserve ({self.reserve}) or cap."
            )

    def _text_start(self) -> int:
        """Where text stands that comes now: behind all positions that were given."""
        return max(self.counts.edge, self.counts.issued)

    def _read_text(self, ids: Tensor) -> Tensor:
        """Logits (1,V) of what follows ``ids`` (1,n)."""
        start, counts = self._text_start(), self.counts
        at = start + torch.arange(ids.shape[1], device=self._device)[None]
        logits = self._forward(ids, at if self.family.axes < AXES else at.expand(AXES, *at.shape))
        counts.edge = counts.issued = start + ids.shape[1]
        return logits

    def _answer(self, ids: Tensor, most: int, on_token: Callable[[int], None] | None, keep: bool) -> list[int]:
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        stop = {ends} if isinstance(ends, int) else set(ends or ())
        logits, said = self._read_text(ids), []
        while True:
            token = int(logits[0].argmax())
            said.append(token)
            if on_token is not None:
                on_token(token)
            last = token in stop or len(said) == most
            if not last or keep:
                logits = self._read_text(torch.tensor([[token]], device=self._device))
            if last:
                return said

    def _forward(self, ids: Tensor, places: Tensor, **pixels: Tensor) -> Tensor:
        given = {"input_ids": ids, "position_ids": places, "logits_to_keep": 1, "use_cache": True, **pixels}
        logits: Tensor = self.model(**given, **{CACHE: self.cache}).logits[:, -1]
        self.counts.peak = max(self.counts.peak, self.entries)
        return logits

    def _pushed(self) -> Pushed:
        return Pushed(self.counts.steps, self.counts.compressions, self.entries, self.bytes)
