"""``keepkv.fit``: will it fit, and what to set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from keepkv.core.budget import Budget
from keepkv.core.calibration import Calibration, Given, loaded
from keepkv.core.options import Size, keywords, taken
from keepkv.engine.state import Settings
from keepkv.errors import KeepKVError, UnsupportedModel
from keepkv.methods import Method, make_method
from keepkv.methods.presets import DEFAULT
from keepkv.plan.estimate import Choice, Compressed, Full
from keepkv.plan.network import Network
from keepkv.plan.result import MOST_TOKENS, TIGHT, Case, Fit
from keepkv.plan.sample import sees_more
from keepkv.plan.source import read_config
from keepkv.plan.units import own_memory, read_bytes, read_tokens, size
from keepkv.store import CODECS, Held, choose, settled

CHUNKS = 8192, 4096, 2048, 1024, 512  # of these the largest that fits, where none is given
MOST_ROWS = 1 << 16
TRIES = 12  # after which a search goes by halves
SHARES = 0.75, 0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01  # smaller budgets to look at
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fit(
    model: Any,
    context: int | str,
    *,
    budget: Budget | float | int | str = 0.2,
    method: str | Method = DEFAULT,
    batch: int = 1,
    memory: int | str | None = None,
    chunk: int | str | None = None,
    store: str | None = None,
    codec: str = "none",
    store_options: dict[str, Any] | None = None,
    codec_options: dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    weights: int | str | None = None,
    device: str | None = None,
    calibration: Given = None,
    **options: Any,
) -> Fit:
    """Whether ``context`` tokens fit a memory, with the full cache and compressed, and what to set; no weight is read.

    model: a folder with config.json, a name on the Hub, a configuration or a model of transformers. context: tokens of
    a row, such as 131072 or "128k". budget, method, store, codec, their options, calibration: as ``keepkv.Cache`` takes
    them; the last is compared with the configuration, and its tensors say how large a slot is.
    batch: rows. memory: bytes such as "24GiB"; None: the first GPU's, or this machine's. chunk: tokens of the prompt
    that are read at once where it is read in chunks; None: 8,192, or fewer where these do not fit. dtype: of weights
    and cache; None: the configuration's. weights: their bytes where they are quantised, such as "5GiB".
    device: "cuda" or "cpu", on which attention takes other memory; None: a GPU unless ``memory`` is this machine's RAM.

    Peaks are of tensors. What is beside them, a few per cent for the allocator and half a GiB for CUDA, is not counted.
    Raises ``KeepKVError`` where something cannot be read, ``UnsupportedModel`` where a model cannot be run without its
    weights.
    """
    config, tokens, rows = read_config(model), read_tokens(context), taken("fit", "batch", batch, Size)
    known = loaded(calibration)
    asked, chosen = Budget.of(budget), make_method(method, options, [one.kind for one in known])
    if chosen.prompt:
        raise KeepKVError(
            f"method {chosen.name!r} keeps the prompt, which takes what it takes in a plain cache, and what a prompt "
            "takes is what is said here. Ask for the method 'full', or with prompt=False"
        )
    if chosen.when.cap is not None:
        raise KeepKVError(
            f"When(cap={chosen.when.cap}) bounds the cache whatever is read: what it takes is not computed here. Ask "
            "for that number of slots as the budget, without a cap"
        )
    settings = Settings(chosen, asked)
    layout, codec = choose(store or chosen.store, codec, chosen.allocate.ragged)
    codec, codec_options = settled(codec, keywords("fit", "codec_options", codec_options), asked)
    held = Held(settings.stats, chosen.reduce.merges, CODECS.build(codec, **codec_options), settings.room)
    choice = Choice(settings, layout, keywords("fit", "store_options", store_options), held, tuple(known))
    room = (read_bytes(memory), "as given") if memory is not None else own_memory()
    network = Network(config, _dtype(dtype, config), _on_cpu(device, memory))
    full: Full = Full(network)
    ours, refused = None, None
    try:
        ours = Compressed(network, config, choice, tokens)
    except UnsupportedModel as error:
        refused = str(error)
    heavy = network.weights if weights is None else read_bytes(weights, "weights")
    look = _Look(heavy, None if room is None else room[0], tokens, rows)
    piece = min(tokens, read_tokens(chunk, "chunk")) if chunk is not None else look.chunk(ours or full)
    case = None if ours is None else look.case(ours, piece)
    found = Fit(
        model=type(network.model).__name__, dtype=str(network.dtype)[6:], weights=heavy, method=chosen.name,
        budget=_shown(asked), store=layout, codec=codec, context=tokens, batch=rows, chunk=piece,
        full=look.case(full, piece), compressed=case, refused=refused, memory=None if room is None else room[0],
        where="" if room is None else room[1], smaller=None, notes=(), python="", command="",
    )  # fmt: skip
    if ours is not None and asked.share is not None and not found.fits and heavy < (found.memory or 0):
        found = replace(found, smaller=look.smaller(ours, piece))
    found = replace(found, notes=tuple(_notes(found, network, ours, config, weights)))
    python, command = _settings(found, model, {**options, **_files(calibration)}, store, codec_options)
    return replace(found, python=python, command=command)


class _Look:
    """Looks for what fits. weights, memory: bytes; the memory may not be known. context, batch: what was asked."""

    def __init__(self, weights: int, memory: int | None, context: int, batch: int) -> None:
        self.weights, self.memory, self.context, self.batch = weights, memory, context, batch

    def chunk(self, cache: Full) -> int:
        """The largest chunk that fits; where none does, or it is not known, the largest there is."""
        for chunk in CHUNKS if self.memory is not None else ():
            if self._fits(cache, self.context, self.batch, chunk):
                return min(chunk, self.context)
        return min(CHUNKS[0], self.context)

    def case(self, cache: Full, chunk: int) -> Case:
        """What there is to say of ``cache``."""
        held = cache.held(self.context, self.batch)
        peak, chunked = (self.weights + cache.peak(self.context, self.batch, x) for x in (None, chunk))
        if self.memory is None:
            return Case(held, peak, chunked)
        longest = _most(lambda n: self._left(cache, n, self.batch, None), self.context, MOST_TOKENS)
        # Whole chunks: a prompt between them takes as much at its peak as the next one, and each look takes seconds.
        whole = _most(
            lambda n: self._left(cache, n * chunk, self.batch, chunk),
            max(1, self.context // chunk),
            MOST_TOKENS // chunk,
        )
        in_chunks = whole * chunk
        rows = _most(lambda n: self._left(cache, self.context, n, chunk), self.batch, MOST_ROWS)
        return Case(held, peak, chunked, longest, in_chunks, rows)

    def smaller(self, cache: Compressed, chunk: int) -> float | None:
        """The largest share below the one that was asked at which the context fits."""
        asked = cache.choice.settings.budget.share
        for share in SHARES:
            if asked is None or share >= asked:
                continue
            if self._fits(cache.at(Budget(share=share)), self.context, self.batch, chunk):
                return share
        return None

    def _fits(self, cache: Full, context: int, batch: int, chunk: int | None) -> bool:
        return self._left(cache, context, batch, chunk) >= 0

    def _left(self, cache: Full, context: int, batch: int, chunk: int | None) -> int:
        assert self.memory is not None
        return self.memory - self.weights - cache.peak(context, batch, chunk)


def _most(left: Callable[[int], int], start: int, cap: int) -> int:
    """The largest number up to ``cap`` of which some memory is ``left``, to one per cent, 0 where there is none.

    What is left falls about evenly with the number, so that the line through two of them says where to look.
    """
    known: dict[int, int] = {}
    guess = min(start, cap)
    while True:
        known[guess] = left(guess)
        good = sorted(n for n, rest in known.items() if rest >= 0)
        bad = sorted(n for n, rest in known.items() if rest < 0)
        low, high = good[-1] if good else 0, bad[0] if bad else cap + 1
        if high - low <= max(1, low // 100):
            return low
        ends = [low, high] if good and bad else good[-2:] or bad[:2]
        if len(known) > TRIES and bad:
            guess = (low + high) // 2
        elif len(ends) == 1:
            guess = 2 * low or high // 2
        else:
            one, two = (known[n] for n in ends)
            zero = ends[0] + (ends[1] - ends[0]) * one // (one - two) if one != two else cap
            guess = zero - zero // 400 if zero - zero // 400 > low else low + max(1, low // 100)
        guess = min(max(guess, low + 1), high - 1)


def _on_cpu(device: str | None, memory: int | str | None) -> bool:
    if device is None:
        return memory is None and not torch.cuda.is_available()
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise KeepKVError(f"device={device!r}: expected cpu or cuda")
    return device == "cpu"


def _dtype(given: str | torch.dtype | None, config: PreTrainedConfig) -> torch.dtype:
    """That which is ``given``, or the configuration's; bfloat16 where neither says."""
    if isinstance(given, str):
        if given not in DTYPES:
            raise KeepKVError(f"dtype={given!r}: expected one of {', '.join(DTYPES)}")
        return DTYPES[given]
    found = given or getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _shown(budget: Budget) -> str:
    """A budget as it is typed."""
    return size(budget.bytes) if budget.bytes is not None else str(budget.value)


def _notes(
    found: Fit, network: Network, ours: Compressed | None, config: PreTrainedConfig, weights: int | str | None
) -> list[str]:
    notes = [] if ours is None else list(ours.notes)
    reach = network.positions
    if reach is not None and found.context > reach:
        notes.append(
            f"the model was made for {reach:,} tokens (max_position_embeddings): beyond that its answers are not to be "
            "trusted, however much memory there is."
        )
    if getattr(config, "quantization_config", None) is not None and weights is None:
        notes.append(
            f"the configuration says that the weights are quantised, and here they count in {found.dtype}: give what "
            "they take with weights=."
        )
    if ours is not None:
        method = ours.method
        if sees_more(method):
            notes.append(f"method {method.name!r} needs more than the text: what its compression takes is not counted.")
        if method.allocate.ragged:
            notes.append("heads keep different numbers of slots: the cache is the most that it can take.")
        if ours.static is not None and ours.slots(next(iter(ours.ours)), found.context, found.batch) > ours.static:
            notes.append(
                f"the static store holds {ours.static:,} slots per head, fewer than are kept: give it capacity."
            )
    case = found.compressed or found.full
    peak = case.peak if found.way in ("full", "compressed") else case.chunked_peak
    if found.way is not None and found.memory is not None and peak > found.memory * (1 - TIGHT):
        notes.append("it is tight: less than 5 % are left, and allocators lose about as much.")
    return notes


def _files(calibration: Given) -> dict[str, Any]:
    """The option that sets ``calibration``, where there is any."""
    some = [calibration] if isinstance(calibration, (str, Path, Calibration)) else calibration or ()
    files = [f"{x.kind}.safetensors" if isinstance(x, Calibration) else str(x) for x in some]
    return {"calibration": files if len(files) > 1 else files[0]} if files else {}


def _settings(
    found: Fit, model: Any, options: dict[str, Any], given: str | None, codec_options: dict[str, Any]
) -> tuple[str, str]:
    """What to set, in Python and as a command."""
    name = str(model).removesuffix("/config.json") if isinstance(model, (str, Path)) else "MODEL"
    chunk = found.chunk if found.way in (None, "compressed in chunks", "full in chunks") else None
    feed = "model.generate(**inputs, {}max_new_tokens=256)"
    chunked = f"prefill_chunk_size={chunk}, " if chunk is not None and chunk < found.context else ""
    if found.compressed is None or found.way in ("full", "full in chunks"):
        own = "cache=DynamicCache(config=model.config), " if chunked else ""
        lines = [*(["from transformers import DynamicCache"] if chunked else []), feed.format(own + chunked)]
        return "\n".join(lines), ""
    budget = f"{found.smaller:g}" if found.smaller is not None else found.budget.replace(" ", "")
    written = budget if budget.replace(".", "").isdigit() else repr(budget)
    more = "".join(f", {key}={value!r}" for key, value in options.items())
    more += f", store={given!r}" if given is not None else ""
    more += f", codec={found.codec!r}" if found.codec != "none" else ""
    more += f", codec_options={codec_options!r}" if codec_options else ""
    lines = [
        f"cache = keepkv.Cache(model, method={found.method!r}, budget={written}{more})",
        feed.format(f"cache=cache, {chunked}"),
    ]
    words = ["keepkv generate", "--model", name, "--method", found.method, "--budget", budget]
    words += [f"--option {key}={value}" for key, value in options.items()]
    words += [f"--option store={given}"] if given is not None else []
    words += [f"--codec {found.codec}"] if found.codec != "none" else []
    words += [f"--codec-option {key}={value}" for key, value in codec_options.items()]
    words += ["--chunk", str(chunk)] if chunked else []
    several = isinstance(options.get("calibration"), list)  # the command takes one
    return "\n".join(lines), "" if several else " ".join([*words, "--prompt-file FILE"])
