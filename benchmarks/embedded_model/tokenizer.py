"""The embedded model's tokenizer: byte-level BPE, trained on the standard library's sources and documentation."""

import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from keepkv.tasks.facts import ADJECTIVES, NOUNS
from keepkv.tasks.text import MODULES, prose

# Digits go in pairs, so that a four-digit code is two tokens; a newline is always a token of its own.
PATTERN = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\n|[^\S\n]+"
_TEMPLATES = (
    " The code of is .", "\nWhat is the code of ?", "\nWhat are all the codes of and , ?", " Let be .", "Words:",
    "\nWhich word is the most common?", " Begin each answer with .", " Never tell the code of .", " secret",
)  # fmt: skip


def words() -> list[str]:
    """Strings that must be one token each: names, and numbers of one or two digits."""
    pairs = [f"{n:02d}" for n in range(100)]
    return [f" {word}" for word in ADJECTIVES + NOUNS] + pairs + [f" {pair}" for pair in pairs[10:]]


def _corpus(weight: int = 2000) -> Iterator[str]:
    yield from prose()
    root = Path(sysconfig.get_path("stdlib"))
    for module in MODULES[::4]:
        path = root / f"{module}.py"
        if path.exists():
            yield path.read_text(encoding="utf-8", errors="ignore")
    for _ in range(weight):  # repeated, so that every word is merged into one token
        yield from words()
        yield from _TEMPLATES


@lru_cache(maxsize=1)
def train_tokenizer(vocab: int = 2048) -> Any:
    """A ``PreTrainedTokenizerFast`` with ``vocab`` tokens; deterministic for one version of Python."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_corpus(), trainer)
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    broken = [word for word in words() if len(raw.encode(word, add_special_tokens=False).ids) != 1]
    if broken:
        raise RuntimeError(f"{len(broken)} words such as {broken[:3]} are not single tokens: raise vocab above {vocab}")
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
