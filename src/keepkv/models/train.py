"""Trains the embedded model from nothing: ``python -m keepkv.models.train --out DIR``.

Each worker process keeps one core busy and they meet once per step, which loses little time to other programs on the
same machine. ``MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592`` in the environment keep glibc from
giving memory back between steps, worth a fifth of the speed.
"""

import argparse
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from keepkv.models.data import MIX, Row, encoder, row
from keepkv.models.network import Weights, hidden_states, init_weights, make_config, rotary, token_losses
from keepkv.models.optimizer import Optimizer
from keepkv.models.tokenizer import train_tokenizer

# Length of the sequences, share of all tokens, tokens per step.
CURRICULUM = ((128, 0.24, 4096), (512, 0.34, 4096), (2304, 0.42, 4608))


@dataclass(frozen=True)
class Batch:
    """``ids`` (B, T); ``at`` (N,) positions in the flattened batch whose next token is learnt, with ``weight`` (N,)."""

    ids: Tensor
    at: Tensor
    targets: Tensor
    weight: Tensor


def collate(rng: random.Random, rows: list[Row], rest: float) -> Batch:
    """Every answer token counts 1; others, up to a quarter of the batch, share a weight of ``rest`` per token."""
    length = len(rows[0][0])
    ids = torch.tensor([r[0] for r in rows])
    places = [(b * length + t - 1, r[1][t]) for b, r in enumerate(rows) for t in range(1, length)]
    chosen = [i for i, answer in places if answer][: ids.numel() // 4]
    others = [i for i, answer in places if not answer]
    fill = rng.sample(others, ids.numel() // 4 - len(chosen))
    at = torch.tensor(chosen + fill)
    weight = torch.tensor([1.0] * len(chosen) + [rest * len(others) / max(1, len(fill))] * len(fill))
    return Batch(ids, at, ids.flatten()[at + 1], weight)


def loss_and_hits(w: Weights, config: Any, batch: Batch, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean loss, and which of the positions were predicted right (N,)."""
    hidden = hidden_states(w, config, batch.ids, cos, sin).flatten(0, 1)[batch.at]
    losses, hits = token_losses(w, hidden, batch.targets)
    return (losses * batch.weight).sum() / batch.weight.sum(), hits


def _average(w: Weights, workers: int) -> None:
    """Makes every worker's gradients the mean over workers."""
    if workers > 1:
        grads = [value.grad for value in w.values() if value.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, mean in zip(grads, (flat / workers).split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))


def plan(tokens: int, curriculum: tuple[tuple[int, float, int], ...]) -> list[tuple[int, int]]:
    """(sequence length, sequences) of each step, in order."""
    total = sum(share for _, share, _ in curriculum)
    steps = []
    for length, share, size in curriculum:
        rows = max(1, size // length)
        steps += [(length, rows)] * max(1, round(tokens * share / total / (rows * length)))
    return steps


def save(w: Weights, config: Any, tokenizer: Any, out: Path) -> None:
    """Writes what ``from_pretrained`` reads."""
    from transformers import GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM(config)
    model.load_state_dict({n: v.detach() for n, v in w.items()} | {"lm_head.weight": w["model.embed_tokens.weight"]})
    # An answer ends at the end of its line.
    ends = [tokenizer.eos_token_id, tokenizer.encode("\n", add_special_tokens=False)[0]]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train(
    *,
    seed: int = 0,
    tokens: int = 3_800_000,
    out: Path | None = None,
    start: Path | None = None,
    mixed: bool = False,
    rate: float = 4e-3,
    rest: float = 0.1,
    muon: bool = True,
    compiled: bool = True,
    vocab: int = 2048,
    curriculum: tuple[tuple[int, float, int], ...] = CURRICULUM,
    save_every: int = 250,
    stop: int | None = None,
    mix: dict[str, float] | None = None,
    report: Callable[[int, int, str], None] | None = None,
    **config_changes: Any,
) -> list[float]:
    """Trains and returns the loss of every step. The result depends on the arguments and the library versions only.

    ``start`` continues from the weights and tokenizer of a directory; ``mixed`` takes the lengths of the curriculum in
    random order: a model that knows short ones forgets less than when long ones come at once; ``stop`` ends after that
    step of the schedule; ``mix`` changes shares of ``MIX``, by names of its functions; ``report(step, steps, line)``
    is called now and then. Every sequence is new, so the accuracy on the answers that it reports is a held-out one.
    """
    if unknown := set(mix or {}) - {kind.__name__ for kind in MIX}:
        raise ValueError(f"no kinds of items {sorted(unknown)}; known: {[kind.__name__ for kind in MIX]}")
    torch.manual_seed(seed)
    if start is None:
        tokenizer = train_tokenizer(vocab)
        config = make_config(len(tokenizer), **config_changes)
        w = init_weights(config, seed)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        tokenizer, config = AutoTokenizer.from_pretrained(start), AutoConfig.from_pretrained(start)
        state = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
        w = {n: v.clone() for n, v in state.items() if n != "lm_head.weight"}
    for value in w.values():
        value.requires_grad_()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rng = random.Random(f"train/{seed}/{rank}")
    encode, steps = encoder(tokenizer), plan(tokens, curriculum)
    if mixed:
        random.Random(seed).shuffle(steps)  # the same order for every worker
    shares = {kind: (mix or {}).get(kind.__name__, share) for kind, share in MIX.items()}
    optimizer = Optimizer(w, rate, len(steps), muon)
    forward = torch.compile(loss_and_hits, dynamic=False) if compiled else loss_and_hits
    history: list[float] = []
    recent: deque[float] = deque(maxlen=50)
    done, began = 0, time.monotonic()
    for i, (length, rows) in enumerate(steps[:stop]):
        mine = range(max(1, rows // workers))
        batch = collate(rng, [row(rng, encode, length, tokenizer.bos_token_id, shares) for _ in mine], rest)
        loss, hits = forward(w, config, batch, *rotary(config, length))
        loss.backward()
        _average(w, workers)
        optimizer.step(i)
        history.append(loss.item())
        if (learnt := batch.weight == 1.0).any():  # plain text has no answers
            recent.append(hits[learnt].float().mean().item())
        done += length * len(mine) * workers
        last = i + 1 == len(steps[:stop])
        if report and (i % 10 == 0 or last):
            speed = done / (time.monotonic() - began)
            report(
                i + 1, len(steps),
                f"length {length}  tokens {done / 1e6:.2f}M  loss {sum(history[-50:]) / len(history[-50:]):.3f}  "
                f"answer tokens right {sum(recent) / max(1, len(recent)):.3f}  {speed:,.0f} tokens/s",
            )  # fmt: skip
        if out is not None and rank == 0 and (last or (i + 1) % save_every == 0):
            save(w, config, tokenizer, out)
    return history


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the model and its tokenizer")
    parser.add_argument("--start", type=Path, help="continue from this directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=3_800_000)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--mix", default="", help="shares of kinds of items that differ, kind:share, comma separated")
    parser.add_argument("--mixed", action="store_true", help="lengths in random order, not one after the other")
    parser.add_argument("--stop", type=int, help="stop after this step of the schedule")
    parser.add_argument("--adamw", action="store_true", help="AdamW for all parameters instead of Muon for matrices")
    parser.add_argument("--eager", action="store_true", help="do not compile (slower, needs no C++ compiler)")
    parser.add_argument("--workers", type=int, default=2, help="processes that share each step, one core each")
    parser.add_argument(
        "--curriculum", default=",".join(":".join(map(str, phase)) for phase in CURRICULUM),
        help="length:share:tokens per step, comma separated",
    )  # fmt: skip
    a = parser.parse_args()
    if a.workers == 1:
        _work(0, a, "")
    else:
        with tempfile.TemporaryDirectory() as folder:
            spawn(_work, (a, f"file://{folder}/meet"), nprocs=a.workers)


def _work(rank: int, a: argparse.Namespace, meet: str) -> None:
    from rich.console import Console
    from rich.progress import Progress

    torch.set_num_threads(1)
    if meet:
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=a.workers)
    phases = [phase.split(":") for phase in a.curriculum.split(",")]
    mix = {kind: float(share) for kind, share in (pair.split(":") for pair in a.mix.split(",") if pair)}
    curriculum = tuple((int(length), float(share), int(size)) for length, share, size in phases)
    console = Console()
    with Progress(console=console, disable=rank > 0 or not console.is_terminal) as progress:
        bar = progress.add_task("training", total=None)

        def report(step: int, steps: int, line: str) -> None:
            progress.update(bar, completed=step, total=steps, description=line)
            if not console.is_terminal and (step % 50 == 1 or step == steps):
                print(f"step {step}/{steps}  {line}", flush=True)

        train(
            seed=a.seed, tokens=a.tokens, out=a.out, start=a.start, rate=a.rate, stop=a.stop, mix=mix, mixed=a.mixed,
            muon=not a.adamw, compiled=not a.eager, curriculum=curriculum, report=report if rank == 0 else None,
        )  # fmt: skip
    if meet:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
