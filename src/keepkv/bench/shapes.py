"""Models by shape: random weights of a Llama, which is all that speed depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from keepkv.errors import KeepKVError, UnknownName

POSITIONS = 1 << 20  # more tokens than any sweep reads


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. heads: query heads; intermediate: width of the MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 32000

    @classmethod
    def read(cls, text: str) -> Shape:
        """``layers=4,hidden=1024,heads=16`` and, if they are not those of a plain Llama, ``kv_heads`` (as many as
        heads), ``head_dim`` (hidden/heads), ``intermediate`` (8/3 of hidden, to the next multiple of 64), ``vocab``."""
        known = list(cls.__dataclass_fields__)
        sizes: dict[str, int] = {}
        for pair in filter(None, text.split(",")):
            key, equals, value = (part.strip() for part in pair.partition("="))
            if key not in known:
                raise UnknownName("size of a shape", key, known)
            if not equals or not value.isdecimal() or int(value) < 1:
                raise KeepKVError(f"shape {text!r}: {pair!r} is not {key}=NUMBER with a number of at least 1")
            sizes[key] = int(value)
        if missing := [key for key in ("layers", "hidden", "heads") if key not in sizes]:
            raise KeepKVError(
                f"shape {text!r} lacks {', '.join(missing)}; e.g. layers=4,hidden=1024,heads=16,kv_heads=4"
            )
        sizes.setdefault("kv_heads", sizes["heads"])
        sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
        sizes.setdefault("intermediate", -(-8 * sizes["hidden"] // 3 // 64) * 64)
        made = cls(**sizes)
        if made.heads % made.kv_heads or made.head_dim < 2 or made.head_dim % 2:
            raise KeepKVError(
                f"shape {text!r}: heads={made.heads} must be a multiple of kv_heads={made.kv_heads}, and "
                f"head_dim={made.head_dim} an even number of at least 2"
            )
        return made

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in asdict(self).items())

    def config(self) -> LlamaConfig:
        """The configuration of such a Llama, whose output does not share the weights of its embedding."""
        sizes: dict[str, Any] = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
        }
        return LlamaConfig(**sizes, max_position_embeddings=POSITIONS, tie_word_embeddings=False, eos_token_id=None)

    def save(self, into: Path, dtype: torch.dtype, seed: int = 0) -> None:
        """Write a model with random weights of ``seed`` to the directory ``into``."""
        before = torch.get_default_dtype()
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            LlamaForCausalLM(self.config()).save_pretrained(into)
        finally:
            torch.set_default_dtype(before)


def hardly_anything(layers: int) -> Shape:
    """A model of that depth with next to no arithmetic: what a token costs in it is what Python and dispatch cost."""
    return Shape(layers=layers, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=32, vocab=64)
