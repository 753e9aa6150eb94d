"""Pictures a second that are read and prepared for the bundled model, and the seconds of the second run."""

# pyright: basic

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sweep.config.compose import expand
from sweep.core.machine import n_cores
from sweep.core.paths import bundled_model_dir
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from tests.bench.checkpoint import write_chats
from tests.bench.setup import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        os.environ["SWEEP_CACHE_DIR"] = f"{place}/cache"
        path = write_chats(Path(place), options.pictures, options.side)
        overrides = ["dataset=chat", f"dataset.path={path}", f"dataset.size={options.pictures}"]
        dataset, model = expand(overrides, multirun=False).points[0].dataset, Model(bundled_model_dir())
        samples_of(dataset, model, 2)  # imports
        times: list[float] = []
        cpu = time.process_time()
        for _ in range(2):
            started = time.perf_counter()
            samples = samples_of(dataset, model, options.pictures)
            times.append(time.perf_counter() - started)
        files = [*Path(place).glob("*.jpg")]
        figures = {
            "pictures": len(files),
            "side": options.side,
            "jpeg_kb": sum(file.stat().st_size for file in files) / len(files) / 1e3,
            "tokens": sum(len(sample.token_ids) for sample in samples),
            "cores": n_cores(),
            "pictures_per_second": len(files) / times[0],
            "first_seconds": times[0],
            "again_seconds": times[1],
            "cpu_ms_per_picture": (time.process_time() - cpu - times[1]) / len(files) * 1e3,
        }
        report("pictures", torch.device("cpu"), figures)


if __name__ == "__main__":
    main()
