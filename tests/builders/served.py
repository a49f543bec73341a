"""A server on this machine that speaks the protocol of OpenAI's completions, with a real tiny model behind it."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Service:
    """What is served, and how it behaves.

    Attributes:
        model, tokenizer: behind the endpoint.
        name: of the model.
        key: that requests must have; None: none.
        most: log-probabilities that are given at most.
        faults: what the next requests get in place of an answer: a status, or `drop` for a connection that breaks.
        forms: of log-probabilities that it knows.
        retry_after: what it says with the status 429.
        shift: added to the ids of tokens in answers: a server with another tokenizer.
        asked: bodies of all requests that were answered.
        url: of the endpoint.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "big"
    key: str | None = None
    most: int = 1000
    faults: list[Any] = field(default_factory=list)
    forms: tuple[str, ...] = ("prompt_logprobs", "echo")
    retry_after: str = "0"
    shift: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        ids = body["prompt"]
        assert isinstance(ids, list) and all(isinstance(each, int) for each in ids)
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
        if "prompt_logprobs" in body and "prompt_logprobs" in self.forms:
            choice["prompt_logprobs"] = self.by_id(ids, min(self.most, body["prompt_logprobs"]))
        if body.get("echo") and "echo" in self.forms:
            choice["logprobs"] = self.by_text(ids, min(self.most, body["logprobs"]))
        new, ended = list[int](), False
        if "prompt_logprobs" not in body and body["max_tokens"]:
            new, ended = self.generated(body)
            choice |= {"text": self.tokenizer.decode(new), "finish_reason": "stop" if ended else "length"}
            choice["text"] = f" {choice['text']}" if new else ""
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new) + ended if new else 0}
        return 200, {"object": "text_completion", "model": self.name, "choices": [choice], "usage": usage}

    def log_p(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)

    def tops(self, ids: list[int], k: int) -> list[dict[int, float]]:
        """By place the k likeliest tokens, and the one that is there."""
        found = []
        for row, token in zip(self.log_p(ids)[:-1], ids[1:], strict=True):
            chosen = {*row.topk(k).indices.tolist(), token}
            found.append({each: row[each].item() for each in chosen})
        return found

    def word(self, token: int) -> str:
        tokens = len(self.tokenizer)
        return self.tokenizer.decode([(token + self.shift) % tokens]) if token < tokens else f"<row {token}>"

    def by_id(self, ids: list[int], k: int) -> list[Any]:
        return [None] + [
            {str(token): {"logprob": p, "rank": 1, "decoded_token": self.word(token)} for token, p in place.items()}
            for place in self.tops(ids, k)
        ]

    def by_text(self, ids: list[int], k: int) -> dict[str, Any]:
        tops = self.tops(ids, k)
        return {
            "tokens": [self.word(token) for token in ids],
            "token_logprobs": [None] + [place[token] for place, token in zip(tops, ids[1:], strict=True)],
            "top_logprobs": [None] + [{self.word(token): p for token, p in place.items()} for place in tops],
            "text_offset": [0] * len(ids),
        }

    def generated(self, body: dict[str, Any]) -> tuple[list[int], bool]:
        ids, new = list(body["prompt"]), list[int]()
        draws = torch.Generator().manual_seed(body.get("seed", 0))
        while len(new) < body["max_tokens"]:
            row = self.log_p(ids)[-1]
            heat = body["temperature"]
            token = int(row.argmax() if heat == 0 else torch.multinomial((row / heat).softmax(-1), 1, generator=draws))
            if token == self.tokenizer.eos_token_id:
                return new, True
            new.append(token)
            ids.append(token)
        return new, False


@contextmanager
def serving(service: Service) -> Iterator[Service]:
    """Serve on a free port of this machine while the block runs."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.respond(lambda body: (200, {"object": "list", "data": [{"id": service.name}]}))

        def do_POST(self) -> None:
            self.respond(service.answer if self.path == "/v1/completions" else lambda body: (404, {}))

        def respond(self, answer: Any) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            with lock:
                fault = service.faults.pop(0) if service.faults else None
                if fault is None and service.key not in (None, self.headers.get("Authorization", "")[len("Bearer ") :]):
                    fault = 401
                if fault is None:
                    service.headers.append(dict(self.headers))
                    service.asked.append(body)
                    status, content = answer(body)
                else:
                    status, content = fault, {"error": {"message": "not now"}}
            if status == "drop":
                self.close_connection = True
                return
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            if status == 429:
                self.send_header("Retry-After", service.retry_after)
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
