"""Kind "fast-kvzip": what a second reading attends to in a token, by small gates on its hidden state, trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy
from transformers import PreTrainedModel

from keepkv.calibrate import answering
from keepkv.calibrate.base import Found, Tensors, register_kind
from keepkv.calibrate.least_squares import HELD_OUT, Sums, foretold, said
from keepkv.calibrate.wanted import GROUPS, HIDDEN, SINKS, Remembering, wanted
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.errors import CalibrationError
from keepkv.methods import Method
from keepkv.score.learned.fast_kvzip import KIND, PREFIX, STAT, FastKVzip
from keepkv.tasks.asking import Ids

RATE, ROWS = 1e-2, 1024  # of Adam; tokens of a step


@dataclass
class Read:
    """Of one layer, each a list over texts: hidden states (S,E) and the attention (S,H) that their tokens get."""

    hidden: list[Tensor]
    wanted: list[Tensor]
    groups: int = 1

    def some(self, judged: bool) -> tuple[Tensor, Tensor]:
        """Those of every fifth text, which judge, or of the others."""
        pairs = enumerate(zip(self.hidden, self.wanted, strict=True), start=1)
        x, y = zip(*(pair for i, pair in pairs if (i % HELD_OUT == 0) == judged), strict=True)
        return torch.cat(x), torch.cat(y)


@register_kind(KIND)
@torch.no_grad()
def fast_kvzip_gates(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    asked: Sequence[Sequence[Ids]] | None = None,
    behind: str = "text",
    rank: int = 16,
    anchors: int = 16,
    steps: int = 500,
    seed: int = 0,
) -> Found:
    """Per layer the tensors that the authors of Fast KVzip publish (arXiv 2601.17668), see
    ``keepkv.score.learned.fast_kvzip``; ``keepkv calibrate fast-kvzip --from`` reads theirs instead.

    Trained to foretell KVzip's score (arXiv 2505.23416) of a token, in [0, 1], from its hidden state: cross entropy,
    ``steps`` of Adam of ``ROWS`` tokens each, layer by layer. rank: width of the gates' queries and keys; anchors: keys
    that are learned beside them. Every fifth text is left out, and says how much of the variance is foretold.

    asked, behind: as of ``gates``; KVzip's own is "text". "both" teaches what questions ask as well.
    """
    if min(rank, steps) < 1 or anchors < 0:
        raise CalibrationError(f"{KIND}(rank={rank}, anchors={anchors}, steps={steps}): give positive numbers")
    cache = Cache(model, Method(Remembering(), when=When("deferred")), 1.0)
    held = {layer.info.index: Read([], []) for layer in cache.compressible}
    known = list[bool]()
    for logs in wanted(KIND, model, cache, batches, asked, behind, known):
        for layer, y in zip(cache.compressible, logs, strict=True):
            one = held[layer.info.index]
            one.hidden.append(layer.score_state[HIDDEN][:, SINKS:].flatten(0, 1))
            one.wanted.append(y.exp().transpose(1, 2).flatten(0, 1))
            one.groups = int(layer.score_state[GROUPS])
    random = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    shares: dict[int, list[float]] = {}
    for index, one in held.items():
        gate = _trained(_fresh(one, rank, anchors, random), *one.some(judged=False), steps, random)
        made[index] = {PREFIX + name: x.detach() for name, x in gate.items()}
        shares[index] = _share(gate, *one.some(judged=True))
    lines = [*answering.said(known), *said(shares, "gates on hidden states", "the attention that tokens get")]
    return Found(made, {"foretold": shares}, lines)


def _fresh(read: Read, rank: int, anchors: int, random: torch.Generator) -> dict[str, Tensor]:
    """A gate before its training, in the authors' names and shapes."""
    width, heads, groups = read.hidden[0].shape[1], read.wanted[0].shape[1], read.groups

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(read.hidden[0].device)

    size = torch.cat(read.hidden).float().square().mean().sqrt() * width**0.5  # queries and keys of a spread of 1
    return {
        "q_proj.weight": drawn(heads * groups * rank, width) / size, "q_proj.bias": drawn(heads * groups * rank) * 0,
        "k_proj.weight": drawn(heads * rank, width) / size, "q_norm.weight": drawn(rank) * 0 + 1,
        "k_norm.weight": drawn(rank) * 0 + 1, "k_base": drawn(heads, 1, anchors, rank),
        "b": drawn(heads, 1, groups) * 0 - 2.0,
    }  # fmt: skip


def _told(gate: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """What a gate makes of hidden states (N,E): shares (N,H)."""
    told = FastKVzip().token_stats(hidden[None].float(), {PREFIX + name: x for name, x in gate.items()})
    return told[STAT][0].T


@torch.enable_grad()
def _trained(gate: dict[str, Tensor], x: Tensor, y: Tensor, steps: int, random: torch.Generator) -> dict[str, Tensor]:
    gate = {name: value.requires_grad_() for name, value in gate.items()}
    wide = [gate["q_proj.weight"], gate["k_proj.weight"]]  # weights of features that are large need smaller steps
    scale = float(wide[0].detach().std())
    rest = [value for name, value in gate.items() if not name.endswith("proj.weight")]
    optimizer = torch.optim.Adam([{"params": wide, "lr": RATE * scale}, {"params": rest, "lr": RATE}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for _ in range(steps):
        some = torch.randint(len(x), (ROWS,), generator=random).to(x.device)
        loss = binary_cross_entropy(_told(gate, x[some]).clamp(1e-6, 1 - 1e-6), y[some].float().clamp(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return gate


def _share(gate: dict[str, Tensor], x: Tensor, y: Tensor) -> list[float]:
    """Of each head, how much of the variance is foretold."""
    sums, told = Sums(), _told(gate, x).T[..., None]
    sums.add(told, y.T[..., None])
    found: list[float] = foretold(sums, torch.ones(len(told), 1, 1, dtype=torch.float64))[:, 0].tolist()
    return found
