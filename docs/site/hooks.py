"""Hooks of the site's build: studies in benchmarks/ become pages of it, methods have theirs, and
llms.txt lists all for language models."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

import method_pages

ROOT = Path(__file__).parents[2]
SHOWN = {".md", ".svg"}


def on_files(files: Any, config: Any) -> Any:
    """Reports and figures of studies, at the place that links from docs/ give them once docs/ is the root."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "benchmarks").rglob("*")):
        if path.suffix in SHOWN:
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, ROOT, config.site_dir, config.use_directory_urls))
    for info in method_pages.ordered():
        files.append(File.generated(config, f"methods/{info.name}.md", content=method_pages.page(info)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and benchmarks/, as they stand in the repository, made those of the site."""
    source = page.file.src_uri
    if source == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    if source.startswith("benchmarks/"):
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    if source.startswith("methods/"):
        return markdown
    return (method_pages.linked(markdown) if source == "methods.md" else markdown).replace("](../", "](")


def on_post_page(output: str, **_: Any) -> str:
    """The theme's search box is a dialog without a name, which screen readers miss."""
    dialog = 'data-md-component="search" role="dialog"'
    return output.replace(dialog, f'{dialog} aria-label="Search"')


def on_post_build(config: Any) -> None:
    index = (Path(config.docs_dir) / "index.md").read_text("utf-8")
    (Path(config.site_dir) / "llms.txt").write_text(llms(index), encoding="utf-8")


def llms(index: str) -> str:
    """What https://llmstxt.org asks for, of the index: a title, what the project is, and the lists of pages."""
    [about] = re.findall(r"^\*\*.*?(?=\n\n)", index, re.DOTALL | re.MULTILINE)
    groups = re.findall(r"^## .+\n\n(?:- .+\n)+", index, re.MULTILINE)
    lists = re.sub(r"\((?:\.\./)?([\w/-]+)\.md\)", r"(\1.html)", "\n".join(groups))
    return f"# keepkv\n\n> {' '.join(about.replace('**', '').split())}\n\n{lists}"
