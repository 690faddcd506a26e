"""Times presses of kvpress; started inside the environment of kvpress, imports no keepkv.

    python kvpress_times.py MODEL DTYPE

MODEL: a directory written by ``save_pretrained``. Each line of stdin is a JSON object with ``press`` (class name and
options, see ``benchmarks/kvpress/kvpress_worker.py``) and ``ids``; the answer is a line with the seconds of processor
time that the press' hooks took during one prefill, or with what went wrong. All of the hooks counts: queries projected
anew, scores, choice, and what is copied.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

sys.path.insert(0, str(Path(__file__).parents[1] / "kvpress"))
from kvpress_worker import build_press
from replay import Replay


@torch.inference_mode()
def seconds(model: Any, replay: Replay, spec: dict[str, Any], ids: list[int]) -> float:
    """What the outermost hooks of a press take while a prompt is read."""
    press, spent = build_press(spec), [0.0]
    original = press.forward_hook

    def timed(*args: Any, **kwargs: Any) -> Any:
        with replay.live():
            began = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent[0] += time.process_time() - began

    press.forward_hook = timed
    with press(model), replay.runs():
        model(torch.tensor([ids]), past_key_values=DynamicCache(), logits_to_keep=1)
    return spent[0]


def main() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
    print(json.dumps({"ready": torch.__version__}), flush=True)
    read: list[int] = []
    for line in sys.stdin:
        job = json.loads(line)
        if job["ids"] != read:
            read, replay = job["ids"], Replay(model)
        try:
            answer: dict[str, Any] = {"seconds": seconds(model, replay, job["press"], job["ids"])}
        except Exception as error:  # the other side names the press, and goes on with the next
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
