"""Writes a checkpoint as the package ships it, weights in float16.

python -m benchmarks.embedded_vlm.export CHECKPOINTS src/keepkv/embedded/vlm
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

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


if __name__ == "__main__":
    main()
