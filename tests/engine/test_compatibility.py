"""The table of docs/compatibility.md is what is found: a sample of architectures here, all of them with ``-m slow``."""

from __future__ import annotations

import pytest
import transformers

from benchmarks.compatibility.models import NOT_TRIED, architectures, build
from benchmarks.compatibility.table import read, sentence
from benchmarks.compatibility.trial import attempt

VERSION, SAID = read()
SAMPLE = [
    "AfmoeForCausalLM",  # sliding beside full, gates
    "BloomForCausalLM",  # no attention interface
    "DeepseekV32ForCausalLM",  # an index over every token
    "DeepseekV3ForCausalLM",  # latents, experts
    "DiffLlamaForCausalLM",  # works on cached keys
    "Gemma4ForCausalLM",  # shared slots, two sizes of heads
    "GPT2LMHeadModel",  # learned positions
    "GptOssForCausalLM",  # sinks
    "KimiLinearForCausalLM",  # recurrent beside latents
    "Lfm3ForCausalLM",  # convolutions that decode in place, beside two kinds of attention
    "Llama4ForCausalLM",  # chunked, layers without rotation
    "LlavaForConditionalGeneration",
    "MambaForCausalLM",
    "MiniMaxForCausalLM",  # a cache class of its own
    "MllamaForCausalLM",  # cross-attention to an image
    "OPTForCausalLM",
    "Qwen3VLForConditionalGeneration",  # positions in three dimensions
    "T5Gemma2ForConditionalGeneration",
    "WhisperForCausalLM",  # not padding-proof itself
    "Zamba2ForCausalLM",  # full attention beside a recurrent state
]


def is_as_said(name: str) -> None:
    """Whatever the version, nothing is wrong; with the version of the page, it happens what the page says."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    try:
        model = build(name)
    except Exception as error:
        if transformers.__version__ == VERSION:
            raise
        pytest.skip(f"transformers {transformers.__version__} does not make it small: {error}")
    found = attempt(model)
    assert not found.faults, found.faults
    if transformers.__version__ == VERSION:
        assert sentence(found) == SAID[name]


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name: str) -> None:
    is_as_said(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAID.keys() - set(SAMPLE) - NOT_TRIED.keys()))
def test_every_architecture(name: str) -> None:
    is_as_said(name)


def test_every_architecture_is_in_the_table() -> None:
    if transformers.__version__ == VERSION:
        assert SAID.keys() == {*architectures(), *NOT_TRIED}
    assert not [name for name, text in SAID.items() if "WRONG" in text]


def test_many_are_compressed() -> None:
    """The page says "nearly all": most classes of the table are."""
    assert sum("compressed" in text and not text.startswith("nothing") for text in SAID.values()) > 0.7 * len(SAID)
