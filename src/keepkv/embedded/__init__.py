"""A small trained Llama model inside the package, so that the quality of compression can be seen offline."""

from importlib import resources


def embedded_model() -> str:
    """Directory that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load, offline."""
    return str(resources.files("keepkv.embedded") / "weights")


__all__ = ["embedded_model"]
