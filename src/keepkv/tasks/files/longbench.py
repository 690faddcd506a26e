"""LongBench (arXiv 2308.14508): 21 data sets in English, Chinese and code.

Records as in ``data/NAME.jsonl`` of THUDM/LongBench: context, input, answers, all_classes, length, language, dataset.
Prompts, reply lengths and metrics are those of its ``config/*.json`` and ``eval.py``, spelling included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from keepkv.metrics.f1 import segmented_f1, word_f1
from keepkv.metrics.longbench import classification, code_similarity, segmented_rouge, share_of_numbers
from keepkv.metrics.summary import rouge_l_f
from keepkv.tasks.base import Item
from keepkv.tasks.files.base import Benchmark, question
from keepkv.tasks.files.records import Record

_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other "
    "words.\n\nThe following are given passages.\n",
    "\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other "
    "words.\n\nQuestion: {input}\nAnswer:",
)
_UNANSWERABLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based "
    "on "
    'the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", '
    'or "unanswerable". Do not provide any explanation.\n\n'
)

# Before the context, after it; the context is what is compressed.
PROMPTS: dict[str, tuple[str, str]] = {
    "narrativeqa": (
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: ",
        "\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do "
        "not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    ),
    "qasper": (
        f"You are given a scientific article and a question. Answer the question {_UNANSWERABLE}Article: ",
        f"\n\n Answer the question based on the above article {_UNANSWERABLE}Question: {{input}}\n\nAnswer:",
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n",
        "\n\nNow, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
    ),
    "multifieldqa_zh": (
        "阅读以下文字并用中文简短回答：\n\n",
        "\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "dureader": (
        "请基于给定的文章回答下述问题。\n\n文章：",
        "\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    ),
    "gov_report": (
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n",
        "\n\nNow, write a one-page summary of the report.\n\nSummary:",
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one "
        "or more sentences.\n\nTranscript:\n",
        "\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\n"
        "Answer:",
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n",
        "\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    ),
    "vcsum": ("下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n", "\n\n会议总结："),
    "trec": (
        "Please determine the type of the question below. Here are some examples of questions.\n\n",
        "\n{input}",
    ),
    "triviaqa": (
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
        "The following are some examples.\n\n",
        "\n\n{input}",
    ),
    "samsum": (
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n",
        "\n\n{input}",
    ),
    "lsht": ("请判断给定新闻的类别，下面是一些例子。\n\n", "\n{input}"),
    "passage_count": (
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
        "words, how many non-repeating paragraphs are there in total?\n\n",
        "\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should "
        "only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
    ),
    "passage_retrieval_en": (
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract "
        "is from.\n\n",
        "\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is "
        'from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
    ),
    "passage_retrieval_zh": (
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n",
        "\n\n下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是\"段落1\"，\"段落2\"等格式\n\n答案是：",
    ),
    "lcc": ("Please complete the code given below. \n", "Next line of code:\n"),
    "repobench-p": ("Please complete the code given below. \n", "{input}Next line of code:\n"),
}  # fmt: skip
_LIMITS = {32: "hotpotqa 2wikimqa musique triviaqa passage_count passage_retrieval_en passage_retrieval_zh"}
_LIMITS |= {64: "multifieldqa_en multifieldqa_zh trec lsht lcc repobench-p"}
_LIMITS |= {128: "narrativeqa qasper dureader samsum", 512: "gov_report qmsum multi_news vcsum"}
LIMITS = {part: limit for limit, parts in _LIMITS.items() for part in parts.split()}

METRICS: dict[str, Callable[[str, str], float]] = dict.fromkeys(PROMPTS, word_f1) | {
    "multifieldqa_zh": segmented_f1,
    **dict.fromkeys(("dureader", "vcsum"), segmented_rouge),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l_f),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), share_of_numbers),
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
}
_EXAMPLES = ("trec", "triviaqa", "samsum", "lsht")  # models go on with further examples: the first line counts
_CLASSES = ("trec", "lsht")


def make(record: Record, part: str) -> Item:
    """The context, and the question in the words of LongBench."""
    before, after = PROMPTS[part]
    metric = METRICS[part]
    if part in _CLASSES:
        metric = partial(classification, classes=record["all_classes"])
    asked = question(
        after.replace("{input}", record["input"]), record["answers"], metric, LIMITS[part], first_line=part in _EXAMPLES
    )
    return Item(before + record["context"], (asked,), tags={"length": float(record.get("length") or 0)})


BENCHMARK = Benchmark(
    "longbench",
    "21 long-context data sets (arXiv 2308.14508)",
    make,
    lambda part: ("THUDM/LongBench", part, "test"),
    tuple(PROMPTS),
)
