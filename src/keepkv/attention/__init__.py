"""Attention over the parts that a store hands out, in plain torch or by the kernels."""
