"""Whether a reply follows a verifiable instruction, by the rules and ids of IFEval (arXiv 2311.07911).

As the published ``instructions.py``, without its dependencies: sentences end at ``.``, ``!`` or ``?`` before white
space (there: a trained splitter), words in capitals are runs of letters with hyphens and apostrophes (there: a
tokenizer), and replies asked for in English capitals or lower case are checked for case alone (there: also for the
language).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from keepkv.errors import KeepKVError, UnknownName

Rule = Callable[..., bool]


def follows(reply: str, instruction: str, arguments: dict[str, Any]) -> bool:
    """Whether ``reply`` follows the instruction of that id; arguments that are None are as if not given."""
    rule(instruction)
    return bool(reply.strip()) and RULES[instruction](
        reply, **{key: value for key, value in arguments.items() if value is not None}
    )


def rule(instruction: str) -> Rule:
    """The rule of that id."""
    if instruction not in RULES:
        raise UnknownName("instruction", instruction, RULES)
    return RULES[instruction]


def compare(count: int, relation: str, threshold: int) -> bool:
    """``relation``: "less than" or "at least"."""
    if relation not in ("less than", "at least"):
        raise KeepKVError(f"relation {relation!r}: supported are 'less than' and 'at least'")
    return count < threshold if relation == "less than" else count >= threshold


def _language(reply: str, language: str) -> bool:
    try:
        import langdetect
    except ModuleNotFoundError as missing:
        raise KeepKVError(
            "language:response_language needs langdetect, which is not installed: pip install langdetect"
        ) from missing
    langdetect.DetectorFactory.seed = 0
    try:
        return bool(langdetect.detect(reply) == language)
    except langdetect.LangDetectException:
        return True  # as published: no letters to tell by


def _paragraphs(reply: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", reply)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _first_word(reply: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in reply.split("\n\n")]
    count = sum(map(bool, parts))
    if nth_paragraph > count or not parts[nth_paragraph - 1]:
        return False
    start = re.split(r"[.,?!'\"]", parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"'))[0]
    return count == num_paragraphs and start.lower() == first_word.lower()


def _postscript(reply: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = postscript_marker.strip()
    return re.search(known.get(marker, marker.lower()), reply.lower()) is not None


def _bullets(reply: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", reply, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", reply, re.MULTILINE)) == num_bullets


def _highlights(reply: str, num_highlights: int) -> bool:
    single, double = re.findall(r"\*[^\n\*]*\*", reply), re.findall(r"\*\*[^\n\*]*\*\*", reply)
    return sum(bool(found.strip("*").strip()) for found in single + double) >= num_highlights


def _json(reply: str) -> bool:
    bare = re.sub(r"^```(json|Json|JSON)?", "", reply.strip()).removesuffix("```").strip()
    try:
        json.loads(bare)
    except ValueError:
        return False
    return True


def _two(reply: str) -> bool:
    parts = [part.strip() for part in reply.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _quotation(reply: str) -> bool:
    said = reply.strip()
    return len(said) > 1 and said[0] == said[-1] == '"'


# By id: what the rule says of a reply, given the arguments by their published names.
RULES: dict[str, Rule] = {
    "keywords:existence": lambda reply, keywords: all(re.search(word, reply, re.IGNORECASE) for word in keywords),
    "keywords:frequency": lambda reply, keyword, relation, frequency: compare(
        len(re.findall(keyword.strip(), reply, re.IGNORECASE)), relation, frequency
    ),
    "keywords:forbidden_words": lambda reply, forbidden_words: (
        not any(re.search(rf"\b{word}\b", reply, re.IGNORECASE) for word in forbidden_words)
    ),
    "keywords:letter_frequency": lambda reply, letter, let_relation, let_frequency: compare(
        reply.lower().count(letter.strip().lower()), let_relation, let_frequency
    ),
    "language:response_language": _language,
    "length_constraints:number_sentences": lambda reply, relation, num_sentences: compare(
        len([x for x in re.split(r"(?<=[.!?])\s+", reply.strip()) if x]), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": lambda reply, relation, num_words: compare(
        len(re.findall(r"\w+", reply)), relation, num_words
    ),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": lambda reply, num_placeholders: (
        len(re.findall(r"\[.*?\]", reply)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda reply: (
        re.search(r"My answer is (yes|no|maybe)\.", reply) is not None
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": lambda reply, section_spliter, num_sections: (
        len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", reply)) - 1 >= num_sections
    ),
    "detectable_format:json_format": _json,
    "detectable_format:title": lambda reply: any(x.strip("<>").strip() for x in re.findall(r"<<[^\n]+>>", reply)),
    "combination:two_responses": _two,
    "combination:repeat_prompt": lambda reply, prompt_to_repeat: (
        reply.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:end_checker": lambda reply, end_phrase: (
        reply.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": lambda reply, capital_relation, capital_frequency: compare(
        sum(x.isupper() for x in re.findall(r"[\w'-]+", reply)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda reply: "," not in reply,
}
