"""Entry point of the command ``keepkv``."""

from __future__ import annotations

import sys


def app() -> None:
    """Run the command line, or say what it needs: typer and rich are an extra, not part of the library."""
    try:
        from keepkv.cli.program import program
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"error: the command line needs {package}, which is not installed: pip install 'keepkv[cli]'")
    try:
        program()
    except KeyboardInterrupt:  # before a verb had begun
        sys.exit(130)
