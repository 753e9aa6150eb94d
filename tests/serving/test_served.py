"""`sweep validate --served` against a real vLLM server, on the CPU: what it serves is as far away as measured."""

import base64
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sweep.cli import main
from sweep.commands.export import serve_line
from sweep.config.compose import expand
from sweep.core.paths import bundled_model_dir
from sweep.formats.mixed import MixedRecipe
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from tests.exports import FORMATS, recipe_of
from tests.formats import group_format
from workers.data.batches import make_plan
from workers.data.scenes import scene

START_SECONDS = 240
OPTIONS = ["cluster.device=cpu", "validation.n_samples=64"]


def recipe_for(path: Path | None = None) -> MixedRecipe:
    """INT4 weights in groups, with the scales that fused layers share."""
    found = recipe_of([group_format("int4", *FORMATS["int4_groups_weight_only"], "max", "fused")], path)
    dataset = expand(["dataset.size=small"], multirun=False).points[0].dataset
    samples = samples_of(dataset, Model(bundled_model_dir()), 16)
    return replace(found, dataset_revision=make_plan(samples, packed=True).digest("small"))


def is_up(url: str) -> bool:
    with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{url}/v1/models", timeout=5):
        return True
    return False


@pytest.fixture(scope="module")
def place(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and its export."""
    del programs  # without them the export is not served
    place = tmp_path_factory.mktemp("served")
    (place / "int4.yaml").write_text(recipe_for().to_yaml())
    written = ["--format", "compressed-tensors", "--out", str(place / "int4")]
    assert main(["export", str(place / "int4.yaml"), OPTIONS[0], *written]) == 0
    return place


@pytest.fixture(scope="module")
def server(place: Path, programs: Path) -> Iterator[str]:
    """The export, served by the line that `sweep export` prints, under a name of its own. Yields: the URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, *words = shlex.split(serve_line(place / "int4"))
    command = [programs / program, *words, "--served-model-name", "int4", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager"]  # compiling takes longer than all that is asked
    own = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    with (place / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **own}, start_new_session=True, cwd=place
        )
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not is_up(url):
            alive = process.poll() is None and time.monotonic() < until
            assert alive, (place / "server.log").read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()  # it ends the engine, a process of its own
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def validated(place: Path, server: str) -> Callable[..., int]:
    def run(recipe: str, *rest: str) -> int:
        return main(
            ["validate", str(place / recipe), f"store.uri={place / 'store'}", *OPTIONS, "--served", server, *rest]
        )

    return run


def test_what_vllm_serves_is_as_far_away_as_measured(validated: Callable[..., int], place: Path, server: str) -> None:
    assert validated("int4.yaml", "--decode") == 0
    (row,) = json.loads((place / "int4.validation.json").read_text())
    served = row["served"]
    assert (served["url"], served["model"], served["root"]) == (server, "int4", str(place / "int4"))
    top, sampled, decode = served["kl"]
    assert sampled["n_tokens"] >= 2000
    assert decode["n_tokens"] >= 2000
    for each in (top, sampled, decode):
        low, high = each["ratio_interval"]
        assert 0.95 < low < each["ratio"] < high < 1.05, each
    assert top["served_kl"] < top["measured_kl"]  # a bound, of 20 tokens of 4,096
    for each in (sampled, decode):
        low, high = each["served_kl_interval"]
        assert low < each["measured_kl"] < high
    assert "| texts of the server |" in (place / "int4.validation.md").read_text()


def test_the_serve_line_answers_texts_chats_and_pictures(server: str) -> None:
    def answered(path: str, **request: Any) -> dict[str, int]:
        """Tokens of the prompt and of the answer."""
        body = json.dumps({"model": "int4", "max_tokens": 8, "ignore_eos": True, "temperature": 0, **request}).encode()
        asked = urllib.request.Request(f"{server}/v1/{path}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=120) as answer:
            return json.load(answer)["usage"]

    assert answered("completions", prompt="dog: ")["completion_tokens"] == 8
    picture = io.BytesIO()
    Image.fromarray(scene(3).pixels).save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    question = {"type": "text", "text": "What is it?"}
    asked = answered("chat/completions", messages=[{"role": "user", "content": [question]}])
    shown = [{"type": "image_url", "image_url": {"url": url}}, question]
    seen = answered("chat/completions", messages=[{"role": "user", "content": shown}])
    assert asked["completion_tokens"] == seen["completion_tokens"] == 8
    assert seen["prompt_tokens"] - asked["prompt_tokens"] == 4 + 2  # merged patches between their two marks


def test_more_log_probabilities_than_vllm_gives_are_refused_with_what_to_type(
    validated: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert validated("int4.yaml", "--logprobs", "21") == 2
    assert "Serve with --max-logprobs 21, or type a smaller --logprobs K." in capsys.readouterr().err
    assert validated("int4.yaml", "--served-model", "int8") == 2
    assert "does not serve 'int8'. Type --served-model NAME, one of: 'int4'." in capsys.readouterr().err


def test_another_model_of_the_same_shape_is_refused(
    validated: Callable[..., int], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = place / "other"
    shutil.copytree(bundled_model_dir(), other, ignore=shutil.ignore_patterns("layer-analysis"))
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(0)
    for name, weight in weights.items():
        if weight.dim() > 1:
            weights[name] = (0.02 * torch.randn(weight.shape)).to(weight.dtype)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    (place / "other.yaml").write_text(recipe_for(other).to_yaml())
    assert validated("other.yaml", "--decode") == 2
    message = capsys.readouterr().err
    assert "serves another model under the name 'int4'" in message
    assert "and that of pure chance 8.32" in message
    assert not list(place.glob("other.validation.*"))
