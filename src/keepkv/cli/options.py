"""Options that several verbs have."""

from typing import Annotated

from typer import Option

Texts = list[str] | None  # of an option that may be repeated
Model = Annotated[str | None, Option(help="Directory or Hub name; the embedded model if absent.")]
Methods = Annotated[Texts, Option("--method", "-m", help="NAME or NAME:key=value,key=value. Repeatable.")]
Budget = Annotated[
    str, Option("--budget", "-b", help="Share of the tokens (0.1 or 10%), slots per head (512) or bytes (64MiB).")
]
Device = Annotated[str, Option(help="cpu, cuda, cuda:1 …; auto takes a GPU where there is one.")]
AsJson = Annotated[bool, Option("--json", help="JSON on stdout.")]
