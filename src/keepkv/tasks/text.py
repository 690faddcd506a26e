"""Real English prose that every Python installation carries: its own documentation.

The haystack comes from the language reference (``pydoc_data.topics``) and from the docstrings of the standard library,
read from source so that nothing is imported. Both are under the PSF licence. Where neither is installed (a stripped or
zipped Python) the document shipped with the package takes their place.
"""

import ast
import re
import sysconfig
from functools import lru_cache
from importlib import resources
from pathlib import Path

MODULES = (
    "base64", "bdb", "bisect", "calendar", "cmd", "codecs", "collections/__init__", "configparser", "contextlib",
    "copy", "difflib", "dis", "doctest", "fileinput", "fnmatch", "fractions", "ftplib", "functools", "gzip", "hmac",
    "inspect", "io", "ipaddress", "logging/__init__", "logging/handlers", "lzma", "mailbox", "mimetypes", "os",
    "pathlib",
    "platform", "poplib", "queue", "random", "re/__init__", "sched", "secrets", "selectors", "shelve", "shutil",
    "smtplib", "socket", "socketserver", "ssl", "statistics", "tempfile", "textwrap", "threading", "timeit",
    "traceback", "typing", "unittest/case", "urllib/parse", "urllib/request", "uuid", "warnings", "wave", "weakref",
)  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()/\-]{24,280}[a-z)\"]\.")


def sentences_of(text: str) -> list[str]:
    """Plain sentences of a documentation text, in order.

    The first of each paragraph starts with a newline and the others with a space, so that joining them without a
    separator gives clean text, and tokenising piece by piece gives what tokenising the whole gives.
    """
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', ord("*"): None, ord("`"): None})
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text):
        lead = "\n"
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            if _PROSE.fullmatch(sentence):
                pieces.append(lead + sentence)
                lead = " "
    return pieces


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [text for text in found if text]


@lru_cache(maxsize=1)
def prose() -> tuple[str, ...]:
    """All haystack sentences, in a fixed order, without repeats (about 3,000 of them, 0.4 MB)."""
    texts: list[str] = []
    try:
        from pydoc_data.topics import topics

        texts += [topics[name] for name in sorted(topics)]
    except ImportError:
        pass
    root = Path(sysconfig.get_path("stdlib"))
    for module in MODULES:
        texts += _docstrings(root / f"{module}.py")
    pieces = dict.fromkeys(piece for text in texts for piece in sentences_of(text))
    return tuple(pieces) if len(pieces) >= 200 else tuple(sentences_of(document()))


def document() -> str:
    """The long document shipped with the package (prose of the Python documentation, PSF licence)."""
    return (resources.files("keepkv.tasks") / "data" / "document.txt").read_text(encoding="utf-8")
