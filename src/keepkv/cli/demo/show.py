"""Shows a comparison of methods to a person."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from keepkv.cli.demo.material import Material
from keepkv.cli.demo.measure import Compared
from keepkv.cli.demo.strip import LEGEND, cell_of, cells, pointers, strip
from keepkv.cli.output import table
from keepkv.core.words import counted


def show(out: Console, material: Material, rows: list[Compared], budget: str) -> None:
    """Table, strips and examples of what ``measure`` found."""
    known = material.has_answers
    out.print(
        f"{counted(len(material.context), 'token')}, {counted(len(material.asked), 'question')}, budget {budget}. "
        "Compressed before any question was seen."
    )
    out.print()
    out.print(_results(rows, known))
    if not known:
        out.print("same: replies equal to the full cache's. agree: share of its tokens, one by one.")
    out.print("KL: divergence from the full cache on the answers, nats. Speeds: here, batch 1.")
    out.print("\n[bold]Which tokens survived[/bold]")
    _strips(out, material, rows)
    out.print("\n[bold]Some answers[/bold]")
    for i in _examples(rows):
        _answers(out, material, rows, i)


def _results(rows: list[Compared], known: bool) -> Any:
    names = ("right",) if known else ("same", "agree")
    made = table("method", *names, "KL", "cache MiB", "ratio", "prefill tok/s", "decode tok/s")
    for row in rows:
        agree = () if known else (f"{row.agreement:.0%}",)
        made.add_row(
            row.label,
            f"{row.right}/{len(row.replies)}",
            *agree,
            f"{row.kl:.3f}",
            f"{row.receipt.bytes / 2**20:.3f}",
            f"{row.receipt.ratio:.3f}",
            f"{row.prefill_per_second:.0f}",
            f"{row.decode_per_second:.0f}",
        )
    return made


def _strips(out: Console, material: Material, rows: list[Compared]) -> None:
    tokens = len(material.context)
    margin = max(len(row.label) for row in rows) + 2
    width = min(80, tokens, max(20, out.width - margin - 1))
    spots = [None if place is None else cell_of(place, tokens, width) for place in material.places]
    if any(spot is not None for spot in spots):
        out.print(" " * margin, pointers({spot for spot in spots if spot is not None}, width), sep="")
    for row in rows:
        marks: dict[int, bool] = {}
        for spot, reply in zip(spots, row.replies, strict=True):
            if spot is not None:
                marks[spot] = marks.get(spot, True) and reply.right
        out.print(row.label.ljust(margin), strip(cells(row.survival, width), marks), sep="")
    out.print(LEGEND, style="dim")
    if any(spot is not None for spot in spots):
        out.print("▼ a fact is here: green if its question was answered right, red if wrong", style="dim")


def _examples(rows: list[Compared], count: int = 3) -> list[int]:
    """The questions on which the methods differ most."""
    asked = range(len(rows[0].replies))
    split = {i: abs(sum(row.replies[i].right for row in rows) - len(rows) / 2) for i in asked}
    return sorted(sorted(asked, key=lambda i: split[i])[:count])


def _answers(out: Console, material: Material, rows: list[Compared], i: int) -> None:
    asked = material.asked[i]
    out.print(asked.words or asked.prompt.strip(), markup=False)
    margin = max(len(row.label) for row in rows) + 2
    for row in rows:
        reply = row.replies[i]
        mark = "[green]✓[/green]" if reply.right else "[red]✗[/red]"
        out.print(f"  {mark} {row.label.ljust(margin)}", end="")
        out.print(" ".join(reply.text.split()), markup=False)
