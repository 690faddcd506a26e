"""The report of an evaluation: what is computed, and what is written."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import evaluation_rows
import pytest
from evaluation_rows import data_of, rows
from typer.testing import CliRunner

from keepkv.cli.program import program
from keepkv.evaluation.summary import over_tasks
from keepkv.measure import wilson
from keepkv.report import Report, ReportError, arrange, output, read, steps, write
from keepkv.report import page as page_of
from keepkv.report.budgets import axes, budget_label
from keepkv.report.notes import failures, spread_of
from keepkv.report.numbers import front, peaks
from keepkv.report.page import page
from keepkv.report.pool import ALL
from keepkv.report.style import MOST

pytest_plugins = ["report_run"]


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


# What is read


def test_pooled_scores_are_means_over_tasks_in_pairs(directory: Path, report: Report) -> None:
    """Tasks weigh the same, and the needle's grid is not one of them."""
    items: dict[tuple[Any, ...], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows(directory, "items"):
        if row["task"] != "needle":
            items[row["mode"], row["length"], row["method"], row["budget"]][row["task"]][row["seed"]] = (
                row["score"] or 0.0
            )
    pooled = [cell for cell in report.cells if cell.task == ALL]
    assert len(pooled) == len(items)
    for cell in pooled:
        own, full = items[cell.mode, cell.length, cell.method, cell.budget], items[cell.mode, cell.length, "full", 1.0]
        assert cell.score == pytest.approx(fmean(fmean(of.values()) for of in own.values()))
        apart = {task: [of[seed] - full[task][seed] for seed in sorted(of)] for task, of in sorted(own.items())}
        differences = over_tasks(apart)
        assert differences is not None
        found = (cell.minus_full, cell.minus_full_low, cell.minus_full_high)
        assert found == (differences.mean, differences.low, differences.high)
        assert cell.n == 16 and cell.failed == (1 if cell.method == "kvpress/snapkv" else 0)


def test_a_method_that_missed_items_is_not_pooled(copy: Path) -> None:
    held = [row for row in rows(copy, "items") if not (row["method"] == "keepkv" and row["task"] == "secret")]
    evaluation_rows.lines(copy / "items.jsonl", held)
    found = arrange(read(copy))
    assert not [cell for cell in found.cells if cell.task == ALL and cell.method == "keepkv"]
    where = [f"{mode}, {length} tokens" for mode in ("agnostic", "aware") for length in ("512", "1,024")]
    notes = [note for note in found.notes if note.startswith("keepkv: given 8 of 16 items")]
    assert len(notes) == 1 and all(f"8 of 16 items ({place})" in notes[0] for place in where)
    assert any("cells count other items than items.jsonl holds" in note for note in found.notes)
    assert "keepkv" in found.methods


def test_what_compressed_nothing_and_what_was_not_measured_is_said(copy: Path) -> None:
    for name in ("items", "cells"):
        held = [row for row in rows(copy, name) if row["method"] != "random"]
        for row in held:
            row["compressed"] = row["method"] != "keepkv"
        evaluation_rows.lines(copy / f"{name}.jsonl", held)
    notes = arrange(read(copy)).notes
    assert "keepkv compressed nothing in 288 items: read those scores as the full cache's." in notes
    assert "Not measured, so there is nothing to compare with: random." in notes


def test_methods_are_ranked_and_baselines_always_shown(report: Report) -> None:
    scores = [cell.score for cell in report.at(*report.start)]
    assert scores == sorted(scores, key=lambda score: -(score or 0))
    assert report.methods == [cell.method for cell in report.at(*report.start)]
    assert {"full", "random", "snapkv"} <= set(report.chosen)


def test_ten_methods_are_chosen_and_of_each_family_the_best_first(tmp_path: Path) -> None:
    variants = [f"keepkv:threshold={i}" for i in range(8)]
    others = ["knorm", "tova", "h2o", "cam"]
    sizes = evaluation_rows.Sizes(
        tasks=("qa-1",), lengths=(512,), modes=("agnostic",), budgets=(0.1,), layers=1,
        methods=("snapkv", "random", *variants, *others),
    )  # fmt: skip
    found = arrange(read(evaluation_rows.write(tmp_path / "run", sizes, leakage=False, fidelity=False)))
    chosen = [name for name in found.chosen if name not in ("full", "random", "snapkv")]
    assert len(chosen) == MOST == 7 and len(found.chosen) == 10
    assert set(others) < set(chosen)
    best = [name for name in found.methods if name in variants][:3]
    assert [name for name in chosen if name in variants] == best
    assert chosen == sorted(chosen, key=found.methods.index)


def test_failures_are_counted(directory: Path, report: Report) -> None:
    failed = [row for row in rows(directory, "items") if row["score"] is None]
    assert report.failures == [("kvpress/snapkv", failed[0]["error"], len(failed), ["qa-1"])]


def test_failures_that_differ_in_numbers_alone_are_one(report: Report) -> None:
    one = report.evaluation.items[0]
    errors = [f"a ({n}) must match b ({n + 318}) at dimension 3" for n in (674, 669, 672)] + ["out of memory"]
    items = [replace(one, score=None, error=error, task=f"qa-{i}") for i, error in enumerate(errors)]
    assert failures(items) == [
        (one.method, "a (…) must match b (…) at dimension 3", 3, ["qa-0", "qa-1", "qa-2"]),
        (one.method, "out of memory", 1, ["qa-3"]),
    ]


def test_losses_are_summed_up_by_method(report: Report) -> None:
    below = [cell for cell in report.cells if cell.task != ALL and (cell.minus_full_high or 0) < 0]
    below = [cell for cell in below if cell.method not in ("full", "random")]
    assert below and sum(one.below for one in report.losses) == len(below)
    for one in report.losses:
        own = [cell for cell in below if cell.method == one.method]
        assert one.below == len(own) and one.worst.minus_full == min(cell.minus_full or 0 for cell in own)
        assert one.cells == len(report.tasks) * len(report.lengths) * len(report.modes) * len(report.budgets)
    shares = [one.below / one.cells for one in report.losses]
    assert shares == sorted(shares, reverse=True)


def test_few_items_are_said(tmp_path: Path) -> None:
    sizes = evaluation_rows.Sizes(tasks=("qa-1", "secret"), lengths=(512,), modes=("agnostic",), items=4, layers=1)
    found = arrange(read(evaluation_rows.write(tmp_path / "run", sizes, leakage=False, fidelity=False)))
    assert found.notes[0].startswith("4 items per cell: a task's score is known to ± 0.3 at worst")
    wide = [spread_of(n) for n in (4, 16, 100)]
    assert wide == pytest.approx([(high - low) / 2 for low, high in (wilson(2, 4), wilson(8, 16), wilson(50, 100))])
    assert "<dd>4 as a rule, 3 to 4</dd>" in page(found)


def test_front() -> None:
    points = [(1.0, 0.5, "a"), (2.0, 0.4, "b"), (3.0, 0.9, "c"), (3.0, 0.8, "d")]
    assert [name for _, _, name in front(points, small=True)] == ["a", "c"]
    assert [name for _, _, name in front(points, small=False)] == ["c"]
    points = [(1.0, 0.1, "a"), (1.02, 0.9, "b"), (2.0, 0.95, "c")]  # two per cent fewer bytes are no merit
    assert [name for _, _, name in front(points, small=True)] == ["b", "c"]


def test_peaks_are_the_worst_of_each_curve(report: Report) -> None:
    curves: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in report.evaluation.leakage:
        curves[row.method, row.order, row.spans].append(row.leak or 0)
    found = {(row.method, row.order, row.spans): row.leak for row in peaks(report.evaluation.leakage)}
    assert found == {key: max(leaks) for key, leaks in curves.items()} and len(found) == 5 * 3 * 4


def test_labels() -> None:
    labels = [budget_label(one) for one in (0.1, 1.0, 1, 512, "256MiB")]
    assert labels == ["10 %", "100 %", "1 slots", "512 slots", "256MiB"]


def test_shares_slots_and_bytes_have_an_axis_each() -> None:
    found = axes([64, 0.5, "2MiB", 0.05, 0.1, 256, 128, "1MiB"])
    assert [axis.budgets for axis in found] == [
        ["5 %", "10 %", "50 %"], ["64 slots", "128 slots", "256 slots"], ["1MiB", "2MiB"],
    ]  # fmt: skip
    assert found[1].at == pytest.approx([0, 0.5, 1]) and found[2].at == [0, 1]
    assert found[0].at[1] == pytest.approx(0.301, abs=1e-3)
    assert [axis.at for axis in axes([64, 0.1])] == [[0.5], [0.5]]
    assert [axis.budgets for axis in axes([1.0, "10%bytes"])] == [["10 % of bytes", "100 %"]]
    assert [axis.budgets for axis in axes([1.0, 0.1, "10%bytes"])] == [["10 %", "100 %"], ["10 % of bytes"]]


# What is written


def test_page_refers_to_nothing_outside(report: Report) -> None:
    from keepkv.report.figures import all_figures, svg

    drawn = next(svg(figure) for name, figure in all_figures(report) if name.startswith("score-"))
    text = page(report, [drawn])
    refers = ("src", "href", "srcset", "action", "poster", "data")
    links = [value for _, given in Tags(text).found for name, value in given.items() if name.split(":")[-1] in refers]
    assert links.count("data:,") == 1  # no icon is asked for
    assert all(link == "data:," or (link or "").startswith("#") for link in links)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert not re.search(r"@import|\bfetch\(|XMLHttpRequest|\bimport\(|WebSocket|sendBeacon", text)


def test_numbers_on_the_page_are_those_of_the_rows(directory: Path, report: Report, text: str) -> None:
    data = data_of(text)
    head = ("task", "mode", "length", "method", "budget")
    names = {"task": data["tasks"], "mode": [mode for mode, _ in data["modes"]], "length": data["lengths"]}
    names |= {"method": [one["name"] for one in data["methods"]], "budget": data["budgets"]}
    shown = {}
    for row in data["cells"]:
        key = tuple(names[name][i] for name, i in zip(head, row, strict=False))
        shown[key] = dict(zip(data["columns"], row[5:], strict=True))
    assert len(shown) == len(report.cells)
    for row in rows(directory, "cells"):
        cell = shown[(*(row[name] for name in head[:4]), budget_label(row["budget"]))]
        assert {name for name in cell if cell[name] is None} == {name for name in cell if row[name] is None}
        known = {name: value for name, value in cell.items() if value is not None}
        assert {name: row[name] for name in known} == pytest.approx(known, rel=1e-5)


def test_tables_have_the_scores(report: Report, text: str, tmp_path: Path) -> None:
    from keepkv.report.markdown import markdown

    table = re.search(r'<table class="summary" data-mode="aware" data-length="512">.*?</table>', text, re.DOTALL)
    assert table
    by_html = {
        unescape(name).replace("<wbr>", ""): [float(score) for score in re.findall(r"<td>([\d.]+)", cells)]
        for name, cells in re.findall(r"<th scope=row>(.*?)</th>(.*?)</tr>", table[0])
    }
    section = markdown(report).split("## Query-aware, 512 tokens")[1].split("\n## ")[0]
    by_markdown = {
        name: [float(cell.split()[0]) for cell in cells.split(" | ")]
        for name, cells in re.findall(r"^\| ([^|]+) \| (.*) \|$", section, re.MULTILINE)
        if name != "method"
    }
    for method in report.methods:
        own = [c for c in report.cells if (c.task, c.mode, c.length, c.method) == (ALL, "aware", 512, method)]
        expected = [round(cell.score or 0, 3) for cell in own] * (3 if method == "full" else 1)
        assert by_html[method] == by_markdown[method] == expected


def test_strings_from_data_are_never_markup(copy: Path) -> None:
    evil = '</script><script>alert("{{data}}")</script><img src=x>'
    for name in ("items", "cells", "maps"):
        evaluation_rows.lines(
            copy / f"{name}.jsonl",
            [row | ({"method": evil} if row["method"] == "keepkv" else {}) for row in rows(copy, name)],
        )
    found = arrange(read(copy))
    text = page(replace(found, notes=[evil]))
    tags = [tag for tag, _ in Tags(text).found]
    assert tags.count("script") == 2 and "img" not in tags and "i" in tags
    assert evil in [one["name"] for one in data_of(text)["methods"]]
    from keepkv.report.markdown import markdown

    links = "[a](http://b) **c** `d` | e & <f> www.g.h ~~i~~ #1 @j"
    written = markdown(replace(found, notes=[links]))
    assert "<script>" not in written and "<img" not in written and "&lt;script&gt;" in written
    note = next(line for line in written.splitlines() if line.startswith("> "))
    assert note == r"> \[a\](http:\//b) \*\*c\*\* \`d\` \| e &amp; &lt;f&gt; www\.g.h \~\~i\~\~ \#1 \@j"


def test_infinite_divergence_is_unknown(copy: Path) -> None:
    held = rows(copy, "fidelity")
    held[1]["metrics"]["kl"] |= {"mean": float("inf"), "high": float("inf")}
    evaluation_rows.lines(copy / "fidelity.jsonl", held)
    assert data_of(page(arrange(read(copy))))["fidelity"][1]["kl"] == [None, held[1]["metrics"]["kl"]["low"], None]


def test_maps_that_do_not_fit_are_left_out_and_counted(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = data_of(page(report))
    assert whole["maps_left_out"] == 0 and len(whole["maps"]["texts"]) == 1  # one text, however many maps of it
    monkeypatch.setattr(page_of, "MAPS_LIMIT", 5000)
    fewer = data_of(page(report))
    assert 0 < len(fewer["maps"]["rows"]) == len(whole["maps"]["rows"]) - fewer["maps_left_out"]


def test_survival_is_packed_to_a_64th(directory: Path, text: str) -> None:
    data, first = data_of(text), next(row for row in rows(directory, "maps") if row["method"] == "keepkv")
    steps = data["maps"]["steps"]
    found = next(
        row
        for row in data["maps"]["rows"]
        if row[:3] == [first["task"], first["mode"], first["length"]]
        and data["methods"][row[3]]["name"] == "keepkv"
        and row[4] == budget_label(first["budget"])
    )
    assert [steps.index(one) / 63 for one in found[7]] == pytest.approx(first["survival"], abs=1 / 126)
    assert found[6] == first["kept"]


def test_figures_show_the_same_numbers(report: Report) -> None:
    pytest.importorskip("matplotlib")
    from keepkv.report.figures.scores import score

    figure = score(report, "aware", 512)
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    for method in report.chosen:
        own = [c for c in report.cells if (c.task, c.mode, c.length, c.method) == (ALL, "aware", 512, method)]
        assert drawn[method] == [cell.score for cell in own] * (2 if method == "full" else 1)


def test_every_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = evaluation_rows.Sizes(
        tasks=("qa-1", "needle"), lengths=(512,), modes=("decode",), budgets=(0.1, 64, "1MiB")
    )
    found = arrange(read(evaluation_rows.write(tmp_path / "run", sizes)))
    told: list[str] = []
    written = write(found, tmp_path / "out", told.append)
    assert len(told) == steps() and told[-1] == "page"
    assert {path.stem.split("-")[0] for path in written.figures} == {
        "score", "tasks", "pareto", "heat", "needle", "kept", "survival", "leakage", "fidelity",
    }  # fmt: skip
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written.figures)
    assert written.page.read_text("utf-8").count("<figure><svg") == 1
    assert found.budgets == ["10 %", "64 slots", "1MiB"] and len(found.axes("qa-1", "decode", 512)) == 3


# The command


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(program, ["report", *args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_command(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    monkeypatch.setattr(output, "find_spec", lambda name: None)  # as without matplotlib
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    result = run(str(directory), "--out", str(tmp_path / "a" / "b"), "--open")
    assert "keepkv[plots]" in result.stderr and "report.html" in result.stdout
    assert opened == [(tmp_path / "a" / "b" / "report.html").as_uri()]
    assert (tmp_path / "a" / "b" / "report.html").read_text("utf-8") == page(report)
    found = json.loads(run(str(directory), "--out", str(tmp_path), "--json").stdout)
    assert Path(found["table"]).read_text("utf-8").startswith("# Scores of embedded") and found["figures"] == []


def test_command_fails_with_one_line(tmp_path: Path) -> None:
    assert run(str(tmp_path), code=2).stderr.count("\n") == 1


def test_a_place_that_cannot_be_written_to(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot write to"):
        write(report, tmp_path / "file")


def test_help_shows_examples() -> None:
    assert "keepkv report results" in run("--help").output.split("Examples:")[1]
