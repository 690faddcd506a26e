"""Engine and workers in processes of their own, one of them or two: a program is run, and says what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vllm_engine

PROGRAM = """
import json, sys
from vllm import LLM
from vllm.exceptions import VLLMValidationError
from vllm_engine import Reference, Request, blocks_of, parameters
from keepkv.integrations.vllm import engine_args

if __name__ == "__main__":
    path, ranks, asked, default = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
    llm = LLM(path, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", block_size=32, max_model_len=1024,
              kv_cache_memory_bytes=blocks_of(200), tensor_parallel_size=ranks, **engine_args(**default))
    try:
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], parameters(Request(3, {"budget": "1GiB"})), use_tqdm=False)
        refused = ""
    except VLLMValidationError as error:
        refused = str(error)
    requests = [Request(300 + 20 * i, keys, seed=i) for i, keys in enumerate(asked)]
    outs = llm.generate([{"prompt_token_ids": x.prompt} for x in requests], [parameters(x) for x in requests],
                        use_tqdm=False)
    reference = Reference(path)
    own = [Request(x.length, {**default, **x.keys}, seed=x.seed) for x in requests]
    same = [list(o.outputs[0].token_ids) == reference.reply(x) for x, o in zip(own, outs)]
    print("FOUND", json.dumps({"same": same, "refused": refused}))
"""


def run(folder: Path, path: str, ranks: int, asked: list[dict[str, Any]], default: dict[str, Any]) -> Any:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    helpers = Path(vllm_engine.__file__).parent
    paths = os.pathsep.join(map(str, (helpers, helpers.parents[1])))  # the second one has the benchmarks
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(program), path, str(ranks), json.dumps(asked), json.dumps(default)]
    found = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900, check=False)
    line = next((x for x in found.stdout.splitlines() if x.startswith("FOUND")), None)
    assert line is not None, found.stdout[-2000:] + found.stderr[-4000:]
    return json.loads(line.removeprefix("FOUND"))


def test_a_process_of_its_own_with_a_default(checkpoint: str, tmp_path: Path) -> None:
    asked = [{}, {"budget": 64}, {"method": "adakv"}, {"method": "keepkv2", "budget": 0.3, "every": 8}, {"budget": 1.0}]
    found = run(tmp_path, checkpoint, 1, asked, {"method": "snapkv", "budget": 0.25})
    assert found["same"] == [True] * len(asked)
    assert "bytes belong to the server" in found["refused"]


@pytest.mark.slow
def test_two_ranks(checkpoint: str, tmp_path: Path) -> None:
    """Heads decide for themselves where each keeps as many; AdaKV divides a budget among the heads of a rank."""
    asked = [{}, {"method": "snapkv", "budget": 0.25}, {"method": "keydiff", "budget": 64, "every": 8},
             {"method": "keepkv", "budget": 0.25, "threshold": -1}, {"method": "adakv", "budget": 0.25}]  # fmt: skip
    found = run(tmp_path, checkpoint, 2, asked, {})
    assert found["same"] == [True, True, True, True, False]
