"""Runs kvpress on a model and prompts read from files; started inside the environment of kvpress, imports no keepkv.

    python kvpress_worker.py JOB.json RESULT

JOB.json: ``model`` (a directory written by ``save_pretrained``), ``prompts`` (a safetensors file: name -> ids (B,T),
``name.mask`` its attention mask), ``threads``, ``dtype``, ``device`` and ``runs``, a list of objects with

    id            name of the run in the result
    task          "prefill": read the prompt, then feed the continuation one token at a time (batch 1)
                  "decode": the same with the press active while decoding
                  "generate": ``model.generate``, left padding, chunks and turns included
                  "ask": read the prompt, then ask ``questions`` ({"prompt", "answer": names, "limit"}), in turn if
                  ``conversation``
    prompt, continuation, turns      names in the prompts file
    press         {"press": class name, "options": {...}, "set": {...}}, options may hold presses, "set" has attributes
                  that are no options; null = the plain cache
    attention     "sdpa" or "eager"
    new, chunk    of "generate": new tokens, prefill_chunk_size or null
    scores        also record the scores that ranked the slots
    kept          of "decode" and "ask": false where kept slots need not be identified (masked keys are overwritten)
    reorder       put slots back into the order of the text after each compression (kvpress leaves them in the order
                  of their scores): shows what that order changes

Writes RESULT.safetensors, ``id/kept/LAYER`` (B,H,S) int32 original indices in order, padded at the end with -1,
``id/scores/LAYER``, ``id/logits``, ``id/sequences``, and RESULT.json with times, bytes, what was fed and versions.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from kvpress_ask import ask
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

EMPTY = -1


def build_press(spec: dict[str, Any]) -> Any:
    """A press from its class name and options, presses inside presses included; "set" has attributes that are no
    options."""
    options = {
        name: build_press(value) if isinstance(value, dict) and "press" in value else value
        for name, value in spec.get("options", {}).items()
    }
    press = getattr(kvpress, spec["press"])(**options)
    for name, value in spec.get("set", {}).items():
        setattr(press, name, value)
    return press


def innermost(press: Any) -> Any:
    """The press that scores."""
    while True:
        inner = getattr(press, "press", None) or getattr(press, "base_press", None)
        if inner is None:
            return press
        press = inner


def seed_layers(press: Any) -> None:
    """Let what a press draws at random follow from the index of the layer, so that keepkv can draw the same."""
    scorer = innermost(press)
    if not hasattr(scorer, "score"):
        return
    original = scorer.score

    def score(module: Any, *args: Any, **kwargs: Any) -> Tensor:
        torch.manual_seed(module.layer_idx)
        result: Tensor = original(module, *args, **kwargs)
        return result

    scorer.score = score


class ScoreLog:
    """Keeps the scores that a press computed last, per layer, and the keys that were scored."""

    def __init__(self, press: Any) -> None:
        self.scores: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        scorer = innermost(press)
        if not hasattr(scorer, "score"):
            return
        original = scorer.score

        def score(module: Any, hidden_states: Any, keys: Any, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = original(module, hidden_states, keys, *args, **kwargs)
            self.scores[module.layer_idx], self.keys[module.layer_idx] = result.detach().float().clone(), keys
            return result

        scorer.score = score

    def by_token(self, layer: int, full: Tensor) -> Tensor:
        """(B,H,S): scores by original index, -inf for tokens that were gone."""
        scores, keys = self.scores[layer].cpu(), self.keys[layer]
        out = torch.full(full.shape[:3], float("-inf"))
        for b, h in ((b, h) for b in range(keys.shape[0]) for h in range(keys.shape[1])):
            out[b, h, find(keys[b, h], full[b, h])] = scores[b, h]
        return out


def keep_order(press: Any) -> None:
    """Make a press return slots in the order in which it was given them."""
    original = press.compress

    def compress(module: Any, hidden_states: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new_keys, new_values = original(module, hidden_states, keys, *args, **kwargs)
        pairs = [list(zip(*x, strict=True)) for x in zip(new_keys, keys, strict=True)]
        order = torch.stack([torch.stack([find(a, b) for a, b in row]) for row in pairs]).argsort(-1)
        index = order.to(keys.device)[..., None]
        return new_keys.gather(2, index.expand_as(new_keys)), new_values.gather(2, index.expand_as(new_values))

    press.compress = compress


def attention_modules(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def pack(rows: list[list[Tensor]]) -> Tensor:
    """Index lists per row and head as one (B,H,S) int32 tensor, padded at the end with -1."""
    size = max(len(x) for row in rows for x in row)
    out = torch.full((len(rows), len(rows[0]), size), EMPTY, dtype=torch.int32)
    for b, row in enumerate(rows):
        for h, indices in enumerate(row):
            out[b, h, : len(indices)] = indices.sort().values.int()
    return out


def contents(keys: Tensor) -> list[bytes]:
    """The bytes of each row of (S,D)."""
    return [row.tobytes() for row in keys.float().cpu().numpy()]


def find(keys: Tensor, full: Tensor) -> Tensor:
    """Row of ``full`` (S,D) that each row of ``keys`` equals."""
    where = {key: i for i, key in enumerate(contents(full))}
    if len(where) < len(full):
        raise RuntimeError("two keys of the prompt are equal; kept slots cannot be told apart")
    found = [where.get(key, EMPTY) for key in contents(keys)]
    if EMPTY in found:
        raise RuntimeError("cached keys were overwritten: they equal none that entered the cache")
    return torch.tensor(found)


def kept_of(keys: Tensor, full: Tensor, masked: Any) -> Tensor:
    """Original index of each cached key, found by its value in ``full``, where kvpress does not mask it."""
    rows = []
    for b in range(keys.shape[0]):
        heads = []
        for h in range(keys.shape[1]):
            indices = find(keys[b, h], full[b, h])
            if masked is not None:
                rows_, heads_, slots = (x.cpu() for x in masked)
                visible = torch.ones(keys.shape[2], dtype=torch.bool)
                visible[slots[(rows_ == b) & (heads_ == h)]] = False
                indices = indices[visible]
            heads.append(indices)
        rows.append(heads)
    return pack(rows)


def cache_bytes(cache: Any) -> int:
    """Storage of the cached tensors."""
    storages = {}
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


class Worker:
    """One model and its prompts."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job.get("threads", 1))
        self.prompts = load_file(job["prompts"])
        self.device = torch.device(job.get("device", "cpu"))
        dtype = getattr(torch, job.get("dtype", "float32"))
        self.model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(self.device).eval()
        self.tensors: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}
        self.full: dict[tuple[str, str], Any] = {}

    def get(self, name: str) -> Tensor:
        return self.prompts[name].to(self.device)

    def run(self, run: dict[str, Any]) -> None:
        """Do one run; an exception that kvpress raises is part of the result."""
        self.model.set_attn_implementation(run.get("attention", "sdpa"))
        for module in attention_modules(self.model):
            module.masked_key_indices = None  # outlives the press otherwise
        press = build_press(run["press"]) if run.get("press") else None
        if press:
            seed_layers(press)
        if run.get("reorder"):
            keep_order(press)
        log = ScoreLog(press) if press and run.get("scores") else None
        tasks = {"prefill": self.prefill, "decode": self.decode, "generate": self.generate, "ask": self.ask}
        task = tasks[run["task"]]
        try:
            with torch.no_grad():
                facts = task(run, press, log)
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            facts = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        self.facts[run["id"]] = facts

    def prefill(self, run: dict[str, Any], press: Any, log: ScoreLog | None) -> dict[str, Any]:
        ids = self.get(run["prompt"])
        full = self.full_cache(run["prompt"])
        cache = DynamicCache(config=self.model.config)
        started = time.perf_counter()
        with press(self.model) if press else contextlib.nullcontext():
            last = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        seconds = time.perf_counter() - started
        for i, module in enumerate(attention_modules(self.model)):
            masked = getattr(module, "masked_key_indices", None) if press else None
            kept = kept_of(cache.layers[i].keys, full.layers[i].keys, masked)
            self.tensors[f"{run['id']}/kept/{i}"] = kept
            if log:
                self.tensors[f"{run['id']}/scores/{i}"] = log.by_token(i, full.layers[i].keys)
        facts = {"prefill_seconds": seconds, "bytes": cache_bytes(cache), "full_bytes": cache_bytes(full)}
        started = time.perf_counter()
        logits = [last, *self.feed(run["continuation"], cache, ids.shape[1])]
        self.tensors[f"{run['id']}/logits"] = torch.stack(logits, 1).float().cpu()
        return {**facts, "decode_seconds": time.perf_counter() - started}

    def full_cache(self, prompt: str) -> Any:
        """The plain cache of a prompt; compression follows attention, so its keys are those that a press is given."""
        name = (prompt, self.model.config._attn_implementation)
        if name not in self.full:
            self.full[name] = DynamicCache(config=self.model.config)
            self.model(self.get(prompt), past_key_values=self.full[name])
        return self.full[name]

    def feed(self, name: str, cache: Any, start: int) -> list[Tensor]:
        """Logits (B,V) after each token of the continuation, at its true position."""
        logits = []
        for i, token in enumerate(self.get(name).unbind(1)):
            position = torch.full((len(token), 1), start + i, device=self.device)
            out = self.model(token[:, None], past_key_values=cache, position_ids=position)
            logits.append(out.logits[:, -1])
        return logits

    def ask(self, run: dict[str, Any], press: Any, log: ScoreLog | None) -> dict[str, Any]:
        if not any(prompt == run["prompt"] for prompt, _ in self.full):
            self.full.clear()  # runs come prompt by prompt
        ids, full = self.get(run["prompt"]), self.full_cache(run["prompt"])
        asked = [{**q, "prompt": self.get(q["prompt"]), "answer": self.get(q["answer"])} for q in run["questions"]]
        cache, facts = ask(self.model, press, ids, asked, run["conversation"])
        for i, module in enumerate(attention_modules(self.model)):
            masked = getattr(module, "masked_key_indices", None) if press else None
            if run.get("kept", True):
                kept = kept_of(cache.layers[i].keys, full.layers[i].keys, masked)
                self.tensors[f"{run['id']}/kept/{i}"] = kept
        return {**facts, "bytes": cache_bytes(cache), "full_bytes": cache_bytes(full)}

    def decode(self, run: dict[str, Any], press: Any, log: ScoreLog | None) -> dict[str, Any]:
        ids, start = self.get(run["prompt"]), self.get(run["prompt"]).shape[1]
        cache, keys = DynamicCache(config=self.model.config), {}
        hooks = [self._log_keys(module, cache, keys) for module in attention_modules(self.model)]
        try:
            with press(self.model):
                self.model(ids, past_key_values=cache)
                logits = self.feed(run["continuation"], cache, start)
        finally:
            for hook in hooks:
                hook.remove()
        self.tensors[f"{run['id']}/logits"] = torch.stack(logits, 1).float().cpu()
        facts = {"bytes": cache_bytes(cache), "slots": cache.layers[0].keys.shape[2]}
        if not run.get("kept", True):
            return facts
        for i in range(len(cache.layers)):
            full = torch.cat(keys[i], 2)
            self.tensors[f"{run['id']}/kept/{i}"] = kept_of(cache.layers[i].keys, full, None)
            if log:
                self.tensors[f"{run['id']}/scores/{i}"] = log.by_token(i, full)
        order = find(cache.layers[0].keys[0, 0], torch.cat(keys[0], 2)[0, 0])
        return {**facts, "in_order": bool((order[1:] > order[:-1]).all())}

    def _log_keys(self, module: Any, cache: Any, keys: dict[int, list[Tensor]]) -> Any:
        """Keep every key that enters the cache; registered before the press, so it runs before the press."""

        def hook(own: Any, args: Any, kwargs: Any, output: Any) -> None:
            new = kwargs["hidden_states"].shape[1]
            keys.setdefault(own.layer_idx, []).append(cache.layers[own.layer_idx].keys[:, :, -new:].clone())

        return module.register_forward_hook(hook, with_kwargs=True)

    def generate(self, run: dict[str, Any], press: Any, log: ScoreLog | None) -> dict[str, Any]:
        """Greedy generation over one or more turns; the press is active in the first, which reads the context."""
        cache, fed, visible = DynamicCache(config=self.model.config), [], []

        def spy(module: Any, args: Any, kwargs: Any) -> None:
            positions = kwargs.get("position_ids")
            ends = [] if positions is None else [int(positions[-1, 0]), int(positions[-1, -1])]
            fed.append({"tokens": kwargs["input_ids"].shape[1], "positions": ends})

        def see(module: Any, args: Any, kwargs: Any) -> None:
            mask = kwargs.get("attention_mask")
            if mask is not None and kwargs["hidden_states"].shape[1] == 1:
                allowed = mask if mask.dtype == torch.bool else mask == 0
                width = min(allowed.shape[-1], cache.layers[0].keys.shape[2] + 1)
                visible.append([*allowed[:, 0, -1, :width].sum(-1).tolist(), width])

        first = attention_modules(self.model)[0]
        hooks = [
            self.model.register_forward_pre_hook(spy, with_kwargs=True),
            first.register_forward_pre_hook(see, with_kwargs=True),
        ]
        ids = self.get(run["prompt"])
        mask = self.get(f"{run['prompt']}.mask") if f"{run['prompt']}.mask" in self.prompts else torch.ones_like(ids)
        turns, logits = [], []
        try:
            for turn, name in enumerate([None, *run.get("turns", [])]):
                if name is not None:
                    ids = torch.cat((ids, self.get(name)), 1)
                    mask = torch.ones_like(ids)
                with press(self.model) if press and turn == 0 else contextlib.nullcontext():
                    out = self.model.generate(
                        input_ids=ids,
                        attention_mask=mask,
                        past_key_values=cache,
                        max_new_tokens=run["new"],
                        min_new_tokens=run["new"],
                        do_sample=False,
                        pad_token_id=0,
                        prefill_chunk_size=run.get("chunk"),
                        output_logits=True,
                        return_dict_in_generate=True,
                    )
                ids = out.sequences
                logits.append(torch.stack(out.logits, 1).float().cpu())
                turns.append({"fed": list(fed), "visible": list(visible), "slots": cache.layers[0].keys.shape[2]})
                fed.clear()
                visible.clear()
        finally:
            for hook in hooks:
                hook.remove()
        self.tensors[f"{run['id']}/logits"] = torch.cat(logits, 1)
        self.tensors[f"{run['id']}/sequences"] = ids.cpu().contiguous()
        return {"turns": turns, "bytes": cache_bytes(cache)}


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    transformers.logging.set_verbosity_error()
    job, result = json.loads(Path(sys.argv[1]).read_text("utf-8")), sys.argv[2]
    worker = Worker(job)
    for run in job["runs"]:
        worker.run(run)
    save_file({k: v.contiguous() for k, v in worker.tensors.items()}, f"{result}.safetensors")
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    facts = {"versions": {**versions, "python": platform.python_version()}, "runs": worker.facts}
    Path(f"{result}.json").write_text(json.dumps(facts), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
