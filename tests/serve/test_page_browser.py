"""The page of a server as a browser shows it, used with the keyboard, in light, in the dark, and 400 pixels wide."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving_http import running

from keepkv.serve.page import page
from keepkv.tasks import demo_document

pytest_plugins = ["serving_http"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLACES = [Path("node_modules"), Path("/usr/lib/node_modules"), Path("/usr/local/lib/node_modules")]


def package(name: str, variable: str) -> Path | None:
    """Where npm put a package: beside us, globally, or where the environment says."""
    places = [Path(os.environ[variable])] if variable in os.environ else [place / name for place in PLACES]
    return next((place.absolute() for place in places if place.exists()), None)


def test_the_page_is_one_file_that_fetches_nothing() -> None:
    text = page()
    assert "{{" not in text and not re.findall(r"(?:src|href)=\"(?!data:)", text)
    assert not re.findall(r"https?://", text) and "@import" not in text and "url(" not in text


@pytest.fixture(scope="module")
def found(loaded: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium, to test the page in a browser")
    if shutil.which("node") is None:
        pytest.skip("no node here: it drives the browser")
    playwright = package("playwright-core", "PLAYWRIGHT_CORE")
    if playwright is None:
        pytest.skip("no playwright-core here: npm install playwright-core, or set PLAYWRIGHT_CORE to its folder")
    axe = package("axe-core/axe.min.js", "AXE_CORE")
    folder = Path(os.environ.get("KEEPKV_PICTURES", tmp_path_factory.mktemp("pictures")))
    with running(*loaded) as server:
        command = ["node", str(Path(__file__).with_name("page_probe.mjs")), server.url, CHROMIUM, str(folder)]
        command += [] if axe is None else [str(axe)]
        environment = {**os.environ, "PLAYWRIGHT_CORE": str(playwright)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not server.engine.contexts.list(), "the page leaves its document on the server"
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.mark.slow
def test_nothing_goes_wrong_and_nothing_sticks_out(found: dict[str, Any]) -> None:
    assert found["problems"] == [] and found["unlabelled"] == []
    assert len(found["wide"]) == 8 and all(width <= window for width, window in found["wide"].values())
    assert found["first"]["disabled"] and found["first"]["methods"] > 10
    assert "is no text" in found["binary"]


@pytest.mark.slow
def test_axe_finds_no_serious_fault_on_it(found: dict[str, Any]) -> None:
    if not found["axe"]:
        pytest.skip("no axe-core here: npm install axe-core, or set AXE_CORE to its axe.min.js")
    assert not {name: faults for name, faults in found["axe"].items() if faults}


@pytest.mark.slow
def test_a_document_is_read_and_asked_about(found: dict[str, Any]) -> None:
    document, questions = demo_document()
    assert "".join(text for text, _ in found["runs"]).endswith(document)
    shares = {kept for _, kept in found["runs"]}
    assert min(shares) == 0 and max(shares) > 0.5 and len(shares) > 4
    assert found["question"] == questions[0].prompt.strip() and questions[0].answer.strip() in found["reply"]
    assert found["focus"] == "question" and "behind" in found["line"]
    assert found["held"], "what the server holds is told as soon as the document is"
    first, second = (re.findall(r"at most ([\d.]+ \w+)", text)[0] for text in found["cost"])
    assert first != second
    assert "kvzip" in found["receipt"]["method"] and "ratio 0." in found["receipt"]["memory"]
    assert found["heads"] == 8 and "each cell a KV head" in found["note"] and "instead of" in found["lead"]
