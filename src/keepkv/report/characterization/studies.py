"""The documents of the studies: a recommendation, a capacity plan, a schedule, a search."""

from __future__ import annotations

from collections.abc import Sequence

from keepkv.characterize.analyse.capacity import Load, Plan
from keepkv.characterize.analyse.recommend import Recommendation
from keepkv.characterize.analyse.schedule import Replay, Setting
from keepkv.characterize.analyse.search import Found
from keepkv.report.characterization.output import Pages, Section
from keepkv.report.characterization.words import NOTHING, measured, number, shown

SCOPE = "Valid inside of what was measured alone: this model, machine, workload and length."


def recommended(found: Sequence[Recommendation]) -> Pages:
    """What to take at each place."""
    return Pages(
        "What to take", "Limits first, then the front, then one choice and what its neighbours cost.", {}, (SCOPE,),
        tuple(section for one in found for section in _recommendation(one)),
    )  # fmt: skip


def _recommendation(one: Recommendation) -> list[Section]:
    title = ", ".join(shown(one.place))
    if one.pick is None:
        return [Section(title, f"Nothing to recommend: {one.why}.")]
    rows = [(one.pick.choice, *(measured(one.pick, name) for name in one.axes), "–")]
    for other in one.alternatives:
        rows.append((other.row.choice, *(measured(other.row, name) for name in one.axes), price(other.price)))
    words = f"Take {one.pick.choice}: {one.why}. Below it, the nearest others of the front and what they change."
    made = [Section(title, words, ("choice", *one.axes, "price"), tuple(rows))]
    standing = tuple((at.name, "yes" if at.on_front else "no", ", ".join(at.dominated_by), ", ".join(at.tied_with))
                     for at in one.standings)  # fmt: skip
    columns = ("choice", "on the front", "beaten by", "tied with")
    made.append(Section(f"Standing: {title}", "Beaten only where the interval says so.", columns, standing, 4))
    if one.volume:
        words = "Share of the box between the best and the worst of each axis that a method's choices beat."
        volumes = tuple((name, f"{value:.3f}") for name, value in sorted(one.volume.items(), key=lambda x: -x[1]))
        made.append(Section(f"Hypervolume: {title}", words, ("method", "volume"), volumes))
    return made


def price(changes: dict[str, float | None]) -> str:
    """``ratio +12 %, score −3 %``."""
    return ", ".join(f"{name} {NOTHING if x is None else f'{100 * x:+.0f} %'}" for name, x in changes.items())


def capacity_pages(plans: Sequence[Plan], load: Load) -> Pages:
    """Machines for a load."""
    facts = {
        "Requests": f"{load.rate:g}/s", "Tokens of one": f"{load.tokens:g}", "Memory": number(load.memory, "B"),
        "Weights": number(load.weights, "B"), "Kept free": f"{load.spare:.0%}",
    }  # fmt: skip
    rows = tuple(
        (
            one.choice, one.bound, str(one.fits), NOTHING if one.at_once is None else str(one.at_once),
            NOTHING if one.per_machine is None else f"{one.per_machine:.3g}"
            + (f" ({one.low:.3g} to {one.high:.3g})" if one.low is not None and one.high is not None else ""),
            NOTHING if one.machines is None else str(one.machines), NOTHING if one.saves is None else str(one.saves),
        )
        for one in plans
    )  # fmt: skip
    words = (
        "Bound by memory: more at once would serve more, and does not fit, so compression buys machines. Bound by "
        "compute: more at once serves no more, and compression buys memory alone. Edge of the grid: measure more."
    )
    columns = ("choice", "bound by", "fit at once", "measured at", "goodput/s of one", "machines", "saved")
    return Pages(
        "How many machines", "From the bytes of a token and the goodput of closed loops, both measured.", facts,
        (SCOPE,), (Section("Plans", words, columns, rows, 2),),
    )  # fmt: skip


def schedule_pages(table: Sequence[Setting], replays: Sequence[Replay], every: float) -> Pages:
    """A schedule, replayed on a trace against fixed settings."""
    best = next((one for one in replays[1:]), None)
    gain = "" if best is None or not best.joules else (
        f" It takes {100 * (1 - replays[0].joules / best.joules):.1f} % less than the best fixed setting, {best.name}."
    )  # fmt: skip
    rows = tuple(
        (one.name, number(one.joules, "J"), str(one.switches), f"{one.unmet} of {len(one.steps)}") for one in replays
    )
    settings = tuple(
        (one.choice, f"{one.rate:g}", number(one.joules, "J"), "yes" if one.feasible else "no", one.source)
        for one in sorted(table, key=lambda one: (one.rate, one.joules))
    )
    steps = tuple((f"{one.start:g}", f"{one.load:.3g}", one.choice, number(one.joules, "J"), "yes" if one.met else "no")
                  for one in replays[0].steps)  # fmt: skip
    return Pages(
        "Which setting at which load", f"Every {every:g} s the setting of least energy that keeps the limits.{gain}",
        {"Joules of": ", ".join(dict.fromkeys(one.source for one in table))}, (SCOPE,),
        (
            Section("Replay", "", ("setting", "energy", "switches", "intervals unmet"), rows),
            Section("What was measured", "", ("choice", "requests/s", "per token", "feasible", "joules of"), settings),
            Section("The schedule", "", ("from s", "requests/s", "choice", "energy", "met"), steps),
        ),
    )  # fmt: skip


def search_pages(found: Found) -> Pages:
    """A search, and what it recommends."""
    inner = recommended([found.best])
    return Pages(
        "What a search found", f"{found.tried} short measurements; {len(found.survivors)} then measured in full.",
        {"Survivors": "; ".join(found.survivors)}, inner.notes, inner.sections,
    )  # fmt: skip
