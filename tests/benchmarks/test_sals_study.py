"""The study of selections: what it calls kept is kept, and its tables have every row."""

from __future__ import annotations

import pytest
import torch
import zoo

from benchmarks.sals import reads, tables
from benchmarks.sals.run import ARMS, measured, read, stored
from keepkv.select import make_select


def test_the_oracle_keeps_all_of_everything_and_most_of_an_eighth() -> None:
    ids = torch.randint(3, zoo.VOCAB, (1, 128))
    with torch.no_grad():
        info, slots, queries, scaling = next(iter(read(zoo.model("llama"), ids)))
        keys = slots.keys.repeat_interleave(queries.shape[1] // slots.keys.shape[1], 1)
        late = slots.positions[:, :1, None] > torch.arange(128 - queries.shape[2], 128)[:, None]
        truth = (queries @ keys.mT * scaling).masked_fill(late, -torch.inf).softmax(-1)
        found = {}
        for name, selected in (("exact", 1.0), ("exact", 0.125), ("quest", 0.125)):
            select = make_select(name, selected, {"sinks": 4, "window": 32})
            assert select is not None
            one = measured(select, stored(slots, info, "none", {}, {}), truth, queries, scaling, info, {})
            found[name, selected] = one["mass"]
    assert abs(found["exact", 1.0] - 1) < 1e-5
    assert found["exact", 0.125] >= found["quest", 0.125]


@pytest.mark.parametrize("arm", ["none, all", "sals d/4, latent", "sals d/4, codes", "sals d/8, latent"])
def test_bytes_that_a_token_reads_are_those_that_are_counted(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watched operation by operation, and by the formula of SALS: 2·r* bytes for each slot, 2·r + d·(b + 1)/8 for each
    that is taken."""
    monkeypatch.setenv("KEEPKV_KERNELS", "reference")
    codec, options, which = reads.ARMS[arm]
    select, tokens, taken = make_select(which, 256 if which else None, {}), 4096, 256
    store, info = reads.filled(codec, options, tokens)
    read = reads.read(store, info, select, tokens)
    assert read == pytest.approx(reads.counted(store, select, taken), rel=0.03)
    if which is not None:
        d = reads.HEADS * reads.DIM
        rank, bits = options["rank"] * d, options.get("value_bits", 4)
        formula = (tokens - 32) * rank + (taken + 4) * (2 * rank + d * (bits + 1) / 8) + 32 * 4 * d
        assert read == pytest.approx(formula, rel=0.03)


def test_tables_are_of_the_rows() -> None:
    written = (tables.HERE / "tables.md").read_text("utf-8")
    assert tables.page() == written and all(f"| {arm} |" in written for arm in ARMS)
