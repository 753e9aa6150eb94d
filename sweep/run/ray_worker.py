"""What Ray starts as a worker process of a run's own cluster: Ray's program, which by itself opens the session directory to everybody (2.60)."""

import runpy
import sys
from pathlib import Path

import ray
from ray._common import utils

if __name__ == "__main__":
    del sys.path[0]  # this file's directory, whose modules are no top-level ones
    utils.try_make_directory_shared = lambda directory_path: None
    runpy.run_path(str(Path(ray.__file__).parent / "_private" / "workers" / "default_worker.py"), run_name="__main__")
