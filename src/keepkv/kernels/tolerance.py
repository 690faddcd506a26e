"""How near a kernel must come to its reference in float64, by the dtype of its inputs."""

from __future__ import annotations

import torch

# Kernel and reference see the same rounded inputs, and both sum in float32. What is left is the rounding of the output
# and, in half precision, of the softmax weights before they meet the values: 2^-11 and 2^-8 of each, four times.
RTOL = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# For values and keys of size 1. Sums of both signs cancel, so small outputs carry the error of large terms.
ATOL = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# For log-sum-exps, log masses and cosines, which stay float32 whatever the dtype of the inputs.
EXACT = {"rtol": 2e-5, "atol": 2e-5}
