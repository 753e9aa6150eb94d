"""The files that deploy a sweep: valid where their readers look, of one mind with the code, and doing what they say."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
CRDS = Path(
    os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "reference" / "kuberay")
)  # KubeRay's own, not part of the project
RAY_VERSION = next(
    line.removeprefix("ray==")
    for line in (DEPLOY / "constraints.txt").read_text().splitlines()
    if line.startswith("ray==")
)


def tool(name: str) -> str:
    """A checker: beside this Python (from the extra `test`), else on PATH (.ci/run installs Debian's)."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def check(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def documents(path: Path) -> list[Any]:
    return list(
        yaml.load_all(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    )  # the CRDs take Python's own loader ten seconds


def document(path: Path) -> Any:
    (only,) = documents(path)
    return only


# KubeRay


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown keys wherever it lists known ones, as Kubernetes prunes them silently."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if (
        isinstance(made.get("properties"), dict)
        and "additionalProperties" not in made
        and not made.get("x-kubernetes-preserve-unknown-fields")
    ):
        made["additionalProperties"] = False
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return made


def crd_schema(kind: str) -> Any:
    path = CRDS / f"{kind.lower()}s.crd.yaml"
    if not path.is_file():
        pytest.skip("KubeRay's CRDs are not here")
    (version,) = [each for each in document(path)["spec"]["versions"] if each["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {
        "type": "object",
        "properties": {"name": {"type": "string"}},
        "required": ["name"],
    }
    return strict(schema)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_manifests_fit_the_strict_crd(kind: str) -> None:
    manifest = document(KUBERAY / f"{kind.lower()}.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(manifest, crd_schema(kind))


def test_a_misspelt_key_would_be_seen() -> None:
    manifest = document(KUBERAY / "raycluster.yaml")
    container = manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["volumeMount"] = container.pop("volumeMounts")
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.validate(manifest, crd_schema("RayCluster"))


def pod_specs(cluster: Any) -> list[Any]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_cluster_of_the_job_is_the_cluster() -> None:
    cluster, job = document(KUBERAY / "raycluster.yaml"), document(KUBERAY / "rayjob.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_the_cluster_is_guarded_bounded_and_of_the_pinned_ray() -> None:
    cluster = document(KUBERAY / "raycluster.yaml")["spec"]
    assert cluster["rayVersion"] == RAY_VERSION
    assert cluster["authOptions"] == {"mode": "token", "secretName": "sweep-ray-token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert 0 <= workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_pods_mount_what_they_have_and_export_what_is_scraped() -> None:
    documents_ = documents(KUBERAY / "volumes.yaml")
    claims = {each["metadata"]["name"] for each in documents_ if each["kind"] == "PersistentVolumeClaim"}
    (policy,) = [each for each in documents_ if each["kind"] == "NetworkPolicy"]
    (endpoint,) = document(KUBERAY / "podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    for pod in pod_specs(document(KUBERAY / "raycluster.yaml")["spec"]):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in volumes.values()
            if "persistentVolumeClaim" in volume
        } <= claims
        assert endpoint["port"] in {port["name"] for port in container["ports"]}
        assert pod["securityContext"]["runAsNonRoot"] is True
    assert policy["spec"]["ingress"][-1]["ports"] == [{"port": endpoint["port"]}]


def test_a_retried_job_finds_what_the_one_before_has_done() -> None:
    """Each retry is a new cluster: what the sweep writes lies on the volume."""
    job = document(KUBERAY / "rayjob.yaml")["spec"]
    mount = "/shared/"
    for key in ("store.uri", "model.path", "output_layout.root", "dataset.captions_path"):
        assert f" {key}={mount}" in job["entrypoint"]
    assert job["backoffLimit"] > 0
    variables = yaml.safe_load(job["runtimeEnvYAML"])["env_vars"]
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert all(isinstance(value, str) for value in variables.values())  # Ray refuses numbers


# Commands, wherever they stand


def commands() -> Iterator[list[str]]:
    """Overrides of every `sweep run` in the folder's files."""
    for path in sorted(DEPLOY.rglob("*")):
        if path.suffix in (".md", ".yaml", ".sbatch"):
            text = (
                document(path)["spec"]["entrypoint"]
                if path.name == "rayjob.yaml"
                else path.read_text(encoding="utf-8").replace("\\\n", " ")
            )
            for match in re.finditer(r"(?:sweep run|sweep\.sbatch|sweep:latest run) (-m [^`\n'\"]*)", text):
                yield [word for word in shlex.split(match[1], comments=True) if word != "-m"]


def test_documented_commands_compose() -> None:
    from sweep.config.compose import expand

    found = sorted({tuple(words) for words in commands()})
    assert len(found) >= 4
    for words in found:
        assert "grid=origin" in words
        small = [
            "quant_pair=wfp8_afp8,wint4_aint8" if word == "grid=origin" else word for word in words
        ]  # its 432 points: tests/unit/test_config.py
        assert len(expand(small, multirun=True).points) == 2


# ray up


def test_the_cluster_launcher_takes_the_yaml(tmp_path: Path) -> None:
    """Ray's own preparation and validation, as `ray up` does them, in a process of its own."""
    script = (
        "import sys, yaml\nfrom ray.autoscaler._private.util import prepare_config, validate_config\n"
        "config = prepare_config(yaml.safe_load(open(sys.argv[1])))\nvalidate_config(config)\n"
        "print(config['max_workers'], *config['file_mounts'])"
    )
    printed = check(sys.executable, "-c", script, DEPLOY / "ray-cluster.yaml").split()
    assert printed[-3:] == ["2", "~/sweep", "~/.ray/auth_token"]
    broken = tmp_path / "broken.yaml"
    broken.write_text((DEPLOY / "ray-cluster.yaml").read_text().replace("idle_timeout_minutes", "idle_minutes"))
    assert subprocess.run([sys.executable, "-c", script, broken], capture_output=True, check=False).returncode


def test_every_node_of_the_launcher_asks_for_the_token() -> None:
    config = document(DEPLOY / "ray-cluster.yaml")
    starts = [
        command
        for key in ("head", "worker")
        for command in config[f"{key}_start_ray_commands"]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command and "--metrics-export-port=8080" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]


# Linters


def test_shell_scripts_pass_shellcheck() -> None:
    scripts = [
        path for path in DEPLOY.rglob("*") if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
    ]
    assert scripts
    check(tool("shellcheck"), *scripts, ROOT / ".ci" / "run")


def test_the_image_passes_hadolint() -> None:
    check(tool("hadolint"), DEPLOY / "Dockerfile")


def test_the_image_is_pinned_unprivileged_and_copies_what_is_there() -> None:
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (base,) = [line for line in lines if line.startswith("FROM ")]
    assert re.fullmatch(r"FROM nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu24\.04", base)
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]
    assert 'ENTRYPOINT ["sweep"]' in lines
    allowed = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert source in allowed, f"{source} is kept out of the build"


def test_extensions_are_built_for_somebody(tmp_path: Path) -> None:
    """Without a compiler for CUDA nothing can be built here; what is built for nobody is refused before."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    done = subprocess.run(
        [sys.executable, DEPLOY / "build_extensions.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "TORCH_CUDA_ARCH_LIST is not set" in done.stderr


# Prometheus and Grafana

METRIC = re.compile(r"\bray_(sweep_[a-z_]+)")


def known_metrics() -> set[str]:
    """The table of deploy/README.md; histograms have the series that Prometheus reads."""
    rows = re.findall(
        r"^\| `(sweep_[a-z_]+)` \| (\w+) \|", (DEPLOY / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    series = {name for name, kind in rows if kind != "histogram"}
    return series | {
        f"{name}_{part}" for name, kind in rows if kind == "histogram" for part in ("bucket", "sum", "count")
    }


def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "sweep.json").read_text(encoding="utf-8"))


def queries() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def rules() -> list[Any]:
    return [rule for group in document(DEPLOY / "prometheus" / "rules.yml")["groups"] for rule in group["rules"]]


def test_prometheus_takes_its_files() -> None:
    promtool = tool("promtool")
    check(promtool, "check", "config", DEPLOY / "prometheus" / "prometheus.yml")
    check(promtool, "check", "rules", DEPLOY / "prometheus" / "rules.yml")


def test_every_alert_fires_and_only_then() -> None:
    check(tool("promtool"), "test", "rules", DEPLOY / "prometheus" / "rules_test.yml")
    cases = [
        case for test in document(DEPLOY / "prometheus" / "rules_test.yml")["tests"] for case in test["alert_rule_test"]
    ]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == {rule["alert"] for rule in rules()}


def test_panels_and_alerts_ask_for_known_metrics_only() -> None:
    known = known_metrics()
    assert len(known) > 10
    for query in [*queries(), *(rule["expr"] for rule in rules())]:
        named = set(METRIC.findall(query))
        assert named, query
        assert named <= known, query
    assert {name.removesuffix("_bucket") for name in known if not name.endswith(("_sum", "_count"))} <= {
        name.removesuffix("_bucket") for query in queries() for name in METRIC.findall(query)
    }, "a metric that no panel shows"


def test_queries_are_promql(tmp_path: Path) -> None:
    """As recording rules, with Grafana's variable filled in, promtool parses them."""
    made = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    check(tool("promtool"), "check", "rules", file)


def test_grafana_finds_the_dashboard_and_its_data() -> None:
    (source,) = document(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    (provider,) = document(DEPLOY / "grafana" / "provisioning" / "dashboards" / "sweep.yml")["providers"]
    panels = dashboard()["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (p["gridPos"]["x"] + i, p["gridPos"]["y"] + j)
        for p in panels
        for i in range(p["gridPos"]["w"])
        for j in range(p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24
    assert provider["options"]["path"] in (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert provider["folder"] != "Ray"


def test_the_table_of_metrics_is_what_the_code_exports() -> None:
    code = (ROOT / "workers" / "service" / "metrics.py").read_text(encoding="utf-8")
    table = re.findall(
        r"^\| `(sweep_[a-z_]+)` \|", (DEPLOY / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert sorted(table) == sorted(re.findall(r'"(sweep_[a-z_]+)"', code))


# Slurm

STUBS = {
    "scontrol": 'echo "scontrol $*" >> "$LOG"\n[[ $1 == show ]] && printf "node1\\nnode2\\n"\nexit 0',
    "srun": 'echo "srun $*" >> "$LOG"\nexec sleep 60',
    "ray": 'echo "ray $*" >> "$LOG"',
}
SLEEPER = """echo "sweep $* at $RAY_ADDRESS" >> "$LOG"
[[ -e $LOG.done ]] && exit 0
trap 'touch "$LOG.done"; sleep 0.3; exit 75' TERM
touch "$LOG.started"
while :; do sleep 0.1; done"""


def batch(tmp_path: Path, sweep: str, *arguments: str) -> subprocess.Popen[str]:
    """The batch script as slurmd starts it, with stand-ins for Slurm, Ray and the driver."""
    stubs = tmp_path / "bin"
    stubs.mkdir(exist_ok=True)
    for name, body in {**STUBS, "sweep": sweep}.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (stubs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "16"}
    environment = {**os.environ, **slurm, "PATH": f"{stubs}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    return subprocess.Popen(
        [DEPLOY / "slurm" / "sweep.sbatch", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


def test_a_slurm_job_near_its_end_is_interrupted_requeued_and_then_done(tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = batch(tmp_path, SLEEPER, "-m", "grid=origin")
    wait_for(tmp_path / "log.started")
    job.send_signal(signal.SIGUSR1)
    printed, _ = job.communicate(timeout=30)
    assert job.returncode == 75, printed
    lines = log.read_text().splitlines()
    assert lines[-1] == "scontrol requeue 4711"
    assert "sweep run cluster=auto -m grid=origin at node1:24711" in lines
    started = [line for line in lines if line.startswith("srun ")]
    assert ["--head" in line for line in started] == [True, False]
    assert ["--nodelist=node1" in started[0], "--nodelist=node2" in started[1]] == [True, True]
    again = batch(tmp_path, SLEEPER, "-m", "grid=origin")
    printed, _ = again.communicate(timeout=30)
    assert again.returncode == 0, printed
    assert log.read_text().count("requeue") == 1


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_a_slurm_job_ends_as_its_sweep_does(tmp_path: Path, code: int) -> None:
    job = batch(tmp_path, f"exit {code}")
    printed, _ = job.communicate(timeout=30)
    assert job.returncode == code, printed
    assert ("scontrol requeue 4711" in (tmp_path / "log").read_text()) is (code == 75)


def test_a_cancelled_slurm_job_stops_its_sweep_and_stays_cancelled(tmp_path: Path) -> None:
    job = batch(tmp_path, SLEEPER)
    wait_for(tmp_path / "log.started")
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=30)
    assert job.returncode == 75, printed
    assert (tmp_path / "log.done").exists()
    assert "requeue" not in (tmp_path / "log").read_text()
