"""Two tasks of lm-evaluation-harness that the embedded model can do: a code is chosen, and a code is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keepkv import tasks

CHOICE = """\
task: codes-choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITTEN = """\
task: codes-written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def write(place: Path, tokenizer: Any) -> Path:
    """Six documents of 90 to 240 tokens with four facts each, and the tasks on them, into the folder ``place``."""
    lines = []
    for seed in range(6):
        item = tasks.get("niah-multikey-1").generate(tokenizer, 90 + 30 * seed, seed, facts=4, questions=4)
        asked = item.questions[seed % 4]
        choices = [question.answer for question in item.questions]
        document = {"context": item.context, "question": asked.prompt, "answer": asked.answer}
        lines.append(json.dumps(document | {"choices": choices, "label": seed % 4}))
    (place / "codes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, text in (("choice", CHOICE), ("written", WRITTEN)):
        (place / f"{name}.yaml").write_text(text.format(data=place / "codes.jsonl"), encoding="utf-8")
    return place


def answers(result: dict[str, Any]) -> list[Any]:
    """What was said to each document, in their order."""
    [samples] = result["samples"].values()
    return [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
