"""A judge behind an endpoint with OpenAI's interface of chat: a service, or a server of one's own such as vLLM.

It needs the standard library alone: threads that wait for answers are enough for some dozens of requests at a time.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import io
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from leanlight.contracts import SAFETY_FIELDS, Picture, SafetySample, UnreadablePictureError, UserError, Verdict
from leanlight.contracts.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lit_modules.falcon_eye.judges import digest, refused
from lit_modules.nn.checks import require_positive

PictureFormat = Literal["png", "jpeg"]

_LARGEST_ANSWER = 4 << 20  # bytes that are read of an answer
_SHOWN = 160  # characters of the endpoint's own words in a failure


class _Again(Exception):
    """Trouble that may pass.

    Args:
        reason: in words.
        wait: seconds that the endpoint asked for; None where it did not say.
        down: whether nobody listens.
    """

    def __init__(self, reason: str, wait: float | None = None, down: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.down = wait, down


class _Failed(Exception):
    """Trouble with one sample."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """A redirect would carry the key to another place; it becomes an error."""


class HttpJudge:
    """Asks an endpoint about each sample, several at a time.

    The key comes from the environment when it is needed, and appears in no fingerprint, error or verdict. What goes
    wrong with one sample is its verdict's failure: an answer that is no JSON, a refused request, trouble that lasts
    after all retries, a budget that is used up. `requests` and `tokens` say what has been spent.

    Args:
        url: of the endpoint, with or without ``/chat/completions``; without a path, ``/v1`` is meant.
        model: the endpoint's name of the model.
        prompt: what is asked about a sample; its picture goes before it.
        parser: from the answer's text to a verdict.
        fields: of `SAFETY_FIELDS`, those that the prompt asks for.
        key_variable: environment variable of the key; sent where it is set.
        options: further entries of a request.
        concurrency: requests at a time.
        timeout: seconds without a sign of the endpoint.
        retries: how often a request is sent again after 429, 5xx, a closed connection or a time-out.
        backoff: seconds before the first retry, doubled for each further one, with jitter.
        longest_wait: seconds; a sample for which the endpoint asks for more fails.
        max_requests: budget, retries included; None for no limit.
        max_tokens: budget of tokens that the endpoint says it used; requests under way may exceed it.
        picture_format: ``png`` or ``jpeg``.
        longest_side: pixels; larger pictures are made smaller.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: Callable[[SafetySample], str],
        parser: Callable[[str], Verdict],
        fields: Sequence[str] = SAFETY_FIELDS,
        key_variable: str = "OPENAI_API_KEY",
        options: Mapping[str, Any] | None = None,
        concurrency: PositiveInt = 8,
        timeout: PositiveFloat = 60.0,
        retries: NonNegativeInt = 5,
        backoff: NonNegativeFloat = 1.0,
        longest_wait: NonNegativeFloat = 120.0,
        max_requests: PositiveInt | None = None,
        max_tokens: PositiveInt | None = None,
        picture_format: PictureFormat = "jpeg",
        longest_side: PositiveInt = 1024,
    ) -> None:
        budget = {"max_requests": max_requests, "max_tokens": max_tokens}
        given = {name: value for name, value in budget.items() if value is not None}
        require_positive(concurrency=concurrency, longest_side=longest_side, **given)
        if not timeout > 0:
            raise UserError(f"timeout: expected a positive number of seconds, got {timeout}")
        if picture_format not in get_args(PictureFormat):
            raise UserError(f"picture_format: expected png or jpeg, got {picture_format!r}")
        self.url, self.name = _endpoint(url), model
        self.model, self.prompt, self.parser, self.fields = model, prompt, parser, tuple(fields)
        self.options = {"temperature": 0, "max_tokens": 512} | dict(options or {})
        self.key_variable, self.concurrency, self.timeout = key_variable, concurrency, timeout
        self.retries, self.backoff, self.longest_wait = retries, backoff, longest_wait
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.picture_format, self.longest_side = picture_format, longest_side
        self.batch_size = 4 * concurrency
        # What the prompt says of a stand-in tells it from other prompts.
        asked = prompt(SafetySample("", "instruction", "response"))
        shown = [picture_format, longest_side]
        self.fingerprint = digest(self.url, model, asked, list(self.fields), self.options, shown)
        self.requests = self.tokens = 0
        self._answered = self._accepted = False
        self._resume_at, self._jitter = 0.0, random.Random()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def judge(self, samples: Sequence[SafetySample]) -> list[Verdict]:
        """A verdict for each sample, in order; UserError when nobody listens at the endpoint, or it wants a key."""
        self._stop.clear()
        with ThreadPoolExecutor(self.concurrency) as pool:
            pending = [pool.submit(self._verdict, sample) for sample in samples]
            try:
                return [each.result() for each in pending]
            except BaseException:
                # Nobody waits for the rest, least of all for those that wait to ask again.
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def limits(self, samples: int, tokens: int | None) -> str:
        """What it keeps to, and for how many samples that is enough, in words.

        Args:
            samples: that are to be judged.
            tokens: that they would take in all; None where that is not known.
        """
        words = f"{self.concurrency} requests at a time, {self.timeout:g} s each"
        budget = [f"{self.max_requests:,} requests"] if self.max_requests is not None else []
        budget += [f"{self.max_tokens:,} tokens"] if self.max_tokens is not None else []
        if not budget:
            return f"{words}; no budget"
        enough = samples if self.max_requests is None else min(samples, self.max_requests)
        if self.max_tokens is not None and tokens:
            enough = min(enough, samples * self.max_tokens // tokens)
        return f"{words}; at most {' and '.join(budget)} a command, enough for {enough:,} of {samples:,} samples"

    def _verdict(self, sample: SafetySample) -> Verdict:
        lacking: dict[str, bool | None] = dict.fromkeys(self.fields)
        try:
            answer = self._message(self._asked(sample))
        except (_Failed, UnreadablePictureError) as error:
            return Verdict(lacking, failure=str(error))
        # Some endpoints put a refusal beside the content.
        text = answer.get("content") or answer.get("refusal") or ""
        if not isinstance(text, str) or not text.strip():
            return Verdict(lacking, failure="the answer holds no text")
        verdict = self.parser(text)
        labels = lacking | {name: label for name, label in verdict.labels.items() if name in lacking}
        silent = all(label is None for label in labels.values())
        declined = verdict.refused or (silent and (bool(answer.get("refusal")) or refused(text)))
        return replace(verdict, labels=labels, refused=declined, text=text)

    def _asked(self, sample: SafetySample) -> bytes:
        """The body of a request about a sample."""
        content: list[dict[str, Any]] = [{"type": "text", "text": self.prompt(sample)}]
        if sample.image is not None:
            uri = data_uri(sample.image, self.picture_format, self.longest_side)
            content.insert(0, {"type": "image_url", "image_url": {"url": uri}})
        message = {"role": "user", "content": content if len(content) > 1 else content[0]["text"]}
        return json.dumps({"model": self.model, "messages": [message], **self.options}).encode()

    def _message(self, body: bytes) -> dict[str, Any]:
        """The message that the endpoint answers, after as many trials as it takes."""
        for trial in range(self.retries + 1):
            self._pause(self._resume_at - time.monotonic())
            self._spend()
            try:
                return self._read(self._post(body))
            except _Again as trouble:
                if trouble.down and (trial == self.retries or not self._answered):
                    raise UserError(f"{self.url}: no connection to the endpoint ({trouble})") from None
                if trial == self.retries:
                    raise _Failed(f"{trouble} ({trial + 1} trials)") from None
                wait = self.backoff * 2**trial * self._jitter.uniform(0.5, 1)
                if trouble.wait is not None:
                    if trouble.wait > self.longest_wait:
                        raise _Failed(f"{trouble}; it asks to wait {trouble.wait:.0f} s") from None
                    wait = trouble.wait + wait / 10  # not all at the same moment
                    self._resume_at = max(self._resume_at, time.monotonic() + trouble.wait)
                self._pause(min(wait, self.longest_wait))
        raise AssertionError("the last trial returns or raises")

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(max(seconds, 0)) or self._stop.is_set():
            raise _Failed("interrupted")

    def _spend(self) -> None:
        """Take a request from the budget."""
        with self._lock:
            if self.max_requests is not None and self.requests >= self.max_requests:
                raise _Failed(f"the budget of {self.max_requests} requests is used up")
            if self.max_tokens is not None and self.tokens >= self.max_tokens:
                raise _Failed(f"the budget of {self.max_tokens} tokens is used up")
            self.requests += 1

    def _post(self, body: bytes) -> bytes:
        """What the endpoint answers; trouble is told apart by what helps: another trial, the user, or nothing."""
        key = os.environ.get(self.key_variable, "").strip()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(self.url, body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                self._answered = self._accepted = True
                content = response.read(_LARGEST_ANSWER)
                if response.length and len(content) < _LARGEST_ANSWER:  # bytes that were promised and did not come
                    raise http.client.IncompleteRead(content)
        except urllib.error.HTTPError as error:
            self._answered = True
            with error:
                self._raise_status(error, key)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            cut = TimeoutError | ConnectionResetError | ConnectionAbortedError | BrokenPipeError
            down = isinstance(reason, OSError) and not isinstance(reason, cut)
            raise _Again(f"no answer: {type(reason).__name__}", down=down) from None
        except ValueError:
            raise UserError(f"{self.key_variable}: expected a key that a header can carry") from None
        # An endpoint that repeats the key must not bring it into a verdict.
        return content.replace(key.encode(), b"***") if key else content

    def _raise_status(self, error: urllib.error.HTTPError, key: str) -> None:
        words = _complaint(error)
        words = words.replace(key, "***") if key else words
        # Later on, 403 is how some endpoints refuse the content of one request.
        if error.code == 401 or (error.code == 403 and not self._accepted):
            what = f"refuses the key in {self.key_variable}" if key else f"wants a key; set {self.key_variable}"
            raise UserError(f"{self.url}: the endpoint {what} ({error.code})")
        if error.code == 429 or error.code >= 500:
            raise _Again(f"the endpoint answered {error.code}{words}", _retry_after(error.headers.get("Retry-After")))
        raise _Failed(f"the endpoint answered {error.code}{words}")

    def _read(self, content: bytes) -> dict[str, Any]:
        """The message in an answer."""
        try:
            answer = json.loads(content)
            message = dict(answer["choices"][0]["message"])
        except (ValueError, RecursionError, KeyError, IndexError, TypeError):
            kind = "HTML" if content.lstrip()[:1] == b"<" else "JSON with a message"
            raise _Failed(f"the answer is {kind}" if kind == "HTML" else f"the answer is no {kind}") from None
        used = answer.get("usage")
        tokens = used.get("total_tokens") if isinstance(used, dict) else None
        with self._lock:
            self.tokens += tokens if isinstance(tokens, int) else 0
        return message


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"url: expected http://HOST or https://HOST, got {url.partition('?')[0]!r}")
    if parts.username or parts.password or parts.query:
        raise UserError("url: expected one without user, password and query; a key belongs into the environment")
    path = parts.path.rstrip("/") or "/v1"
    path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


def data_uri(picture: Picture, format: PictureFormat = "jpeg", longest_side: int = 1024) -> str:
    """A picture as a ``data:`` URI, its longer side at most `longest_side` pixels. Raises UnreadablePictureError."""
    from PIL import Image

    image = Image.fromarray(picture.pixels().permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((longest_side, longest_side))
    buffer = io.BytesIO()
    image.save(buffer, format.upper(), **({"quality": 90} if format == "jpeg" else {}))
    return f"data:image/{format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _retry_after(value: str | None) -> float | None:
    """Seconds of a header that holds seconds or a date; None without one."""
    if not value:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _complaint(error: urllib.error.HTTPError) -> str:
    """The endpoint's own words about an error, shortened, in one line; empty without any."""
    try:
        said = json.loads(error.read(_LARGEST_ANSWER))["error"]["message"]
    except (ValueError, RecursionError, KeyError, TypeError, OSError, http.client.HTTPException):
        return ""
    return ": " + " ".join(str(said).split())[:_SHOWN]
