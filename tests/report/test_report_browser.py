"""The report of an evaluation as a browser really draws it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from decimal import ROUND_HALF_UP, Decimal
from html import unescape
from pathlib import Path
from typing import Any

import evaluation_rows
import pytest
from evaluation_rows import rows

from keepkv.report import Report, arrange, read
from keepkv.report.page import page
from keepkv.report.pool import ALL

pytest_plugins = ["report_run"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BEFORE = """<script>window.problems = []; addEventListener("error", (e) => problems.push(e.message));
console.error = (...all) => problems.push(all.join(" "));</script>"""
AFTER = f"<script>{Path(__file__).with_name('report_probe.js').read_text('utf-8')}</script>"


# Serious faults that axe finds, written into the page when it is done.
AXE = """<script>axe.run(document, { resultTypes: ["violations"] }).then(({ violations }) => {
  const found = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
  const list = found.map(({ id, nodes }) => [id, nodes.length, nodes[0].html.slice(0, 200)]);
  document.body.append(make("pre", { id: "probe" }, JSON.stringify({ problems, list })));
});</script>"""


def axe() -> str:
    """The source of axe-core, where npm put it: beside us, globally, or where AXE_CORE says."""
    folders = [Path("node_modules/axe-core"), Path("/usr/lib/node_modules/axe-core")]
    folders += [Path("/usr/local/lib/node_modules/axe-core")]
    places = [Path(os.environ.get("AXE_CORE", "nowhere")), *(folder / "axe.min.js" for folder in folders)]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        pytest.skip("no axe-core here: npm install axe-core, or set AXE_CORE to its axe.min.js")
    return found.read_text("utf-8").replace("</script", "<\\/script")


def look(text: str, folder: Path, fragment: str = "", size: str = "1280,2000", after: str = AFTER) -> dict[str, Any]:
    """What the page says of itself in a browser, before and after some of its buttons are pressed."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: install it to test the page in a browser")
    path = folder / "page.html"
    path.write_text(text.replace("<body>", "<body>" + BEFORE).replace("</body>", after + "</body>"), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += f"--disable-component-update --disable-sync --virtual-time-budget=5000 --window-size={size} --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", path.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert probe, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(probe[1]))
    return found


def shown(score: float | None) -> str:
    """As a script rounds: halves up."""
    return str(Decimal(score or 0).quantize(Decimal("0.001"), ROUND_HALF_UP))


def test_browser_draws_everything(report: Report, text: str, tmp_path: Path) -> None:
    found = look(text, tmp_path)
    assert found["problems"] == [] and found["ready"] == "yes"
    sections = ("score", "tasks", "pareto", "heat", "needle", "map", "text", "leak", "fidelity", "lost", "table")
    assert list(found["charts"]) == [f"s-{name}" for name in sections]
    for name, boxes in found["charts"].items():
        assert boxes and all(width > 20 and height > 5 for width, height in boxes), (name, boxes)
    assert found["answer"] == " 4821" and found["rings"] > 0
    assert found["bare"] == 0
    by_method, by_colour = (dict(pairs) for pairs in (found["colours"], [pair[::-1] for pair in found["colours"]]))
    assert all(by_method[m] == colour for m, colour in found["colours"])  # a method has one colour
    assert all(by_colour[colour] == m for m, colour in found["colours"] if "grey" not in colour)  # and a colour one

    def marks(task: str, mode: str) -> list[list[str]]:
        return [[cell.method, shown(cell.score)] for cell in report.at(task, mode, 1024, "10 %")]

    first, clicked, baselines, task = (found[name] for name in ("first", "clicked", "baselines", "task"))
    assert sorted(first["marks"]) == sorted(marks(ALL, "agnostic"))
    assert first["tables"] == ["Query-agnostic, 1,024 tokens, all tasks"]
    assert sorted(clicked["marks"]) == sorted(marks(ALL, "aware")) and clicked["marks"] != first["marks"]
    assert clicked["tables"] == ["Query-aware, 1,024 tokens, all tasks"]
    assert (clicked["shown"], baselines["shown"]) == (6, 3)
    assert task["task"] == "qa-1" and sorted(task["marks"]) == sorted(marks("qa-1", "aware"))
    assert found["down"] == sorted(found["down"], reverse=True) != found["up"] == sorted(found["up"])
    assert "task=qa-1" in found["hash"] and "mode=aware" in found["hash"]


def test_browser_opens_at_a_view_and_fits_a_phone(report: Report, text: str, tmp_path: Path) -> None:
    found = look(text, tmp_path, "#task=needle&mode=aware&length=512&budget=25+%25&methods=keepkv", "500,900")
    assert found["problems"] == []
    assert found["first"]["sub"].startswith("needle, query-aware, 512 tokens") and found["first"]["shown"] == 4
    expected = [[cell.method, shown(cell.score)] for cell in report.at("needle", "aware", 512, "25 %")]
    assert sorted(found["first"]["marks"]) == sorted(expected)
    assert found["wide"][0] <= found["wide"][1]  # nothing sticks out
    assert {"summary", "table"} <= set(found["edges"])  # what is cut off shows it


def test_browser_shows_where_in_a_picture_tokens_survive(copy: Path, tmp_path: Path) -> None:
    """A grid for each step of what was seen; a text alone has none."""
    assert look(page(arrange(read(copy))), tmp_path)["seen"] == []
    held = [row | {"vision": [*range(3, 3 + 24)], "grid": [2, 4]} for row in rows(copy, "maps")]
    evaluation_rows.lines(copy / "maps.jsonl", held)
    found = look(page(arrange(read(copy))), tmp_path)
    assert found["problems"] == [] and [count for _, count in found["seen"]] == [8, 8, 8]
    assert found["seen"][0][0].startswith("Where in step 1 tokens survive: ")


def test_browser_hides_what_was_not_measured(copy: Path, tmp_path: Path) -> None:
    for name in ("speed", "maps", "leakage", "fidelity"):
        (copy / f"{name}.jsonl").unlink()
    found = look(page(arrange(read(copy))), tmp_path)
    assert found["problems"] == []
    assert not {"s-map", "s-text", "s-leak", "s-fidelity"} & set(found["charts"])


def test_browser_draws_ten_methods_and_each_kind_of_budget_on_its_own_axis(tmp_path: Path) -> None:
    methods = ("snapkv", "random", "keepkv", "knorm", "tova", "h2o", "cam", "d2o", "adakv", "keydiff", "streaming-llm")
    sizes = evaluation_rows.Sizes(
        tasks=("qa-1", "secret"), lengths=(512,), methods=methods, budgets=(0.1, 0.25, 64), items=2, layers=1
    )
    run = evaluation_rows.write(tmp_path / "run", sizes, leakage=False, fidelity=False)
    found = look(page(arrange(read(run))), tmp_path)
    assert found["problems"] == []
    titles = [f"Score against budget: {what}" for what in ("share of the tokens", "slots per head")]
    assert [axis.split(": all tasks")[0] for axis in found["axes"]] == titles
    ten = found["ten"]
    assert len(set(ten["before"])) == len(set(ten["after"])) == 10
    assert ten["full"] and ten["free"] and len(set(ten["after"]) - set(ten["before"])) == 1
    assert "4 items: ±\u00a00.3" in found["lead"]


def test_browser_says_what_is_worse_than_random(copy: Path, tmp_path: Path) -> None:
    held = rows(copy, "fidelity")
    for row in held:
        if row["method"] == "keepkv" and row["budget"] == 0.1:
            row["metrics"]["kl"] |= {"mean": 9.0, "high": 9.5}
    evaluation_rows.lines(copy / "fidelity.jsonl", held)
    word, table = look(page(arrange(read(copy))), tmp_path)["fidelity"]
    assert word.startswith("Worse than random drops: keepkv:key=zip (10 %).")
    divergences = [float(re.match(r"[\d.]+", shown)[0]) for _, shown in table]  # type: ignore[index]
    assert divergences == sorted(divergences) and divergences[-1] == 9
    assert [name for name, shown in table if "above random" in shown] == ["keepkv:key=zip"]


@pytest.mark.parametrize(("scheme", "size"), [("light", "1280,2000"), ("dark", "500,900")])
def test_axe_finds_no_serious_fault(text: str, tmp_path: Path, scheme: str, size: str) -> None:
    if scheme == "dark":
        text = text.replace("screen and (prefers-color-scheme:dark)", "screen")
    found = look(text, tmp_path, size=size, after=f"<script>{axe()}</script>{AXE}")
    assert found == {"problems": [], "list": []}


def test_browser_goes_where_there_is_something(copy: Path, tmp_path: Path) -> None:
    """One task in each mode: choosing the other mode changes the task, and there is no score over all tasks."""
    for name in ("items", "cells", "speed", "maps"):
        held = [
            row for row in rows(copy, name) if (row["task"], row["mode"]) in (("qa-1", "agnostic"), ("secret", "aware"))
        ]
        evaluation_rows.lines(copy / f"{name}.jsonl", held)
    report = arrange(read(copy))
    assert report.start[:2] == ("qa-1", "agnostic")
    assert not [cell for cell in report.cells if cell.task == ALL]
    found = look(page(report), tmp_path, "#task=needle")
    assert found["problems"] == []
    assert (found["first"]["task"], found["clicked"]["task"]) == ("qa-1", "secret")
    assert found["clicked"]["sub"].startswith("secret, query-aware")
    assert found["clicked"]["tables"] == ["Query-aware, 1,024 tokens, secret"]


def test_browser_errors_would_be_seen(text: str, tmp_path: Path) -> None:
    found = look(text.replace("settle(true);\nrender();", "settle(true);\nrender();\nnothing.at.all();", 1), tmp_path)
    assert any("nothing is not defined" in problem for problem in found["problems"])
