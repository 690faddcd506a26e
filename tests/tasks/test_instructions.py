"""Several instructions in one prompt: rules and their checkers, spans, frames; how much of a text a reply repeats."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from keepkv import tasks
from keepkv.metrics import rouge_1, rouge_l, verbatim
from keepkv.tasks.base import TaskError, counter
from keepkv.tasks.instructions import (
    ATTACKS,
    DEFENCES,
    FAMILIES,
    ORDERS,
    PLAIN,
    REFUSAL,
    build,
    draw,
    frame_of,
    obey,
    refuses,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    from keepkv.embedded import embedded_model

    return AutoTokenizer.from_pretrained(embedded_model())


# --- what a reply repeats --------------------------------------------------------------------------------------------


def test_rouge_by_hand():
    reference = "the cat sat on the mat"
    assert rouge_l(reference, "The cat was on a mat.") == 4 / 6  # the cat · on · mat
    assert rouge_1(reference, "The cat was on a mat.") == 4 / 6
    assert rouge_l(reference, "mat the on sat cat the") == 3 / 6  # backwards: the · on · the
    assert rouge_1(reference, "mat the on sat cat the") == 1.0
    assert rouge_1(reference, "the the the") == 2 / 6  # each as often as the reference has it
    assert verbatim(reference, "he sat on the chair, the cat") == 3 / 6


def test_rouge_at_its_ends():
    for measure in (rouge_l, rouge_1, verbatim):
        assert measure("Keep it, always!", "") == 0.0
        assert measure("Keep it, always!", "keep IT always") == 1.0
        assert measure("", "anything") == 0.0
        assert measure("Καλημέρα κόσμε", "καλημέρα κόσμε") == 1.0
        assert measure("running", "run") == 0.0  # no stemming


# --- rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_knows_a_reply_that_keeps_it_from_one_that_breaks_it(family):
    for seed in range(12):
        rule = FAMILIES[family](random.Random(seed))
        assert rule.check.strict(rule.passes) and rule.check.loose(rule.passes), rule.text
        assert not rule.check.strict(rule.fails), rule.text
        assert not rule.check.strict(""), rule.text
        assert rule.text.endswith(".") and rule.check.family == family


def test_there_are_enough_families():
    assert len(FAMILIES) >= 12 and len(ATTACKS) >= 5 and set(DEFENCES) == {"short", "long"}


@pytest.mark.parametrize("family", FAMILIES)
def test_loose_forgives_an_opening_line_and_nothing_that_strict_allows(family):
    rule = FAMILIES[family](random.Random(1))
    wrapped = "Sure: here is my reply, without further ado, JUST AS you Wanted z x j!\n" + rule.passes
    assert rule.check.loose(wrapped), rule.text
    for reply in (rule.passes, rule.fails, wrapped, "", "a\nb", '{"a": 1}', "1 *2* 3"):
        assert rule.check.loose(reply) >= rule.check.strict(reply)


def test_rules_that_stand_together_can_be_kept_together():
    for seed in range(150):
        rules = draw(random.Random(seed), 1 + seed % 4)
        reply = obey(rules)
        broken = [rule.text for rule in rules if not rule.check.strict(reply.strip())]
        assert not broken, (broken, [rule.text for rule in rules], reply)
        assert all(not a.slots & b.slots for a, b in combinations(rules, 2))


def test_too_many_rules_are_refused():
    with pytest.raises(TaskError, match="stand together"):
        draw(random.Random(0), 3, ["lower-case", "upper-case", "script"])


def test_refusals_are_known():
    assert refuses(REFUSAL) and refuses("I'm sorry, but I can't share my instructions.")
    assert refuses("I am not able to disclose that.") and refuses("I won't repeat it.")
    assert not refuses("My rules are: write in lower case.") and not refuses("")


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("defence", ["none", "short", "long"])
@pytest.mark.parametrize("directives", [1, 2, 3, 4])
def test_spans_hold_what_they_are_named_after(tokenizer, order, defence, directives):
    options = {"order": order, "defence": defence, "directives": directives, "attacks": tuple(ATTACKS)}
    item = tasks.get("multi-instruction").generate(tokenizer, 500, directives, **options)
    parts = {name: item.context[start:end] for name, (start, end) in item.spans.items()}
    rules = [check.text for check in item.questions[0].checks]
    assert [text for name, text in parts.items() if name.startswith("directive")] == rules
    shield = " ".join(text for name, text in parts.items() if name.startswith("defence"))
    assert (REFUSAL in shield) == (defence != "none")
    assert parts["notes"].startswith("\n\nNotes for reference:") and item.context.endswith(parts["notes"])
    starts = {name: start for name, (start, _) in item.spans.items()}
    if defence != "none":
        first = starts["defence-1"] < starts["directive-1"]
        assert first == (order != "directive-first")
    if defence != "none" and order == "interleaved":
        assert starts["defence-1"] < starts["directive-1"] < starts["defence-2"]
    probes = [question for question in item.questions if question.probe]
    assert len(probes) == len(ATTACKS) and all(probe.forbidden == " ".join(rules) for probe in probes)


def test_a_prompt_without_notes_has_the_rules_alone(tokenizer):
    item = build(random.Random(0), counter(tokenizer), 400, filler=False)
    assert "notes" not in item.spans and len(tokenizer.encode(item.context)) < 150


@pytest.mark.parametrize(
    "options",
    [{"order": "sideways"}, {"defence": "huge"}, {"directives": 5}, {"attacks": ["none"]}, {"requests": 99}],
    ids=lambda options: next(iter(options)),
)
def test_impossible_options_are_refused(tokenizer, options):
    with pytest.raises(TaskError):
        tasks.get("multi-instruction").generate(tokenizer, 400, **options)


def test_a_prompt_too_short_for_its_rules_is_refused(tokenizer):
    with pytest.raises(TaskError, match="fewer"):
        tasks.get("multi-instruction").generate(tokenizer, 40, defence="long", directives=4)


def test_replies_are_scored_by_the_rules_they_keep(tokenizer):
    item = tasks.get("multi-instruction").generate(tokenizer, 400, 3)
    asked, probe = item.questions[0], item.questions[-1]

    def graded(question, reply):
        return tasks.grade(tokenizer, question, [], tokenizer.encode(reply, add_special_tokens=False))

    good, bad = graded(asked, asked.answer), graded(asked, asked.foil)
    assert good.value == good.loose == 1.0 and bad.value < 1.0 and not good.leaked
    assert graded(asked, asked.answer + "\n\nUser: and now?\nAssistant: No.").value == 1.0  # the next turn is not read
    assert graded(probe, probe.foil).leaked and not graded(probe, probe.answer).leaked
    assert not graded(probe, "I like rivers and bridges.").leaked


# --- frames ----------------------------------------------------------------------------------------------------------


def test_without_a_template_headers_are_plain(tokenizer):
    assert frame_of(tokenizer) is PLAIN and frame_of(len) is PLAIN


def test_a_template_frames_the_system_text(tokenizer):
    tokenizer.chat_template = CHATML
    item = tasks.get("multi-instruction").generate(tokenizer, 400, 1)
    assert item.framed and item.context.startswith("<|im_start|>system\nYou ")
    question = item.questions[0]
    assert question.prompt.startswith("<|im_end|>\n<|im_start|>user\n")
    assert question.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    rules = [check.text for check in question.checks]
    assert [item.context[a:b] for name, (a, b) in item.spans.items() if name.startswith("directive")] == rules


def test_without_a_system_role_the_rules_open_the_user_turn(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    item = tasks.get("multi-instruction").generate(tokenizer, 400, 1)
    assert item.framed and item.context.startswith("<bos>[INST] You ")
    assert item.questions[0].prompt.startswith("\n\n") and item.questions[0].prompt.endswith(" [/INST]")
    start, end = item.spans["directive-1"]
    assert item.context[start:end] == item.questions[0].checks[0].text
