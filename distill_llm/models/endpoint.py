"""A model behind an OpenAI-compatible endpoint: requests that are tried again, and what goes wrong in one line."""

import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from distill_llm.common.errors import InputError, first_line, one_of

if TYPE_CHECKING:
    import requests

AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""Statuses of a server that is busy, or not well: the same request may be answered later."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before a request is sent again: doubled each time, and cut to a random share of half to all of it."""
LONGEST_ASKED = 600.0
"""Seconds: a server that asks to wait for longer is out for today, which is a fault to see now."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served.

    Attributes:
        url: up to the version, such as `http://localhost:8000/v1`.
        model: what the server calls it.
        key_variable: the environment variable that holds the key, if the server wants one. The key itself is nowhere else.
        timeout: seconds that the server may be silent.
        retries: how often a request is sent again.
        parallel: requests at once.
        field: what messages call the endpoint.

    Raises:
        InputError: names the field: no address, or one that holds a key.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 6
    parallel: int = 8
    field: str = "server"

    def __post_init__(self) -> None:
        if "@" in self.url or "?" in self.url:
            host = re.split("[/?]", self.url.partition("://")[2])[0].rpartition("@")[2]
            fix = f"take out what is before the @ or after the ?: a key belongs into the environment ({self.key_variable})"
            raise InputError(
                f"{self.field}.url", f"{self.url.partition('://')[0]}://...{host}" if host else "...", fix=fix
            )
        if not _is_address(self.url):
            raise InputError(f"{self.field}.url", self.url, "an address such as http://localhost:8000/v1")
        if not 1 <= self.parallel <= 256:
            raise InputError(f"{self.field}.parallel", self.parallel, "a whole number from 1 to 256")


class Client:
    """Sends requests to an endpoint, several at once; it may be sent to other processes.

    Args:
        endpoint: where to.
    """

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self._lock = threading.Lock()
        self._opened: tuple[int, requests.Session] | None = None  # the process that it belongs to

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.endpoint,)

    def check(self) -> None:
        """Ask for the server's models.

        Raises:
            InputError: it cannot be reached, does not take the key, or does not serve the model.
        """
        try:
            listed = self._send("GET", "models", None, retries=0)
        except _NoSuchPath:
            return  # an endpoint need not list its models
        try:
            names = [str(each["id"]) for each in listed["data"]]
        except (KeyError, TypeError):
            return
        if names and self.endpoint.model not in names:
            raise InputError(f"{self.endpoint.field}.model", self.endpoint.model, one_of(names, self.endpoint.model))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request about the model.

        Args:
            path: after the endpoint's address, such as `completions`.
            body: JSON, without the model.

        Raises:
            InputError: one line: no answer after all retries, a refused key, an unknown model, or what the server says.
        """
        try:
            return self._send("POST", path, {"model": self.endpoint.model, **body}, self.endpoint.retries)
        except _NoSuchPath as error:
            fix = f"serve this model, or a server with /{path}: it answered 404 ({error})"
            raise InputError(f"{self.endpoint.field}.model", self.endpoint.model, fix=fix) from None

    def each(self, ask: Callable[[T], R], given: Sequence[T]) -> list[R]:
        """Ask for several things at once; the answers are in the order of the questions."""
        if len(given) < 2 or self.endpoint.parallel == 1:
            return [ask(one) for one in given]
        with ThreadPoolExecutor(min(self.endpoint.parallel, len(given))) as threads:
            return list(threads.map(ask, given))

    def close(self) -> None:
        """End the connections; a later request opens new ones."""
        with self._lock:
            if self._opened is not None and self._opened[0] == os.getpid():
                self._opened[1].close()
            self._opened = None

    def _session(self) -> "requests.Session":
        import requests

        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():  # forked: connections belong to the parent
                session = requests.Session()
                for scheme in ("http://", "https://"):
                    session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=self.endpoint.parallel))
                session.auth = self._with_key  # nor is a password of a .netrc sent in its place
                self._opened = os.getpid(), session
            return self._opened[1]

    def _with_key(self, request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        """The request with the key, if there is one.

        Raises:
            InputError: a key that no header can hold; other code would show it.
        """
        if key := os.environ.get(self.endpoint.key_variable, "").strip():
            if not (key.isascii() and key.isprintable()):
                there, given = self.endpoint, f"{self.endpoint.key_variable}, with characters that no key has"
                fix = "put the key alone into this environment variable: one line of plain letters, digits and signs"
                raise InputError(f"{there.field}.key_variable", given, fix=fix)
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _send(self, method: str, path: str, body: dict[str, Any] | None, retries: int) -> dict[str, Any]:
        import requests

        there = self.endpoint
        address, wait = f"{there.url.rstrip('/')}/{path}", FIRST_WAIT
        for turn in range(retries + 1):
            asked: float | None = None
            try:
                answer = self._session().request(method, address, json=body, timeout=there.timeout)
                if answer.status_code not in AGAIN:
                    return _read(answer, there)
                said, asked = f"status {answer.status_code}", _seconds(answer.headers.get("Retry-After"))
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                said = type(error).__name__
            except requests.RequestException as error:
                fix = f"correct the address: it cannot be asked ({type(error).__name__})"
                raise InputError(f"{there.field}.url", there.url, fix=fix) from None
            if asked is not None and asked > LONGEST_ASKED:
                fix = f"go on later: it answered {said}, and asks to wait for {asked:,.0f} seconds"
                raise InputError(f"{there.field}.url", there.url, fix=fix)
            if turn < retries:
                time.sleep(min(LONGEST_WAIT, wait * random.uniform(0.5, 1) if asked is None else asked))
                wait = min(LONGEST_WAIT, 2 * wait)
        tried = f"{retries + 1} times" if retries else "once"
        fix = f"start the server, or correct the address: no answer ({said}, tried {tried})"
        raise InputError(f"{there.field}.url", there.url, fix=fix)


class _NoSuchPath(Exception):
    """The server has no such path, or no such model."""


def _is_address(url: str) -> bool:
    """Whether it names a host, by a protocol that is spoken here."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, or a port that is no number
        return False


def _read(answer: "requests.Response", there: Endpoint) -> dict[str, Any]:
    """The JSON of an answer.

    Raises:
        InputError, _NoSuchPath: the server refused the request, or answered with something else.
    """
    if answer.status_code in (401, 403):
        has = "that it has is refused" if os.environ.get(there.key_variable) else "is not set"
        fix = f"put a key that the server takes into this environment variable: the one {has}"
        raise InputError(f"{there.field}.key_variable", there.key_variable, fix=fix)
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.status_code == 404:
        raise _NoSuchPath(_complaint(content) or "not found")
    if answer.status_code != 200:
        fix = f"look at the server: it answered {answer.status_code} ({_complaint(content) or answer.reason})"
        raise InputError(f"{there.field}.url", there.url, fix=fix)
    if not isinstance(content, dict):
        raise InputError(
            f"{there.field}.url", there.url, "an OpenAI-compatible endpoint: this one does not answer with JSON"
        )
    return content


def _complaint(content: Any) -> str:
    """What a server says is wrong, in one line."""
    if not isinstance(content, dict):
        return ""
    inner = content.get("error", content)
    text = inner.get("message", "") if isinstance(inner, dict) else inner
    return first_line(ValueError(str(text)))[:120] if text else ""


def _seconds(text: str | None) -> float | None:
    """The wait that a server asks for; None where it asks for none, or for a date."""
    try:
        asked = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return None if math.isnan(asked) else max(0.0, asked)
