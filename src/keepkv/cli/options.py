"""Options that several verbs have."""

from typing import Annotated

from typer import Option

from keepkv.cli.output import one_line_errors
from keepkv.core.plugins import load_file


@one_line_errors
def _run(files: list[str] | None) -> list[str] | None:
    for path in files or ():
        load_file(path)
    return files


Texts = list[str] | None  # of an option that may be repeated
Model = Annotated[str | None, Option(help="Directory, .gguf file or Hub name; the embedded model if absent.")]
Methods = Annotated[
    Texts,
    Option("--method", "--methods", "-m", help="NAME or NAME:key=value,key=value, codec=int4 among them. Repeatable."),
]
Budget = Annotated[
    str,
    Option(
        "--budget",
        "-b",
        help="Share of the tokens (0.1 or 10%) or of the bytes (10%bytes), slots per head (512) or bytes (64MiB).",
    ),
]
Codec = Annotated[
    str | None,
    Option(help="How keys and values are written: int4, hadamard, lloyd-max, kivi, int8 …, or auto; none if absent."),
]
CodecOption = Annotated[Texts, Option(help="key=value of the codec, such as bits=2. Repeatable.")]
Select = Annotated[
    str | None,
    Option(help="Which older slots a decoded token reads: codes, exact, latent, quest …; all of them if absent."),
]
Selected = Annotated[str | None, Option(help="How many slots per head --select takes, or which share (0.125).")]
SelectOption = Annotated[Texts, Option(help="key=value of the selection, such as window=64. Repeatable.")]
Import = Annotated[
    Texts,
    Option(
        "--import",
        metavar="FILE",
        is_eager=True,
        callback=_run,
        help="Python file whose register_… calls take effect: scores, methods, tasks. Repeatable.",
    ),
]
Device = Annotated[str, Option(help="cpu, cuda, cuda:1 …; auto takes a GPU where there is one.")]
AsJson = Annotated[bool, Option("--json", help="JSON on stdout.")]
