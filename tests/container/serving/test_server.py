"""The endpoint's contract over real HTTP on loopback, with a server on a thread."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from container.serving.engine import Engine, Options
from container.serving.metrics import Metrics
from container.serving.protocol import CompletionRequest, parse, parse_json
from container.serving.sequence import BadRequest
from container.serving.server import create_app
from container.serving.settings import ServerSettings, SettingsError

LIMIT = 512


class Server:
    """A running server; `gate` holds the engine's loading back until it is set."""

    def __init__(self, folder: Path, gate: threading.Event, **settings: Any):
        def load(chosen: ServerSettings) -> Engine:
            gate.wait(30)
            options = Options(max_batch=chosen.max_batch, max_model_len=LIMIT)
            return Engine.load(folder, backend="reference", kv_cache_dtype="float32", options=options)

        self.app = create_app(ServerSettings(folder, None, **settings), load)
        config = uvicorn.Config(
            self.app, port=0, host="127.0.0.1", log_level="warning", timeout_graceful_shutdown=5
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    @property
    def engine(self) -> Engine:
        return self.app.state.serving.loop.engine

    def wait_ready(self) -> None:
        while self.client.get("/ping").status_code != 200:
            time.sleep(0.02)

    def wait_idle(self) -> None:
        """Until no sequence and no page is in use; the test's timeout is the limit."""
        while self.engine.busy or self.engine.allocator.used:
            time.sleep(0.02)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    gate = threading.Event()
    running = Server(tiny_folder, gate, max_body_bytes=20_000)
    gate.set()
    running.wait_ready()
    yield running
    running.stop()


def post(server: Server, path: str = "/invocations", **body: Any) -> httpx.Response:
    return server.client.post(path, json=body)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    parts = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


def test_ping_is_503_until_a_token_was_generated(tiny_folder: Path) -> None:
    gate = threading.Event()
    server = Server(tiny_folder, gate)
    assert server.client.get("/ping").status_code == 503
    early = post(server, prompt="a")
    assert early.status_code == 503
    assert int(early.headers["retry-after"]) > 0
    gate.set()
    server.wait_ready()
    assert post(server, prompt="a", max_tokens=1).status_code == 200
    server.stop()


def test_a_model_that_cannot_load_is_told_and_ends_the_server(tmp_path: Path) -> None:
    gate, failed = threading.Event(), threading.Event()
    server = Server(tmp_path, gate)
    server.app.state.serving.on_failure = failed.set
    gate.set()
    assert failed.wait(20)
    answer = server.client.get("/ping")
    assert answer.status_code == 503
    assert "config.json" in answer.json()["status"]
    server.stop()


def test_completion(server: Server) -> None:
    answer = post(server, prompt="hello", max_tokens=6, temperature=0, return_token_ids=True).json()
    assert answer["object"] == "text_completion"
    (choice,) = answer["choices"]
    assert len(choice["token_ids"]) == 6
    assert choice["finish_reason"] == "length"
    assert choice["text"] == server.engine.tokenizer.decode(choice["token_ids"])
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 6
    by_ids = post(
        server, "/v1/completions", prompt=list(b"hello"), max_tokens=6, return_token_ids=True
    ).json()
    assert by_ids["choices"][0]["token_ids"] == choice["token_ids"]


def test_the_checkpoint_says_what_the_request_does_not(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    defaults = {"temperature": 1.0, "top_k": 1, "max_new_tokens": 1000, "eos_token_id": None}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    gate = threading.Event()
    gate.set()
    server = Server(folder, gate)
    server.wait_ready()
    usage = post(server, prompt="hello").json()["usage"]
    assert usage["total_tokens"] == LIMIT  # 1000 is more than fits, and no error where nobody asked for it
    assert post(server, prompt="hello", max_tokens=3).json()["usage"]["completion_tokens"] == 3
    assert post(server, prompt="hello", max_tokens=1000).status_code == 400
    first, second = (
        post(server, prompt="hello", max_tokens=30, **k).json() for k in ({}, {"temperature": 0})
    )
    assert first["choices"][0]["text"] == second["choices"][0]["text"]  # top_k 1 leaves nothing to chance
    free = [post(server, prompt="hello", max_tokens=30, top_k=0).json()["choices"] for _ in range(2)]
    assert free[0] != free[1]
    server.stop()


def test_several_prompts_and_completions(server: Server) -> None:
    body = {"prompt": ["one", "two"], "n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 5}
    answer = post(server, **body).json()
    first = answer["choices"]
    assert [c["index"] for c in first] == [0, 1, 2, 3]
    assert first[0]["text"] != first[1]["text"]
    assert post(server, **body).json()["choices"] == first
    assert answer["usage"]["prompt_tokens"] == 6  # a prompt counts once, however many completions it has
    assert answer["usage"]["total_tokens"] == 26
    assert post(server, prompt="a", n=2, temperature=1, seed=2**63 - 1, max_tokens=1).status_code == 200


def test_logprobs(server: Server) -> None:
    answer = post(server, "/v1/completions", prompt="ab", max_tokens=3, logprobs=2).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 3
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert logprobs["text_offset"][0] == 0
    chat = {
        "messages": [{"role": "user", "content": "x"}],
        "logprobs": True,
        "top_logprobs": 1,
        "max_tokens": 2,
    }
    content = post(server, "/v1/chat/completions", **chat).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 2
    assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"]
    assert set(content[0]) == {"token", "logprob", "bytes", "top_logprobs"}
    assert all(len(entry["bytes"]) == 1 for entry in content)  # the tokens are bytes


def test_tokens_of_log_probabilities_join_to_the_text(server: Server) -> None:
    # a draw of ASCII only, where each token is a character
    body = {"prompt": "ab", "max_tokens": 4, "logprobs": 0, "temperature": 1, "stream": True}
    for seed in range(50):
        chunks = [c["choices"][0] for c in events(post(server, **body, seed=seed))]
        text = "".join(c["text"] for c in chunks)
        if text.isascii():
            break
    assert "".join(t for c in chunks for t in c["logprobs"]["tokens"]) == text
    places = [place for c in chunks for place in c["logprobs"]["text_offset"]]
    assert places == list(range(len(text)))


def test_chat(server: Server) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    chat = post(
        server, "/v1/chat/completions", messages=[{"role": "user", "content": parts}], max_tokens=4
    ).json()
    assert chat["object"] == "chat.completion"
    plain = post(server, prompt="hello\n\n", max_tokens=4).json()
    message = chat["choices"][0]["message"]
    assert message == {"role": "assistant", "content": plain["choices"][0]["text"]}
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 4, "stream": True, "n": 2}
    chunks = [c["choices"][0] for c in events(post(server, "/v1/chat/completions", **body))]
    for index in range(2):
        deltas = [c["delta"] for c in chunks if c["index"] == index]
        # clients join what the deltas hold, so the role comes once
        assert [d.get("role") for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(d.get("content", "") for d in deltas) == message["content"]


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": ["one", "two"]},
        {"inputs": {"prompt": ["one", "two"]}},
        {"instances": [{"prompt": "one"}, {"prompt": "two"}]},
        {"dataframe_split": {"columns": ["prompt"], "data": [["one"], ["two"]]}},
        {"dataframe_records": [{"prompt": "one"}, {"prompt": "two"}]},
        {"dataframe_records": [{"text": "one"}, {"text": "two"}]},
        {"dataframe_split": {"columns": ["id", "prompt"], "data": [[1, "one"], [2, "two"]], "index": [0, 1]}},
    ],
)
def test_mlflow_forms(server: Server, body: dict[str, Any]) -> None:
    answer = post(server, **body, params={"max_new_tokens": 4, "temperature": 0}).json()
    expected = [post(server, prompt=p, max_tokens=4).json()["choices"][0]["text"] for p in ("one", "two")]
    assert answer == {"predictions": expected}


def test_streaming_gives_the_same_text(server: Server) -> None:
    body = {"prompt": ["hello", "you"], "max_tokens": 12, "seed": 3, "temperature": 1.2}
    whole = post(server, **body).json()
    stream = post(server, **body, stream=True, stream_options={"include_usage": True}, return_token_ids=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(stream)
    assert last["usage"]["completion_tokens"] == 24
    for index in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == whole["choices"][index]["text"]
        assert sum(len(c["token_ids"]) for c in mine) == 12
        assert [c["finish_reason"] for c in mine][-1] == "length"


def test_stop_strings(server: Server) -> None:
    text = post(server, prompt="hello", max_tokens=24, temperature=1, seed=1).json()["choices"][0]["text"]
    stop = text[5:7]
    answer = post(server, prompt="hello", max_tokens=24, temperature=1, seed=1, stop=stop).json()["choices"][
        0
    ]
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b"{", 400, None, "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', 400, None, "NaN"),
        (b"[1]", 400, None, "expected a JSON object"),
        (b"{}", 400, None, "the body needs prompt"),
        (b'{"prompt": 5}', 400, "prompt", "prompt"),
        (b'{"prompt": ""}', 400, "prompt", "empty"),
        (b'{"prompt": []}', 400, "prompt", "0 prompts"),
        (b'{"prompt": [999]}', 400, "prompt", "token id 999"),
        (b'{"prompt": "a", "max_tokens": 0}', 400, "max_tokens", "at least 1"),
        (b'{"prompt": "a", "max_tokens": 1.5}', 400, "max_tokens", "integer"),
        (b'{"prompt": "a", "max_tokens": 600}', 400, "max_tokens", "limit of 512"),
        (b'{"prompt": "a", "temperature": -1}', 400, "temperature", "between"),
        (b'{"prompt": "a", "top_p": 2}', 400, "top_p", "at most 1"),
        (b'{"prompt": "a", "top_k": 1e6}', 400, "top_k", "integer"),
        (b'{"prompt": "a", "temperature": 1, "top_k": 9223372036854775808}', 400, "top_k", "between 0"),
        (b'{"prompt": "a", "n": 99}', 400, "n", "16"),
        (b'{"prompt": "a", "model": "gpt"}', 400, "model", "not served"),
        (b'{"messages": []}', 400, "messages", "at least 1"),
        (b'{"inputs": []}', 400, "inputs", "no prompts"),
        (b'{"inputs": ["a"], "params": {"beams": 2}}', 400, "beams", "beams"),
        (b'{"dataframe_split": [1]}', 400, "dataframe_split", "columns"),
        (
            b'{"dataframe_split": {"columns": ["a"], "data": [5]}}',
            400,
            "dataframe_split",
            "a list of 1 values",
        ),
        (b'{"dataframe_split": {"columns": [[1]], "data": [[5]]}}', 400, "dataframe_split", "texts"),
        (b'{"dataframe_records": [{"a": "x", "b": "y"}]}', 400, "dataframe_records", "columns ['a', 'b']"),
        (b'{"inputs": [{"prompt": "x"}, 5]}', 400, "prompt", "valid string"),
        (b'{"inputs": ["a"], "params": {"max_tokens": 0}}', 400, "max_tokens", "at least 1"),
        (b'{"prompt": "\\ud83d"}', 400, None, "surrogates not allowed"),
        (b'{"prompt": "\xed\xa0\x80"}', 400, None, "not valid JSON"),
        (b'{"prompt": "a", "logit_bias": {"50": -100}}', 400, "logit_bias", "logit_bias is not supported"),
        (b'{"prompt": "a", "echo": true}', 400, "echo", "echo is not supported"),
        (b'{"prompt": "a", "suffix": "b"}', 400, "suffix", "suffix is not supported"),
        (b'{"prompt": "a", "best_of": 3}', 400, "best_of", "best_of is not supported"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}', 400, "tools", "tools is not"),
        (b'{"messages": [{"role": "user"}]}', 400, "messages", "role 'user' has no content"),
        (
            b'{"messages": [{"role": "a", "tool_calls": [{}]}]}',
            400,
            "messages",
            "tool_calls are not supported",
        ),
        (
            b'{"messages": [{"role": "a", "content": "b"}], "max_completion_tokens": 0, "max_tokens": 2}',
            400,
            "max_tokens",
            "at least 1",
        ),
        (b'{"messages": [{"role": "a", "content": "b"}], "top_logprobs": 2}', 400, "top_logprobs", "needs"),
        (b'{"prompt": "a", "model": "%s"}' % (b"m" * 5000), 400, "model", "..."),
        (b'{"prompt": "%s"}' % (b"a" * 600), 400, "prompt", "limit of 512"),
        (b'{"prompt": "%s"}' % (b"a" * 30_000), 413, None, "over 20000 bytes"),
    ],
)
def test_bad_requests(server: Server, body: bytes, status: int, param: str | None, words: str) -> None:
    answer = server.client.post("/invocations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert len(error["message"]) <= 1024
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert post(server, prompt="a", max_tokens=1).status_code == 200


def test_other_routes_and_content_types(server: Server) -> None:
    assert server.client.get("/nothing").status_code == 404
    wrong = server.client.get("/invocations")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    wrong = server.client.post("/invocations", content=b"a,b", headers={"content-type": "text/csv"})
    assert wrong.status_code == 415
    assert "text/csv" in wrong.json()["error"]["message"]
    card = server.client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"]) == ("mla", "model")
    assert server.client.get("/v1/models/mla").json() == card
    assert server.client.get("/v1/models/other").status_code == 404
    assert server.client.post('/v1/models/a"b').status_code == 405
    assert "/v1/models/a" not in server.client.get("/metrics").text


def test_fields_that_ask_for_nothing_are_taken(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 1, "max_tokens": 0}
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logit_bias": None}
    assert post(server, "/v1/chat/completions", **chat, **neutral, user="me").status_code == 200
    plain = {"presence_penalty": 0, "frequency_penalty": 0.0, "best_of": 1, "echo": False, "suffix": None}
    assert post(server, prompt="a", max_tokens=1, **plain).status_code == 200


def test_a_long_text_is_tokenized_beside_the_other_requests(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    encode = server.engine.tokenizer.encode

    def slow(text: str, special: bool = True) -> list[int]:
        if len(text) > 10_000:
            assert gate.wait(20)
        return encode(text, special)

    monkeypatch.setattr(server.engine.tokenizer, "encode", slow)
    answers: list[httpx.Response] = []
    for body in ({"prompt": "a" * 18_000}, {"messages": [{"role": "user", "content": "a" * 18_000}]}):
        thread = threading.Thread(target=lambda b=body: answers.append(post(server, **b)))
        thread.start()
        assert server.client.get("/ping", timeout=10).status_code == 200
        assert post(server, prompt="a", max_tokens=1).status_code == 200
        gate.set()
        thread.join()
        gate.clear()
    assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [
        (400, "context_length_exceeded")
    ] * 2


def test_a_long_list_of_the_wrong_type_is_refused_at_once(server: Server) -> None:
    body = parse_json(b'{"prompt": ["a"' + b",1" * 1_000_000 + b"]}")
    started = time.process_time()
    with pytest.raises(BadRequest):
        parse(CompletionRequest, body)
    assert time.process_time() - started < 1  # all million faults took ten seconds


def test_a_body_that_says_it_is_too_long_is_not_waited_for(server: Server) -> None:
    url = server.client.base_url
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_goes_away_frees_its_pages(server: Server) -> None:
    long = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True}
    with server.client.stream("POST", "/invocations", json={**long, "stream": True}) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/invocations", json=long, timeout=0.05)
    server.wait_idle()
    text = server.client.get("/metrics").text
    assert 'mla_requests_total{outcome="abort"}' in text
    assert post(server, prompt="a", max_tokens=1).status_code == 200


def test_prefix_is_reused(server: Server) -> None:
    prompt = "The same beginning. " * 10
    first = post(server, prompt=prompt, max_tokens=4, return_token_ids=True).json()
    again = post(server, prompt=prompt, max_tokens=4, return_token_ids=True).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 192
    assert again["choices"] == first["choices"]


def test_a_dead_engine_thread_makes_the_server_unhealthy(tiny_folder: Path) -> None:
    gate = threading.Event()
    gate.set()
    server = Server(tiny_folder, gate)
    server.wait_ready()

    def broken(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    server.app.state.serving.metrics.step = broken
    assert post(server, prompt="a").status_code == 500
    assert server.client.get("/ping").status_code == 503
    assert post(server, prompt="a").status_code == 503
    server.stop()


def test_what_does_not_end_before_the_server_is_told_so(tiny_folder: Path) -> None:
    gate = threading.Event()
    gate.set()
    server = Server(tiny_folder, gate)
    server.wait_ready()
    long = {"prompt": "hello", "max_tokens": 500, "ignore_eos": True}
    whole: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: whole.append(post(server, **long)))
    with server.client.stream("POST", "/invocations", json={**long, "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        thread.start()
        while len(server.engine.scheduler.running) < 2 and thread.is_alive():
            time.sleep(0.001)
        server.app.state.serving.interrupt()
        *_, last, end = lines
    thread.join()
    assert end == "data: [DONE]"
    assert "the server is stopping" in last
    assert whole[0].status_code == 503
    assert "the server is stopping" in whole[0].json()["error"]["message"]
    server.stop()


def test_a_failing_step_ends_only_its_own_requests(tiny_folder: Path) -> None:
    gate = threading.Event()
    gate.set()
    server = Server(tiny_folder, gate)
    server.wait_ready()
    model, server.engine.model = server.engine.model, None  # type: ignore[assignment]
    failed = post(server, prompt="a")
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "server_error"
    server.engine.model = model
    assert post(server, prompt="a").status_code == 200
    server.wait_idle()
    server.stop()


def test_metrics(server: Server) -> None:
    post(server, prompt="hello", max_tokens=3)
    text = server.client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["mla_generated_tokens_total"]) >= 3
    assert float(values["mla_time_to_first_token_seconds_count"]) >= 1
    assert values["mla_cache_pages_used"] == "0"
    for line in text.splitlines():
        assert line.startswith(("# HELP mla_", "# TYPE mla_", "mla_"))
    metrics = Metrics()
    metrics.response('/v1/models/a "b"\\c', 200)
    assert r'{path="/v1/models/a \"b\"\\c",status="200"} 1' in metrics.prometheus()
    embedded = json.loads(server.app.state.serving.metrics.embedded("m"))
    names = [m["Name"] for m in embedded["_aws"]["CloudWatchMetrics"][0]["Metrics"]]
    assert set(names) <= embedded.keys()


def test_more_requests_than_places(tiny_folder: Path) -> None:
    gate = threading.Event()
    gate.set()
    server = Server(tiny_folder, gate, max_batch=2, max_queue=4)
    server.wait_ready()
    answers: list[httpx.Response] = []

    def call() -> None:
        body = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True}
        answers.append(httpx.post(server.client.base_url.join("/invocations"), json=body, timeout=60))

    threads = [threading.Thread(target=call) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [a.status_code for a in answers]
    assert set(statuses) == {200, 503}
    texts = {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}
    assert len(texts) == 1
    never = post(server, prompt="hello", n=5)  # however empty the queue
    assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
    refused = next(a for a in answers if a.status_code == 503)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    server.wait_idle()
    server.stop()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SAGEMAKER_BIND_TO_PORT", "eighty", "SAGEMAKER_BIND_TO_PORT is 'eighty'"),
        ("SAGEMAKER_BIND_TO_PORT", "65536", "at most 65535 is possible"),
        ("MLA_NUM_THREADS", "100000", "MLA_NUM_THREADS is '100000', at most 1024"),
        ("MLA_MAX_BATCH", "0", "MLA_MAX_BATCH is '0'"),
        ("MLA_KERNEL_DIR", "/does/not/exist", "MLA_KERNEL_DIR is /does/not/exist"),
        ("MLA_KERNEL_S3_URI", "https://bucket/kernel", "MLA_KERNEL_S3_URI is 'https://bucket/kernel'"),
    ],
)
def test_settings_name_the_variable(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        ServerSettings.from_environment({name: value})
