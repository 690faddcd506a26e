"""Long-context tasks: a context to compress, and questions asked afterwards. Generated ones need no network; benchmarks
of others are read from files or a hub."""

from collections.abc import Iterable
from pathlib import Path

from keepkv.core.plugins import load_packages
from keepkv.core.registry import known_as, owner
from keepkv.tasks import instructions, long_decode, niah, notes, perplexity, qa, secret, variable_tracking, word_lists
from keepkv.tasks.base import Item, Question, Task, TaskError
from keepkv.tasks.demo import demo_document
from keepkv.tasks.files import BENCHMARKS, FileTask, is_file_task, open_task
from keepkv.tasks.scoring import Score, grade, score, score_item
from keepkv.tasks.vision import drawn, moving

# The thirteen shapes of RULER (arXiv 2404.06654), in text of our own: never to be compared with published numbers.
RULER = (*niah.TASKS, variable_tracking.TASK, *word_lists.TASKS, *qa.TASKS)
GROUPS: dict[str, tuple[Task, ...]] = {
    "ruler": RULER,
    "facts": (niah.NEEDLE, niah.SHARED_CONTEXT, notes.TASK),
    "rules": (secret.TASK, instructions.TASK),
    "replies": (long_decode.TASK,),
    "text": (perplexity.TASK,),
    "vision": drawn.TASKS,
    "scenes": moving.TASKS,
}
OWN = "registered"  # the group of tasks that others have added
_TASKS: dict[str, Task] = {task.name: task for group in GROUPS.values() for task in group}


def names(sees: bool = False) -> tuple[str, ...]:
    """Names of all generated tasks without pictures; with them if the model ``sees``."""
    load_packages()
    return tuple(name for name, task in _TASKS.items() if task.sees == sees)


def group_of(name: str) -> str:
    """The group of a generated task."""
    return next((group for group, held in GROUPS.items() if name in (task.name for task in held)), OWN)


def chosen(given: Iterable[str], sees: bool = False) -> tuple[str, ...]:
    """The tasks that are meant: ``all`` generated ones, with pictures if the model ``sees``, else those without; those
    of a group; or one by its name, whatever its case."""
    found: list[str] = []
    for name in given:
        if name == "all":
            found += names(sees)
        elif name in GROUPS:
            found += [task.name for task in GROUPS[name]]
        else:
            found.append(named(name))
    return tuple(dict.fromkeys(found))


def named(name: str) -> str:
    """``name`` as the task is called, whatever its case. Raises ``UnknownName`` with the nearest one."""
    if name not in _TASKS:
        load_packages()
    return name if is_file_task(name) else known_as(name, [*_TASKS, *BENCHMARKS], "task")


def get(name: str) -> Task:
    """The task of that name: of a generated one, or of a benchmark and its file, as ``open`` takes them."""
    name = named(name)
    return _TASKS[name] if name in _TASKS else open(name)


def pooled(name: str) -> bool:
    """Whether scores of the task of that name count in the mean over all tasks; those of unknown ones do."""
    return name not in _TASKS or _TASKS[name].pooled


def open(name: str, path: str | Path | None = None) -> FileTask:
    """A benchmark of others: ``open("longbench:qasper", "qasper.jsonl")`` or ``open("longbench:qasper=qasper.jsonl")``.

    Without a path it comes from the hub, which takes the package ``datasets``. See ``keepkv.tasks.files``.
    """
    return open_task(name, path)


def register(task: Task, *, replace: bool = False) -> Task:
    """Adds a task under its own name. What is built by the same function again takes its former place; ``replace``
    takes that of another one."""
    held = _TASKS.get(task.name)
    if held is not None and not replace and owner(held.build) != owner(task.build):
        raise TaskError(
            f"a task named {task.name!r} is already registered, by {owner(held.build)}: give it another name, or "
            "register it with replace=True to take the place of the first"
        )
    _TASKS[task.name] = task
    return task


__all__ = [
    "BENCHMARKS", "GROUPS", "FileTask", "Item", "Question", "Score", "Task", "TaskError", "chosen", "demo_document",
    "get", "grade", "group_of", "named", "names", "open", "pooled", "register", "score", "score_item",
]  # fmt: skip
