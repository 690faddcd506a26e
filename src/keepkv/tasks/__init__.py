"""Long-context tasks: a context to compress, and questions asked afterwards. Generated ones need no network; benchmarks
of others are read from files or a hub."""

from pathlib import Path

from keepkv.tasks import (
    common_words,
    frequent_words,
    instructions,
    long_decode,
    needle,
    niah_multikey_1,
    niah_multikey_2,
    niah_multikey_3,
    niah_multiquery,
    niah_multivalue,
    niah_single_1,
    niah_single_2,
    niah_single_3,
    perplexity,
    qa_1,
    qa_2,
    secret,
    shared_context,
    variable_tracking,
)
from keepkv.tasks.base import Item, Question, Task, TaskError
from keepkv.tasks.demo import demo_document
from keepkv.tasks.files import BENCHMARKS, FileTask, is_file_task, open_task
from keepkv.tasks.scoring import Score, grade, score, score_item

# The thirteen shapes of RULER (arXiv 2404.06654), in text of our own: never to be compared with published numbers.
RULER = (
    niah_single_1, niah_single_2, niah_single_3, niah_multikey_1, niah_multikey_2, niah_multikey_3, niah_multivalue,
    niah_multiquery, variable_tracking, common_words, frequent_words, qa_1, qa_2,
)  # fmt: skip
_MODULES = (*RULER, needle, shared_context, long_decode, secret, perplexity, instructions)
_TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}


def names() -> tuple[str, ...]:
    """Names of all generated tasks."""
    return tuple(_TASKS)


def get(name: str) -> Task:
    """The task of that name: of a generated one, or of a benchmark and its file, as ``open`` takes them."""
    if name in _TASKS:
        return _TASKS[name]
    if is_file_task(name):
        return open(name)
    raise TaskError(f"no task {name!r}; known: {', '.join(_TASKS)}; from files: {', '.join(BENCHMARKS)}")


def open(name: str, path: str | Path | None = None) -> FileTask:
    """A benchmark of others: ``open("longbench:qasper", "qasper.jsonl")`` or ``open("longbench:qasper=qasper.jsonl")``.

    Without a path it comes from the hub, which takes the package ``datasets``. See ``keepkv.tasks.files``.
    """
    return open_task(name, path)


def register(task: Task) -> Task:
    """Adds a task under its own name."""
    if task.name in _TASKS:
        raise TaskError(f"a task named {task.name!r} is already registered")
    _TASKS[task.name] = task
    return task


__all__ = [
    "BENCHMARKS", "FileTask", "Item", "Question", "Score", "Task", "TaskError", "demo_document", "get", "grade",
    "names", "open", "register", "score", "score_item",
]  # fmt: skip
