"""``model.generate(**inputs, custom_generate="PATH OR REPOSITORY", trust_remote_code=True, method=…, budget=…)``."""

from __future__ import annotations

from typing import Any


def generate(model: Any, method: str = "auto", budget: Any = 0.25, **kwargs: Any) -> Any:
    """``model.generate(**kwargs)`` with a compressed cache; method and budget as ``keepkv.Cache`` takes them."""
    import keepkv

    for name in ("custom_generate", "trust_remote_code"):
        kwargs.pop(name, None)
    with keepkv.compressed(model, method, budget):
        return model.generate(**kwargs)
