#!/bin/sh
# All that the plugin still has to show on a GPU, in about half an hour; run it from the root of the repository, in an
# environment with vllm, keepkv[cli,plots] and pytest. MODEL: a directory or a Hub name.
set -eu
MODEL=${MODEL:-Qwen/Qwen3-8B}
CAP=${CAP:-8GiB}
OUT=${OUT:-benchmarks/vllm/results/gpu}
mkdir -p "$OUT"
python -m pytest -q tests/kernels/test_paged.py | tee "$OUT/kernel.txt"
# Replies in float32 beside transformers on the CPU: what differs must be a tie.
for file in replies blocks prefix preemption calibrated; do
    python -m pytest -q "tests/integrations/vllm_plugin/test_$file.py" | tee "$OUT/test_$file.txt" || true
done
for context in 2048 8192 32768; do
    keepkv bench --engine vllm --model "$MODEL" --dtype bfloat16 --cap "$CAP" --context "$context" --new 256 \
        --requests 64 --repeats 3 -p plain -p fp8 -m snapkv -m keepkv2 -m adakv -b 0.25 -b 0.1 \
        --plots --out "$OUT/$context"
done
