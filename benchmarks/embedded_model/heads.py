"""A sibling of the embedded model with multi-head attention: eight query heads, and as many KV heads.

    python -m benchmarks.embedded_model.heads --out ../heads      # an hour on a busy core

Depth, width, head dimension and tokenizer are the embedded model's. It has read a seventh as many tokens, in texts of
1,152 at most, so it answers less: ``benchmarks/tada`` says how much.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .seeds import Stage, train

SHAPE = "num_attention_heads:8,num_key_value_heads:8"
SEED = 8
STAGES = (
    Stage(3_200_000, "4e-3", "128:0.3:4096,512:0.4:4096,1152:0.3:4608", mixed=False),
    Stage(1_700_000, "3e-3", "256:0.45:8192,640:0.35:8960,1152:0.2:9216",
          mix="dense:0.01,dense_alike:0.08,in_text:0.03,in_text_alike:0.15,multivalue:0.11,multiquery:0.06,"
              "variables:0.1,counting:0.06,rules:0.1,secrets:0.04,plain:0.01,long_values:0.12,noise:0.01,"
              "answering:0.12"),
)  # fmt: skip


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
    train(SEED, a.out, STAGES, options + ["--eager"] * a.eager)


if __name__ == "__main__":
    main()
