"""Pictures on their way to other machines: through the store, and whole."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from sweep.core.batches import Picture, Plan, Sample
from sweep.core.errors import Unfit
from sweep.store.integrity import check_store
from sweep.store.store import Store
from workers.data.batches import make_plan
from workers.data.pictures import picture_file
from workers.model.forward import batch_to
from workers.service.shared_pictures import fetch_pictures, share_pictures

CPU = torch.device("cpu")
LEVELS = np.linspace(-1, 1, 256, dtype=np.float32)[None].repeat(3, axis=0)


def on_machine(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP_CACHE_DIR", str(root / name))


def plan_of(n: int) -> Plan:
    """Samples with a picture each, whose files are made here."""
    samples: list[Sample] = []
    for i in range(n):
        values = np.random.default_rng(i).integers(0, 256, (4096, 3, 512), dtype=np.uint8)
        file = picture_file(f"picture{i}")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, values)
        picture = Picture(content=f"picture{i}", shape=(4096, 1536), n_rows=4096, tensors={}, levels=LEVELS)
        samples.append(Sample(token_ids=np.arange(4), pictures=(picture,)))
    return make_plan(samples, packed=False)


def test_another_machine_gets_the_pictures_out_of_the_store_and_the_plan_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "store"))
    on_machine("driver", tmp_path, monkeypatch)
    plan = plan_of(3)
    assert len(pickle.dumps(plan)) < 50_000  # the pictures have 75 MB as float32
    share_pictures([plan, plan], store)
    here = [batch_to(batch, CPU, torch.float32)["pixel_values"] for batch in plan.batches("3")]
    on_machine("worker", tmp_path, monkeypatch)
    fetch_pictures(plan, store)
    there = [batch_to(batch, CPU, torch.float32)["pixel_values"] for batch in plan.batches("3")]
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))
    (finding,) = check_store(store)
    assert "3 pictures for workers" in finding.text


def test_a_picture_that_is_nowhere_or_damaged_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    on_machine("driver", tmp_path, monkeypatch)
    plan = plan_of(2)
    on_machine("worker", tmp_path, monkeypatch)
    with pytest.raises(Unfit, match=r"neither in .* nor in the store"):
        fetch_pictures(plan, store)
    on_machine("driver", tmp_path, monkeypatch)
    share_pictures([plan], store)
    path = tmp_path / "store" / "pictures" / "picture1.npy"
    path.write_bytes(path.read_bytes()[:-1])
    on_machine("worker", tmp_path, monkeypatch)
    with pytest.raises(Unfit):
        fetch_pictures(plan, store)
    assert not path.exists()
    assert any("not those that were written" in reason for reason in store.damage.values())
