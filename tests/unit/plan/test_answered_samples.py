"""Data sets whose answers the model writes: from the config to samples, kept with the store."""

import json
from pathlib import Path
from typing import Any

import pytest

from sweep.config.compose import expand
from sweep.config.schema import SweepConfig
from sweep.core.errors import SweepError
from sweep.plan.model import Model
from sweep.plan.own_samples import Writing
from sweep.plan.samples import samples_of
from sweep.plan.trials import plan_sweep
from sweep.store.store import Store
from tests.vision import picture, save_vision, written_here
from workers.model import answers


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and 20 chats with a picture each, that ask only."""
    path = tmp_path_factory.mktemp("place")
    save_vision(path / "model", "qwen3_vl")
    lines: list[str] = []
    for index in range(20):
        picture(seed=index).save(path / f"{index}.png")
        content: list[dict[str, Any]] = [
            {"type": "image", "image": f"{index}.png"},
            {"type": "text", "text": f"What is {index}?"},
        ]
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}]}))
    (path / "chats.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "cache"))


def overrides(place: Path, store: Path, *more: str) -> list[str]:
    return [
        "model=hf_causal_lm",
        f"model.path={place / 'model'}",
        "dataset=chat",
        f"dataset.path={place / 'chats.jsonl'}",
        "dataset.answers=model",
        "dataset.answer_tokens=5",
        f"store.uri={store}",
        *more,
    ]


def config(place: Path, store: Path, *more: str) -> SweepConfig:
    return expand(overrides(place, store, *more), multirun=False).points[0]


def digest(point: SweepConfig) -> str:
    model = Model(Path(point.model.path or ""))
    return model.plan(samples_of(point.dataset, model, 16, Writing.of(point))).digest("small")


def test_answers_are_kept_with_the_store_and_found_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_here(monkeypatch)
    point = config(place, tmp_path / "store")
    model = Model(place / "model")
    samples = samples_of(point.dataset, model, 16, Writing.of(point))
    assert all(sample.predictions.any() and sample.pictures for sample in samples)
    assert len(Store(str(tmp_path / "store")).files.names("answers")) == 2
    found = model.plan(samples).digest("small")

    monkeypatch.setattr(answers, "_generated", lambda chunks, author: iter([1 / 0] if chunks else []))
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(tmp_path / "another cache"))
    assert digest(point) == found
    with pytest.raises(ZeroDivisionError):  # they would be written
        digest(config(place, tmp_path / "store", "dataset.answers=model_greedy"))
    with pytest.raises(ZeroDivisionError):
        digest(config(place, tmp_path / "other store"))


def test_a_plan_of_a_sweep_has_the_answers(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written_here(monkeypatch)
    point = config(place, tmp_path / "store")
    plan = plan_sweep([point], "cpu")
    assert [*plan.plans] == [plan.plans[key].digest(plan.plans[key].size) for key in plan.plans]
    assert Store(str(tmp_path / "store")).files.names("answers")


def test_conversations_without_answers_need_a_model_that_writes_them(place: Path, tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"dataset.answers=model"):
        digest(config(place, tmp_path / "store", "dataset.answers=file"))
