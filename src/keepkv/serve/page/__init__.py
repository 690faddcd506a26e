"""The page at ``/``: a document, a budget, a chat, and which tokens survived; one file that fetches nothing else."""

from __future__ import annotations

import json
from importlib.resources import files

from keepkv.tasks import demo_document

# What the page may do: its own style and script, and calls to the server that it came from.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
QUESTIONS = 3  # of the sample, that are offered
LONGEST = 512  # tokens of a reply


def page() -> str:
    """The HTML."""
    document, questions = demo_document()
    asked = [one.prompt.strip() for one in questions[:QUESTIONS]]
    given = {"document": document, "questions": asked, "max_tokens": LONGEST}
    # A closing tag within a string would end the script.
    parts = {"given": json.dumps(given).replace("<", "\\u003c"), "script": _part("page.js")}
    head, *rest = _part("index.html").split("{{")
    return head + "".join(parts[piece.partition("}}")[0]] + piece.partition("}}")[2] for piece in rest)


def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
