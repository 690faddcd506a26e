"""The studies of streams: rows that are measured, and tables that are made of them."""

from __future__ import annotations

from torch import Tensor

from benchmarks.video import long, run
from keepkv.core.slots import LayerView
from keepkv.embedded import embedded_vlm
from keepkv.score.vision.tar import TaR
from keepkv.tasks.scenes import CELLS


def test_a_policy_at_an_eighth_and_the_full_cache() -> None:
    model, processor = embedded_vlm()
    rows = [run.measure(model, processor, policy, 0) for policy in ("full", "infinipot-v", "sliding")]
    full, ours, sliding = rows
    assert full["entries"] == 1 + CELLS * run.FRAMES and ours["cap"] == full["entries"] // 8
    assert ours["peak"] <= ours["cap"] and sliding["peak"] <= sliding["cap"]
    assert {kind: len(x) for kind, x in full["right"].items()} == {kind: len(x) for kind, x in ours["right"].items()}
    lines = run.table([row | {"seed": seed} for seed in (0, 1) for row in rows]).splitlines()
    assert len(lines) == 5 and lines[3].startswith("| infinipot-v | ")


class Reversed(TaR):
    """What is most like the recent steps stays."""

    def __call__(self, view: LayerView) -> Tensor:
        return -super().__call__(view)


def test_what_is_new_answers_and_what_is_not_does_not() -> None:
    """At an eighth of the full cache: TaR as before, less than chance where it is turned round."""
    model, processor = embedded_vlm()
    right = {}
    for policy in ("tar", "random", Reversed()):
        rows = [run.measure(model, processor, policy, seed) for seed in (0, 1)]
        hits = [hit for row in rows for kind in run.SURE for hit in row["right"].get(kind, [])]
        right[policy if isinstance(policy, str) else "reversed"] = sum(hits) / len(hits)
    assert right["tar"] >= 0.95 and right["random"] <= 0.75 and right["reversed"] < right["random"], right


def test_a_long_stream_is_tracked() -> None:
    row = long.measure("infinipot-v", 0, 1000)
    assert [x["frames"] for x in row["track"]] == [500, 1000]
    assert len({x["peak"] for x in row["track"]}) == 1 and row["track"][0]["peak"] <= long.CAP
    assert row["right"]["rare"] and row["right"]["recent"]
    assert "±" in long.table([row])


def test_events_of_a_long_stream_are_rare_and_recent() -> None:
    scene = long.scene_of(1, 10_000)
    late = [event for event in scene.events if event.start >= 9000]
    assert len(scene.events) == long.RARE + long.RECENT and len(late) == long.RECENT
    assert all(a.end <= b.start for a, b in zip(scene.events, scene.events[1:], strict=False))
