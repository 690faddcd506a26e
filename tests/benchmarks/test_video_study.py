"""The studies of streams: rows that are measured, and tables that are made of them."""

from __future__ import annotations

from benchmarks.video import long, run
from keepkv.embedded import embedded_vlm
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
