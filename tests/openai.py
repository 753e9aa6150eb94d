"""A small OpenAI-compatible server in this process, for tests: it serves any model that gives log probabilities."""

import json
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

Answer = tuple[int, Mapping[str, str], bytes]  # status, headers, body


@dataclass
class Endpoint:
    """A server's address, and the requests that it has had: path, headers, body."""

    url: str
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait; of more than 5, the default, some would be reset


@contextmanager
def serving(answer: Callable[[str, Mapping[str, str], dict[str, Any]], Answer]) -> Generator[Endpoint]:
    """Serve until left, by a function from a request's path, headers and JSON to the answer."""
    endpoint = Endpoint(url="")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            endpoint.requests.append((self.path, dict(self.headers), body))
            status, headers, content = answer(self.path, self.headers, body)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answered(content: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def refused(message: str, status: int = 400) -> Answer:
    return answered({"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}, status)


@dataclass
class ServedModel:
    """Answers of a server of one model, in the shape that vLLM 0.32 gives them."""

    log_probs: Callable[[Tensor], Tensor]  # from token ids [1, n] to [n, vocabulary], nats
    cards: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "served", "max_model_len": 512}])
    max_logprobs: int = 20

    def __post_init__(self) -> None:
        self._one_at_a_time = threading.Lock()

    def __call__(self, path: str, headers: Mapping[str, str], body: dict[str, Any]) -> Answer:
        if path == "/v1/models":
            return answered({"object": "list", "data": self.cards})
        if path != "/v1/completions" or body["model"] not in [card["id"] for card in self.cards]:
            return refused("not found", 404)
        if body.get("prompt_logprobs", 0) > self.max_logprobs:
            return refused(f"{body['prompt_logprobs']} is greater than max allowed: {self.max_logprobs}")
        with self._one_at_a_time, torch.no_grad():
            choice = self.scored(body) if "prompt_logprobs" in body else self.written(body)
        return answered({"id": "cmpl-1", "object": "text_completion", "choices": [{"index": 0, "text": "", **choice}]})

    def scored(self, body: dict[str, Any]) -> dict[str, Any]:
        """The likeliest tokens at each position, and the prompt's own."""
        ids, n_top = body["prompt"], body["prompt_logprobs"]
        found: list[dict[str, dict[str, float]] | None] = [None]
        for token, of_all in zip(ids[1:], self.log_probs(torch.tensor([ids])), strict=False):
            tokens = dict.fromkeys([token, *of_all.topk(n_top).indices.tolist()])
            found.append({str(each): {"logprob": float(of_all[each]), "rank": 1} for each in tokens})
        return {"prompt_logprobs": found}

    def written(self, body: dict[str, Any]) -> dict[str, Any]:
        """A text drawn from the model."""
        neutral = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "ignore_eos": True, "logprobs": 0}
        assert {name: body[name] for name in neutral} == neutral
        generator, ids, chosen = torch.Generator().manual_seed(body["seed"]), list(body["prompt"]), []
        for _ in range(body["max_tokens"]):
            of_all = self.log_probs(torch.tensor([ids]))[-1]
            ids.append(int(torch.multinomial(of_all.exp(), 1, generator=generator)))
            chosen.append(float(of_all[ids[-1]]))
        return {"token_ids": ids[len(body["prompt"]) :], "logprobs": {"token_logprobs": chosen}}
