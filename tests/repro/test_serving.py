"""The checks of exports go through the results store: made once, for every engine that is here."""

import pytest
from exports import MIXED, PROMPTS, TOKENIZER, wide

from llmdrop import DropPlan, Store
from llmdrop.repro import serving
from llmdrop.serving.checks import engines


def test_checks_and_timings_are_made_once(tmp_path, monkeypatch):
    model, store, plans = wide(), Store(tmp_path), {"Baseline": DropPlan(), "Mixed": MIXED}
    checked = serving.check_all(model, TOKENIZER, plans, PROMPTS[:3], 4, store=store)
    assert set(zip(checked["engine"], checked["plan"], strict=True)) == {(e, p) for e in engines() for p in plans}
    assert checked["max_difference"].notna().any()
    timed = serving.compare_all(model, TOKENIZER, plans, list(range(9)), 4, store=store, rounds=2, weights="f16")
    assert list(zip(timed["engine"], timed["plan"], strict=True)) == [(e, p) for e in engines() for p in plans]
    shares = ["prefill_speedup", "decode_speedup_low", "kv_share", "file_share"]
    assert (timed.loc[timed["plan"] == "Baseline", shares] == 1).all(axis=None)
    assert (timed["decode_speedup_low"] <= timed["decode_speedup"]).all()
    assert (timed["decode_speedup"] <= timed["decode_speedup_high"]).all()
    for measure in ("check_export", "compare_serving"):
        monkeypatch.setattr(serving, measure, lambda *args, **settings: pytest.fail("measured again"))
    assert serving.check_all(model, TOKENIZER, plans, PROMPTS[:3], 4, store=store).equals(checked)
    again = serving.compare_all(model, TOKENIZER, plans, list(range(9)), 4, store=store, rounds=2, weights="f16")
    assert again.equals(timed)
