"""The page at ``/``: a document, a budget, a chat, and which tokens survived; one file that fetches nothing else."""

from importlib.resources import files


def page() -> str:
    """The HTML."""
    return files(__name__).joinpath("index.html").read_text(encoding="utf-8")
