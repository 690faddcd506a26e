"""Whether a reply keeps a rule: plain functions on text, each rule one function. Replies come stripped."""

from __future__ import annotations

import json
import re
import unicodedata

_FENCE = re.compile(r"^```(?:json)?\s*(.*?)\s*```$", re.DOTALL | re.IGNORECASE)
_TITLE = re.compile(r"^== .+ ==$", re.MULTILINE)


def words(text: str) -> list[str]:
    """Runs of letters, digits, hyphens and apostrophes."""
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def is_lower(reply: str) -> bool:
    """Has letters, and none of them is a capital."""
    return reply == reply.lower() and _has_letters(reply)


def is_upper(reply: str) -> bool:
    """Has letters, and all of them are capitals."""
    return reply == reply.upper() and _has_letters(reply)


def has_word(reply: str, word: str, times: int) -> bool:
    """Has ``word`` at least ``times`` times, as a whole word."""
    return len(re.findall(rf"\b{re.escape(word)}\b", reply, re.IGNORECASE)) >= times


def lacks_word(reply: str, word: str) -> bool:
    """Says something without ``word`` as a whole word."""
    return bool(reply) and not has_word(reply, word, 1)


def has_title(reply: str) -> bool:
    """The first line is a title between double equals signs."""
    return _TITLE.fullmatch(reply.split("\n")[0].strip()) is not None


def is_quoted(reply: str) -> bool:
    """Stands between double quotation marks."""
    return len(reply) > 2 and reply[0] + reply[-1] in ('""', "“”")


def is_json(reply: str) -> bool:
    """Is one JSON object, in a code fence or without."""
    fenced = _FENCE.match(reply)
    try:
        return isinstance(json.loads(fenced[1] if fenced else reply), dict)
    except ValueError:
        return False


def in_script(reply: str, script: str) -> bool:
    """Has letters, and all of them are of ``script``, named as Unicode does: GREEK, CYRILLIC."""
    letters = [x for x in reply if x.isalpha()]
    return bool(letters) and all(unicodedata.name(x, "").startswith(script) for x in letters)


def _has_letters(text: str) -> bool:
    return any(x.isalpha() for x in text)
