"""The text of a reply as it grows: whole characters, and nothing that may still become a stop."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from serving import loaded

from keepkv.serve.batch.text import Text

TEXTS = st.text(alphabet=st.sampled_from("ab öü☃你好👩🏽‍🚀🇩🇪\n,.<|"), max_size=25)


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


@settings(deadline=None, max_examples=60)
@given(TEXTS)
def test_pieces_make_the_text(text: str) -> None:
    for tokenizer, ids in (
        (loaded()[1], loaded()[1].encode(text, add_special_tokens=False)),
        (Letters(), text.encode()),
    ):
        grown = Text(tokenizer, [])
        pieces = [grown.add(token) for token in ids]
        whole = tokenizer.decode(list(ids), skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + grown.end() == whole


@settings(deadline=None, max_examples=100)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    """Which of the stops is complete first decides, one that begins first among those."""
    grown, told = Text(Letters(), [], stops), ""
    for token in text.encode():
        told += grown.add(token)
    told += grown.end()
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    if not ends:
        assert told == text and grown.stopped is None
        return
    at = min(ends[0] - len(stop) for stop in stops if text[: ends[0]].endswith(stop))
    assert told == text[:at] and grown.stopped in stops


def test_what_may_become_a_stop_is_held_back() -> None:
    grown = Text(Letters(), [], ["<end>"])
    assert [grown.add(x) for x in b"a<en<en"] == ["a", "", "", "", "<en", "", ""]
    assert grown.end() == "<en" and grown.stopped is None


def test_a_character_over_several_tokens_comes_whole() -> None:
    grown = Text(Letters(), [])
    assert [grown.add(x) for x in "é👍".encode()] == ["", "é", "", "", "", "👍"]
    grown = Text(Letters(), [])
    assert [grown.add(x) for x in "👍".encode()[:2]] == ["", ""] and grown.end() == "\ufffd"


def test_a_space_at_the_beginning_stays() -> None:
    tokenizer = loaded()[1]
    prompt, more = tokenizer.encode("The moon"), tokenizer.encode(" is far", add_special_tokens=False)
    grown = Text(tokenizer, prompt)
    assert "".join(grown.add(x) for x in more) + grown.end() == " is far"
