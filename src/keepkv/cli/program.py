"""The verbs of the command line, put together."""

from __future__ import annotations

import typer

from keepkv.cli.bench import bench
from keepkv.cli.calibrate import calibrate
from keepkv.cli.check import check
from keepkv.cli.demo.command import demo
from keepkv.cli.eval import evaluation
from keepkv.cli.fidelity import fidelity
from keepkv.cli.fit import fit
from keepkv.cli.generate import generate
from keepkv.cli.methods import methods
from keepkv.cli.report import report

program = typer.Typer(
    name="keepkv",
    help="KV-cache compression for transformers that really frees memory, and says what it did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (demo, generate, methods, fit, check, fidelity, report, bench, calibrate):
    program.command()(verb)
program.command("eval")(evaluation)
