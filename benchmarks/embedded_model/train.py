"""Trains the embedded model from nothing: ``python -m benchmarks.embedded_model.train --out DIR``.

Each worker process keeps one core busy and they meet once per step, which loses little time to other programs on the
same machine. ``MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592`` in the environment keep glibc from
giving memory back between steps, worth a fifth of the speed. With ``--device cuda`` one process trains, and
``--loaders 4`` others keep it in data.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from .data import MIX, Row, encoder, row
from .network import Weights, hidden_states, init_weights, make_config, rotary, token_losses
from .optimizer import Optimizer
from .tokenizer import train_tokenizer

# Length of the sequences, share of all tokens, tokens per step.
CURRICULUM = ((128, 0.24, 4096), (512, 0.34, 4096), (2304, 0.42, 4608))


@dataclass(frozen=True)
class Batch:
    """``ids`` (B, T); ``at`` (N,) positions in the flattened batch whose next token is learnt, with ``weight`` (N,)."""

    ids: Tensor
    at: Tensor
    targets: Tensor
    weight: Tensor

    def to(self, device: str) -> "Batch":
        """The same on ``device``."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


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


_make: Callable[[int], Batch]  # of a loader process


def _loader(make: Callable[[int], Batch]) -> None:
    global _make
    _make = make
    torch.set_num_threads(1)


def _arrays(i: int) -> tuple[Any, ...]:
    # As arrays: tensors would go through shared memory, a file each.
    return tuple(tensor.numpy() for tensor in vars(_make(i)).values())


def batches(make: Callable[[int], Batch], steps: int, loaders: int) -> Iterator[Batch]:
    """``make(i)`` of every step in order, made ahead by as many ``loaders``, processes that start at once, or here."""
    if not loaders:
        return map(make, range(steps))
    # Forked, so that they have the tokenizer already; CUDA must not have started yet.
    pool = get_context("fork").Pool(loaders, _loader, (make,))
    made = pool.imap(_arrays, range(steps))

    def read() -> Iterator[Batch]:
        with pool:
            for arrays in made:
                yield Batch(*map(torch.from_numpy, arrays))

    return read()


Step = Callable[[Batch], tuple[Tensor, Tensor]]


def recorded(step: Step, warm: int = 3) -> Step:
    """``step`` as one CUDA graph for each shape: kernels of a small model take longer to launch than to run.

    The first ``warm`` steps of a shape run as they are, as what is recorded may not set anything up.
    """
    side = torch.cuda.Stream()  # nothing may be recorded on the default one
    seen: Counter[torch.Size] = Counter()
    graphs: dict[torch.Size, tuple[Any, Batch, tuple[Tensor, Tensor]]] = {}

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        shape = batch.ids.shape
        seen[shape] += 1
        if seen[shape] <= warm:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = step(batch)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if shape not in graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                result = step(batch)
            graphs[shape] = graph, batch, result
        graph, place, (loss, right) = graphs[shape]
        for old, new in zip(vars(place).values(), vars(batch).values(), strict=True):
            old.copy_(new)
        graph.replay()
        return loss.clone(), right.clone()

    return run


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
    tokenizer: Any = None,
    device: str = "cpu",
    loaders: int = 0,
    report: Callable[[int, int, str], None] | None = None,
    **config_changes: Any,
) -> list[float]:
    """Trains and returns the loss of every step. On a CPU it depends on the arguments and the library versions only.

    ``start`` continues from the weights and tokenizer of a directory; ``mixed`` takes the lengths of the curriculum in
    random order: a model that knows short ones forgets less than when long ones come at once; ``stop`` ends after that
    step of the schedule; ``mix`` changes shares of ``MIX``, by names of its functions; ``tokenizer`` is taken instead
    of a new one; ``loaders`` processes make the batches ahead: other ones than without, the same whatever their number;
    ``report(step, steps, line)`` is called now and then. Every sequence is new, so the accuracy on the answers that it
    reports is a held-out one.
    """
    if unknown := set(mix or {}) - {kind.__name__ for kind in MIX}:
        raise ValueError(f"no kinds of items {sorted(unknown)}; known: {[kind.__name__ for kind in MIX]}")
    torch.manual_seed(seed)
    if start is None:
        tokenizer = tokenizer or train_tokenizer(vocab)
        config = make_config(len(tokenizer), **config_changes)
        w = init_weights(config, seed)
    else:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        tokenizer, config = AutoTokenizer.from_pretrained(start), AutoConfig.from_pretrained(start)
        state = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
        w = {n: v.clone() for n, v in state.items() if n != "lm_head.weight"}
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rng = random.Random(f"train/{seed}/{rank}")
    encode, steps = encoder(tokenizer), plan(tokens, curriculum)
    if mixed:
        random.Random(seed).shuffle(steps)  # the same order for every worker
    shares = {kind: (mix or {}).get(kind.__name__, share) for kind, share in MIX.items()}

    def make(i: int) -> Batch:
        length, rows = steps[i]
        own = random.Random(f"train/{seed}/{rank}/{i}") if loaders else rng
        made = [row(own, encode, length, tokenizer.bos_token_id, shares) for _ in range(max(1, rows // workers))]
        return collate(own, made, rest)

    ready = batches(make, len(steps[:stop]), loaders)
    w = {name: value.to(device).requires_grad_() for name, value in w.items()}
    optimizer = Optimizer(w, rate, len(steps), muon)
    gpu = device != "cpu"
    forward = torch.compile(loss_and_hits, dynamic=False) if compiled and not gpu else loss_and_hits
    angles = {n: tuple(angle.to(device) for angle in rotary(config, n)) for n in {n for n, _ in steps}}

    def step(batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and the share of answer tokens that were right: not a number in plain text, which has none."""
        loss, hits = forward(w, config, batch, *angles[batch.ids.shape[1]])
        loss.backward()
        _average(w, workers)
        optimizer.step()
        learnt = batch.weight == 1.0
        return loss.detach(), (hits & learnt).sum() / learnt.sum()

    take = recorded(step) if compiled and gpu else step
    history: list[tuple[Tensor, Tensor]] = []  # read seldom: the processor waits for the GPU then
    done, began = 0, time.monotonic()
    for i, batch in enumerate(ready):
        optimizer.schedule(i)
        history.append(take(batch.to(device)))
        done += batch.ids.numel() * workers
        last = i + 1 == len(steps[:stop])
        if report and (i % (50 if gpu else 10) == 0 or last):
            losses, right = map(torch.stack, zip(*history[-50:], strict=True))
            report(
                i + 1, len(steps),
                f"length {batch.ids.shape[1]}  tokens {done / 1e6:.2f}M  loss {losses.mean():.3f}  "
                f"answer tokens right {right.nanmean():.3f}  {done / (time.monotonic() - began):,.0f} tokens/s",
            )  # fmt: skip
        if out is not None and rank == 0 and (last or (i + 1) % save_every == 0):
            save(w, config, tokenizer, out)
    return [loss.item() for loss, _ in history]


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
    parser.add_argument("--eager", action="store_true", help="do not compile or record (slower, needs no C++ compiler)")
    parser.add_argument(
        "--shape", default="", help="fields of the configuration that differ, name:number, comma separated"
    )
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer to take instead of a new one")
    parser.add_argument("--workers", type=int, default=2, help="processes that share each step on a CPU, one core each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--loaders", type=int, default=0, help="processes that make the data ahead, one core each")
    parser.add_argument(
        "--curriculum", default=",".join(":".join(map(str, phase)) for phase in CURRICULUM),
        help="length:share:tokens per step, comma separated",
    )  # fmt: skip
    a = parser.parse_args()
    if a.workers == 1 or a.device != "cpu":
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
    shape = {field: int(number) for field, number in (pair.split(":") for pair in a.shape.split(",") if pair)}
    curriculum = tuple((int(length), float(share), int(size)) for length, share, size in phases)
    tokenizer = None
    if a.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    console = Console()
    with Progress(console=console, disable=rank > 0 or not console.is_terminal) as progress:
        bar = progress.add_task("training", total=None)

        def report(step: int, steps: int, line: str) -> None:
            progress.update(bar, completed=step, total=steps, description=line)
            if not console.is_terminal and (step % 50 == 1 or step == steps):
                print(f"step {step}/{steps}  {line}", flush=True)

        train(
            seed=a.seed, tokens=a.tokens, out=a.out, start=a.start, rate=a.rate, stop=a.stop, mix=mix, mixed=a.mixed,
            muon=not a.adamw, compiled=not a.eager, curriculum=curriculum, tokenizer=tokenizer, device=a.device,
            loaders=a.loaders, report=report if rank == 0 else None, **shape,
        )  # fmt: skip
    if meet:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
