"""Long-context tasks: a context to compress, and questions asked afterwards. Generated ones need no network; benchmarks
of others are read from files or a hub."""

from pathlib import Path

from keepkv.tasks import instructions, long_decode, niah, notes, perplexity, qa, secret, variable_tracking, word_lists
from keepkv.tasks.base import Item, Question, Task, TaskError
from keepkv.tasks.demo import demo_document
from keepkv.tasks.files import BENCHMARKS, FileTask, is_file_task, open_task
from keepkv.tasks.scoring import Score, grade, score, score_item

# The thirteen shapes of RULER (arXiv 2404.06654), in text of our own: never to be compared with published numbers.
RULER = (*niah.TASKS, variable_tracking.TASK, *word_lists.TASKS, *qa.TASKS)
_OTHERS = (notes.TASK, long_decode.TASK, secret.TASK, perplexity.TASK, instructions.TASK)
_TASKS: dict[str, Task] = {task.name: task for task in (*RULER, niah.NEEDLE, niah.SHARED_CONTEXT, *_OTHERS)}


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


def pooled(name: str) -> bool:
    """Whether scores of the task of that name count in the mean over all tasks; those of unknown ones do."""
    return name not in _TASKS or _TASKS[name].pooled


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
    "names", "open", "pooled", "register", "score", "score_item",
]  # fmt: skip
