"""Small trained models inside the package, one that reads and one that sees, so that the quality of compression can be
seen offline."""

from importlib import resources

from keepkv.embedded.sight import Processor, embedded_vlm

# Its tokenizer has no chat template. This one puts a question behind a text as the model was trained to read them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def embedded_model() -> str:
    """Directory that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load, offline."""
    return str(resources.files("keepkv.embedded") / "weights")


__all__ = ["CHAT_TEMPLATE", "Processor", "embedded_model", "embedded_vlm"]
