"""What a compression costs beside kvpress' press of that name, and beside the prefill before it.

    python -m benchmarks.compression.peers --kvpress-python ../kvpress-environment/bin/python [--lengths 4096 16384]

The same weights, tokens and dtype on both sides, in turn, round by round; one thread. Times are processor time, which
another process on the machine adds little to. Of keepkv: observing during the prefill and compressing after it. Of
kvpress: all that its hooks do. Either is all that a layer costs beyond a plain cache: scores, choice, and the copy of
what is kept. What the model does before is not timed, and done once for all (``replay``).

``prefill`` is one layer with the shape of an 8B model's (hidden 4,096, MLP 14,336) over the same tokens; compressions
are those of its heads (32 query and 8 KV heads of 128). Their layer is 512 wide: queries that a press projects anew
cost it an eighth of what they would there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import keepkv
from benchmarks.compression.cost import device_name, watched
from benchmarks.compression.replay import Replay
from benchmarks.kvpress.pairs import MATCHED, Pair
from keepkv.engine.versions import CACHE
from keepkv.measure import environment

HERE = Path(__file__).parent
BUDGET, WINDOW = 0.25, 32
WARM = 256  # tokens that every method sees first
HEADS: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress-python", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="*", default=None, help="names of pairs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    a = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [x for x in MATCHED if not x.eager and "filled" not in x.name and "each alone" not in x.name]
    pairs = [x for x in pairs if a.only is None or x.name in a.only]
    with tempfile.TemporaryDirectory() as folder:
        model = llama(a, hidden_size=512, intermediate_size=512)
        model.save_pretrained(folder)
        command = [str(a.kvpress_python), str(HERE / "kvpress_times.py"), folder, a.dtype]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdin and worker.stdout and "ready" in worker.stdout.readline()
            rows = []
            for length in a.lengths:
                rows += measure(model, pairs, length, worker, a)
            worker.stdin.close()
    about = {
        "device": device_name("cpu"), "dtype": a.dtype, "threads": 1, "budget": BUDGET, "rounds": a.rounds,
        "versions": environment.versions(), "kvpress": version_of(a.kvpress_python),
    }  # fmt: skip
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "peers.json").write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    (a.out / "peers.md").write_text(table(rows, about))
    print(table(rows, about))


def llama(a: argparse.Namespace, **sizes: int) -> LlamaForCausalLM:
    """One layer with the heads of an 8B model, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**HEADS, **sizes, num_hidden_layers=1, max_position_embeddings=max(a.lengths) + 8)
    made: LlamaForCausalLM = LlamaForCausalLM(config).to(getattr(torch, a.dtype)).eval()
    return made


@torch.inference_mode()
def prefill_seconds(a: argparse.Namespace, length: int) -> float:
    """One layer of an 8B model over ``length`` tokens, once."""
    model, ids = llama(a, hidden_size=4096, intermediate_size=14336), torch.randint(256, (1, length))
    model.model(ids[:, :64], use_cache=False)
    began = time.process_time()
    model.model(ids, use_cache=False)
    return time.process_time() - began


def measure(model: Any, pairs: list[Pair], length: int, worker: Any, a: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each pair, kvpress and keepkv in turn."""
    made = torch.Generator().manual_seed(length)
    ids, short = (torch.randint(256, (1, n), generator=made) for n in (length, WARM))
    found: dict[str, list[tuple[float, float]]] = {pair.name: [] for pair in pairs}
    wrong: dict[str, str] = {}
    replays = Replay(model), Replay(model)
    for fed in (short, *[ids] * a.rounds):  # the first warms up
        replay = replays[fed is ids]
        for pair in pairs:
            if pair.name in wrong:
                continue
            job = {"press": pair.press(1 - BUDGET, WINDOW), "ids": fed[0].tolist()}
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            answer = json.loads(worker.stdout.readline())
            if "error" in answer:
                wrong[pair.name] = answer["error"]
                continue
            ours = seconds(model, replay, pair, fed)
            if fed is ids:
                found[pair.name].append((ours, answer["seconds"]))
    prefill = prefill_seconds(a, length)
    rows = []
    for name, times in found.items():
        if not times:
            rows.append({"method": name, "length": length, "error": wrong.get(name, "not run")})
            continue
        ratios = sorted(mine / theirs for mine, theirs in times)
        ours, others = (statistics.median(x) for x in zip(*times, strict=True))
        rows.append({
            "method": name, "length": length, "keepkv_ms": ours * 1e3, "kvpress_ms": others * 1e3,
            "ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1],
            "prefill_ms": prefill * 1e3, "of_prefill": ours / prefill,
        })  # fmt: skip
    return rows


@torch.inference_mode()
def seconds(model: Any, replay: Replay, pair: Pair, ids: torch.Tensor) -> float:
    """Observing and compressing of keepkv."""
    kept = round(BUDGET * ids.shape[1])
    options, method = pair.options(WINDOW), pair.method(WINDOW, (kept,))
    if isinstance(method, keepkv.Method):
        cache = keepkv.Cache(model, method, kept)
        cache = cache.copy(when=keepkv.When("deferred"))
    else:
        cache = keepkv.Cache(model, method, kept, when=keepkv.When("deferred"), **options)
    spent = [0.0]
    with watched(cache, spent, time.process_time), replay.runs():
        model(input_ids=ids, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    began = time.process_time()
    cache.compress()
    took = time.process_time() - began
    assert cache.report().compressed
    return spent[0] + took


def version_of(python: Path) -> str:
    asked = "from importlib.metadata import version as v; print(v('kvpress'), 'torch', v('torch'))"
    return subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{about['device']}, {about['dtype']}, {about['threads']} thread, budget {about['budget']}, kvpress "
        f"{about['kvpress']}, keepkv with torch {version('torch')}; one layer, medians of {about['rounds']} rounds "
        "(lowest to highest), processor time.",
        "",
        "| slots | method | keepkv, ms | kvpress, ms | keepkv ÷ kvpress | of the layer's prefill |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        if "error" in r:
            lines.append(f"| {r['length']:,} | {r['method']} | | {r['error'][:80]} | | |")
            continue
        lines.append(
            f"| {r['length']:,} | {r['method']} | {r['keepkv_ms']:.1f} | {r['kvpress_ms']:.1f} | {r['ratio']:.2f} "
            f"({r['ratio_low']:.2f}–{r['ratio_high']:.2f}) | {r['of_prefill']:.2%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
