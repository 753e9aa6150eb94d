"""The worker process of a run's own cluster: Ray's program, kept from opening the session directory to everybody.

Ray 2.60 makes that directory readable and writable for all users of the machine.
"""

import runpy
import sys
from pathlib import Path

import ray
from ray._common import utils

if __name__ == "__main__":
    del sys.path[0]  # this file's directory, whose modules are no top-level ones
    utils.try_make_directory_shared = lambda directory_path: None
    runpy.run_path(str(Path(ray.__file__).parent / "_private" / "workers" / "default_worker.py"), run_name="__main__")
