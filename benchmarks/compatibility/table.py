"""Tries every architecture and writes the table of docs/compatibility.md.

python -m benchmarks.compatibility.table [CLASS ...]: with classes, their outcomes are only printed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import transformers

from benchmarks.compatibility.models import NOT_TRIED, architectures, build
from benchmarks.compatibility.trial import Outcome, attempt

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
_BEGIN, _END = "<!-- table -->\n", "<!-- end of table -->"


def sentence(outcome: Outcome) -> str:
    """What happens to a model, for the table."""
    if outcome.refused is not None:
        return f"refused: {outcome.refused}"
    kinds = " and ".join(sorted(set(outcome.left) - {"no cache of its own"}))
    if not outcome.compressed:
        text = f"nothing is compressed; left: {kinds}"
    elif kinds:
        text = f"full attention is compressed; left: {kinds}"
    else:
        text = "every layer is compressed"
    return "; ".join(
        (text, *(f"the model itself {x}" for x in outcome.plain), *(f"WRONG: {x}" for x in outcome.faults))
    )


def render(said: Mapping[str, str]) -> str:
    """The table of what happens, by model class, one line for each thing that happens."""
    by_outcome: dict[str, list[str]] = {}
    for name, text in said.items():
        by_outcome.setdefault(text, []).append(name)
    order = ("every", "full", "nothing", "refused", "not tried")
    lines = sorted(by_outcome.items(), key=lambda x: (next(i for i, y in enumerate(order) if x[0].startswith(y)), x[0]))
    rows = [f"| {text} | {len(names)} | {', '.join(f'`{name}`' for name in names)} |" for text, names in lines]
    head = f"With transformers {transformers.__version__}:\n\n| what happens | | model classes |\n|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


def read() -> tuple[str, dict[str, str]]:
    """The version of transformers that the table of the page was made with, and what it says, by model class."""
    table = PAGE.read_text("utf-8").split(_BEGIN)[1].split(_END)[0]
    [version] = re.findall(r"With transformers (\S+):", table)
    rows = re.findall(r"^\| (.+?) \| \d+ \| (.+) \|$", table, re.MULTILINE)
    return version, {name: text for text, names in rows for name in re.findall(r"`(\w+)`", names)}


def found(names: Iterable[str]) -> dict[str, str]:
    """What happens to each of ``names``."""
    said = {}
    for name in names:
        said[name] = sentence(attempt(build(name)))
        print(f"{name}: {said[name]}", file=sys.stderr, flush=True)
    return said


def main() -> None:
    """Try all, and write the page; or those that are named."""
    transformers.logging.set_verbosity_error()
    if sys.argv[1:]:
        found(sys.argv[1:])
        return
    said = found(architectures()) | {name: f"not tried: {why}" for name, why in NOT_TRIED.items()}
    before, rest = PAGE.read_text("utf-8").split(_BEGIN)
    table = render({name: said[name] for name in sorted(said, key=str.lower)})
    PAGE.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{rest.split(_END)[1]}", "utf-8")


if __name__ == "__main__":
    main()
