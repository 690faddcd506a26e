"""What a state machine runs on: tiny models, and every choice that a cache is made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as t
from hypothesis import strategies as st
from matrix import random_profile
from published import gates_at_random
from transformers import PreTrainedModel

import keepkv
from keepkv.calibrate import calibrate
from keepkv.core.calibration import needed
from keepkv.errors import UnsupportedModel
from keepkv.methods import make_method
from keepkv.store import CODECS
from keepkv.store.codec import Codec

VOCABULARY = 1024  # no row sees a token twice: equal keys would tie
WINDOW = 8  # of layers with a sliding window
BUDGET = 9
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2,
    num_key_value_heads=4,
)  # fmt: skip


def _gemma3(*kinds: str) -> PreTrainedModel:
    layers = [f"{kind}_attention" for kind in kinds]
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=WINDOW, layer_types=layers))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE)),
    "sliding, full": lambda: _gemma3("sliding", "full"),
    "full, sliding": lambda: _gemma3("full", "sliding"),
    "latent": lambda: t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**{**SHAPE, **LATENT})),
}
SMALL: dict[str, Any] = {
    "window": 2,
    "sinks": 1,
    "queries": 4,
    "kernel": 3,
    "prompt": False,
}  # so that a few tokens leave something to choose
LAYOUTS = [
    ("auto", "none"), ("ragged", "none"), ("static", "none"), ("auto", "lossless"), ("ragged", "lossless"),
    ("auto", "masked"), ("ragged", "masked"),
]  # fmt: skip
SPANS = keepkv.SpanPolicy([keepkv.Span(1, 3, "protect"), keepkv.Span(4, 7, "fair")], on_overflow="grow")
SPANNED = 8  # tokens that a first prompt must have, for the spans to lie in it


class Lossless(Codec):
    """Writes what it is given in other fields, a few tokens at a time: zones are as with a codec that loses digits."""

    exact = 4

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"keys": keys.flip(-1), "values": values.flip(-1)}

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return fields["keys"].flip(-1), fields["values"].flip(-1)


class Masked(Codec):
    """Writes the bits of keys under a mask that a few tokens of a head share, and loses nothing: a slot that were read
    with the mask of others would be another one."""

    exact = 4
    several = 3  # tokens that share a mask

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor, shared: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        b, h, s, _ = keys.shape
        first = shared["mask"].shape[2] if shared else 0
        bits = _bits(keys)
        mask = bits[:, :, :: self.several]
        group = torch.arange(s, device=keys.device) // self.several
        fields = {"keys": bits ^ mask[:, :, group], "values": values, "like": keys[..., :0]}
        fields["group"] = (group + first).view(1, 1, s, 1).expand(b, h, s, 1).contiguous()
        return fields, {"mask": torch.cat((shared["mask"], mask), 2) if shared else mask.clone()}

    def read(
        self, fields: dict[str, torch.Tensor], shared: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at = fields["group"].expand(*fields["keys"].shape)
        return (fields["keys"] ^ shared["mask"].gather(2, at)).view(fields["like"].dtype), fields["values"]

    def prune(
        self, fields: dict[str, torch.Tensor], valid: torch.Tensor, shared: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        group, shared = fields["group"][..., 0], {"mask": shared["mask"].clone()}
        needed = torch.zeros(*group.shape[:2], shared["mask"].shape[2] + 1, dtype=torch.bool)
        needed = needed.scatter_(2, group.masked_fill(~valid, needed.shape[2] - 1), True)[..., :-1]
        sign = torch.iinfo(shared["mask"].dtype).min
        shared["mask"][~needed] ^= sign  # whoever still reads one that nobody needs gets other keys
        return fields, shared


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@dataclass(frozen=True)
class World:
    """One choice of everything. Nothing in it changes while a machine runs."""

    method: str
    arch: str
    kind: tuple[str, str]
    prefill: str | None
    every: int | None
    spans: bool
    dtype: torch.dtype

    @property
    def model(self) -> PreTrainedModel:
        return model(self.arch, self.dtype)

    @property
    def exact(self) -> bool:
        """Whether a row alone gives the same numbers to rounding."""
        return self.dtype == torch.float32

    @property
    def slides(self) -> bool:
        """Whether a layer with a sliding window stands beside those that are compressed."""
        return "sliding" in self.arch

    @property
    def calibration(self) -> keepkv.Calibration | None:
        """What the method's score needs to know of the model, if anything."""
        chosen = make_method(self.method, {})
        kind = next(iter(needed(chosen.score, chosen.allocate)), None)
        return None if kind is None else _calibration(kind, self.arch, self.dtype)

    @property
    def least(self) -> int:
        """Tokens of a first prompt."""
        return SPANNED if self.spans else 2

    def cache(self) -> keepkv.Cache:
        options = keepkv.methods()
        known = next(x.options for x in options if x.name == self.method)
        chosen: dict[str, Any] = {k: x for k, x in SMALL.items() if k in known}
        if self.method != "full":
            chosen["when"] = keepkv.When(self.prefill, self.every)
        layout, codec = self.kind
        more = {"store_options": {"capacity": 256}} if layout == "static" else {}
        spans = SPANS if self.spans else None
        budget = None if self.method == "full" else BUDGET
        store = None if layout == "auto" else layout
        more |= {"calibration": self.calibration, "spans": spans}
        return keepkv.Cache(self.model, self.method, budget, store=store, codec=codec, **more, **chosen)


@cache
def model(arch: str, dtype: torch.dtype) -> PreTrainedModel:
    """A tiny model, its random weights sharpened: it would attend almost evenly, and every choice would be near."""
    torch.manual_seed(0)
    made = MODELS[arch]().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("k_norm.weight", "kv_a_layernorm.weight")):  # or all keys, all latents have the same norm
                parameter.uniform_(0.1, 2.0)
            elif parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4.0)
    return made.to(dtype)


@cache
def _calibration(kind: str, arch: str, dtype: torch.dtype) -> keepkv.Calibration:
    """What a score needs to know of the model, from a few tokens at random."""
    known = model(arch, dtype)
    if kind == "heads":
        return random_profile(known)
    if kind == "fast-kvzip":
        return gates_at_random(known)
    generator = torch.Generator().manual_seed(0)
    return calibrate(
        kind, known, torch.randint(3, known.config.get_text_config().vocab_size, (5, 1, 40), generator=generator)
    )


@cache
def possible(world: World) -> bool:
    """Whether such a cache can be made; what is refused is refused when it is made."""
    if world.slides and world.kind[0] == "static":
        return False  # rows of transformers' fixed buffers cannot be moved; that is refused, see ``test_refusals``
    CODECS._factories.setdefault("lossless", Lossless)
    CODECS._factories.setdefault("masked", Masked)
    try:
        world.cache()
    except keepkv.KeepKVError as error:
        assert isinstance(error, UnsupportedModel) or "holds slots as they are" in str(error), error
        return False
    return True


NAMES = sorted((x.name for x in keepkv.methods() if not x.name.startswith("test-")), key=lambda x: x != "knorm")


def worlds(**given: Any) -> st.SearchStrategy[World]:
    """Any possible world, simplest first; what is ``given`` is fixed."""
    choices: dict[str, Any] = {
        "method": NAMES,
        "arch": list(MODELS),
        "kind": LAYOUTS,
        "prefill": ["immediate", "deferred", None],
        "every": [None, 2, 3],
        "spans": [False, True],
        "dtype": [torch.float32] * 3 + [torch.bfloat16],
        **{name: [x] for name, x in given.items()},
    }
    drawn = {name: st.sampled_from(values) for name, values in choices.items()}
    return st.builds(World, **drawn).filter(possible)
