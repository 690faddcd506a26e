"""The command line as a whole: what it lists, what that costs, how it shows progress and how it is stopped."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from importlib import import_module
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import keepkv
from keepkv.cli import progress as shown
from keepkv.cli.output import one_line_errors, progress, progress_rows, table, waiting
from keepkv.cli.program import VERBS, program
from keepkv.cli.wording import escaped, flowed


def run(*args: str, code: int = 0, env: dict[str, str] | None = None) -> Any:
    result = CliRunner().invoke(program, list(args), env=env)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def python(*words: str) -> Any:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_python_m_keepkv_and_the_version() -> None:
    found = python("-m", "keepkv", "--version")
    assert found.returncode == 0 and found.stdout.startswith(f"keepkv {keepkv.__version__}, torch 2.")
    assert run("-V").stdout == found.stdout


def test_help_and_typos_import_no_engine() -> None:
    typed = [["--help"], ["--version"], ["genrate"], *([verb.name, "--help"] for verb in VERBS)]
    lines = (
        "import sys",
        "from keepkv.cli.main import app",
        f"for words in {typed}:",
        "    sys.argv[1:] = words",
        "    try: app()",
        "    except SystemExit: pass",
        "    assert not {'torch', 'transformers'} & set(sys.modules), words",
    )
    found = python("-c", "\n".join(lines))
    assert found.returncode == 0, found.stderr


def test_every_verb_is_listed_with_the_first_line_of_its_help_under_a_heading() -> None:
    listed = " ".join(run("--help").stdout.replace("│", " ").split())
    for verb in VERBS:
        module, _, name = verb.where.partition(":")
        loaded = import_module(f"keepkv.cli.{module}")
        if verb.parts:  # says itself what they are
            first = loaded.__doc__.strip().removeprefix(f"``keepkv {verb.name}``: ").capitalize()
        else:
            first = flowed(getattr(loaded, name).__doc__.partition("\n\n")[0])
        assert verb.line == first and verb.panel in listed
        assert f"{verb.name} {first}".replace("\\[", "[") in listed


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_has_words_for_values_and_flowing_paragraphs(verb: Any) -> None:
    for words in [[part] for part in verb.parts] or [[]]:
        wide = run(verb.name, *words, "--help", env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).stdout
        assert "<bool>" not in wide and "<int" not in wide and "list[" not in wide
        assert ("--progress" in wide) == verb.long
    assert not verb.parts or all(part in run(verb.name, "--help").stdout for part in verb.parts)


def test_help_texts() -> None:
    assert "keepkv[plots]" in run("report", "--help").stdout.replace("\n", "")
    assert (
        escaped("pip install 'keepkv[plots]'")
        == escaped(r"pip install 'keepkv\[plots]'")
        == r"pip install 'keepkv\[plots]'"
    )
    assert flowed("One\ntwo.\n\n\b\nExamples:\n  a\n  b") == "One two.\n\n\b\nExamples:\n  a\n  b"


def test_plain_progress_counts_and_says_what_is_left(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(shown, "SOON", 0.01)
    monkeypatch.setattr(shown, "NEXT", 0.01)
    before = shown.chosen.set(shown.How.plain)
    try:
        with progress(3) as step:
            step("keydiff")
            step("snapkv")
            time.sleep(0.1)
    finally:
        shown.chosen.reset(before)
    assert "snapkv, 2 of 3, 0 s so far, about 0 s left\n" in capsys.readouterr().err


def test_short_work_that_nobody_watches_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("loading"), progress_rows(3) as advance:
        advance(1, "x")
    assert capsys.readouterr().err == ""


def test_time_left() -> None:
    now = time.monotonic()
    assert shown.Work(10, done=2, began=now - 60).left() == "about 4 min left"
    assert shown.Work(10, counted=True, done=1, began=now - 60).left() == ""
    assert shown.Work(3, counted=True, done=5, began=now - 60).left() == ""  # more than was planned
    assert shown.Work(700, done=7, began=now - 120).left() == "about 3 h 18 min left"


def test_a_bar_for_a_person(monkeypatch: Any) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "44")
    monkeypatch.setenv("TERM", "xterm")
    with progress(11) as step:
        step("expected-attention")
        step("keydiff")
        time.sleep(0.3)
    assert "2 of 11" in screen.getvalue() and "keydiff" in screen.getvalue()


def stopped(work: Any) -> str:
    app = typer.Typer()
    app.command()(one_line_errors(work))
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 130 and not result.stdout.strip()
    return result.stderr


def test_ctrl_c_says_what_was_stopped_and_how_to_go_on() -> None:
    def rows() -> None:
        with progress_rows(32, after="Give the command again.") as advance:
            advance(8, "keydiff")
            raise KeyboardInterrupt

    def load() -> None:
        with progress(3) as step, waiting("loading a model"):
            step("x")
            raise KeyboardInterrupt

    def other() -> None:
        raise KeyboardInterrupt

    assert stopped(rows) == "\nstopped at 8 of 32, keydiff. Give the command again.\n"
    assert stopped(load) == f"\nstopped while loading a model. {shown.ANEW}\n"
    assert stopped(other) == f"\nstopped. {shown.ANEW}\n"


@pytest.mark.parametrize("width", [44, 80, 120])
def test_tables_break_no_word(width: int) -> None:
    made = table("method", "what it does", "right", "KL", "cache MiB", "ratio", "prefill tok/s", left=2)
    made.add_row(
        "expected-attention:statistics=stored", "scores by expected queries", "3/12", "0.123", "1.0", "0.1", "120"
    )
    made.add_row("keydiff", "keeps keys that differ", "12/12", "0.123", "1.0", "0.1", "12,000")
    out = Console(file=io.StringIO(), width=width, highlight=False)
    out.print(made)
    said = out.file.getvalue()  # type: ignore[attr-defined]
    words = "expected-attention:statistics=stored keydiff expected queries 3/12 12,000".split()
    assert all(word in said for word in words), said
    assert max(map(len, said.splitlines())) <= width


def test_headings_go_on_in_a_second_line_before_anything_is_cut() -> None:
    """The table of a real model in ``demo``, which has one column more, in a terminal of 80 columns."""
    made = table("method", "same", "agree", "KL", "cache MiB", "ratio", "prefill tok/s", "decode tok/s")
    made.add_row("expected-attention", "2/2", "100%", "0.000", "151.866", "1.016", "2,345", "12")
    out = Console(file=io.StringIO(), width=80, highlight=False)
    out.print(made)
    over, heads, row = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert over.split() == ["prefill", "decode"]
    assert heads.split() == ["method", "same", "agree", "KL", "cache", "MiB", "ratio", "tok/s", "tok/s"]
    assert row.split() == ["expected-attention", "2/2", "100%", "0.000", "151.866", "1.016", "2,345", "12"]
