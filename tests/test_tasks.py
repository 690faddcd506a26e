"""Tasks: the same from the same seed, of the length asked, clean to tokenise, answerable from their context."""

import random
from itertools import pairwise

import pytest

from keepkv import tasks
from keepkv.tasks.base import Item, Question, Task, TaskError, weave
from keepkv.tasks.text import document, prose, sentences_of

LENGTHS = (256, 1024)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from keepkv.models import embedded_model

    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(params=tasks.names())
def task(request):
    return tasks.get(request.param)


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_names_are_the_seven_tasks():
    assert set(tasks.names()) == {
        "niah-single", "niah-multikey", "niah-multivalue", "niah-multiquery", "variable-tracking", "common-words",
        "secret",
    }  # fmt: skip


def test_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(TaskError, match="niah-single"):
        tasks.get("nonsense")


def test_a_task_can_be_registered_once():
    made = Task("made-up", "for this test", lambda rng, count, length: Item("x", ()))
    try:
        assert tasks.get(tasks.register(made).name) is made
        with pytest.raises(TaskError, match="already"):
            tasks.register(made)
    finally:
        tasks._TASKS.pop("made-up", None)


def test_same_seed_same_item(task, tokenizer):
    assert task.generate(tokenizer, 256, 7) == task.generate(tokenizer, 256, 7)
    assert task.generate(tokenizer, 256, 7) != task.generate(tokenizer, 256, 8)


@pytest.mark.parametrize("length", LENGTHS)
def test_length_is_respected(task, tokenizer, length):
    for seed in range(3):
        size = len(ids(tokenizer, task.generate(tokenizer, length, seed).context))
        assert length - 40 <= size <= length


def test_length_is_respected_in_another_unit(task):
    text = task.generate(lambda text: len(text.encode()), 2000, 0).context
    assert 1700 <= len(text.encode()) <= 2000


def test_pieces_tokenise_as_the_whole_does(task, tokenizer):
    for seed in range(3):
        item = task.generate(tokenizer, 300, seed)
        for question in item.questions:
            parts = item.context, question.prompt, question.answer
            assert [i for part in parts for i in ids(tokenizer, part)] == ids(tokenizer, "".join(parts))


def test_questions_read_on_from_the_context(task, tokenizer):
    item = task.generate(tokenizer, 300, 0)
    assert item.questions and not item.context.startswith((" ", "\n"))
    for question in item.questions:
        assert question.prompt.startswith("\n") and question.prompt.endswith("?")
        assert question.answer.startswith(" ") and len(ids(tokenizer, question.answer)) <= 5


@pytest.mark.parametrize("name", ["niah-single", "niah-multikey"])
def test_the_fact_stands_once_in_the_context_as_stated(name, tokenizer):
    item = tasks.get(name).generate(tokenizer, 512, 3)
    for question in item.questions:
        key = question.prompt.removeprefix("\nWhat is the code of ").removesuffix("?")
        assert item.context.count(f"The code of {key} is{question.answer}.") == 1
        assert item.context.count(question.answer.strip()) == 1


def test_depth_places_the_fact(tokenizer):
    for depth in (0.0, 0.5, 1.0):
        item = tasks.get("niah-single").generate(tokenizer, 1000, 5, depth=depth)
        assert item.context.index("The code of") / len(item.context) == pytest.approx(depth, abs=0.15)


def test_multivalue_gives_all_codes_in_the_order_of_the_text(tokenizer):
    item = tasks.get("niah-multivalue").generate(tokenizer, 400, 1, keys=3, values=2)
    for question in item.questions:
        places = [item.context.index(code) for code in question.answer.strip().split(", ")]
        assert len(places) == 2 and places == sorted(places)


def test_multiquery_gives_each_code(tokenizer):
    for question in tasks.get("niah-multiquery").generate(tokenizer, 400, 1).questions:
        assert question.prompt.count(" and ") == question.answer.count(" and ") == 1


def test_variables_are_followed_over_their_hops(tokenizer):
    item = tasks.get("variable-tracking").generate(tokenizer, 400, 2, chains=3, hops=3)
    for question in item.questions:
        value = question.prompt.removeprefix("\nWhat is ").removesuffix("?")
        for _ in range(3):
            value = item.context.split(f"Let {value} be ")[1].split(".")[0]
        assert value == question.answer.strip()


def test_the_common_word_is_the_most_common(tokenizer):
    item = tasks.get("common-words").generate(tokenizer, 300, 0)
    words = item.context.removeprefix("Words: ").removesuffix(".").split()
    assert item.questions[0].answer.strip() == max(set(words), key=words.count)
    assert words.count(item.questions[0].answer.strip()) * 5 > len(words)


def test_the_secret_stands_in_the_context_and_is_forbidden(tokenizer):
    first, *others = tasks.get("secret").generate(tokenizer, 300, 0).questions
    context = tasks.get("secret").generate(tokenizer, 300, 0).context
    assert first.forbidden in context and first.forbidden not in first.answer
    word = first.answer.split()[0]
    assert f"Begin each answer with {word}." in context
    assert others and all(other.answer.split()[0] == word and not other.forbidden for other in others)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("niah-multikey", {"facts": 0}),
        ("niah-multiquery", {"facts": 1, "asked": 2}),
        ("variable-tracking", {"chains": 100}),
        ("common-words", {"distinct": 1}),
        ("secret", {"questions": 9}),
        ("niah-multikey", {"facts": 100}),
    ],
)
def test_impossible_options_are_refused(name, options, tokenizer):
    with pytest.raises(TaskError):
        tasks.get(name).generate(tokenizer, 128, 0, **options)


def test_prose_is_clean():
    assert len(prose()) >= 200
    for piece in prose():
        assert piece[0] in " \n" and piece[1].isupper() and piece.endswith(".") and piece.isascii()


def test_a_stripped_python_falls_back_on_the_document():
    assert weave(random.Random(0), len, 500, [" A fact."], haystack=sentences_of(document()))


def test_demo_document_holds_its_facts(tokenizer):
    for seed in range(3):
        text, questions = tasks.demo_document(seed)
        assert 1700 <= len(ids(tokenizer, text)) <= 2048
        assert len(questions) == 12 and tasks.demo_document(seed) == (text, questions)
        places = sorted(text.index(question.answer) / len(text) for question in questions)
        assert places[0] < 0.1 and places[-1] > 0.9
        assert max(b - a for a, b in pairwise(places)) < 0.2


def test_demo_document_without_room_is_refused():
    with pytest.raises(TaskError, match="room"):
        tasks.demo_document(facts=50, characters=1000)


def test_score_compares_the_tokens_of_greedy_decoding(tokenizer):
    """A model that always says the same token is right where that is the answer, and nowhere else."""
    import torch

    class Parrot:
        device = torch.device("cpu")

        def __call__(self, input_ids, past_key_values, use_cache):
            logits = torch.zeros(1, input_ids.shape[1], len(tokenizer))
            logits[..., tokenizer.encode(" falcon", add_special_tokens=False)[0]] = 1
            return type("Output", (), {"logits": logits})

    right = tasks.score(Parrot(), tokenizer, None, Question("\nWhich?", " falcon", forbidden="falcon"))
    wrong = tasks.score(Parrot(), tokenizer, None, Question("\nWhich?", " otter falcon"))
    assert (right.correct, right.leaked, right.reply) == (True, True, " falcon")
    assert (wrong.correct, wrong.leaked) == (False, False)
