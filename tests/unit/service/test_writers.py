"""Parts reach the store through threads and through processes, and no process outlives the worker that started it."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sweep.core.errors import StoreFailed
from sweep.core.groups import Part
from sweep.store.store import Store
from tests.tasks import GROUP, TASK
from workers.scoring.scores import GroupScore
from workers.service.rows import TaskWriter
from workers.service.writers import Writers
from workers.task import Task

ROOT = Path(__file__).resolve().parents[3]
GROUPS = [replace(GROUP, name=f"layers.{i}.a", modules=(f"layers.{i}.a",)) for i in range(3)]
PARTS = [Part(group.part, (group,)) for group in GROUPS]
SCORE = GroupScore(
    score=32.0,
    sample_scores=np.full(16, 2.0),
    kind_scores=np.outer([0.5, 0.0, 1.5, 0.0], np.ones(16)),
    top_token_score=0.25,
    dy_square_sum=1.0,
    y_square_sum=100.0,
    dw_square_sum=1.0,
    w_square_sum=4.0,
    input_amax=3.0,
)


def task(name: str) -> Task:
    return replace(TASK, task_id=name, groups=tuple(GROUPS), cells={"small": f"cell-{name}"})


def opened(writers: Writers, store: Path, names: Sequence[str]) -> None:
    for name in names:
        writers.open(TaskWriter(task(name), {"small": [1] * 16}, PARTS, str(store)))


@pytest.mark.parametrize("processes", [False, True])
def test_parts_become_cells(tmp_path: Path, processes: bool) -> None:
    writers = Writers(2, processes=processes)
    opened(writers, tmp_path, "abc")
    written = [
        writers.write(name, part.name, {"small": [None if part is PARTS[1] else SCORE]})
        for part in PARTS
        for name in "abc"
    ]
    for done in [*written, *(writers.close(name, complete=name != "c") for name in "abc")]:
        done.result()
    store = Store(str(tmp_path))
    for name in "ab":
        table = store.scores(f"cell-{name}")
        assert table["group"].to_pylist() == [group.name for group in GROUPS]
        assert (table["sensitivity"].to_pylist(), table["predicted_kl"].to_pylist()) == (
            [2.0, None, 2.0],
            [1.0, None, 1.0],
        )
        kinds = [table[f"score_{kind}"].to_pylist() for kind in ("first_token", "image", "prompt", "answer")]
        assert kinds == [[8.0, None, 8.0], [0.0, None, 0.0], [24.0, None, 24.0], [0.0, None, 0.0]]
        assert table["score_top_token"].to_pylist() == [0.25, None, 0.25]
        assert table["sample_predictions"].to_pylist() == [[1] * 16] * 3
        assert table["sample_scores_first_token"].to_pylist() == [[0.5] * 16, None, [0.5] * 16]
        assert table["sample_scores_image"].null_count == table["sample_scores_answer"].null_count == 3
        assert table["output_rel_error"].to_pylist()[0] == pytest.approx(0.1)
        assert table["output_sqnr_db"].to_pylist()[0] == pytest.approx(20)
    assert not store.is_finished("cell-c")
    assert store.part_names("cell-c") == {part.name for part in PARTS}
    writers.shutdown()


@pytest.mark.parametrize("processes", [False, True])
def test_what_goes_wrong_with_a_part_is_told(tmp_path: Path, processes: bool) -> None:
    (tmp_path / "parts").write_text("in the way")
    writers = Writers(1, processes=processes)
    with writers.tidied():
        opened(writers, tmp_path, "a")
        with pytest.raises(StoreFailed, match="Cannot write to the store"):
            writers.write("a", "layers.0", {"small": [SCORE]}).result()
    assert not writers._of_task
    writers.shutdown()


def test_a_process_ends_when_its_worker_is_killed() -> None:
    script = "import time\nfrom workers.service.writers import Writers\n"
    script += "if __name__ == '__main__':\n    writers = Writers(1, processes=True)\n"
    script += "    print(*writers._executors[0]._processes, flush=True)\n    time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        writer = int(parent.stdout.readline())
        time.sleep(2)  # it is up by then
        assert Path(f"/proc/{writer}").exists()
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (
        Path(f"/proc/{writer}").exists()
        and Path(f"/proc/{writer}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)
