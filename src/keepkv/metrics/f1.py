"""F1 of the words of a short answer, as SQuAD defined it and as LongBench and InfiniteBench use it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from keepkv.errors import KeepKVError

_CHINESE = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and surplus white space."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def normalise_chinese(text: str) -> str:
    """Lower case, without punctuation of either script and without white space."""
    return "".join("".join(c for c in text.lower() if c not in string.punctuation + _CHINESE).split())


def f1(said: Sequence[str], true: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over two bags of tokens."""
    same = (Counter(said) & Counter(true)).total()
    return 2 * same / (len(said) + len(true)) if same else 0.0


def word_f1(reply: str, answer: str) -> float:
    """Over normalised words."""
    return f1(normalise(reply).split(), normalise(answer).split())


def character_f1(reply: str, answer: str) -> float:
    """Over the characters of normalised Chinese (InfiniteBench)."""
    return f1(normalise_chinese(reply), normalise_chinese(answer))


def segmented_f1(reply: str, answer: str) -> float:
    """Over the words that jieba finds in Chinese (LongBench)."""
    said, true = ([word for token in segment(text) if (word := normalise_chinese(token))] for text in (reply, answer))
    return f1(said, true)


def segment(text: str) -> list[str]:
    """Words of Chinese text."""
    try:
        import jieba
    except ModuleNotFoundError as missing:
        raise KeepKVError(
            "Chinese answers are scored over the words that jieba finds, and it is not installed: "
            "pip install 'keepkv[eval]'"
        ) from missing
    return list(jieba.cut(text, cut_all=False))
