"""What is run: every method that compresses a prompt, and the strongest forms of some."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from keepkv.cli.arguments import variant
from keepkv.core.calibration import Calibration, needed
from keepkv.evaluation.setup import Variant
from keepkv.methods.base import METHODS, make_method, own_options
from keepkv.methods.traits import YOURS, group_of

FULL = "full"
OUT = {  # methods that are no arm, and why
    "fast-kvzip": "taught on other texts, in a table of its own",
    "lukv": "its authors' curves are of other models",
    "per-layer": "without shares it is snapkv",
    "ends": "made for pictures",
    "fastv": "made for pictures",
    "text-first": "made for pictures",
    "vl-cache": "made for pictures",
}
OPTIONS = {"duo-attention": ":profile=found"}  # its default is what its authors published, for other models
STRONG = (
    "auto", "long-document", "kvzip:allocate=pooled", "kvzip:plus=true", "kvzip:plus=true,allocate=pooled",
    "keepkv2:allocate=uniform", "adakv:score=keydiff", "adakv:score=curdkv", "compactor:allocate=adakv",
    "attention-matching:allocate=adakv",
)  # fmt: skip
CODED = tuple(f"{name}:codec=hadamard" for name in (FULL, "keepkv2", "keepkv3", "kvzip"))


def zoo() -> tuple[str, ...]:
    """Every method that compresses a prompt, as it comes. Those that keep a prompt whole and evict while a reply is
    decoded have a study of their own, ``benchmarks.long_decode``."""
    ours = (name for name in METHODS if name not in OUT and family(name) != YOURS)
    made = {name: make_method(name, {}) for name in ours}
    chosen = (name for name, one in made.items() if name != FULL and one.when.prefill and not one.prompt)
    return tuple(name + OPTIONS.get(name, "") for name in chosen)


def variants(arms: Iterable[str], files: Iterable[str]) -> dict[str, Variant]:
    """By arm, what runs it, with the calibration files that it needs; arms that need another one are left out."""
    kinds = {Calibration.load(file).kind: file for file in files}
    found = {}
    for arm in arms:
        one = variant(arm)
        method = make_method(one.method, own_options(one.options))
        wanted = needed(method.score, method.allocate)
        if wanted.keys() <= kinds.keys():
            own = {"calibration": [kinds[kind] for kind in wanted]} if wanted else {}
            found[arm] = replace(one, options={**one.options, **own})
    return found


def family(name: str) -> str:
    """What the file that a method is registered in says of itself."""
    return group_of(METHODS.factory(name))
