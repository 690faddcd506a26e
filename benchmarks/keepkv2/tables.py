"""Tables of the study of ``keepkv2`` in Markdown.

    python -m benchmarks.keepkv2.tables [--work DIR] [--out benchmarks/keepkv2/results]

With ``--work`` the folders of ``run.py`` are first joined to ``cells.jsonl.gz`` and ``run.json`` in ``--out``; without,
these are read again. Writes one page a part. Needs no run to be finished: what is compared was run for all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .collect import Record, collect, read, write
from .plan import OURS, REHEARSED
from .pooled import Cells, Interval, difference, mean, ratio

ALONE = "-text"  # ends the name of a part that is another without questions to rehearse
ENOUGH = 0.95  # of the full cache's score
Key = tuple[str, Any]  # method and budget
NOTE = (
    "Mean over tasks and models of the mean over items. ±: half of the 95 % interval of the paired difference "
    f"{OURS} − method on the same items (bootstrap over items, stratified by task and model); bold where it excludes 0."
)
TITLES = {
    "agnostic": "Compressed before the question is seen",
    "lengths": "Other lengths, compressed before the question is seen",
    "aware": "Compressed with the question in sight",
    "rehearsed": "Compressed before the question is seen, questions of other kinds rehearsed",
    "decode": "Compressed while a long reply is decoded",
    "decode-kept": "Compressed while a long reply is decoded, the prompt kept by every method",
    "ablation": "Without one part of it",
    "fidelity": "Attention outputs and next tokens at questions and their true answers",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="of run.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    a = parser.parse_args()
    if a.work is not None:
        write(a.out, *collect(a.work))
    for name, text in pages(*read(a.out)).items():
        (a.out / f"{name}.md").write_text(text)
        print(a.out / f"{name}.md")


def pages(cells: Sequence[Record], run: Record) -> dict[str, str]:
    """Markdown by name of the page."""
    made = {}
    for part in run["parts"]:
        if part.endswith(ALONE):
            continue
        mine = [cell for cell in cells if cell["part"] == part]
        mine += [
            cell | {"method": f"{cell['method']}, the text alone"}
            for cell in cells
            if cell["part"] == part + ALONE and cell["method"] in REHEARSED
        ]
        made[part] = fidelity_page(mine, run) if part == "fidelity" else score_page(part, mine, run)
        if part == "agnostic":
            made["by-model"] = by(mine, "model", "Each model by itself", run)
            made["by-task"] = by(mine, "task", "Each task by itself, over all models", run)
    return made


def table_of(cells: Sequence[Record], name: str) -> dict[Key, Cells]:
    """By method and budget: ``name`` of the items that were run for every method at that budget, failed ones left out.

    The full cache stands at every budget.
    """
    budgets = [b for b in dict.fromkeys(cell["budget"] for cell in cells) if b != 1.0]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    found: dict[Key, dict[Any, dict[Any, float]]] = {(m, b): {} for b in budgets for m in methods}
    for budget in budgets:
        mine = [cell for cell in cells if cell["budget"] == budget or cell["method"] == "full"]
        for place in dict.fromkeys(map(_place, mine)):
            here = {cell["method"]: cell for cell in mine if _place(cell) == place}
            whole = set.intersection(*(set(here[m]["seeds"]) if m in here else set() for m in methods))
            for method, cell in here.items():
                values = zip(cell["seeds"], cell.get(name, [None] * len(cell["seeds"])), strict=True)
                held = {seed: value for seed, value in values if seed in whole and value is not None}
                if held:
                    found[method, budget][place] = held
    return found


def _place(cell: Record) -> tuple[Any, ...]:
    return cell["model"], cell["task"], cell["length"], cell["mode"]


def score_page(part: str, cells: Sequence[Record], run: Record) -> str:
    """Scores, differences and measured bytes; the smallest budget that is enough."""
    lines = [f"# {TITLES[part]}", "", *header(cells, run, part), NOTE]
    for length in dict.fromkeys(cell["length"] for cell in cells):
        mine = [cell for cell in cells if cell["length"] == length]
        found = table_of(mine, "score")
        lines += ["", f"## Score at {length} tokens{scope(found)}", "", *means(found)]
        lines += ["", f"## {OURS} minus method at {length} tokens", "", *against(found, difference)]
        if part == "agnostic":
            lines += ["", "## Smallest budget with 95 % of the full cache's score", "", *enough(mine)]
    lines += ["", "## Bytes, as a share of a plain cache", "", *sizes(cells)]
    return "\n".join([*lines, *failures(cells)]) + "\n"


def by(cells: Sequence[Record], key: str, title: str, run: Record) -> str:
    """Scores and differences of each model, or task."""
    lines = [f"# {title}", "", *header(cells, run, cells[0]["part"]), NOTE]
    for value in dict.fromkeys(cell[key] for cell in cells):
        found = table_of([cell for cell in cells if cell[key] == value], "score")
        lines += ["", f"## {value}{scope(found)}", "", *means(found), "", f"{OURS} minus method:", ""]
        lines += against(found, difference)
    return "\n".join(lines) + "\n"


def fidelity_page(cells: Sequence[Record], run: Record) -> str:
    """Errors, and ours as a share of each other method's."""
    lines = [f"# {TITLES['fidelity']}", "", *header(cells, run, "fidelity")]
    lines += ["Smaller is better. Ratios have 95 % intervals (paired bootstrap as for scores); bold where below 1."]
    for name, words in (
        ("output_error", "‖o′−o‖ / ‖o‖ of attention outputs"),
        ("kl", "KL(full ‖ compressed), nats"),
        ("answer_kl", "KL at tokens of the answer, nats"),
    ):
        found = table_of(cells, name)
        lines += ["", f"## {words}{scope(found)}", "", *means(found, least=True)]
        lines += ["", f"{OURS} as a share of the method's:", "", *against(found, ratio), ""]
        for mine in [m for m in dict.fromkeys(m for m, _ in found) if m.startswith(OURS)]:
            for budget in budgets_of(found):
                lines += best_rival(found, mine, budget)
    return "\n".join([*lines, *failures(cells)]) + "\n"


def best_rival(found: dict[Key, Cells], mine: str, budget: Any) -> list[str]:
    """What ``mine`` has, as a share of the smallest of all that are not forms of ours."""
    others = {m: mean(c) for (m, b), c in found.items() if b == budget and not m.startswith((OURS, "full")) and c}
    best = min(others, key=others.__getitem__, default=None)
    one = ratio(found.get((mine, budget), {}), found[best, budget]) if best else None
    if one is None:
        return []
    span = f"({number(one.low)} … {number(one.high)})"
    return [f"- `{mine}`, {share(budget)}: {number(one.value)} {span} of the best rival's, `{best}`"]


def means(found: dict[Key, Cells], least: bool = False) -> list[str]:
    """Methods down, the best first, and budgets across; the best of each budget in bold."""
    budgets, worst = budgets_of(found), float("inf") if least else float("-inf")
    held = {key: mean(cells) if cells else worst for key, cells in found.items()}
    methods = [m for m in dict.fromkeys(method for method, _ in held) if m != "full"]
    sign = 1 if least else -1
    methods.sort(key=lambda m: sign * sum(held[m, b] for b in budgets))
    best = {b: min((sign * held[m, b] for m in methods), default=None) for b in budgets}
    rows = []
    for method in (["full"] if any(m == "full" for m, _ in held) else []) + methods:
        texts = [number(held[method, b]) for b in budgets]
        marks = ["**" * (method != "full" and sign * held[method, b] == best[b]) for b in budgets]
        rows.append([f"`{method}`", *(f"{mark}{text}{mark}" for mark, text in zip(marks, texts, strict=True))])
    return markdown(["method", *map(share, budgets)], rows)


def against(found: dict[Key, Cells], compare: Callable[[Cells, Cells], Interval | None]) -> list[str]:
    """Ours against each method, those first that come nearest."""
    budgets = budgets_of(found)
    methods = [m for m in dict.fromkeys(m for m, _ in found) if m != OURS and (m != "full" or compare is difference)]
    made = {(m, b): compare(found.get((OURS, b), {}), found[m, b]) for m in methods for b in budgets}
    sign = 1 if compare is difference else -1
    total = {m: sum(sign * one.value for b in budgets if (one := made[m, b]) is not None) for m in methods}
    neutral = 0.0 if compare is difference else 1.0
    rows = [[f"`{m}`", *(_cell(made[m, b], neutral) for b in budgets)] for m in sorted(methods, key=total.__getitem__)]
    return markdown([f"{OURS} against", *map(share, budgets)], rows)


def _cell(one: Interval | None, neutral: float) -> str:
    if one is None:
        return "–"
    text = number(one.value, signed=neutral == 0.0) + (f" ± {number(one.half)}" if one.half == one.half else "")
    clear = one.low > neutral or one.high < neutral if neutral == 0.0 else one.high < neutral
    return f"**{text}**" if clear else text


def enough(cells: Sequence[Record]) -> list[str]:
    """For each method, over all models and for each."""
    names = list(dict.fromkeys(cell["model"] for cell in cells))
    groups = {"all": cells} | {name: [cell for cell in cells if cell["model"] == name] for name in names}
    found = {name: table_of(mine, "score") for name, mine in groups.items()}
    methods = [m for m in dict.fromkeys(m for m, _ in found["all"]) if m != "full"]
    least = {(m, name): smallest(table, m) for m in methods for name, table in found.items()}
    methods.sort(key=lambda m: [least[m, name] or 2.0 for name in groups])
    rows = [[f"`{m}`", *(share(least[m, name]) if least[m, name] else "–" for name in groups)] for m in methods]
    return markdown(["method", *groups], rows)


def smallest(found: dict[Key, Cells], method: str) -> float | None:
    """The smallest budget from which on ``method`` has 95 % of the full cache's score at every larger one."""
    least = None
    for budget in sorted(budgets_of(found), reverse=True):
        full = found.get(("full", budget), {})
        if not full or not mean(found[method, budget]) >= ENOUGH * mean(full):
            break
        least = budget
    return least


def sizes(cells: Sequence[Record]) -> list[str]:
    """What the receipts say, mean over cells."""
    budgets = [b for b in dict.fromkeys(cell["budget"] for cell in cells) if b != 1.0]
    rows = []
    for method in dict.fromkeys(cell["method"] for cell in cells if cell["method"] != "full"):
        row = [f"`{method}`"]
        for budget in budgets:
            mine = [c["ratio"] for c in cells if c["method"] == method and c["budget"] == budget and c["ratio"]]
            row.append(number(sum(mine) / len(mine), digits=4) if mine else "–")
        rows.append(row)
    return markdown(["method", *map(share, budgets)], rows)


def header(cells: Sequence[Record], run: Record, part: str) -> list[str]:
    """What it was made with."""
    made = run["environments"][0]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    held = run["parts"][part]
    items = sorted(set(held["items"].values()))
    names = ", ".join(held["models"])
    text = f"Models {names}, each with items of its own, {made['device']}, {made['dtype']}; {versions}."
    counts = f"{len(held['items'])} tasks of {' or '.join(map(str, items))} contexts for each model"
    return [text, f"{counts}; every method keeps {held['sinks']} first and {held['window']} last tokens.", ""]


def scope(found: dict[Key, Cells]) -> str:
    """How many cells and items are compared, of the budget that has fewest."""
    counts = [(len(cells), sum(map(len, cells.values()))) for cells in found.values()]
    if not counts:
        return ""
    cells, items = min(counts)
    return f" ({cells} of model × task, {items} items)"


def failures(cells: Sequence[Record]) -> list[str]:
    """What could not be run, by method."""
    lines = [""]
    for method in dict.fromkeys(cell["method"] for cell in cells if cell["failed"]):
        mine = [cell for cell in cells if cell["method"] == method and cell["failed"]]
        lines.append(f"`{method}`: {sum(c['failed'] for c in mine)} items failed, e.g. {mine[0].get('error')}")
    return lines if len(lines) > 1 else []


def budgets_of(found: dict[Key, Cells]) -> list[Any]:
    return list(dict.fromkeys(budget for _, budget in found))


def share(budget: Any) -> str:
    """``7.5 %``, or slots."""
    return f"{100 * budget:g} %" if isinstance(budget, float) else f"{budget} slots"


def number(value: float, signed: bool = False, digits: int = 3) -> str:
    """``.682``, ``−.012``."""
    if value != value or abs(value) == float("inf"):
        return "–"
    text = f"{abs(value):.{digits}f}"
    text = text[1:] if text.startswith("0.") else text
    return ("−" if value < 0 else "+" * signed) + text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" if line[0] != "---" else "|---" * len(line) + "|" for line in lines]


if __name__ == "__main__":
    main()
