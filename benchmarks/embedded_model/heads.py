"""A sibling of the embedded model with multi-head attention: eight query heads, and as many KV heads.

    python -m benchmarks.embedded_model.heads --out ../heads      # an hour on a busy core

Depth, width, head dimension and tokenizer are the embedded model's. It is trained in the short way of
``seeds``, so it answers less: ``benchmarks/tada`` says how much.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .seeds import SHORT, train

SHAPE = "num_attention_heads:8,num_key_value_heads:8"
SEED = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; its stages lie beside it")
    parser.add_argument("--workers", type=int, default=1, help="processes that share each step on a CPU")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--loaders", type=int, default=0, help="processes that make the data ahead")
    parser.add_argument("--eager", action="store_true", help="as benchmarks.embedded_model.train takes it")
    a = parser.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    options = ["--workers", str(a.workers), "--device", a.device, "--loaders", str(a.loaders), "--shape", SHAPE]
    train(SEED, a.out, SHORT, options + ["--eager"] * a.eager)


if __name__ == "__main__":
    main()
