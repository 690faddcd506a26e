"""IFEval (arXiv 2311.07911): prompts whose instructions a program can check.

Records as in ``input_data.jsonl`` of google/IFEval: key, prompt, instruction_id_list, kwargs (one object per
instruction). A record may also have a ``context``, a long text that stands before the prompt and is compressed with it:
whether instructions survive compression is the question then.
"""

from __future__ import annotations

from functools import partial

from keepkv.metrics.instructions import follows, rule
from keepkv.tasks.base import Check, Item, Question
from keepkv.tasks.files.base import Benchmark
from keepkv.tasks.files.records import Record


def make(record: Record, part: str) -> Item:
    """The prompt, which is compressed, and a reply that its instructions are checked on. The value is the share of
    instructions followed; correct where all are, as IFEval's strict accuracy of prompts."""
    checks = []
    for name, arguments in zip(record["instruction_id_list"], record["kwargs"], strict=True):
        rule(name)
        strict = partial(follows, instruction=name, arguments=dict(arguments or {}))
        checks.append(Check(name.partition(":")[0], name, strict))
    if not checks:
        raise ValueError("no instructions")
    text = f"{record['context']}\n\n{record['prompt']}" if record.get("context") else record["prompt"]
    return Item(text, (Question("\n\n", "", checks=tuple(checks), limit=1280),))


BENCHMARK = Benchmark(
    "ifeval",
    "prompts with instructions that can be checked (arXiv 2311.07911)",
    make,
    lambda part: ("google/IFEval", None, "train"),
)
