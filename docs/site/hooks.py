"""Hooks of the site's build: studies in benchmarks/ become pages of it, and llms.txt lists its pages for language models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
SHOWN = {".md", ".svg"}


def on_files(files: Any, config: Any) -> Any:
    """Reports and figures of studies, at the place that links from docs/ give them once docs/ is the root."""
    for path in sorted((ROOT / "benchmarks").rglob("*")):
        if path.suffix in SHOWN:
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, ROOT, config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/, benchmarks/ and the files beside them, as they stand in the repository, made those of the site."""
    source = page.file.src_uri
    if source.startswith("benchmarks/"):
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    return markdown.replace("](../", "](")


def on_post_build(config: Any) -> None:
    text = llms(config.nav, Path(config.docs_dir), config.site_name, config.site_description)
    (Path(config.site_dir) / "llms.txt").write_text(text, encoding="utf-8")


def llms(nav: list[Any], docs: Path, name: str, about: str) -> str:
    """The navigation as llmstxt.org has it: a page a line, with its title and its first sentence."""
    lines = [f"# {name}", "", f"> {about}"]
    for entry in nav:
        [(group, pages)] = entry.items() if isinstance(entry, dict) else [(None, entry)]
        if isinstance(pages, str):
            lines += ["", line_of(pages, docs)]
            continue
        lines += ["", f"## {group}", "", *(line_of(page, docs) for page in flat(pages))]
    return "\n".join(lines) + "\n"


def flat(pages: list[Any]) -> list[str]:
    """Paths of an entry of the navigation, in order."""
    found: list[str] = []
    for page in pages:
        inside = list(page.values()) if isinstance(page, dict) else [page]
        found += flat(inside[0]) if isinstance(inside[0], list) else inside
    return found


def line_of(page: str, docs: Path) -> str:
    path = (docs if (docs / page).exists() else docs.parent) / page
    text = path.read_text("utf-8")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    paragraphs = [block for block in re.split(r"\n\s*\n", text) if re.match(r"[A-Z`*\"]", block)]
    first = re.split(r"(?<=[.:?]) ", " ".join(paragraphs[0].split()))[0] if paragraphs else ""
    plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", first)
    return f"- [{title.group(1) if title else page}]({page.removesuffix('.md')}.html): {plain}"
