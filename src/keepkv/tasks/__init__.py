"""Generated long-context tasks that need no network: a context to compress, and questions asked afterwards."""

from keepkv.tasks import (
    common_words,
    niah_multikey,
    niah_multiquery,
    niah_multivalue,
    niah_single,
    secret,
    variable_tracking,
)
from keepkv.tasks.base import Item, Question, Task, TaskError
from keepkv.tasks.demo import demo_document
from keepkv.tasks.scoring import Score, score, score_item

_MODULES = (
    niah_single, niah_multikey, niah_multivalue, niah_multiquery, variable_tracking, common_words, secret,
)  # fmt: skip
_TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in _MODULES}


def names() -> tuple[str, ...]:
    """Names of all tasks."""
    return tuple(_TASKS)


def get(name: str) -> Task:
    """The task of that name."""
    if name not in _TASKS:
        raise TaskError(f"no task {name!r}; known: {', '.join(_TASKS)}")
    return _TASKS[name]


def register(task: Task) -> Task:
    """Adds a task under its own name."""
    if task.name in _TASKS:
        raise TaskError(f"a task named {task.name!r} is already registered")
    _TASKS[task.name] = task
    return task


__all__ = [
    "Item", "Question", "Score", "Task", "TaskError", "demo_document", "get", "names", "register", "score",
    "score_item",
]  # fmt: skip
