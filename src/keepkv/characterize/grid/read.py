"""A grid, and the file that says it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from keepkv.characterize.grid.lengths import Lengths
from keepkv.characterize.grid.levels import CHECKPOINT, WEIGHTS, Application, Hardware, Technique, Workload
from keepkv.core.options import Checked, Count, Positive, Rule, Size
from keepkv.errors import KeepKVError, UnknownName
from keepkv.measure.rows import plain

OWN = "embedded"  # the model inside the package
IN_PROCESS, SERVE = "in-process", "serve"
LIMITS = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Phases(Checked):
    """warm_least, warm_most: requests before the window; it begins once the time to the first token and per token have
    been flat over the last ``warm_least`` of them, or at ``warm_most``. seconds, requests: the window lasts until both
    are reached, and ends at ``most_seconds`` whatever was reached. idle: seconds of rest before, in which idle power
    is measured where there is a meter."""

    warm_least: Size = 4
    warm_most: Size = 16
    seconds: Positive = 30.0
    requests: Size = 30
    most_seconds: Positive = 600.0
    idle: Annotated[float, Rule("of at least 0", lambda x: x >= 0)] = 2.0


@dataclass(frozen=True)
class Grid(Checked):
    """Everything that decides a run.

    model: directory or Hub name, or "embedded". driver: "in-process", "serve" (our own server on this machine), or the
    address of a server that speaks OpenAI's protocol. api: "completions" or "chat", of a server. limits: seconds of
    ``ttft``, ``tpot``, ``e2e`` that a request must keep to count for goodput. timeout: seconds of a point. block:
    points between two baselines, at most. energy: a source of ``keepkv.measure.energy``. rows: requests that our own
    drivers answer together, at most. seed: of the order.
    """

    applications: tuple[Application, ...]
    workloads: tuple[Workload, ...]
    techniques: tuple[Technique, ...]
    weights: tuple[str, ...] = ("none",)
    hardware: tuple[Hardware, ...] = (Hardware(),)
    model: str = OWN
    driver: str = IN_PROCESS
    api: str = "completions"
    seeds: tuple[int, ...] = (0,)
    phases: Phases = Phases()
    limits: dict[str, float] | None = None
    timeout: Positive = 3600.0
    block: Size = 8
    energy: str = "auto"
    rows: Size = 8
    seed: Count = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("applications", "workloads", "techniques", "weights", "hardware", "seeds"):
            if not getattr(self, name):
                raise KeepKVError(f"grid: no {name}: give at least one")
        names = [one.name for one in self.applications]
        for what, labels in (
            ("applications", names), ("workloads", [one.label for one in self.workloads]),
            ("techniques", [one.label for one in self.techniques]), ("hardware", [one.label for one in self.hardware]),
        ):  # fmt: skip
            if twice := [label for label in labels if labels.count(label) > 1]:
                raise KeepKVError(f"grid: two {what} are called {twice[0]!r}: give each once, under a name of its own")
        for name in self.weights:
            if name not in WEIGHTS and not name.startswith(CHECKPOINT):
                raise UnknownName("weights", name, [*WEIGHTS, f"{CHECKPOINT}NAME"])
        if self.driver not in (IN_PROCESS, SERVE) and "://" not in self.driver:
            raise UnknownName("driver", self.driver, [IN_PROCESS, SERVE, "http://…"])
        if self.api not in ("completions", "chat"):
            raise UnknownName("api", self.api, ("completions", "chat"))
        for name, value in (self.limits or {}).items():
            if name not in LIMITS:
                raise UnknownName("limit", name, LIMITS)
            if not isinstance(value, (int, float)) or not value > 0:
                raise KeepKVError(f"limit {name}={value!r}: give seconds above 0")

    def setting(self) -> dict[str, Any]:
        """What of the grid decides a point besides its levels."""
        names = ("model", "driver", "api", "phases", "limits", "energy", "rows")
        return {name: plain(getattr(self, name)) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``run.json`` holds it."""
        made: dict[str, Any] = plain(asdict(self))
        return made

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Grid:
        """The grid that ``to_dict`` gave."""
        levels: dict[str, Any] = {
            "applications": tuple(map(Application.from_dict, held["applications"])),
            "workloads": tuple(map(Workload.from_dict, held["workloads"])),
            "techniques": tuple(Technique(**one) for one in held["techniques"]),
            "hardware": tuple(Hardware(**one) for one in held["hardware"]),
            "phases": Phases(**held["phases"]),
        }
        return cls(**{**held, **levels, "weights": tuple(held["weights"]), "seeds": tuple(held["seeds"])})


def read_grid(path: str | Path) -> Grid:
    """The grid in a YAML file; paths in it are relative to it. Raises ``KeepKVError`` with what is wrong."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise KeepKVError("grids are YAML: pip install 'keepkv[characterize]'") from error
    where = Path(path).expanduser()
    try:
        held = yaml.safe_load(where.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise KeepKVError(f"cannot read {str(path)!r}: {error}") from error
    except yaml.YAMLError as error:
        raise KeepKVError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    return make_grid(held, where.parent)


def make_grid(held: Any, folder: Path | None = None) -> Grid:
    """The grid that plain data says: the fields of ``Grid``, with ``methods`` for its techniques. A list in the place
    of one value of an entry stands for an entry with each. folder: what relative paths are relative to."""
    given = dict(_mapping("grid", held))
    known = [*(f.name for f in fields(Grid) if f.name != "techniques"), "methods"]
    for name in given:
        if name not in known:
            raise UnknownName("field of a grid", str(name), known)
    made: dict[str, Any] = {name: _plain(value) for name, value in given.items() if name in SCALARS}
    if "phases" in given:
        made["phases"] = Phases(**_known("phases", given["phases"], Phases))
    techniques = [_technique(one) for entry in _list("methods", given.get("methods", [])) for one in _each(entry)]
    made["techniques"] = tuple({one.label: one for one in techniques}.values()) or (Technique(),)
    made["workloads"] = tuple(
        _workload(one, folder)
        for entry in _list("workloads", given.get("workloads", [{}]))
        for one in _each(entry, LISTS)
    )
    terse = made.get("model", OWN) == OWN
    made["applications"] = tuple(
        _application(one, folder, terse) for one in _list("applications", given.get("applications"))
    )
    if "hardware" in given:
        entries = _list("hardware", given["hardware"])
        made["hardware"] = tuple(
            Hardware(**_known("hardware", one, Hardware)) for entry in entries for one in _each(entry)
        )
    return Grid(**made)


SCALARS = ("model", "driver", "api", "seeds", "weights", "limits", "timeout", "block", "energy", "rows", "seed")
LISTS = ("n_in", "n_out")  # read by themselves
PIECES = ("store", "codec", "select", "selected", "store_options", "codec_options", "select_options")


def _technique(given: Mapping[str, Any]) -> Technique:
    known = ("method", "budget", "options", *PIECES)
    for name in given:
        if name not in known:
            raise UnknownName("field of a method", str(name), known)
    options = dict(_mapping("options", given.get("options") or {}))
    options |= {name: given[name] for name in PIECES if given.get(name) not in (None, "none")}
    if "method" not in given:
        raise KeepKVError(f"a method has no name: {dict(given)}")
    return Technique(given["method"], given.get("budget"), options)


def _workload(given: Mapping[str, Any], folder: Path | None) -> Workload:
    made = _known("workloads", given, Workload)
    made |= {name: Lengths.read(made[name]) for name in LISTS if made.get(name) is not None}
    return Workload(**_located(made, "trace", folder))


def _application(given: Any, folder: Path | None, terse: bool) -> Application:
    """terse: whether the model is the one that knows tasks in their terse form."""
    made = _known("applications", given, Application)
    pairs = _list("questions", made.get("questions", []))
    for one in pairs:
        if not isinstance(one, Mapping) or set(one) != {"ask", "answer"}:
            raise KeepKVError(f"questions: {one!r}: give each as {{ask: …, answer: …}}")
    made["questions"] = tuple((str(one["ask"]), str(one["answer"])) for one in pairs)
    made["tasks"] = tuple(_list("tasks", made.get("tasks", [])))
    made.setdefault("plain", bool(made["tasks"]) and not terse)
    made.setdefault("name", made["text"] if made.get("text") else "+".join(made["tasks"]))
    return Application(**_located(made, "text", folder))


def _located(made: dict[str, Any], name: str, folder: Path | None) -> dict[str, Any]:
    if folder is not None and isinstance(made.get(name), str):
        made[name] = str(folder / Path(made[name]).expanduser())
    return made


def _each(entry: Any, whole: Iterable[str] = ()) -> list[dict[str, Any]]:
    """An entry for each combination of the values that ``entry`` lists."""
    held = _mapping("entry", entry)
    lists = {name: x if isinstance(x, list) and name not in whole else [x] for name, x in held.items()}
    return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]


def _known(what: str, given: Any, kind: Any) -> dict[str, Any]:
    known = [f.name for f in fields(kind)]
    for name in _mapping(what, given):
        if name not in known:
            raise UnknownName(f"field of {what}", str(name), known)
    return dict(given)


def _mapping(what: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise KeepKVError(f"{what}: {given!r} is no set of names and values")
    return given


def _list(what: str, given: Any) -> list[Any]:
    if given is None:
        raise KeepKVError(f"grid: no {what}: give at least one")
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
