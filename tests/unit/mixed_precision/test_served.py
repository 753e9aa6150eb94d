"""`sweep validate --served`: KL of a served model, against one that is known; what is wrong with a server is said."""

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sweep.cli import main
from sweep.config.compose import expand
from sweep.core.paths import bundled_model_dir
from sweep.formats.mixed import MixedRecipe
from sweep.mixed_precision import openai_server, served
from sweep.mixed_precision.served import bucket_kl, excess
from sweep.plan.model import Model
from sweep.plan.samples import samples_of
from tests.exports import FORMATS, apply, recipe_of
from tests.formats import group_format
from tests.models import save_checkpoint
from tests.openai import Answer, ServedModel, answered, refused, serving
from workers.data.batches import make_plan
from workers.model.loading import load
from workers.quant.applied import calibrated_model

MODEL = Model(bundled_model_dir())
CONFIG = expand(["dataset.size=small", "cluster.device=cpu", "validation.n_samples=16"], multirun=False).points[0]
KEYS = ("VLLM_API_KEY", "OPENAI_API_KEY")


@pytest.fixture(scope="module")
def recipe() -> MixedRecipe:
    found = recipe_of([group_format("int4", *FORMATS["int4_groups_weight_only"]), None])
    samples = samples_of(CONFIG.dataset, MODEL, 16)
    return replace(found, dataset_revision=make_plan(samples, packed=True).digest("small"))


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path: Path, recipe: MixedRecipe) -> Callable[..., int]:
    """Validate the recipe; what is measured in this process is found again by later tests."""

    def validated(*rest: str) -> int:
        path = tmp_path / "mixed.yaml"
        path.write_text(recipe.to_yaml())
        options = [f"store.uri={tmp_path / 'store'}", "cluster.device=cpu", "validation.n_samples=16"]
        return main(["validate", str(path), *options, *rest])

    return validated


@pytest.fixture
def refusal(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Validate what must be refused before the model is loaded; gives the one message."""

    def refused(*rest: str) -> str:
        monkeypatch.setattr("workers.model.loading.load", None)
        assert run(*rest) == 2
        out, err = capsys.readouterr()
        assert not out
        assert "Traceback" not in err
        assert not list(tmp_path.glob("mixed.validation.*"))
        return err

    return refused


def plain(scale: float = 1.0, change: Callable[[Any], object] = lambda model: None) -> Callable[[Tensor], Tensor]:
    """The bundled model with all logits scaled: another distribution, of which every probability is known."""
    model = load(MODEL.path, dtype=torch.float32, device="cpu")
    change(model)
    return torch.no_grad()(
        lambda ids: (scale * model(input_ids=ids, use_cache=False).logits[0]).double().log_softmax(1)
    )


def exact_kl(p: Callable[[Tensor], Tensor], q: Callable[[Tensor], Tensor], texts: list[list[int]], first: int) -> float:
    """Mean KL(p || q) at the predictions of tokens from number `first` on."""
    found = []
    for text in texts:
        log_p, log_q = (each(torch.tensor([text]))[first - 1 : -1] for each in (p, q))
        found.append((log_p.exp() * (log_p - log_q)).sum(1))
    return float(torch.cat(found).mean())


def test_each_way_finds_the_kl_of_a_model_that_is_known(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served, "_TOKENS", 500)
    base, other = plain(), plain(1.25)
    with serving(ServedModel(other)) as server:
        assert run("--served", server.url, "--decode", "--json") == 0
        bodies = [body for path, _, body in server.requests if path == "/v1/completions"]
    (row,) = json.loads(capsys.readouterr().out)
    top, sampled, decode = row["served"].pop("kl")
    assert row["served"] == {"url": server.url, "model": "served", "root": None, "n_top": 20}
    samples = [body["prompt"] for body in bodies if body.get("prompt_logprobs") == 20][1:]  # the first is the check
    texts = [body["prompt"] for body in bodies if body.get("prompt_logprobs") == 0]
    bound = exact_kl(base, other, samples, 1)
    assert 0.2 * bound < top["served_kl"] < bound
    assert top["n_tokens"] == row["n_predictions"]
    assert top["measured_kl"] == pytest.approx(row["measured_kl"], rel=1e-5)
    assert top["measured_kl_interval"] == pytest.approx(row["measured_kl_interval"], rel=1e-5)
    assert sampled["n_tokens"] == sum(len(text) - 4 for text in texts) >= 500
    low, high = sampled["served_kl_interval"]
    assert low < exact_kl(base, other, texts, 4) < high
    assert high - low < low
    written = [body["prompt"] for body in bodies if "seed" in body]
    assert decode["n_tokens"] == sum(body["max_tokens"] for body in bodies if "seed" in body)
    assert {tuple(prefix) for prefix in written} == {tuple(text[:4]) for text in samples}
    low, high = decode["served_kl_interval"]
    assert 0 < low < decode["served_kl"] < high
    # A small change of all logits is as far there as back, to the first order.
    assert 0.5 < decode["served_kl"] / sampled["served_kl"] < 2


def test_the_fake_quantized_model_itself_is_as_far_as_measured_in_each_way(
    run: Callable[..., int], tmp_path: Path, recipe: MixedRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_TOKENS", 200)
    batches = list(make_plan(samples_of(CONFIG.dataset, MODEL, 16), packed=True).batches("small"))
    with serving(ServedModel(plain(change=lambda model: apply(model, calibrated_model(model, batches, recipe))))) as at:
        assert run("--served", f"{at.url}/v1/", "--decode") == 0
    (row,) = json.loads((tmp_path / "mixed.validation.json").read_text())
    assert [each["way"] for each in row["served"]["kl"]] == ["top", "sampled", "decode"]
    for each in row["served"]["kl"]:
        assert each["ratio"] == pytest.approx(1, abs=1e-4)
        assert each["ratio_interval"] == pytest.approx([1, 1], abs=1e-4)
    page = (tmp_path / "mixed.validation.md").read_text()
    assert "## Served" in page
    assert "| texts of the server | served || unquantized |".replace("||", "\\|\\|") in page


def test_the_unquantized_model_itself_is_no_distance_away_and_texts_repeat(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_TOKENS", 200)
    sent: list[list[Any]] = []
    for _ in range(2):
        with serving(ServedModel(plain())) as server:
            assert run("--served", server.url) == 0
        sent.append(sorted(body["prompt"] for _, _, body in server.requests if "prompt" in body))
        (row,) = json.loads((tmp_path / "mixed.validation.json").read_text())
        assert [each["way"] for each in row["served"]["kl"]] == ["top", "sampled"]
        assert all(0 <= each["served_kl"] < 1e-9 for each in row["served"]["kl"])
    assert sent[0] == sent[1]


def test_a_bound_over_the_whole_vocabulary_is_the_kl(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_TOKENS", 1)
    base, other = plain(), plain(0.9)
    with serving(ServedModel(other, max_logprobs=4096)) as server:
        assert run("--served", server.url, "--logprobs", "4096", "validation.n_samples=4") == 0
    samples = [body["prompt"] for _, _, body in server.requests if body.get("prompt_logprobs") == 4096][1:]
    (row,) = json.loads((tmp_path / "mixed.validation.json").read_text())
    assert row["served"]["kl"][0]["served_kl"] == pytest.approx(exact_kl(base, other, samples, 1), rel=1e-5)


def test_a_coarser_distribution_is_never_further_away() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.full(50, 0.3), 200), rng.dirichlet(np.full(50, 0.3), 200)
    whole = (p * np.log(p / q)).sum(1)
    before = np.zeros(200)
    for n in (1, 5, 20, 50):
        own, other = (np.pad(np.log(each[:, :n]), ((0, 0), (0, 3)), constant_values=np.nan) for each in (p, q))
        bound = bucket_kl(own, other)
        assert (before <= bound + 1e-12).all()
        assert (bound <= whole + 1e-12).all()
        before = bound
    np.testing.assert_allclose(before, whole)


def test_a_tiny_kl_survives_rounding() -> None:
    """In float32 the difference of two sums would be lost: each is 1e7 times as large."""
    p = np.array([[0.5, 0.3, 0.2]])
    q = np.array([[0.5 + 1e-5, 0.3 - 1e-5, 0.2]])
    expected = float((p * np.log(p / q)).sum())
    assert bucket_kl(np.log(p), np.log(q))[0] == pytest.approx(expected, rel=1e-4)
    assert excess(np.array([1e-6]))[0] == pytest.approx(5e-13, rel=1e-3)


def test_a_key_is_sent_only_where_one_is_asked_for(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ServedModel(lambda _: torch.zeros(0))

    def guarded(path: str, headers: Any, body: Any) -> Answer:
        if headers.get("Authorization") != "Bearer secret-1":
            return answered({"error": "Unauthorized"}, 401)
        return refused("none today") if path == "/v1/completions" else model(path, headers, body)

    with serving(guarded) as server:
        assert "asks for an API key. Set VLLM_API_KEY or OPENAI_API_KEY in the environment." in refusal(
            "--served", server.url
        )
        monkeypatch.setenv("OPENAI_API_KEY", "secret-2")
        message = refusal("--served", server.url)
        assert "does not accept the key in OPENAI_API_KEY" in message
        assert "secret" not in message
        monkeypatch.setenv("VLLM_API_KEY", " secret-1\n")
        assert "none today" in refusal("--served", server.url)  # past the door
        monkeypatch.setenv("VLLM_API_KEY", "two\nlines")
        message = refusal("--served", server.url)
        assert "VLLM_API_KEY holds characters that no API key has" in message
        assert "two" not in message
    with serving(lambda *_: answered({"data": []})) as open_to_all:
        assert "serves no model" in refusal("--served", open_to_all.url)
    assert all("Authorization" not in headers for _, headers, _ in open_to_all.requests)


def test_a_key_is_sent_where_only_completions_ask_for_it(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ServedModel(lambda _: torch.zeros(0))

    def half_guarded(path: str, headers: Any, body: Any) -> Answer:
        if path == "/v1/completions":
            return refused("none today") if headers.get("Authorization") else answered({"error": "no key"}, 403)
        return model(path, headers, body)

    with serving(half_guarded) as server:
        assert "asks for an API key" in refusal("--served", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert "none today" in refusal("--served", server.url)
    assert all("Authorization" not in headers for path, headers, _ in server.requests if path == "/v1/models")


def test_a_redirect_is_not_followed(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with serving(lambda *_: answered({"data": []})) as other:
        moved = (307, {"Location": f"{other.url}/v1/models"}, b"")
        with serving(lambda _, headers, __: moved if "Authorization" in headers else (401, {}, b"")) as server:
            message = refusal("--served", server.url)
    assert f"redirects to '{other.url}/v1/models', which is not followed" in message
    assert other.requests == []


def test_a_proxy_of_the_environment_gets_nothing(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda *_: answered({"data": []})) as proxy, serving(lambda *_: answered({"data": []})) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert f"{server.url} serves no model." in refusal("--served", server.url)
    assert proxy.requests == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--logprobs", "5"], "--logprobs is about a served model. Type --served http://HOST:8000 as well."),
        (["--decode"], "--decode is about a served model."),
        (["--served-model", "x"], "--served-model is about a served model."),
        (["--served", "localhost:8000"], "is no http:// or https:// URL. Type one as --served http://HOST:8000."),
        (["--served", "ftp://host"], "is no http:// or https:// URL"),
        (["--served", "file:///etc/passwd"], "is no http:// or https:// URL"),
        (["--served", "http://"], "is no http:// or https:// URL"),
        (["--served", "http://host:port"], "is no URL"),
        (["--served", "http://[::1"], "is no URL"),
        (["--served", "http://ab c/"], "has characters that no URL has"),
        (["--served", "http://höst/"], "has characters that no URL has"),
        (["--served", "http://me:word@host/"], "A key is read from VLLM_API_KEY or OPENAI_API_KEY."),
        (["--served", "http://host/?key=1"], "takes scheme, host, port and path alone"),
        (["--served", "http://nowhere.invalid"], "No server answers at http://nowhere.invalid/v1/models"),
        (["--served", "http://127.0.0.1:1", "--logprobs", "0"], "--logprobs 0 is not between 1 and 4096"),
        (["--served", "http://127.0.0.1:1", "--logprobs", "4097"], "--logprobs 4097 is not between 1 and 4096"),
        (["--served", "http://127.0.0.1:1", "dataset=scenes"], "Give the same samples"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(refusal: Callable[..., str], options: list[str], words: str) -> None:
    assert words in refusal(*options)


def test_a_port_where_nobody_listens_is_named(refusal: Callable[..., str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    message = refusal("--served", url)
    assert f"No server answers at {url}/v1/models: [Errno 111] Connection refused." in message
    assert "Start `vllm serve DIR`" in message
    assert "No server answers at https://" in refusal("--served", url.replace("http", "https"))


def test_a_server_that_says_nothing_is_left(refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_server, "_CONNECT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        assert "/v1/models has not answered within 0 s" in refusal(
            "--served", f"http://127.0.0.1:{silent.getsockname()[1]}"
        )


MANY = [{"id": "one"}, {"id": "two"}]


@pytest.mark.parametrize(
    ("models", "completion", "options", "words"),
    [
        ((404, {}, b"<html>"), None, [], "is no OpenAI-compatible server, or its API is under another path"),
        ((200, {}, b"<html>"), None, [], "does not answer as an OpenAI-compatible server does"),
        (answered([1, 2]), None, [], "does not answer as an OpenAI-compatible server does"),
        ((503, {}, b"busy\x1b[31m\n"), None, [], "answers with status 503: busy [31m"),
        (answered({"data": []}), None, [], "serves no model"),
        (answered({"data": MANY}), None, [], "Type --served-model NAME, one of: 'one', 'two'."),
        (
            answered({"data": MANY}),
            None,
            ["--served-model", "six"],
            "does not serve 'six'. Type --served-model NAME, one of: 'one', 'two'.",
        ),
        (None, answered({"choices": []}), [], "with no completion"),
        (None, answered({"choices": [{"text": "x"}]}), [], "it ignores `prompt_logprobs`"),
        (None, refused("prompt_logprobs is unknown"), [], "`vllm serve` gives. http://"),
        (None, refused("prompt_logprobs is unknown"), [], "refuses (status 400): prompt_logprobs is unknown"),
        (None, refused("died", 500), [], "/v1/completions answers with status 500: died"),
        (None, answered({"choices": [{"prompt_logprobs": [None]}]}), [], "of another prompt"),
    ],
)
def test_what_is_wrong_with_a_server_is_said(
    refusal: Callable[..., str], models: Answer | None, completion: Answer | None, options: list[str], words: str
) -> None:
    model = ServedModel(lambda _: torch.zeros(0))

    def answer(path: str, headers: Any, body: Any) -> Answer:
        if path == "/v1/models":
            return models or model(path, headers, body)
        assert completion is not None
        return completion

    with serving(answer) as server:
        assert words in refusal("--served", server.url, *options)


def test_more_log_probabilities_than_the_server_gives_are_refused_with_what_to_type(
    refusal: Callable[..., str],
) -> None:
    with serving(ServedModel(plain())) as server:
        message = refusal("--served", server.url, "--logprobs", "21")
    assert "21 is greater than max allowed: 20" in message
    assert "Serve with --max-logprobs 21, or type a smaller --logprobs K." in message


def test_logits_are_no_log_probabilities(refusal: Callable[..., str]) -> None:
    base = plain()
    with serving(ServedModel(lambda ids: base(ids) + 20)) as server:
        assert "Serve without --logprobs-mode raw_logits" in refusal("--served", server.url)


def test_a_server_of_short_prompts_is_refused_with_the_length(refusal: Callable[..., str]) -> None:
    with serving(ServedModel(plain(), cards=[{"id": "served", "max_model_len": 30}])) as server:
        message = refusal("--served", server.url)
    longest = max(len(sample.token_ids) for sample in samples_of(CONFIG.dataset, MODEL, 32)[16:])
    assert f"takes 30 tokens at most; the longest validation sample has {longest}" in message
    assert f"Serve with --max-model-len {longest + 1}." in message


def test_another_model_is_told_by_its_files_or_by_what_it_says(
    run: Callable[..., int], refusal: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the same shape and vocabulary that knows nothing of the texts, and one of another shape."""

    def forget(model: Any) -> None:
        torch.manual_seed(0)
        model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)

    with serving(ServedModel(plain(change=forget))) as server:
        assert run("--served", server.url) == 2
    message = capsys.readouterr().err
    assert (
        "serves another model under the name 'served' than qwen3_vl_tiny, which mixed is for: on the validation"
        in message
    )
    assert "Serve what `sweep export` makes of the recipe." in message
    assert not list(tmp_path.glob("mixed.validation.*"))
    other = save_checkpoint(tmp_path / "other", "qwen3")
    with serving(ServedModel(plain(), cards=[{"id": "served", "root": str(other)}])) as server:
        assert f"{other} has other linears" in refusal("--served", server.url)


def test_a_model_that_is_much_further_away_than_measured_is_asked_about(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_TOKENS", 1)
    for scale, asked in ((1.5, True), (1.1, False)):
        with serving(ServedModel(plain(scale))) as server:
            assert run("--served", server.url) == 0
        assert ("times as far as measured: is it the export of this recipe?" in capsys.readouterr().out) == asked


def test_samples_with_pictures_are_refused(
    tmp_path: Path, recipe: MixedRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = expand(["dataset=scenes", "dataset.size=small"], multirun=False).points[0].dataset
    digest = make_plan(samples_of(drawn, MODEL, 16), packed=True).digest("small")
    (tmp_path / "drawn.yaml").write_text(replace(recipe, dataset="scenes", dataset_revision=digest).to_yaml())
    options = [f"store.uri={tmp_path / 'store'}", "validation.n_samples=16", "--served", "http://127.0.0.1:1"]
    assert main(["validate", str(tmp_path / "drawn.yaml"), *options]) == 2
    assert "The validation samples have pictures, and a prompt of token ids carries none." in capsys.readouterr().err


def test_a_server_that_writes_without_ids_is_named(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_TOKENS", 1)
    model = ServedModel(plain())
    model.written = lambda body: {}
    with serving(model) as server:
        assert run("--served", server.url, "--decode") == 2
    assert "ignores `return_token_ids` or `logprobs`" in capsys.readouterr().err
