"""Tasks: the same from the same seed, of the length asked, clean to tokenise, answerable from their context."""

import random
from itertools import pairwise

import pytest

from keepkv import tasks
from keepkv.errors import UnknownName
from keepkv.tasks.base import Item, Question, Task, TaskError, weave
from keepkv.tasks.text import document, prose, sentences_of

LENGTHS = (256, 1024)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from keepkv.embedded import embedded_model

    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(params=tasks.names())
def task(request):
    return tasks.get(request.param)


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_all_thirteen_shapes_of_ruler_are_there():
    shapes = {
        "variable-tracking",
        "common-words",
        "frequent-words",
        "qa-1",
        "qa-2",
        "niah-multivalue",
        "niah-multiquery",
    }
    shapes |= {f"niah-{kind}-{i}" for kind in ("single", "multikey") for i in (1, 2, 3)}
    assert {task.name for task in tasks.RULER} == shapes and len(shapes) == 13
    assert shapes | {"needle", "shared-context", "long-decode", "secret"} <= set(tasks.names())


def test_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(UnknownName, match=r"unknown task 'nonsense'\. Did you mean 'notes'"):
        tasks.get("nonsense")
    with pytest.raises(UnknownName, match="Did you mean 'niah-single-2'"):
        tasks.get("niah-singel-2")
    with pytest.raises(UnknownName, match="Did you mean 'niah-multikey-1'"):  # the beginning of several
        tasks.get("niah")
    assert tasks.get("QA-1") is tasks.get("qa-1")


def test_groups_are_taken_by_name():
    assert tasks.chosen(["Notes", "text", "notes"]) == ("notes", "perplexity")
    assert len(tasks.chosen(["ruler"])) == 13 and tasks.chosen(["all"]) == tasks.names()
    every = [*tasks.names(), *tasks.names(sees=True)]
    assert {tasks.group_of(name) for name in every} == set(tasks.GROUPS)
    assert not set(tasks.names()) & set(tasks.chosen(["all"], sees=True)) and tasks.chosen(["vision"])


def test_a_task_can_be_registered_once():
    made = Task("made-up", "for this test", lambda rng, count, length: Item("x", ()))
    try:
        assert tasks.get(tasks.register(made).name) is made
        again = Task("made-up", "of the same cell, run again", made.build)
        assert tasks.get(tasks.register(again).name) is again
        other = Task("made-up", "another", lambda rng, count, length, more=0: Item("y", ()))
        with pytest.raises(TaskError, match=r"already registered, by .*replace=True"):
            tasks.register(Task("qa-1", "mine", other.build))
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
        if task.asks:
            assert question.prompt.startswith("\n") and question.prompt.endswith(":" if task.english else "?")
        assert question.answer.startswith(" ") and (
            task.decodes or question.judged or question.checks or len(ids(tokenizer, question.answer)) <= 20
        )
        assert all(value in question.answer for value in question.values)


@pytest.mark.parametrize("name", ["niah-single-2", "niah-multikey-1"])
def test_the_fact_stands_once_in_the_context_as_stated(name, tokenizer):
    item = tasks.get(name).generate(tokenizer, 512, 3)
    for question in item.questions:
        key = question.prompt.removeprefix("\nWhat is the code of ").removesuffix("?")
        assert item.context.count(f"The code of {key} is{question.answer}.") == 1
        assert item.context.count(question.answer.strip()) == 1


def test_depth_places_the_fact(tokenizer):
    for depth in (0.0, 0.5, 1.0):
        item = tasks.get("niah-single-2").generate(tokenizer, 1000, 5, depth=depth)
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
        for step in question.answer.strip().split(", "):
            assert step.split(" is ")[0] == value
            value = item.context.split(f"Let {value} be ")[1].split(".")[0]
            assert step.split(" is ")[1] == value
        assert question.values == (value,)


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
        ("niah-multikey-1", {"facts": 0}),
        ("niah-multiquery", {"facts": 1, "asked": 2}),
        ("variable-tracking", {"chains": 100}),
        ("common-words", {"distinct": 1}),
        ("secret", {"questions": 9}),
        ("niah-multikey-1", {"facts": 100}),
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
    from transformers import DynamicCache

    class Parrot:
        device = torch.device("cpu")

        def __call__(self, input_ids, **options):
            logits = torch.zeros(1, input_ids.shape[1], len(tokenizer))
            logits[..., tokenizer.encode(" falcon", add_special_tokens=False)[0]] = 1
            return type("Output", (), {"logits": logits})

    cache = DynamicCache()
    right = tasks.score(Parrot(), tokenizer, cache, Question("\nWhich?", " falcon", forbidden="falcon"))
    wrong = tasks.score(Parrot(), tokenizer, cache, Question("\nWhich?", " otter falcon"))
    assert (right.correct, right.leaked, right.reply) == (True, True, " falcon")
    assert (wrong.correct, wrong.leaked) == (False, False)


def test_values_are_searched_and_graded_replies_count_to_the_first_error(tokenizer):
    def graded(question, reply):
        return tasks.grade(tokenizer, question, ids(tokenizer, question.answer), ids(tokenizer, reply))

    two = Question("\nWhich?", " fox is 1234 and owl is 5678", values=("1234", "5678"))
    assert graded(two, " owl is 5678, fox is 1234").correct
    assert graded(two, " fox is 1234 and owl is 9999").value == 0.5 and not graded(two, "").value
    row = Question("\nWhich?", " fox owl deer elk", graded=True)
    assert [graded(row, r).value for r in (" fox owl deer elk", " fox owl elk elk", "", " fox")] == [1, 0.5, 0, 0.25]


def test_plain_english_wraps_any_task(task, tokenizer):
    item = task.generate(tokenizer, 400, 1, plain=True)
    if task.english or not task.asks:
        assert item == task.generate(tokenizer, 400, 1)
        return
    assert item.context.startswith("Read the following text") and len(ids(tokenizer, item.context)) <= 400
    for question in item.questions:
        assert question.prompt.startswith("\n\nQuestion: ") and question.prompt.endswith("\nAnswer:")
        assert question.values or question.graded


@pytest.mark.parametrize("kind", ["copy", "sort", "add"])
def test_long_replies_are_as_long_as_their_context(kind, tokenizer):
    item = tasks.get("long-decode").generate(tokenizer, 160, 3, kind=kind)
    [question] = item.questions
    assert len(ids(tokenizer, question.answer)) > 70
    words = item.context.split(": ")[1].rstrip(".").split()
    if kind == "copy":
        assert question.answer.split() == words
    elif kind == "sort":
        assert [int(n) for n in question.answer.split()] == sorted(map(int, words))
    else:
        total = int(words[0])
        for term, step in zip(words[2::2], question.answer.strip().split(", "), strict=True):
            total += int(term) - (90 if total + int(term) > 99 else 0)
            assert step.endswith(f"+ {term} is {total}")


def test_two_step_questions_are_answered_by_two_sentences(tokenizer):
    item = tasks.get("qa-2").generate(tokenizer, 500, 1)
    for question in item.questions:
        first, second = question.answer.strip().split(", ")
        assert f"{first}." in item.context and f"{second}." in item.context
        assert first.endswith(" ".join(second.split()[:2])) and first.split(" follows")[0] in question.prompt


def test_the_most_frequent_words_are_the_most_frequent(tokenizer):
    item = tasks.get("frequent-words").generate(tokenizer, 300, 0)
    words = item.context.removeprefix("Words: ").removesuffix(".").split()
    by_count = sorted(set(words), key=words.count, reverse=True)
    assert item.questions[0].values == tuple(by_count[:3])
    assert len({words.count(word) for word in by_count[:4]}) == 4


def test_a_text_goes_on_where_its_context_ends(tokenizer, tmp_path):
    perplexity = tasks.get("perplexity")
    for seed in range(5):
        item = perplexity.generate(tokenizer, 500, seed)
        [question] = item.questions
        assert item.context + question.answer in document() and question.judged and not question.prompt
        assert 56 <= len(ids(tokenizer, question.answer)) <= 64
    own = tmp_path / "own.txt"
    own.write_text("One two three four five six seven eight nine ten. " * 40, encoding="utf-8")
    item = perplexity.generate(tokenizer, 100, 1, path=own, continuation=8)
    assert item.context + item.questions[0].answer in own.read_text(encoding="utf-8")
    for options in ({"path": tmp_path / "none.txt"}, {"continuation": 1}, {"path": own, "continuation": 5000}):
        with pytest.raises(TaskError, match=r"none\.txt|at least 2|longer text"):
            perplexity.generate(tokenizer, 100, 1, **options)


def test_a_reply_is_graded_by_the_metric_up_to_its_end(tokenizer):
    question = Question("\nWhich?", " fox", limit=9, metric=lambda reply: float(reply == " fox"))
    said = [*ids(tokenizer, " fox"), tokenizer.eos_token_id, *ids(tokenizer, " owl")]
    assert tasks.grade(tokenizer, question, [], said).correct
    assert not tasks.grade(tokenizer, question, [], ids(tokenizer, " fox owl")).correct
