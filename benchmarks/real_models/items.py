"""What real models are asked: facts in prose, in English and four other languages, codes in prose, defaults in code,
and sentences that are quoted."""

from __future__ import annotations

import ast
import random
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

from keepkv import tasks
from keepkv.evaluation.setup import HELD_OUT
from keepkv.tasks.base import Count, Item, Question, counter, in_plain_english, weave
from keepkv.tasks.text import prose

from .languages import languages

QUESTIONS = 6
TASKS = ("notes", "niah-multikey-1", "code", "quote", "languages")
TEXTS = Path("~/.cache/keepkv-models/texts").expanduser()  # where ``make real-models`` leaves those of other languages
TRIVIAL = (None, True, False, "")  # defaults that can be guessed


@lru_cache(maxsize=1)
def functions() -> tuple[tuple[str, str, tuple[tuple[str, Any], ...]], ...]:
    """Name, source and telling defaults of short functions of the standard library (PSF licence)."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            every = node.args.posonlyargs + node.args.args
            named = every[len(every) - len(node.args.defaults) :]
            pairs = [(x.arg, v.value) for x, v in zip(named, node.args.defaults, strict=True) if _tells(v)]
            text = ast.get_source_segment(source, node) or ""
            if pairs and len(text) < 900:
                found.append((node.name, text, tuple(pairs)))
    return tuple(found)


def _tells(default: ast.expr) -> bool:
    return isinstance(default, ast.Constant) and default.value not in TRIVIAL and len(str(default.value)) < 12


def code(rng: random.Random, count: Count, length: int) -> Item:
    """Functions one after the other; what is the default of a parameter of one of them?"""
    text, asked = "", []
    for name, source, pairs in rng.sample(functions(), len(functions())):
        if count(text + source) > length:
            continue
        text += f"{source}\n\n\n"
        argument, value = rng.choice(pairs)
        prompt = f"\nWhat is the default value of the parameter {argument} of the function {name}?"
        asked.append(Question(prompt, f" {value!r}", values=(str(value),)))
        if count(text) > 0.9 * length:
            break
    return Item(text.rstrip(), tuple(rng.sample(asked, min(QUESTIONS, len(asked)))))


def quote(rng: random.Random, count: Count, length: int) -> Item:
    """Prose; how does a sentence go on of which the first half is given?"""
    text = weave(rng, count, length, [])
    whole = [x.strip() for x in prose() if x.strip() in text and 10 <= len(x.split()) <= 24]
    asked = []
    for sentence in rng.sample(whole, min(QUESTIONS, len(whole))):
        words = sentence.split()
        half = len(words) // 2
        prompt = f'\nWhich words follow in the text behind "{" ".join(words[:half])}"?'
        asked.append(Question(prompt, " " + " ".join(words[half:]), values=(" ".join(words[half : half + 3]),)))
    return Item(text, tuple(asked))


OWN = {"code": (code, "Answer with the value only."), "quote": (quote, "Quote the words only.")}


def make(task: str, tokenizer: Any, number: int, length: int, texts: Path = TEXTS) -> Item:
    """The context ``number`` of a task, of at most ``length`` tokens, with ``QUESTIONS`` questions. texts: the folder
    of those in other languages."""
    if task == "languages":
        return languages(random.Random(f"{task}/{number}"), counter(tokenizer), length, number, texts)
    if task in OWN:
        build, hint = OWN[task]
        return in_plain_english(build(random.Random(f"{task}/{number}"), counter(tokenizer), length), hint)
    options = {"alike": 1, "questions": QUESTIONS} if task == "notes" else {}
    item = tasks.get(task).generate(tokenizer, length, HELD_OUT + number, plain=True, **options)
    return Item(item.context, item.questions[:QUESTIONS])
