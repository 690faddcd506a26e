"""What a cache file says of the model that filled the cache, and what of it must agree with another."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from keepkv.engine.fingerprint import adapters_of, decoder_of, weights_of
from keepkv.errors import CacheStateError

# Settings without a say in keys and values: names, tokens, what is returned, how numbers are held.
APART = (
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "gradient_checkpointing",
    "id2label", "is_decoder", "is_encoder_decoder", "label2id", "name_or_path", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "quantization_config", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
)  # fmt: skip
# Settings that decide what is stored, and where: these must agree whatever the user says.
SIZES = (
    "global_head_dim", "head_dim", "kv_lora_rank", "layer_types", "num_kv_shared_layers", "qk_nope_head_dim",
    "qk_rope_head_dim", "sliding_window", "v_head_dim",
)  # fmt: skip


class Origin:
    """The model of a cache, which the cache does not keep alive. Adapters are those that were active when it was made;
    settings and weights are read when a file is written, since weights may change."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._config = weakref.ref(model), model.config
        self.adapters = adapters_of(decoder_of(model))
        self._weights: dict[str, Any] = {"weights": None, "unread": "the model was gone when the cache was saved"}

    def facts(self) -> dict[str, Any]:
        """What a file says. Raises ``CacheStateError`` where other adapters are active than when the cache was made."""
        model = self._model()
        if model is None:
            return _plain(self._config, self.adapters, self._weights)
        made = facts(model)
        if made["adapters"] != self.adapters:
            raise CacheStateError(
                f"the cache was made with the adapters {self.adapters}, and {made['adapters']} are active now: save it "
                "while those are active that filled it"
            )
        return made

    def __getstate__(self) -> dict[str, Any]:
        model = self._model()
        weights = self._weights if model is None else weights_of(decoder_of(model))
        return {**self.__dict__, "_model": _gone, "_weights": weights}

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


def facts(model: PreTrainedModel) -> dict[str, Any]:
    """Settings of the text model, active adapters and a digest of the weights, as they come back from a file."""
    decoder = decoder_of(model)
    return _plain(model.config, adapters_of(decoder), weights_of(decoder))


def _plain(config: Any, adapters: list[str], weights: Mapping[str, Any]) -> dict[str, Any]:
    held = config.get_text_config(decoder=True).to_dict()
    settings = {name: x for name, x in held.items() if name not in APART and not name.startswith("_")}
    made = {"settings": settings, "adapters": adapters, "unread": None, **weights}
    plain: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return plain


def _gone() -> None:
    """Stands for a model that does not travel with its cache."""


@dataclass(frozen=True)
class Difference:
    """How the model of a file differs from the one given: in ``sizes``, which no cache survives, or in ``meaning``.
    Each entry says (file, given). unread: why something could not be compared, None where all was."""

    sizes: dict[str, Any] = field(default_factory=dict)
    meaning: dict[str, Any] = field(default_factory=dict)
    unread: str | None = None


def compare(shape: tuple[Mapping[str, Any], Mapping[str, Any]], origin: tuple[Any, Any]) -> Difference:
    """Of the model of a file and the one given: their shapes, and their ``facts``. Settings that one of them lacks are
    not compared: another version of transformers may have another set."""
    sizes = {name: (x, shape[1].get(name)) for name, x in shape[0].items() if x != shape[1].get(name)}
    sizes |= {name: (None, x) for name, x in shape[1].items() if name not in shape[0]}
    ours, theirs = origin
    both = ours["settings"].keys() & theirs["settings"].keys() - shape[0].keys()
    meaning = {
        name: (x, y) for name in sorted(both) if (x := ours["settings"][name]) != (y := theirs["settings"][name])
    }
    sizes |= {name: meaning.pop(name) for name in SIZES if name in meaning}
    if not ours["settings"]:
        unread = ours["unread"] or "the file is of an earlier keepkv, which did not write them"
        return Difference(sizes, meaning, f"settings and weights: {unread}")
    if ours["adapters"] != theirs["adapters"]:
        meaning["adapters"] = (ours["adapters"], theirs["adapters"])
    if ours["weights"] is None or theirs["weights"] is None:
        return Difference(sizes, meaning, f"weights: {ours['unread'] or theirs['unread']}")
    if ours["weights"] != theirs["weights"] and "adapters" not in meaning:
        meaning["weights"] = (ours["weights"][:12], theirs["weights"][:12])
    return Difference(sizes, meaning)
