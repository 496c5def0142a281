"""A judge behind an endpoint, here a local server: what is sent, and what becomes of every kind of trouble."""

import base64
import email.utils
import io
import json
import logging
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

from leanlight.contracts import SafetySample, UnreadablePictureError, UserError, Verdict
from lit_modules.falcon_eye.http_judge import HttpJudge, data_uri

KEY = "sk-a-secret-for-tests"


class Endpoint(ThreadingHTTPServer):
    """Answers as the word that a request asks with says; the first answers of a word may be others."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock, self.seen, self.times = threading.Lock(), Counter(), {}
        self.bodies, self.headers, self.paths = [], [], []
        self.open = self.most = 0


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        word = content if isinstance(content, str) else content[-1]["text"]
        with server.lock:
            server.seen[word] += 1
            trial = server.seen[word]
            server.times.setdefault(word, []).append(time.monotonic())
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
        getattr(self, word.split()[0], self.answer)(trial)

    def log_message(self, *args):
        pass

    def send(self, code, body, headers=(), kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def message(self, text, **more):
        usage = {"total_tokens": 10}
        self.send(200, {"choices": [{"message": {"content": text, **more}}], "usage": usage})

    def answer(self, trial):
        self.message("Harmful")

    def slow(self, trial):
        """Counts the requests that are open; closed before the answer, after which the client may send the next."""
        server = self.server
        with server.lock:
            server.open += 1
            server.most = max(server.most, server.open)
        time.sleep(0.05)
        with server.lock:
            server.open -= 1
        self.message("Benign")

    def hanging(self, trial):
        time.sleep(2 if trial == 1 else 0)
        self.message("Benign")

    def busy(self, trial):
        again = [("Retry-After", "1")]
        self.send(429, {"error": {"message": "slow down"}}, again) if trial == 1 else self.message("Benign")

    def dated(self, trial):
        date = email.utils.formatdate(time.time() + 2, usegmt=True)
        self.send(503, b"", [("Retry-After", date)]) if trial == 1 else self.message("Benign")

    def full(self, trial):
        self.send(429, {}, [("Retry-After", "3600")])

    def shaky(self, trial):
        self.send(500, b"<h1>oops</h1>", kind="text/html") if trial < 3 else self.message("Benign")

    def broken(self, trial):
        self.send(500, {})

    def closing(self, trial):
        if trial < 3:
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.message("Benign")

    def cut(self, trial):
        if trial < 2:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices"')
        else:
            self.message("Benign")

    def refusing(self, trial):
        self.message("I'm sorry, but I can't assist with that.")

    def declining(self, trial):
        self.message(None, refusal="Not this one.")

    def html(self, trial):
        self.send(200, b"<!doctype html><p>hello", kind="text/html")

    def half(self, trial):
        self.send(200, b'{"choices": [{"message": {"content": "Harm')

    def other(self, trial):
        self.send(200, {"choices": []})

    def empty(self, trial):
        self.message("")

    def listed(self, trial):
        self.message([1, 2])

    def bad(self, trial):
        self.send(400, {"error": {"message": f"too long,\nand you said {self.headers['Authorization']}"}})

    def moderated(self, trial):
        self.send(403, {})

    def locked(self, trial):
        self.send(401, {"error": {"message": f"wrong key {KEY}"}})

    def moved(self, trial):
        self.send(302, b"", [("Location", self.server.url + "/elsewhere")])

    def echo(self, trial):
        self.message(f"Harmful {self.headers['Authorization']}")


@pytest.fixture
def endpoint():
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def parsed(text):
    words = {"Harmful": True, "Benign": False}
    return Verdict({"response": words.get(text.split(" ")[0]), "image": None}, text=text)


def judge_of(endpoint, **options):
    options = {"backoff": 0.01, "timeout": 5.0, "retries": 3, "fields": ("response",)} | options
    return HttpJudge(endpoint.url, "a-model", lambda sample: sample.instruction, parsed, **options)


def asked(*words, **more):
    return [SafetySample(str(n), word, "text", **more) for n, word in enumerate(words)]


def ask(endpoint, *words, **options):
    return judge_of(endpoint, **options).judge(asked(*words))


def test_verdicts_come_in_the_order_of_the_samples(endpoint):
    words = [f"{'slow' if n % 3 == 0 else 'answer'} {n}" for n in range(20)]
    found = ask(endpoint, *words, concurrency=6)
    assert [v.labels for v in found] == [{"response": n % 3 != 0} for n in range(20)]
    assert not any(v.failure or v.refused for v in found)
    assert found[1].text == "Harmful"


def test_a_request_holds_model_options_prompt_and_key(endpoint):
    ask(endpoint, "answer", options={"seed": 7, "max_tokens": 9})
    assert endpoint.paths == ["/v1/chat/completions"]
    messages = [{"role": "user", "content": "answer"}]
    assert endpoint.bodies == [{"model": "a-model", "messages": messages, "temperature": 0, "max_tokens": 9, "seed": 7}]
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_without_a_key_in_the_environment_none_is_sent(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ask(endpoint, "answer")[0].labels == {"response": True}
    assert "Authorization" not in endpoint.headers[0]


class Square:
    name, sha256 = "square", "0"

    def __init__(self, height=40, width=20):
        self.size = (3, height, width)

    def pixels(self):
        pixels = torch.zeros(self.size, dtype=torch.uint8)
        pixels[0], pixels[2, : self.size[1] // 2] = 250, 120
        return pixels


class Unreadable(Square):
    def pixels(self):
        raise UnreadablePictureError("torn.png: cannot be read")


def test_a_picture_goes_before_the_text_as_a_data_uri(endpoint):
    judge = judge_of(endpoint, picture_format="png")
    judge.judge(asked("answer", image=Square()))
    picture, text = endpoint.bodies[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "answer"}
    kind, _, data = picture["image_url"]["url"].partition(";base64,")
    assert (picture["type"], kind) == ("image_url", "data:image/png")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (20, 40)
    assert image.getpixel((0, 0)) == (250, 0, 120)
    assert image.getpixel((0, 39)) == (250, 0, 0)


def test_large_pictures_are_made_smaller_and_jpeg_is_jpeg():
    data = data_uri(Square(400, 200), "jpeg", 100).partition("data:image/jpeg;base64,")[2]
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (image.format, image.size) == ("JPEG", (50, 100))


def test_an_unreadable_picture_fails_its_sample_alone_and_costs_no_request(endpoint):
    judge = judge_of(endpoint)
    first, second = judge.judge(asked("answer", image=Unreadable()) + asked("answer"))
    assert first.failure == "torn.png: cannot be read"
    assert first.labels == {"response": None}
    assert second.labels == {"response": True}
    assert judge.requests == 1


def test_no_more_requests_than_allowed_are_open_at_a_time(endpoint):
    ask(endpoint, *[f"slow {n}" for n in range(12)], concurrency=3)
    assert 1 < endpoint.most <= 3


@pytest.mark.parametrize("word", ["shaky", "closing", "cut"])
def test_trouble_that_passes_is_tried_again(endpoint, word):
    (verdict,) = ask(endpoint, word)
    assert verdict.labels == {"response": False}
    assert verdict.failure == ""
    assert endpoint.seen[word] == 2 + (word != "cut")


def test_an_endpoint_that_hangs_is_asked_again_after_the_time_out(endpoint):
    (verdict,) = ask(endpoint, "hanging", timeout=0.5)
    assert verdict.labels == {"response": False}
    assert endpoint.seen["hanging"] > 1


@pytest.mark.parametrize(("word", "least"), [("busy", 1), ("dated", 0.9)])
def test_an_endpoint_that_asks_to_wait_is_left_alone_so_long(endpoint, word, least):
    (verdict,) = ask(endpoint, word)
    assert verdict.labels == {"response": False}
    first, second = endpoint.times[word]
    assert second - first >= least


def test_while_the_endpoint_asks_to_wait_no_other_request_begins(endpoint):
    ask(endpoint, "busy", *[f"slow {n}" for n in range(12)], concurrency=2)
    pause = endpoint.times["busy"][0]
    begun = [at - pause for word, times in endpoint.times.items() for at in times if at > pause]
    assert [at for at in begun if 0.5 < at < 1] == []
    assert len([at for at in begun if at >= 1]) >= 3


def test_who_must_wait_too_long_fails_at_once(endpoint):
    (verdict,) = ask(endpoint, "full")
    assert verdict.failure == "the endpoint answered 429; it asks to wait 3600 s"
    assert endpoint.seen["full"] == 1


def test_trouble_that_stays_is_the_failure_of_its_sample(endpoint):
    first, second = ask(endpoint, "broken", "answer")
    assert first.failure == "the endpoint answered 500 (4 trials)"
    assert first.labels == {"response": None}
    assert second.labels == {"response": True}
    assert endpoint.seen["broken"] == 4


@pytest.mark.parametrize(
    ("word", "failure"),
    [
        ("html", "the answer is HTML"),
        ("half", "the answer is no JSON with a message"),
        ("other", "the answer is no JSON with a message"),
        ("empty", "the answer holds no text"),
        ("listed", "the answer holds no text"),
        ("bad", "the endpoint answered 400: too long, and you said Bearer ***"),
        ("moved", "the endpoint answered 302"),
    ],
)
def test_answers_of_another_kind_fail_without_another_trial(endpoint, word, failure):
    first, second = ask(endpoint, word, "answer")
    assert first.failure == failure
    assert first.labels == {"response": None}
    assert second.labels == {"response": True}
    assert endpoint.seen[word] == 1
    assert endpoint.paths == ["/v1/chat/completions"] * 2


@pytest.mark.parametrize("word", ["refusing", "declining"])
def test_a_refusal_is_a_refusal_and_no_failure(endpoint, word):
    (verdict,) = ask(endpoint, word)
    assert verdict.refused
    assert verdict.failure == ""
    assert verdict.labels == {"response": None}
    assert verdict.text in ("I'm sorry, but I can't assist with that.", "Not this one.")


def test_the_budget_of_requests_holds_retries_included(endpoint):
    judge = judge_of(endpoint, max_requests=5, concurrency=4)
    found = judge.judge(asked("shaky", *[f"answer {n}" for n in range(9)]))
    assert sum(endpoint.seen.values()) == judge.requests == 5
    rest = [v.failure for v in found if v.failure]
    assert rest
    assert set(rest) == {"the budget of 5 requests is used up"}


def test_the_budget_of_tokens_ends_the_questions(endpoint):
    judge = judge_of(endpoint, max_tokens=25, concurrency=1)
    found = judge.judge(asked(*[f"answer {n}" for n in range(6)]))
    assert [v.failure for v in found] == [""] * 3 + ["the budget of 25 tokens is used up"] * 3
    assert judge.tokens == 30


@pytest.mark.parametrize(
    ("options", "tokens", "enough"),
    [
        ({}, 4000, "no budget"),
        ({"max_requests": 30}, None, "at most 30 requests a command, enough for 30 of 40 samples"),
        ({"max_requests": 300}, 4000, "at most 300 requests a command, enough for 40 of 40 samples"),
        ({"max_tokens": 1000}, 4000, "at most 1,000 tokens a command, enough for 10 of 40 samples"),
        ({"max_requests": 5, "max_tokens": 1000}, 4000, "5 requests and 1,000 tokens a command, enough for 5 of 40"),
    ],
)
def test_limits_say_for_how_many_samples_the_budget_is_enough(endpoint, options, tokens, enough):
    words = judge_of(endpoint, concurrency=6, timeout=2.5, **options).limits(40, tokens)
    assert words.startswith("6 requests at a time, 2.5 s each; ")
    assert enough in words


def test_a_key_that_is_refused_or_missing_is_one_line(endpoint, monkeypatch):
    with pytest.raises(UserError, match=r"the endpoint refuses the key in OPENAI_API_KEY \(401\)$"):
        ask(endpoint, "locked")
    monkeypatch.setenv("OTHER_KEY", "")
    with pytest.raises(UserError, match=r"the endpoint wants a key; set OTHER_KEY \(403\)$"):
        ask(endpoint, "moderated", key_variable="OTHER_KEY")


def test_a_403_of_an_endpoint_that_has_answered_fails_its_sample(endpoint):
    found = ask(endpoint, "answer", "moderated", concurrency=1)
    assert [v.failure for v in found] == ["", "the endpoint answered 403"]


def test_a_key_that_no_header_can_carry_is_one_line_without_it(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="OPENAI_API_KEY: expected a key that a header can carry") as error:
        ask(endpoint, "answer")
    assert "two" not in str(error.value)


def test_the_key_is_in_no_verdict_error_log_or_fingerprint(endpoint, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    judge = judge_of(endpoint)
    found = judge.judge(asked("answer", "echo", "bad", "broken"))
    assert found[1].text == "Harmful Bearer ***"
    try:
        judge.judge(asked("locked"))
    except UserError as error:
        found.append(str(error))
    assert KEY not in repr(found) + caplog.text + "".join(capfd.readouterr())
    assert KEY not in repr(vars(judge))
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert judge_of(endpoint).fingerprint == judge.fingerprint


def test_nobody_at_the_endpoint_is_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        judge = HttpJudge(url, "m", lambda s: "x", parsed, fields=("response",), backoff=10)
        started = time.monotonic()
        with pytest.raises(UserError, match=r"/v1/chat/completions: no connection to the endpoint") as error:
            judge.judge(asked("a", "b"))
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 60  # without the pauses of retries, which take minutes


def test_an_endpoint_that_goes_away_for_good_ends_the_questions(endpoint):
    judge = judge_of(endpoint, retries=2)
    judge.judge(asked("answer"))
    endpoint.shutdown()
    endpoint.server_close()
    with pytest.raises(UserError, match="no connection to the endpoint"):
        judge.judge(asked("answer", "slow"))


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://h", "http://h/v1/chat/completions"),
        ("https://h:8000/v1/", "https://h:8000/v1/chat/completions"),
        ("https://h/api/v1/chat/completions", "https://h/api/v1/chat/completions"),
    ],
)
def test_an_address_is_completed(url, found):
    assert HttpJudge(url, "m", lambda s: "x", parsed).url == found


@pytest.mark.parametrize("url", ["ftp://h", "h/v1", "http://user:pass@h/v1", "http://h/v1?key=abc"])
def test_an_address_with_a_key_or_without_a_host_is_one_line(url):
    with pytest.raises(UserError, match=r"^url: expected") as error:
        HttpJudge(url, "m", lambda s: "x", parsed)
    assert "pass" not in str(error.value).replace("password", "")
    assert "abc" not in str(error.value)


def test_the_fingerprint_follows_what_decides_and_not_how_it_is_asked(endpoint):
    same = judge_of(endpoint).fingerprint
    assert judge_of(endpoint, concurrency=2, timeout=9, retries=1, max_requests=3).fingerprint == same
    others = [
        judge_of(endpoint, options={"temperature": 1}),
        judge_of(endpoint, picture_format="png"),
        HttpJudge(endpoint.url, "b-model", lambda s: s.instruction, parsed, fields=("response",)),
        HttpJudge(endpoint.url, "a-model", lambda s: s.response, parsed, fields=("response",)),
    ]
    assert len({same, *(judge.fingerprint for judge in others)}) == 5
