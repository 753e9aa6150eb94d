"""A client of OpenAI-compatible servers: log probabilities of prompts, and written tokens, by id, as vLLM gives them.

Requests go to the URL that was typed and nowhere else: through no proxy, and after no redirect.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeVar
from urllib.parse import urlsplit

import msgspec
from rich.console import Console
from rich.progress import track

from sweep.core.errors import SweepError
from sweep.core.json import Json
from sweep.core.text import count

_KEYS: Final = ("VLLM_API_KEY", "OPENAI_API_KEY")  # variables, the first that is set counts
_AT_ONCE: Final = 32  # requests: a server computes them together, and a token takes it as long as 32 do
_CONNECT_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 300.0  # of a request: the server may be a CPU, or busy with others
_WORDS: Final = 400  # characters of a server's own words in a message
# A log probability of 0 is rounded to no more than this; logits are far above it.
_ROUNDING: Final = 1e-3

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class Refused(SweepError):
    """The server has understood the request, and does not do what it asks for (status 400 or 422)."""


class _Card(msgspec.Struct, frozen=True):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct, frozen=True):
    data: list[_Card]


class _LogProb(msgspec.Struct, frozen=True):
    logprob: float


class _TokenLogProbs(msgspec.Struct, frozen=True):
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct, frozen=True):
    prompt_logprobs: list[dict[int, _LogProb] | None] | None = None
    token_ids: list[int] | None = None
    logprobs: _TokenLogProbs | None = None


class _Completion(msgspec.Struct, frozen=True):
    choices: list[_Choice]


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object, **__: object) -> None:
        """A redirect is an answer like any other, whose status says so."""
        return


_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A model that a server serves."""

    url: str  # without /v1
    model: str  # its name there
    root: str | None  # where the server has it from, if it says so
    max_model_len: int | None  # tokens of a prompt and what follows; None: the server does not say
    key: str | None = field(repr=False)  # None: the server has not asked for one

    def prompt_log_probs(self, token_ids: Sequence[int], n_top: int) -> list[dict[int, float]]:
        """Log probabilities of a prompt's tokens, each given all before it.

        Args:
            token_ids: of the prompt.
            n_top: likeliest tokens to give as well, by id; 0: none.

        Returns: for each token but the first, nats by token id.

        Raises: Refused: the server has its reasons, see the message.
            SweepError: it gives no prompt log probabilities, others, or does not answer.
        """
        choice = self._complete({"prompt": [*token_ids], "max_tokens": 1, "prompt_logprobs": n_top})
        if choice.prompt_logprobs is None:
            raise SweepError(
                f"{self.url} serves {self.model!r} without log probabilities of prompts: it ignores `prompt_logprobs`. "
                "`vllm serve` gives them."
            )
        found: list[dict[int, float]] = []
        for each in choice.prompt_logprobs[1:]:
            found.append({token: one.logprob for token, one in (each or {}).items()})
            _check_log_probs(self.url, found[-1].values())
        own = [token in each for token, each in zip(token_ids[1:], found, strict=False)]
        if len(found) != len(token_ids) - 1 or not all(own):
            raise SweepError(f"{self.url} gives log probabilities of another prompt than the one that it was sent.")
        return found

    def write(self, token_ids: Sequence[int], n_tokens: int, seed: int) -> tuple[list[int], list[float]]:
        """Continue a prompt with tokens drawn from the served model's own distribution, at temperature 1.

        Args:
            token_ids: of the prompt.
            n_tokens: to write; the end of a text is a token like any other.
            seed: of the server's draws.

        Returns: the tokens written, and their log probabilities, nats.

        Raises: SweepError: the server refuses, leaves out ids or log probabilities, or does not answer.
        """
        choice = self._complete(
            {
                "prompt": [*token_ids],
                "max_tokens": n_tokens,
                "seed": seed,
                "ignore_eos": True,
                "logprobs": 0,
                "return_token_ids": True,
                # All of them, as the server takes others from the checkpoint's generation_config.json.
                **{"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0},
                **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
            }
        )
        ids, of_each = choice.token_ids, None if choice.logprobs is None else choice.logprobs.token_logprobs
        if not ids or of_each is None or len(of_each) != len(ids) or None in of_each:
            raise SweepError(
                f"{self.url} writes text without the ids of its tokens and their log probabilities: it ignores "
                "`return_token_ids` or `logprobs`. `vllm serve` gives them; or leave out --decode."
            )
        log_probs = [each for each in of_each if each is not None]
        _check_log_probs(self.url, log_probs)
        return ids, log_probs

    def _complete(self, asked: Mapping[str, Json]) -> _Choice:
        body = json.dumps({"model": self.model, **asked}).encode()
        answer, _ = _ask_as_wanted(f"{self.url}/v1/completions", body, self.key)
        choices = _decoded(self.url, answer, _Completion).choices
        if not choices:
            raise SweepError(f"{self.url} answers a completion request with no completion.")
        return choices[0]


def connect(url: str, model: str | None) -> Server:
    """Find the model that a server serves.

    Args:
        url: as it is typed, with or without /v1.
        model: its name there; None: the only one.

    Raises: SweepError: no server, another kind of server, a key that is missing or wrong, or not exactly one model.
    """
    base = _base_url(url)
    answer, key = _ask_as_wanted(f"{base}/v1/models", None, None)
    cards = _decoded(base, answer, _Models).data
    known = {card.id: card for card in cards}
    if not known:
        raise SweepError(f"{base} serves no model.")
    if model is None and len(known) > 1:
        raise SweepError(f"{base} serves several models. Type --served-model NAME, one of: {_names(known)}.")
    if model is not None and model not in known:
        raise SweepError(f"{base} does not serve {model!r}. Type --served-model NAME, one of: {_names(known)}.")
    card = cards[0] if model is None else known[model]
    return Server(url=base, model=card.id, root=card.root, max_model_len=card.max_model_len, key=key)


def check_prompt_log_probs(server: Server, token_ids: Sequence[int], n_top: int) -> None:
    """Ask for the log probabilities of one prompt. Raises: SweepError: the server does not give that many, or none."""
    try:
        server.prompt_log_probs(token_ids, n_top)
    except Refused as refused:
        try:
            server.prompt_log_probs(token_ids, 0)
        except Refused as error:
            raise SweepError(
                f"{server.url} refuses to give log probabilities of prompts, which `vllm serve` gives. {error}"
            ) from error
        raise SweepError(
            f"{refused} It gives them for the prompt's own tokens. Serve with --max-logprobs {n_top}, or type a "
            "smaller --logprobs K."
        ) from refused


def in_parallel(work: Callable[[_Item], _Answer], items: Sequence[_Item], doing: str) -> list[_Answer]:
    """Do something with every item, a few at a time; what has not begun when an error comes is left.

    Args:
        work: sends a request.
        items: what to send.
        doing: for the progress bar, on a terminal.
    """
    console = Console(stderr=True)
    threads = ThreadPoolExecutor(_AT_ONCE)
    try:
        answers = threads.map(work, items)
        bar = track(
            answers,
            description=f"{doing}, {count(len(items), 'request')}",
            total=len(items),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        return list(bar)
    finally:
        threads.shutdown(cancel_futures=True)


class _KeyWanted(SweepError):
    """The server wants an API key, or another one (status 401 or 403)."""


def _names(models: Iterable[str]) -> str:
    """As a shell takes them: a server's words may be anything."""
    return ", ".join(map(repr, models))


def _base_url(url: str) -> str:
    """Scheme, host, port and the path before /v1. Raises: SweepError: no such URL."""
    advice = "Type one as --served http://HOST:8000."
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise SweepError(f"--served {url!r} is no URL ({error}). {advice}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise SweepError(f"--served {url!r} is no http:// or https:// URL. {advice}")
    if parts.username is not None or parts.query or parts.fragment:
        raise SweepError(
            f"--served takes scheme, host, port and path alone. {advice} A key is read from {' or '.join(_KEYS)}."
        )
    if not url.isascii() or not url.isprintable() or " " in url:
        raise SweepError(f"--served {url!r} has characters that no URL has. {advice}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1').rstrip('/')}"


def _key() -> str | None:
    """The API key of the environment. Raises: SweepError: no HTTP header can carry it."""
    name = next((name for name in _KEYS if os.environ.get(name, "").strip()), None)
    if name is None:
        return None
    key = os.environ[name].strip()
    if not key.isascii() or not key.isprintable():
        raise SweepError(f"{name} holds characters that no API key has.")
    return key


def _ask_as_wanted(url: str, body: bytes | None, key: str | None) -> tuple[bytes, str | None]:
    """Send a request as `_ask` does; with the environment's key if the server asks for one. Returns: the key, too."""
    try:
        return _ask(url, body, key), key
    except _KeyWanted:
        if key is not None or (own := _key()) is None:
            raise
        return _ask(url, body, own), own


def _ask(url: str, body: bytes | None, key: str | None) -> bytes:
    """Send a request. Args: body: JSON to post; None: get.

    Raises: Refused, _KeyWanted, SweepError: no answer, or one that is no success; the message says what to do.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(url, data=body, headers=headers)
    if key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    seconds = _CONNECT_SECONDS if body is None else _ANSWER_SECONDS
    try:
        with _OPENER.open(request, timeout=seconds) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        raise _answered(url, error, key) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise SweepError(
                f"{url} has not answered within {seconds:.0f} s. Check that the server runs and is not overloaded."
            ) from error
        why = f"{reason}" or type(reason).__name__
        raise SweepError(
            f"No server answers at {url}: {why}. Start `vllm serve DIR`, wait until it says that it is ready, "
            "and give its address: --served http://HOST:8000."
        ) from error


def _answered(url: str, error: urllib.error.HTTPError, key: str | None) -> SweepError:
    """What an answer other than a success means."""
    try:
        said = _words(error.read(2**16))
    except (OSError, http.client.HTTPException):
        said = ""
    if error.code in (401, 403):
        if key is None:
            return _KeyWanted(f"{url} asks for an API key. Set {' or '.join(_KEYS)} in the environment.")
        used = next(name for name in _KEYS if os.environ.get(name, "").strip())
        return _KeyWanted(f"{url} does not accept the key in {used} (status {error.code}).")
    if error.code in (400, 422):
        return Refused(f"{url} refuses (status {error.code}): {said}")
    if error.code // 100 == 3:
        to = error.headers.get("Location", "elsewhere")
        return SweepError(f"{url} redirects to {to!r}, which is not followed. Give the server's own address.")
    if error.code == 404 and url.endswith("/models"):
        return SweepError(
            f"{url} is not found (status 404): that is no OpenAI-compatible server, or its API is under another path. "
            "Give the address before /v1: --served http://HOST:8000."
        )
    return SweepError(f"{url} answers with status {error.code}: {said}")


def _words(body: bytes) -> str:
    """A server's own message, in one line."""
    text = body.decode(errors="replace")
    try:
        told = msgspec.json.decode(body, type=_Told)
        text = told.message or (told.error if isinstance(told.error, str) else told.error.message)
    except msgspec.DecodeError:
        pass  # HTML, or other JSON: as it is
    words = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return words if len(words) <= _WORDS else f"{words[:_WORDS]}..."


class _Error(msgspec.Struct, frozen=True):
    message: str = ""


class _Told(msgspec.Struct, frozen=True):
    error: _Error | str = ""
    message: str = ""


_Kind = TypeVar("_Kind", bound=msgspec.Struct)


def _decoded(url: str, answer: bytes, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.json.decode(answer, type=kind)
    except msgspec.DecodeError as error:
        raise SweepError(
            f"{url} does not answer as an OpenAI-compatible server does ({error}). "
            "Give the address of one, as `vllm serve` starts it: --served http://HOST:8000."
        ) from error


def _check_log_probs(url: str, found: Iterable[float]) -> None:
    if any(each > _ROUNDING for each in found):
        raise SweepError(
            f"{url} gives numbers above 0 as log probabilities: logits. Serve without --logprobs-mode raw_logits."
        )
