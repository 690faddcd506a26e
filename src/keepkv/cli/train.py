"""``keepkv train``: a model is trained for its compressed cache, as a YAML file says."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer import Argument, Option

from keepkv.cli.output import one_line_errors, print_json, progress
from keepkv.errors import KeepKVError, UnknownName

# What there is: the module, its function and its config.
KINDS = {
    "distill": ("keepkv.training.run:distill", "keepkv.training.config:Distill"),
    "sft": ("keepkv.training.run:sft", "keepkv.training.config:Sft"),
    "rl": ("keepkv.training.rl:train", "keepkv.training.rl:Config"),
}


@one_line_errors
def train(
    kind: Annotated[str, Argument(metavar="KIND", help=f"{', '.join(KINDS)}.")],
    config: Annotated[str | None, Argument(metavar="CONFIG", help="YAML file that says how.")] = None,
    example: Annotated[bool, Option("--example", help="Print a whole CONFIG with what each key means.")] = False,
    as_json: Annotated[bool, Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Train a model for its compressed cache: what a cache evicts is recorded and replayed with gradients.

    distill: the model under eviction learns to say what it says with every token in sight. It needs texts alone.

    sft: it learns the replies of the texts under eviction.

    rl: it draws replies under eviction and learns which of them a reward prefers (GRPO).

    A run that was killed goes on from its last checkpoint when the same command is given again.

    \b
    Examples:
      keepkv train distill --example > distill.yaml
      keepkv train distill distill.yaml
      keepkv train sft sft.yaml --json
      keepkv train rl --example > rl.yaml
    """
    if kind not in KINDS:
        raise UnknownName("training", kind, KINDS)
    run, told = (_named(where) for where in KINDS[kind])
    from keepkv.training import config as configs

    if example:
        typer.echo(configs.example(told(out=f"runs/{kind}")), nl=False)
        return
    if config is None:
        raise KeepKVError(f"no CONFIG was given: `keepkv train {kind} --example` prints one to begin with")
    chosen: Any = configs.read(told, config)
    from keepkv.cli.load import load

    model, tokenizer = load(chosen.model, chosen.device, dtype=chosen.dtype)
    after = f"The same command goes on from the last checkpoint in {chosen.out}."
    with progress(chosen.optimise.steps, after) as step:
        done = run(chosen, model, tokenizer, step)
    if as_json:
        print_json(done)
        return
    went_on = f", on from step {done.resumed}" if done.resumed else ""
    typer.echo(f"{done.steps} steps{went_on} over {_course(done)}")
    typer.echo(f"wrote {done.model}")


def _course(done: Any) -> str:
    """What it went over, and from where to where."""
    if hasattr(done, "rewards"):
        few = max(1, len(done.rewards) // 10)  # the reward of one step is noise
        first, last = (sum(some) / few for some in (done.rewards[:few], done.rewards[-few:]))
        return f"{done.prompts} prompts: reward {first:.3g} → {last:.3g}"
    said = f"loss {done.losses[0]:.4g} → {done.losses[-1]:.4g}" if done.losses else "no step was left to take"
    return f"{done.texts} texts: {said}; {done.evicted} evictions replayed"


def _named(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
