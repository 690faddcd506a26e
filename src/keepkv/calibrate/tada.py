"""Kind "tada": how alike KV heads are, whether their mean pays, how many bits each layer gets (arXiv 2506.04642)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv.calibrate.arms import LEAST, Arm, best, compare
from keepkv.calibrate.base import Found, register_kind
from keepkv.calibrate.heads import Alike, compare_heads
from keepkv.calibrate.rounded import Divergence
from keepkv.core.layer_info import LayerInfo
from keepkv.core.options import Seed, Size, between, one_of
from keepkv.errors import CalibrationError
from keepkv.kernels.codes import BITS
from keepkv.store.codec.tada import KIND, Auto, Tada, break_even, mean_bits

TENSORS = ("keys", "values")


@register_kind(KIND)
def tada(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    bits: Annotated[float, between(2, 8)] = 4.0,
    mean: Annotated[str, one_of("16bit", "8bit")] = "16bit",
    centre: bool | Auto = "auto",
    proposals: Size = 200,
    seed: Seed = 0,
) -> Found:
    """Per layer: ``tada_bits`` () of codes; ``tada_rho`` (2,), the correlation of heads in keys and in values, and
    ``tada_most`` (2,), that of the layer where it is largest; ``tada_shape`` (3,): KV heads, D, Dv.

    bits: of a number on average, at most. mean, centre: of the codec that bits are searched for. proposals: bits by
    layer that the search looks at. The same seed and texts find the same bits.
    """
    texts = [row[None] for ids in batches for row in ids]
    if len(texts) < LEAST:
        raise CalibrationError(
            f"{len(texts)} pieces of text are too few to search on some and compare on others: give {LEAST} or more, "
            "by more --tokens or a smaller --length"
        )
    layers = compare_heads(model, texts)
    if not layers:
        return Found({}, {}, [])
    rho = {i: torch.tensor([x[name].rho for name in TENSORS]) for i, x in layers.items()}
    most = torch.stack([*rho.values()]).amax(0)
    tensors = {i: {"tada_rho": rho[i], "tada_most": most, "tada_shape": _shape(x)} for i, x in layers.items()}
    plain = Tada(bits=BITS[-1], mean=mean, centre=centre)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is centred is said below
        own = {i: plain.for_layer(LayerInfo(i), held) for i, held in tensors.items()}
    codecs = {i: {b: replace(codec, bits=b) for b in BITS} for i, codec in own.items()}
    sizes = [int(held["tada_shape"][0] * held["tada_shape"][1:].sum()) for held in tensors.values()]
    arms = compare(Divergence(model, texts), codecs, sizes, bits, proposals, seed)
    written = best(arms)
    for i, b in zip(layers, arms[written].bits, strict=True):
        tensors[i]["tada_bits"] = torch.tensor(b, dtype=torch.uint8)
    rows = [_row(i, x, own[i]) for i, x in layers.items()]
    facts = {"layers": rows, "arms": {name: arm._asdict() for name, arm in arms.items()}, "written": written}
    return Found(tensors, facts, [*_of_heads(rows, mean), "", *_of_arms(arms, written, bits)])


def _shape(layer: Mapping[str, Alike]) -> Tensor:
    return torch.tensor([layer["keys"].heads, layer["keys"].width, layer["values"].width])


def _row(index: int, layer: Mapping[str, Alike], codec: Tada) -> dict[str, Any]:
    """Facts of one layer."""
    row: dict[str, Any] = {"layer": index, "heads": layer["keys"].heads, "before_rope": layer["before_rope"].facts()}
    row["widths"] = [layer[name].width for name in TENSORS]
    for name in TENSORS:
        one, bits = layer[name], mean_bits(codec.mean, layer[name].width)
        least = break_even(one.heads, bits)
        row[name] = {**one.facts(), "cost": bits / one.heads, "break_even": least if isfinite(least) else None}
        row[name] |= {"pays": one.rho >= least, "centred": codec.centred(name)}
    return row


def _of_heads(rows: list[dict[str, Any]], mean: str) -> list[str]:
    """How alike heads are, a line a layer, and what follows."""
    lines = [
        "ρ: correlation of the KV heads (of what varies from token to token). saved: bits of a number that centring",
        "saves, by energy (by ranges). cost: bits of a number that a mean takes",
        "layer  heads  keys: ρ          saved         values: ρ        saved         cost  pays from ρ  pays for",
    ]
    for row in rows:
        cells = []
        for name in TENSORS:
            own, varying = row[name], row["before_rope" if name == "keys" else name]["varying"]
            cells.append(f"{own['rho']:6.3f} ({varying:6.3f})  {own['by_energy']:5.2f} ({own['by_range']:5.2f})")
        own, pays = row["keys"], " and ".join(name for name in TENSORS if row[name]["pays"]) or "nothing"
        least = "never" if own["break_even"] is None else f"{own['break_even']:.3f}"
        lines.append(f"{row['layer']:5}  {row['heads']:5}  {'  '.join(cells)}  {own['cost']:4.2f}  {least:>11}  {pays}")
    paid = {name: sum(row[name]["pays"] for row in rows) for name in TENSORS}
    if not any(paid.values()):
        most = max(row[name]["by_energy"] for row in rows for name in TENSORS)
        lines.append(
            f"TaDA does not pay on this model: means over heads ({mean}) cost at least "
            f"{min(row['keys']['cost'] for row in rows):.2f} bits of a number, and save {most:.2f} at most."
        )
    else:
        lines.append(
            f"Means ({mean}) pay for keys in {paid['keys']} and for values in {paid['values']} of {len(rows)} layers."
        )
    return lines


def _of_arms(arms: Mapping[str, Arm], written: str, target: float) -> list[str]:
    """Bits by layer of each arm, and what they do."""
    lines = [
        f"bits by layer, at most {target:g} on average; divergence from the full cache, nats ± standard error, on "
        f"{len(arms[written].divergence)} pieces that were held out"
    ]
    for name, arm in arms.items():
        bits, (error, spread) = " ".join(map(str, arm.bits)), arm.error
        lines.append(f"{name:9} {arm.average:4.2f} bits  {error:.5f} ± {spread:.5f}  {bits}")
    return [*lines, f"written: {written}"]
