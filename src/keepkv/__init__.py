"""keepkv: KV-cache compression with real memory freed, and a receipt.

>>> cache = keepkv.Cache(model, budget=0.1)  # doctest: +SKIP
>>> model.generate(**inputs, cache=cache)  # doctest: +SKIP
>>> print(cache.report())  # doctest: +SKIP

Importing this does nothing else: each public name is imported when it is first asked for, torch and transformers with
it. The first cache enters the attention implementation "keepkv" into transformers.
"""

from typing import TYPE_CHECKING

from keepkv.core.lazy import lazily

if TYPE_CHECKING:
    from keepkv.allocate import Allocate, register_allocate
    from keepkv.asking import Answers, Context, ask
    from keepkv.core.budget import Budget
    from keepkv.core.calibration import Calibration
    from keepkv.core.slots import LayerView, Slots
    from keepkv.core.stats import Stat
    from keepkv.core.when import When
    from keepkv.embedded import embedded_model, embedded_vlm
    from keepkv.engine.attached import restore
    from keepkv.engine.cache import Cache
    from keepkv.engine.compressed import compressed
    from keepkv.engine.examine import ModelCheck, check
    from keepkv.engine.passes.rehearse import rehearse
    from keepkv.engine.passes.reread import reread
    from keepkv.engine.passes.restore_slots import restore_slots
    from keepkv.engine.receipt import Receipt
    from keepkv.errors import KeepKVError
    from keepkv.integrations.kvpress import from_kvpress
    from keepkv.methods import Method, method_info, methods, register_method
    from keepkv.plan.answer import fit
    from keepkv.plan.result import Fit
    from keepkv.reduce import Reduce, Reduced, register_reduce
    from keepkv.score import Score, register_score
    from keepkv.select import Select, register_select
    from keepkv.spans import Span, SpanPolicy, spans_of_chat, spans_of_text
    from keepkv.store import Codec, Store, register_codec, register_store
    from keepkv.video import VideoStream

__version__ = "0.1.0"
_NAMES = {  # by the module that has them; the block above says the same to type checkers
    "allocate": "Allocate register_allocate",
    "asking": "Answers Context ask",
    "core.budget": "Budget",
    "core.calibration": "Calibration",
    "core.slots": "LayerView Slots",
    "core.stats": "Stat",
    "core.when": "When",
    "embedded": "embedded_model embedded_vlm",
    "engine.attached": "restore",
    "engine.cache": "Cache",
    "engine.compressed": "compressed",
    "engine.examine": "ModelCheck check",
    "engine.passes.rehearse": "rehearse",
    "engine.passes.reread": "reread",
    "engine.passes.restore_slots": "restore_slots",
    "engine.receipt": "Receipt",
    "errors": "KeepKVError",
    "integrations.kvpress": "from_kvpress",
    "methods": "Method method_info methods register_method",
    "plan.answer": "fit",
    "plan.result": "Fit",
    "reduce": "Reduce Reduced register_reduce",
    "score": "Score register_score",
    "select": "Select register_select",
    "spans": "Span SpanPolicy spans_of_chat spans_of_text",
    "store": "Codec Store register_codec register_store",
    "video": "VideoStream",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [
    "Allocate", "Answers", "Budget", "Cache", "Calibration", "Codec", "Context", "Fit", "KeepKVError", "LayerView",
    "Method", "ModelCheck", "Receipt", "Reduce", "Reduced", "Score", "Select", "Slots", "Span", "SpanPolicy", "Stat",
    "Store", "VideoStream", "When", "ask", "check", "compressed", "embedded_model", "embedded_vlm", "fit",
    "from_kvpress", "method_info", "methods", "register_allocate", "register_codec", "register_method",
    "register_reduce", "register_score", "register_select", "register_store", "rehearse", "reread", "restore",
    "restore_slots", "spans_of_chat", "spans_of_text",
]  # fmt: skip


lazily(__name__, _MODULES)
