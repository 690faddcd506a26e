"""Writes a checkpoint as the package ships it, weights in float16.

python -m benchmarks.embedded_vlm.export CHECKPOINTS src/keepkv/embedded/vlm
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from keepkv.tasks.scenes import SIDE

from .data import MEAN, STD
from .network import make_model, make_tokenizer
from .train import STATE


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a checkpoint as the package ships it.")
    parser.add_argument("checkpoints", type=Path)
    parser.add_argument("out", type=Path)
    a = parser.parse_args()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.load_state_dict(torch.load(a.checkpoints / STATE, weights_only=True)["model"])
    model.half().save_pretrained(a.out)
    tokenizer.save_pretrained(a.out)
    seen = {"image_processor_type": "CLIPImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    seen |= {"image_mean": [MEAN] * 3, "image_std": [STD] * 3}
    (a.out / "preprocessor_config.json").write_text(json.dumps(seen, indent=1) + "\n")


if __name__ == "__main__":
    main()
