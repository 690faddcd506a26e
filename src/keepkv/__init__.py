"""keepkv: KV-cache compression with real memory freed, and a receipt.

>>> cache = keepkv.Cache(model, method="keepkv", budget=0.1)  # doctest: +SKIP
>>> model.generate(**inputs, cache=cache)  # doctest: +SKIP
>>> print(cache.report())  # doctest: +SKIP

Importing registers the attention implementation "keepkv" with transformers, and does nothing else.
"""

from keepkv.allocate import Allocate, register_allocate
from keepkv.core.budget import Budget
from keepkv.core.calibration import Calibration
from keepkv.core.slots import LayerView, Slots
from keepkv.core.stats import Stat
from keepkv.core.when import When
from keepkv.embedded import embedded_model
from keepkv.engine.cache import Cache
from keepkv.engine.compressed import compressed
from keepkv.engine.examine import ModelCheck, check
from keepkv.engine.interface import register as _register
from keepkv.engine.passes.rehearse import rehearse
from keepkv.engine.passes.reread import reread
from keepkv.engine.receipt import Receipt
from keepkv.errors import KeepKVError
from keepkv.methods import Method, method_info, methods, register_method
from keepkv.plan.answer import fit
from keepkv.plan.result import Fit
from keepkv.reduce import Reduce, Reduced, register_reduce
from keepkv.score import Score, register_score
from keepkv.spans import Span, SpanPolicy, spans_of_chat, spans_of_text
from keepkv.store import Codec, Store, register_codec, register_store

_register()

__version__ = "0.1.0"
__all__ = [
    "Allocate", "Budget", "Cache", "Calibration", "Codec", "Fit", "KeepKVError", "LayerView", "Method", "ModelCheck",
    "Receipt", "Reduce", "Reduced", "Score", "Slots", "Span", "SpanPolicy", "Stat", "Store", "When", "check",
    "compressed", "embedded_model", "fit", "method_info", "methods", "register_allocate", "register_codec",
    "register_method", "register_reduce", "register_score", "register_store", "rehearse", "reread", "spans_of_chat",
    "spans_of_text",
]  # fmt: skip
