"""README, documentation and examples do what they say: snippets run as they stand, commands and names exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from snippets import Snippet, agrees, as_installed, blocks, every_registry, run, runs, snippets
from zoo import ZOO

import keepkv
from keepkv.cli.program import VERBS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STUDIES = sorted((ROOT / "benchmarks").rglob("*.md"))


@pytest.fixture
def registries_as_they_were() -> Any:
    with every_registry():
        yield


def shown(page: Path) -> list[Snippet]:
    """What of a page is run."""
    return [snippet for snippet in snippets(page.read_text("utf-8")) if runs(snippet)]


@pytest.mark.usefixtures("registries_as_they_were")
@pytest.mark.parametrize("page", [page for page in PAGES if shown(page)], ids=lambda page: page.name)
def test_snippets_run_and_print_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, snippet in enumerate(shown(page)):
        printed = run(snippet, names, f"{page.name}, snippet {number}")
        assert snippet.output is None or agrees(snippet.output, printed), f"{snippet.code}prints\n{printed}"


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run(example: Path) -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    code = as_installed(example.read_text("utf-8"))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=offline)
    assert found.returncode == 0 and found.stdout, found.stderr


def commands(page: Path) -> list[list[str]]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"(?<!`)`((?:make|keepkv) [^`…]*)", page.read_text("utf-8"))
    return [shlex.split(line, comments=True) for line in lines]


OPTIONS = {"--help", "--version"}  # of the program itself


@cache
def options(verb: str) -> set[str]:
    [command] = [one.load() for one in VERBS if one.name == verb]
    parts = [command, *getattr(command, "commands", {}).values()]
    return {option for part in parts for parameter in part.params for option in parameter.opts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for program_name, *words in (command for command in commands(page) if command):
        if program_name == "make":
            assert words[0] in targets, words
        if program_name == "keepkv":
            known = OPTIONS if words[0].startswith("-") else options(words[0])
            assert {word for word in words if word.startswith("-")} <= known, words


def test_every_method_is_listed() -> None:
    """``python docs/site/method_pages.py`` writes the list."""
    pages, text = site("method_pages"), (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert pages.with_listing(text) == text
    assert set(re.findall(r"\(methods/(.*)\.md\)", pages.linked(text))) == {info.name for info in keepkv.methods()}


def test_every_method_has_a_page() -> None:
    pages = site("method_pages")
    for info in pages.ordered():
        text = pages.page(info)
        assert all(f"`{name}`" in text for name in info.options), info.name
        assert info.paper.removeprefix("arXiv ") in text and "``" not in text.replace("```", ""), info.name


def test_architectures_that_are_claimed_are_tested() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    [claimed] = re.findall(r"tiny random models of these families: (.*?)\.", text, re.DOTALL)
    assert set(re.findall("`(.*?)`", claimed)) == set(ZOO)


@pytest.mark.parametrize("page", PAGES + STUDIES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES + STUDIES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    files = re.findall(r"(?<![\w/.:])((?:benchmarks|docs|examples|src|tests)/[\w./-]*\w)", text)
    modules = re.findall(r"python -m (benchmarks\.[\w.]*\w)", text.replace("benchmarks.STUDY.NAME", ""))
    files += [f"{module.replace('.', '/')}.py" for module in modules]
    assert not [name for name in files if not (ROOT / name).exists()]


def navigation() -> dict[str, list[str]]:
    """Pages of each group of the site, in order."""
    home, *groups = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    assert home == {"Home": "index.md"}
    return {group: pages for entry in groups for group, pages in entry.items()}


def test_index_lists_every_page_as_the_navigation_does() -> None:
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert {page for group in navigation().values() for page in group if "/" not in page} | {"index.md"} == pages
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    sections = re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", index, re.MULTILINE)
    listed = {title: re.findall(r"^- .*?\]\((?:\.\./)?([\w/-]+\.md)\)", text, re.MULTILINE) for title, text in sections}
    assert {group: listed.get(group) for group in navigation()} == navigation()


def test_the_reference_has_every_public_name() -> None:
    reference = "".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("reference*.md"))
    assert sorted(re.findall(r"^::: keepkv\.(?:[\w.]+\.)?(\w+)$", reference, re.MULTILINE)) == sorted(keepkv.__all__)


def test_language_models_are_told_of_every_page() -> None:
    text = site("hooks").llms((ROOT / "docs" / "index.md").read_text("utf-8"))
    assert re.findall(r"\]\(([\w/-]+)\.html\)", text) == [
        page.removesuffix(".md") for group in navigation().values() for page in group
    ]


def test_figures_are_drawn_from_the_rows_of_today() -> None:
    for name, drawing in site("figures").FIGURES.items():
        assert (ROOT / f"docs/assets/{name}.svg").read_text("utf-8") == drawing(), name


def site(name: str) -> Any:
    """A module of the site's build, which lies in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_has_no_dead_link_on_a_package_index() -> None:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["metadata"]["hooks"]
    text = (ROOT / "README.md").read_text("utf-8")
    for change in hooks["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    assert not re.findall(r"\]\((?!https://)", text)


def test_every_study_says_what_it_is() -> None:
    studies = {path.parent for path in (ROOT / "benchmarks").glob("*/*.py")}
    assert studies and not [study.name for study in studies if not (study / "README.md").exists()]


def test_version_is_said_once() -> None:
    assert f'version = "{keepkv.__version__}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert f"[{keepkv.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"version: {keepkv.__version__}" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"{{{keepkv.__version__}}}" in (ROOT / "docs" / "cite.md").read_text("utf-8")
