"""A cluster that exists: jobs submitted to it, watched, stopped and resumed; and what Prometheus sees there."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sweep.core.paths import bundled_model_dir
from sweep.store.store import Store
from tests.ray.test_sweep import ROOT, at_work, cells, finish, status

GRID = ["-m", "quant_pair=wint8_aint8,wfp8_afp8,wint4_afp16,wint8_afp16", "dataset.size=medium"]
GRID += ["sensitivity.method=kl_div"]  # which takes long enough to be watched
N_TRIALS = 4
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@dataclass(frozen=True)
class Head:
    """A Ray head node on this machine."""

    process: "subprocess.Popen[bytes]"
    address: str
    dashboard: str
    metrics: str
    token: str

    def run(self, *arguments: str) -> str:
        """The output of a command of Ray."""
        done = subprocess.run([RAY, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def asked(self, path: str) -> Any:
        """The dashboard's answer, as its pages and `ray list` read it."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/{path}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def listed(self, what: str) -> list[dict[str, Any]]:
        return self.asked(f"v0/{what}?limit=1000")["data"]["result"]["result"]

    def state_of(self, job: str) -> str:
        return self.asked(f"jobs/{job}")["status"]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node() as found:
        yield found


@contextlib.contextmanager
def head_node(n_gpus: int = 0, path: str | None = None) -> Iterator[Head]:
    """A head node with ports and a folder of its own, beside whatever else runs here; its PATH may be another one."""
    ports = {
        name: free_port()
        for name in (
            "port",
            "dashboard-port",
            "dashboard-agent-listen-port",
            "metrics-export-port",
            "ray-client-server-port",
        )
    }
    folder = tempfile.mkdtemp(prefix="ray-")  # short: a socket's path has 107 characters at most
    options = [f"--{name}={port}" for name, port in ports.items()]
    Path(folder, "token").write_text(token := secrets.token_hex(32), encoding="ascii")
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{folder}/token",
        "RAY_metrics_report_interval_ms": "500",
    }
    options += ["--num-cpus=2", f"--num-gpus={n_gpus}", f"--temp-dir={folder}"]
    command = [RAY, "start", "--head", "--block", *options]
    with pytest.MonkeyPatch.context() as patch, Path(folder, "head.log").open("wb") as log:
        for name, value in environment.items():
            patch.setenv(name, value)
        own = {**os.environ, "PATH": path or os.environ["PATH"]}
        process = subprocess.Popen(command, env=own, stdout=log, stderr=log, start_new_session=True)
        dashboard = f"http://127.0.0.1:{ports['dashboard-port']}"
        found = Head(
            process, f"127.0.0.1:{ports['port']}", dashboard, f"127.0.0.1:{ports['metrics-export-port']}", token
        )
        wait_for(lambda: b"Ray runtime started" in Path(folder, "head.log").read_bytes())
        yield found
        process.terminate()
        process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def run_command(store: Path, *overrides: str) -> list[str]:
    own = ["cluster=auto", "cluster.workers=2", f"store.uri={store}", f"output_layout.root={store}-published"]
    return [sys.executable, "-m", "sweep", "run", *GRID, *own, *overrides]


def submit(head: Head, job: str, store: Path) -> None:
    """Submit a sweep as a job of this name."""
    environment = json.dumps(
        {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "30"}, "excludes": ["models/*/layer-analysis", "tests"]}
    )
    options = ["--address", head.dashboard, "--submission-id", job, "--no-wait"]
    options += ["--working-dir", str(ROOT), "--runtime-env-json", environment]
    submission = [RAY, "job", "submit", *options, "--", *run_command(store)]

    def accepted() -> bool:
        done = subprocess.run(submission, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "No available agent" in done.stdout + done.stderr, done.stdout + done.stderr
        return done.returncode == 0  # a head that has just started refuses jobs

    wait_for(accepted)


def test_a_job_is_submitted_watched_stopped_resubmitted_and_completes(head: Head, tmp_path: Path) -> None:
    """`ray job submit` shows actors, tasks and workers by name.

    `ray job stop` leaves a sweep to resume; the same command again completes it.
    """
    store = tmp_path / "store"
    submit(head, "first", store)
    wait_for(lambda: set(store.glob("parts/*/*")) or head.state_of("first") in ("FAILED", "SUCCEEDED"))
    assert {actor["name"] for actor in head.listed("actors") if actor["state"] == "ALIVE"} >= {
        "sweep-worker-0",
        "sweep-worker-1",
    }
    # Ray lists tasks with some delay.
    wait_for(lambda: any(re.match(r"score w\w+/\w+", task["name"]) for task in head.listed("tasks")), 20.0)
    named = [f"store.uri={store}", f"cluster.address={head.address}"]
    asking = [sys.executable, "-m", "sweep", "status", "--cluster", "--json", *named]
    asked = subprocess.run(asking, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(asked.stdout)
    assert found["running"]
    assert [*found["cluster"]["workers"].values()] == [["sweep-worker-0", "sweep-worker-1"]]
    assert len(found["cluster"]["nodes"]) == 1
    head.run("job", "stop", "--address", head.dashboard, "first")
    wait_for(lambda: head.state_of("first") != "RUNNING")
    assert head.state_of("first") == "STOPPED"
    log = head.run("job", "logs", "--address", head.dashboard, "first")
    assert "Type the same command again to resume." in log
    assert "Traceback" not in log
    assert status(store)["last_run"]["exit_code"] == 75
    assert status(store)["trials"]["done"] < N_TRIALS
    wait_for(lambda: not any(actor["state"] == "ALIVE" for actor in head.listed("actors")))
    kept = cells(store)
    submit(head, "second", store)
    wait_for(lambda: head.state_of("second") not in ("PENDING", "RUNNING"))
    assert head.state_of("second") == "SUCCEEDED", head.run("job", "logs", "--address", head.dashboard, "second")
    assert len(cells(store)) == status(store)["trials"]["done"] == N_TRIALS
    assert {name: cells(store)[name] for name in kept} == kept
    assert not [path for path in store.rglob("*.tmp") if path.name.startswith(".shared")]


def is_ready(prometheus: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{prometheus}/-/ready", timeout=10):
        return True
    return False


@pytest.fixture
def prometheus(head: Head, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes the head's metrics port every second."""
    if (program := shutil.which("prometheus")) is None:
        pytest.skip("needs Debian's package prometheus")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "{global: {scrape_interval: 1s}, scrape_configs: [{job_name: ray, static_configs: "
        f"[{{targets: ['{head.metrics}']}}]}}]}}"
    )
    address = f"127.0.0.1:{free_port()}"
    command = [
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address={address}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: is_ready(address))
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def most(prometheus: str, expression: str) -> float | None:
    """The largest value that an expression has had in the last hour; None: never any."""
    query = urllib.parse.urlencode({"query": f"max(max_over_time(({expression})[1h:1s]))"})
    with urllib.request.urlopen(f"http://{prometheus}/api/v1/query?{query}", timeout=10) as answer:
        result = json.load(answer)["data"]["result"]
    return float(result[0]["value"][1]) if result else None


def test_prometheus_sees_every_metric_of_a_sweep(head: Head, tmp_path: Path, prometheus: str) -> None:
    """A grid of four good trials and four that fail, one of its two workers killed. A CPU has no GPU memory."""
    store, broken = tmp_path / "store", tmp_path / "broken"
    shutil.copytree(bundled_model_dir(), broken, ignore=shutil.ignore_patterns("layer-analysis"))
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith("layers.3.mlp.down_proj.weight"))
    weights[name][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    command = run_command(store, f"model.path={bundled_model_dir()},{broken}", f"cluster.address={head.address}")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_for(
        lambda: (
            process.poll() is not None
            or (most(prometheus, "ray_sweep_rows_written_total") and at_work(head.process.pid))
        )
    )
    assert process.poll() is None, finish(process)
    os.kill(at_work(head.process.pid)[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 3, output
    time.sleep(3)
    names = set(
        re.findall(r'"(sweep_[a-z_]+)"', (ROOT / "workers" / "service" / "metrics.py").read_text(encoding="utf-8"))
    ) - {"sweep_gpu_memory_bytes"}
    assert len(names) == 15
    histograms = {name for name in names if name.endswith("_seconds") and name != "sweep_eta_seconds"}
    unseen = [
        name for name in names if most(prometheus, f"ray_{name}_count" if name in histograms else f"ray_{name}") is None
    ]
    assert unseen == []
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "sweep.json").read_text(encoding="utf-8"))
    queries = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    asked = {query: most(prometheus, query.replace("$__rate_interval", "30s")) for query in queries}
    assert [
        query for query, found in asked.items() if found is None and "gpu" not in query
    ] == []  # a CPU has no GPU memory
    (run,) = Store(str(store)).runs().values()
    assert most(prometheus, 'sum(ray_sweep_groups{state="total"})') == run.groups_total
    assert most(prometheus, "sum(ray_sweep_workers)") == 2
    assert most(prometheus, "sum(ray_sweep_trials)") == 2 * N_TRIALS
    assert most(prometheus, "sum(ray_sweep_failed_trials_total)") == N_TRIALS
    assert most(prometheus, "sum(ray_sweep_retries_total)") == 1
    assert most(prometheus, "sum(ray_sweep_worker_replacements_total)") == 1
    assert 0 < (most(prometheus, "sum(ray_sweep_rows_written_total)") or 0) <= run.groups_total
