"""A fixed KV memory inside vLLM: how many requests run at once, in how many steps and seconds, in which blocks.

Requests are random tokens, sent all at once; replies have a fixed length. Each system has the same bytes: vLLM as it
is, and vLLM with keepkv, whose blocks are larger by what lies beside each slot.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepkv.errors import KeepKVError
from keepkv.integrations.vllm.flags import device_here, engine_args
from keepkv.integrations.vllm.versions import installed
from keepkv.integrations.vllm.wish import read
from keepkv.measure.environment import MadeWith, revision
from keepkv.measure.environment import versions as libraries
from keepkv.measure.interval import Percentiles
from keepkv.measure.rows import INLINE, Row

IN_PROCESS = {  # before vLLM is imported: steps are made by hand, and the scheduler is looked at after each
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
PEERS: dict[str, tuple[str, dict[str, Any]]] = {  # vLLM without keepkv: a label, and keywords of ``vllm.LLM``
    "plain": ("vllm", {}), "fp8": ("vllm, fp8", {"kv_cache_dtype": "fp8"}),
}  # fmt: skip
LOWEST_ID = 5  # of the tokens of a prompt


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent: so many ``requests`` of ``prompt`` random tokens, each to be given ``reply`` tokens.

    kv_bytes: of KV memory. block: slots of a block, None for vLLM's own choice. at_once: tokens a step at most, None
    for vLLM's own choice. dtype: "auto" for the model's.
    """

    model: str
    requests: int
    prompt: int
    reply: int
    kv_bytes: int
    block: int | None = None
    at_once: int | None = None
    dtype: str = "auto"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ServedRow(Row):
    """One system under one load.

    label: method and options, "vllm" for vLLM as it is. blocks: of the pool. most_at_once, mean_at_once: requests that
    run. preemptions: requests that lost their blocks, in the first repeat as all of these. used, running: blocks in use
    and requests running after each step. left_over: blocks in use when all have ended. seconds: from the first request
    to the last token. throughput: tokens of replies per second.
    """

    label: str
    asked: dict[str, Any]
    load: Load
    blocks: int
    most_at_once: int
    mean_at_once: float
    steps: int
    preemptions: int
    left_over: int
    used: list[int]
    running: list[int]
    seconds: Percentiles
    throughput: Percentiles
    made_with: MadeWith = field(metadata=INLINE)
    time: str = ""

    def flat(self) -> dict[str, Any]:
        """One column for each number; without single steps and repeats."""
        left = ("used", "running", "seconds", "throughput", "load")
        row = {**vars(self.load), **{k: x for k, x in self.to_dict().items() if k not in left}}
        for name in ("seconds", "throughput"):
            found = getattr(self, name)
            row |= {f"{name}_median": found.median, f"{name}_p20": found.p20, f"{name}_p80": found.p80}
        return row


def check(keys: dict[str, Any]) -> None:
    """Raise ``KeepKVError`` where what requests ask for cannot be served."""
    read(keys)


def bench(
    load: Load,
    asked: Sequence[tuple[str, dict[str, Any]]],
    repeats: int = 1,
    step: Callable[[int, str], None] = lambda done, what: None,
    peers: Sequence[str] = ("plain",),
) -> Iterator[ServedRow]:
    """Rows of vLLM as it is, and of each of ``asked``: a label, and what its requests ask of keepkv, keys without the
    prefix; a calibration among them is given to the server. peers: of ``PEERS``. ``step`` is told how many are done,
    and what comes next.

    Runs vLLM in this process. Raises ``KeepKVError`` where it is not installed.
    """
    os.environ.update(IN_PROCESS)
    try:
        import vllm  # noqa: F401
    except ModuleNotFoundError as missing:
        raise KeepKVError("vLLM is not installed here: docs/vllm.md says how to install it") from missing
    files = [file for _, keys in asked if (file := keys.get("calibration"))]
    sent = [(label, {name: x for name, x in keys.items() if name != "calibration"}) for label, keys in asked]
    engines: list[tuple[bool, dict[str, Any], list[tuple[str, dict[str, Any]]]]] = [
        (False, args, [(label, {})]) for label, args in (PEERS[name] for name in peers)
    ]
    for ours, args, each in [*engines, (True, {"calibration": files or None}, sent)]:
        with engine(load, ours, **args) as llm:
            for label, keys in each:
                step(0, label)
                yield measure(llm, load, label, keys, repeats)
                step(1, "")


@contextmanager
def engine(load: Load, ours: bool, calibration: Any = None, **args: Any) -> Iterator[Any]:
    """vLLM with the load's KV memory; ``ours``: with keepkv inside. args: further keywords of ``vllm.LLM``."""
    from vllm import LLM

    on_cpu = device_here() == "cpu"  # elsewhere both have graphs, each as many as it can
    given: dict[str, Any] = dict(
        skip_tokenizer_init=True, enforce_eager=on_cpu, dtype=load.dtype, max_model_len=load.prompt + load.reply,
        enable_prefix_caching=False, disable_log_stats=False, kv_cache_memory_bytes=load.kv_bytes,
    )  # fmt: skip
    given |= {} if load.block is None else {"block_size": load.block}
    given |= {} if load.at_once is None else {"max_num_batched_tokens": load.at_once}
    own = engine_args(calibration=calibration, graphs=not on_cpu) if ours else {}
    llm = LLM(load.model, **{**given, **own, **args})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def measure(llm: Any, load: Load, label: str, keys: dict[str, Any], repeats: int = 1) -> ServedRow:
    """Send all requests at once, and look after each step; so many times."""
    before, rows = preemptions(llm), []
    for number in range(repeats):
        rows.append(_once(llm, load, keys, number))
    used, running, _ = rows[0]
    seconds = [x for *_, x in rows]
    pool = _scheduler(llm).kv_cache_manager.block_pool
    found, rate = Percentiles.of(seconds), Percentiles.of([load.requests * load.reply / x for x in seconds])
    assert found is not None and rate is not None
    return ServedRow(
        label=label, asked=keys, load=load, blocks=pool.num_gpu_blocks - 1, most_at_once=max(running),
        mean_at_once=round(sum(running) / len(running), 1), steps=len(running),
        preemptions=(preemptions(llm) - before) // repeats, left_over=used[-1], used=used, running=running,
        seconds=found, throughput=rate, made_with=_made_with(llm), time=time.strftime("%FT%TZ", time.gmtime()),
    )  # fmt: skip


def _once(llm: Any, load: Load, keys: dict[str, Any], number: int) -> tuple[list[int], list[int], float]:
    """Blocks in use and requests running after each step, and seconds."""
    from vllm import SamplingParams

    core, rng, scheduler = llm.llm_engine, random.Random(load.seed), _scheduler(llm)
    pool, extra = scheduler.kv_cache_manager.block_pool, {f"keepkv_{name}": x for name, x in keys.items()} or None
    most = min(2000, llm.llm_engine.model_config.get_vocab_size())
    started = time.perf_counter()
    for i in range(load.requests):
        prompt = [rng.randrange(LOWEST_ID, most) for _ in range(load.prompt)]
        sampling = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, max_tokens=load.reply, extra_args=extra
        )
        core.add_request(f"{number}-{i}", {"prompt_token_ids": prompt}, sampling)
    used, running = [], []
    while core.has_unfinished_requests():
        core.step()
        running.append(len(scheduler.running))
        used.append(int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()))
    return used, running, time.perf_counter() - started


def _scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def preemptions(llm: Any) -> int:
    """As vLLM counts them, since it started."""
    return int(sum(x.value for x in llm.get_metrics() if x.name == "vllm:num_preemptions"))


def _made_with(llm: Any) -> MadeWith:
    from vllm.platforms import current_platform

    config = llm.llm_engine.model_config
    return MadeWith(
        model=config.model, device="cpu" if current_platform.is_cpu() else current_platform.get_device_name(),
        dtype=str(config.dtype).removeprefix("torch."), versions={"vllm": str(installed()), **libraries()},
        revision=revision(),
    )  # fmt: skip


# --- the picture ---------------------------------------------------------------------------------------------------


def draw(rows: Sequence[ServedRow], into: Path, name: str = "bench") -> Path:
    """Writes ``name-blocks.svg``: blocks in use and requests running, step by step; needs ``plots``."""
    from matplotlib import rc_context

    from keepkv.report.figures import svg
    from keepkv.report.figures.look import LOOK, headed, legend, look, panels
    from keepkv.report.style import MOST, styles

    names = [row.label for row in rows]
    drawn = styles(names[:MOST], names[MOST:])
    with rc_context(LOOK):
        figure, (blocks, running) = panels(2, 2, 5.0, 3.2, alike=False)
        for row in rows:
            style = {**look(drawn[row.label]), "marker": "", "lw": 1.2}  # there is a point for each step
            blocks.plot(range(1, row.steps + 1), row.used, label=row.label, **style)
            running.plot(range(1, row.steps + 1), row.running, label=row.label, **style)
        blocks.axhline(max(row.blocks for row in rows), color="grey", lw=0.8, ls=":")
        blocks.set(xlabel="steps of the engine", ylabel="blocks in use (dotted: all)", ylim=(0, None))
        running.set(xlabel="steps of the engine", ylabel="requests running", ylim=(0, None))
        running.tick_params(labelleft=True)
        legend(figure, names)
        path = into / f"{name}-blocks.svg"
        path.write_text(svg(headed(figure, "The same KV memory, step by step")), encoding="utf-8")
    return path
