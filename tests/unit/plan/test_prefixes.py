"""Smaller sizes out of larger ones: the scores that a worker would have found, without one."""

from pathlib import Path

import numpy as np
import pytest

from sweep.config.compose import expand
from sweep.core.batches import TOKEN_KINDS
from sweep.plan.prefixes import take_prefixes
from sweep.plan.trials import SweepPlan, plan_sweep
from sweep.run.session import row_of
from sweep.store.store import Store
from tests.models import overrides_of, place_at, write_captions
from workers.service.scorer import Scorer

PAIRS = "quant_pair=wint4_afp16,wint8_aint8"  # weight-only, and with a static range of the inputs
KINDS = [f"score_{kind}" for kind in TOKEN_KINDS]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place_at(tmp_path_factory.mktemp("prefixes"))


def plan(place: Path, size: str, *overrides: str) -> SweepPlan:
    typed = [*overrides_of(place), PAIRS, "quant_granularity=w_group64", f"dataset.size={size}", *overrides]
    return plan_sweep(expand(typed, multirun=True).points, "cpu")


def score(store: Store, wanted: SweepPlan) -> None:
    for task in wanted.tasks.values():
        list(Scorer(store.uri, "cpu").score([task], wanted.plans[task.plan_id]))
    store.write_trials("r", [row_of(trial, "done", None, "r") for trial in wanted.trials])


@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
@pytest.mark.parametrize("size", ["small", "64"])
def test_a_smaller_size_is_the_leading_samples_scores(place: Path, tmp_path: Path, size: str, method: str) -> None:
    large, small = (plan(place, each, f"sensitivity.method={method}") for each in ("medium", size))
    store, scored = Store(str(tmp_path / "taken")), Store(str(tmp_path / "scored"))
    score(store, large)
    score(scored, small)
    assert take_prefixes(small, store, "cpu") == 1
    weight_only, static = (trial.cell_id or "" for trial in small.trials)
    assert not store.is_finished(static)  # each size has ranges of its own
    taken, expected = store.scores(weight_only).to_pylist(), scored.scores(weight_only).to_pylist()
    for mine, its in zip(taken, expected, strict=True):
        for name in ("score", "sensitivity", "predicted_kl", *KINDS):
            assert mine[name] == pytest.approx(its[name], rel=1e-6, abs=1e-6 * its["score"])
        assert sum(mine[name] for name in KINDS) == pytest.approx(mine["score"], rel=1e-12)
        np.testing.assert_allclose(mine["sample_scores"], its["sample_scores"], rtol=1e-6)
        if method == "fisher":
            assert len(mine["projections"]) == 8 * mine["n_samples"]
            np.testing.assert_allclose(mine["projections"], its["projections"], rtol=1e-6)
        else:
            assert mine["projections"] is None
        same = ("group", "modules", "n_samples", "n_predictions", "sample_predictions", "weight_rel_error")
        assert [mine[name] for name in same] == [its[name] for name in same]
        assert mine["output_rel_error"] is mine["input_amax"] is mine["score_top_token"] is None
    assert take_prefixes(small, store, "cpu") == 0  # it is there now


def test_other_data_are_not_a_prefix(place: Path, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    score(store, plan(place, "medium"))
    other = write_captions(tmp_path / "captions.txt", 128)
    other.write_text("\n".join(reversed(other.read_text().splitlines())) + "\n")
    assert take_prefixes(plan(place, "small", f"dataset.captions_path={other}"), store, "cpu") == 0
    shorter = tmp_path / "shorter.txt"
    shorter.write_text("\n".join((place / "captions.txt").read_text().splitlines()[:20]) + "\n")
    assert take_prefixes(plan(place, "small", f"dataset.captions_path={shorter}"), store, "cpu") == 0
