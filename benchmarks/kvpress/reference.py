"""Calls kvpress in its own environment, through files."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from .outcome import Outcome, kept_lists

WORKER = Path(__file__).with_name("kvpress_worker.py")


@dataclass
class Reference:
    """kvpress in the environment of ``python``. options: of the job (threads, dtype, device)."""

    python: str
    options: dict[str, Any]
    timeout: int = 3600

    def run(
        self, model: PreTrainedModel | str, prompts: dict[str, Tensor], runs: list[dict[str, Any]]
    ) -> tuple[dict[str, Outcome], dict[str, str]]:
        """Outcomes by run id, and versions. ``model``: saved to a temporary directory, or a directory."""
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            if isinstance(model, str):
                directory = model
            else:
                directory = str(place / "model")
                model.save_pretrained(directory)
            save_file({name: x.clone() for name, x in prompts.items()}, place / "prompts.safetensors")
            job = {**self.options, "model": directory, "prompts": str(place / "prompts.safetensors"), "runs": runs}
            (place / "job.json").write_text(json.dumps(job), "utf-8")
            command = [self.python, str(WORKER), str(place / "job.json"), str(place / "result")]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
            environment.pop("PYTHONPATH", None)
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=self.timeout)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
            facts = json.loads((place / "result.json").read_text("utf-8"))
            tensors = load_file(place / "result.safetensors")
        return {run["id"]: _outcome(run["id"], tensors, facts["runs"][run["id"]]) for run in runs}, facts["versions"]


def _outcome(name: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Outcome:
    """The tensors of one run; only the first row of kept sets and scores is read."""
    out = Outcome(facts=facts)
    while (key := f"{name}/kept/{len(out.kept)}") in tensors:
        out.kept.append(kept_lists(tensors[key]))
    while (key := f"{name}/scores/{len(out.scores)}") in tensors:
        out.scores.append(tensors[key][0])
    if f"{name}/logits" in tensors:
        out.logits = tensors[f"{name}/logits"]
    if f"{name}/sequences" in tensors:
        out.facts["sequences"] = tensors[f"{name}/sequences"]
    return out
