"""What is held: receipts are those of the memory, at every moment and after every interrupt."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
import zoo
from matrix import METHODS, SMALL, STORE_ARCHITECTURES, cache, compresses, sampled, store_variants
from running import batch, row

import keepkv
from keepkv.engine.layer import Layer
from keepkv.engine.versions import CACHE
from keepkv.errors import CacheStateError
from keepkv.store import Held

BUDGET = 14
Method = tuple[str, dict[str, Any]]


def storages(mine: keepkv.Cache) -> int:
    """Bytes of every storage that the garbage collector reaches from what the layers hold of tokens."""
    todo: list[Any] = []
    for layer in mine.layers:
        todo += [layer.store, layer.score_state, layer.latest] if isinstance(layer, Layer) else [layer]
    seen, found = set(), {}
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, type | ModuleType | FunctionType | torch.nn.Module | Held):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        else:
            todo += gc.get_referents(x)
    return sum(found.values())


def feed(arch: str, mine: keepkv.Cache, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        zoo.model(arch)(**inputs, **{CACHE: mine})


def more(mine: keepkv.Cache, tokens: int) -> dict[str, torch.Tensor]:
    """The next ``tokens`` of each row."""
    ids = torch.randint(3, zoo.VOCAB, (len(mine.seen), tokens), generator=torch.Generator().manual_seed(tokens))
    return {"input_ids": ids, "attention_mask": mine.attention_mask(tokens)}


def moments(arch: str, mine: keepkv.Cache) -> Iterator[tuple[str, keepkv.Cache]]:
    """Everything that can happen to a cache, and each cache that has come of it."""
    yield "new", mine
    feed(arch, mine, batch())
    yield "a prompt", mine
    yield "a copy", mine.copy()
    for _ in range(3):
        feed(arch, mine, more(mine, 1))
        yield "a token", mine
    yield "a copy while decoding", mine.copy()
    feed(arch, mine, more(mine, 20))
    yield "a second prompt", mine
    mine.compress()
    yield "compressed", mine
    for _ in range(2):
        feed(arch, mine, more(mine, 1))
    yield "tokens of the second turn", mine
    hybrid = len(mine.compressible) < len(mine.layers)
    if not hybrid:  # sliding layers cannot be cropped
        mine.crop(-1)
        yield "cropped", mine
    if not (hybrid and mine.layout == "static"):  # static sliding layers hold no rows apart
        part = mine.split([1])
        yield "split", mine
        yield "the part split off", part
        mine.join(part)
        yield "joined", mine
        yield "the cache that joined", part
        feed(arch, mine, more(mine, 1))
        yield "a token of the joined", mine
    mine.reset()
    yield "reset", mine


@pytest.mark.parametrize(("arch", "method"), sampled(4, STORE_ARCHITECTURES, [*METHODS, *store_variants()]))
def test_receipt_is_what_is_allocated(arch: str, method: Method) -> None:
    """Without counting what a store holds beside its names: 3,264,048 bytes of a static store, then 14,328 in its
    second turn, of the same buffers."""
    if arch != "llama" and method[0] not in ("snapkv", "keepkv", "adakv"):
        pytest.skip("what a method holds does not depend on the model")
    when = {"when": keepkv.When(every=2)} if compresses(method) else {}
    for moment, one in moments(arch, cache(arch, method, BUDGET, **when)):
        assert one.report().bytes == storages(one), moment


# --- interrupts -------------------------------------------------------------------------------------------------------

STEPS = ("_compress_together", "_reduce", "count", "_add", "successor", "load_kept", "load", "_write", "set")


def interrupted(run: Callable[[], Any], at: int) -> bool:
    """Whether ``run`` was interrupted at line ``at`` of those that it executes in keepkv's functions ``STEPS``."""
    left = at

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_name not in STEPS or "keepkv" not in frame.f_code.co_filename:
            return None
        if event == "line":
            if left == 0:
                left = -1
                raise KeyboardInterrupt
            left -= 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


KINDS = [("dense", "none"), ("dense", "int8"), ("ragged", "none"), ("static", "none")]


@pytest.mark.parametrize("name", ["snapkv", "keepkv"])
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_an_interrupted_compression_leaves_a_true_receipt(kind: tuple[str, str], name: str) -> None:
    """Counted before it was stored: 460 slots, merged and dropped for 366 tokens. The next forward answers."""
    model = zoo.model("llama")
    more_options = {"store_options": {"capacity": 96}} if kind[0] == "static" else {}
    when = keepkv.When(prefill="deferred")
    mine = keepkv.Cache(model, name, BUDGET, store=kind[0], codec=kind[1], when=when, **SMALL, **more_options)
    inputs = row(batch(), 0)
    feed("llama", mine, inputs)
    if kind[0] == "static":  # as it is while decoding
        mine = mine.copy(when=keepkv.When(prefill=None, every=2))
        feed("llama", mine, more(mine, 1))
    at, refused, tokens, heads = 0, 0, int(mine.seen[0]), mine.report().kept[0][0]
    while at < 130 and interrupted((one := mine.copy()).compress, at):  # into the second layer of three
        at += 1
        try:
            receipt = one.report()
        except CacheStateError as error:
            assert "interrupted" in str(error)
            refused += 1
            continue
        slots = sum(sum(x[0]) for x in receipt.kept.values())
        assert slots + receipt.merged + receipt.dropped == tokens * len(heads) * len(receipt.kept), at
        if at % 16 == 0:
            feed("llama", one, more(one, 1))
            assert one.report().seen == [tokens + 1]
    assert at > 40 and refused < at // 2 and (refused > 0) == (kind[0] == "static")
