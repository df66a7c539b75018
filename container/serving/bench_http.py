"""The server under load on loopback: `python -m container.serving.bench_http --model DIR`.

Starts `python -m container.serving` on a model folder and reports what HTTP and scheduling add to a request,
then keeps many streams running and reports throughput, latency, errors and whether pages or memory leak. With
`--mlflow` the same folder is also served by `mlflow models serve`, with the same clients.
"""

import argparse
import asyncio
import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # see __main__.py

import httpx

PROMPT = "The assert statement is used to check "
# Small enough to be touched whole before memory is first read: pages of the cache, filled one after the
# other, would look like a leak.
CACHE_TOKENS = 32_768
SHORT = {"prompt": PROMPT, "max_tokens": 1}


@contextmanager
def running(command: list[str], env: dict[str, str], health: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process, from the first 200 of `health` until the block ends."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            while True:
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} ended early:\n{log.read().decode()[-2000:]}")
                try:
                    if httpx.get(health, timeout=2).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(40)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def resident_mb(pid: int) -> float:
    """Resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found.group(1)) / 1e3 if found else 0.0


def metric(port: int, name: str) -> float:
    """A figure of GET /metrics, read with little work: what runs between two requests slows the second."""
    client = http.client.HTTPConnection("127.0.0.1", port)
    client.request("GET", "/metrics")
    text = client.getresponse().read().decode()
    client.close()
    for line in text.splitlines():
        if line.startswith(name + " "):
            return float(line.split()[1])
    raise KeyError(name)


def overhead(port: int, requests: int) -> dict[str, float]:
    """Milliseconds, medians: a request of one token as the client sees it, and its part outside engine steps.

    The client is the standard library's, one connection kept alive; httpx alone would add half a millisecond.
    """
    body = json.dumps(SHORT).encode()
    client = http.client.HTTPConnection("127.0.0.1", port)
    client.connect()
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    seen, beside = [], []
    stepped = metric(port, "mla_step_seconds_sum")
    for _ in range(requests + 10):
        start = time.perf_counter()
        client.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        response = client.getresponse()
        response.read()
        seen.append(1e3 * (time.perf_counter() - start))
        if response.status != 200:
            raise RuntimeError(f"a request was answered with {response.status}")
        before, stepped = stepped, metric(port, "mla_step_seconds_sum")
        beside.append(seen[-1] - 1e3 * (stepped - before))
    client.close()
    return {"request": statistics.median(seen[10:]), "beside": statistics.median(beside[10:])}


async def streams(url: str, clients: int, seconds: float, tokens: int) -> dict[str, Any]:
    """`clients` streaming requests at a time for `seconds`; each starts the next when it ends."""
    ends = time.monotonic() + seconds
    first: list[float] = []
    done, errors, received = 0, 0, 0

    async def client(session: httpx.AsyncClient, index: int) -> None:
        nonlocal done, errors, received
        while time.monotonic() < ends:
            body = {
                "prompt": f"{PROMPT}{index} {done}",
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
            start, seen, finished = time.perf_counter(), 0, False
            async with session.stream("POST", "/invocations", json=body) as response:
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        finished = True
                    elif line.startswith("data: "):
                        if not seen:
                            first.append(1e3 * (time.perf_counter() - start))
                        seen += len(json.loads(line[6:])["choices"][0]["token_ids"])
            received += seen
            done += 1
            errors += not finished or seen != tokens

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    start = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as session:
        await asyncio.gather(*(client(session, i) for i in range(clients)))
    took = time.monotonic() - start
    first.sort()
    return {
        "requests": done,
        "errors": errors,
        "tokens_per_s": received / took,
        "first_token_p50_ms": first[len(first) // 2],
        "first_token_p99_ms": first[int(0.99 * (len(first) - 1))],
    }


async def throughput(url: str, clients: int, seconds: float, tokens: int) -> float:
    """Requests a second of `clients` clients that wait for whole answers in MLflow's form."""
    ends, done = time.monotonic() + seconds, 0
    body = {
        "dataframe_split": {"columns": ["prompt"], "data": [[PROMPT]]},
        "params": {"max_new_tokens": tokens},
    }

    async def client(session: httpx.AsyncClient) -> None:
        nonlocal done
        while time.monotonic() < ends:
            (await session.post("/invocations", json=body)).raise_for_status()
            done += 1

    start = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=120) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return done / (time.monotonic() - start)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="an MLflow model folder")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=32, help="generated by a request")
    parser.add_argument("--mlflow", action="store_true", help="compare with mlflow models serve, 16 clients")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("RESULTS_HTTP.md"))
    options = parser.parse_args()
    lines = [
        "# The server under load",
        "",
        "Written by `python -m container.serving.bench_http`: clients and server on one machine, "
        f"{os.cpu_count()} cores, load average when it began {os.getloadavg()[0]:.1f}.",
        "",
        "| measured | value |",
        "|---|---|",
    ]

    def note(name: str, value: str) -> None:
        lines.append(f"| {name} | {value} |")
        print(lines[-1], flush=True)

    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "model").symlink_to(options.model.resolve())
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        env = {
            **os.environ,
            "MLA_CACHE_TOKENS": str(CACHE_TOKENS),
            "MLA_ML_ROOT": root,
            "SAGEMAKER_BIND_TO_PORT": str(port),
            "MLA_HOST": "127.0.0.1",
        }
        with running([sys.executable, "-m", "container.serving"], env, f"{url}/ping") as process:
            cost = overhead(port, 200)
            note("one token, batch 1, client p50", f"{cost['request']:.2f} ms")
            note("of it outside engine steps, p50", f"{cost['beside']:.2f} ms")
            ours = asyncio.run(throughput(url, 16, min(10, options.seconds), options.tokens))
            note(f"16 clients, {options.tokens} tokens each, whole answers", f"{ours:.1f} requests/s")
            asyncio.run(streams(url, options.clients, min(15, options.seconds), options.tokens))
            memory = resident_mb(process.pid)
            load = asyncio.run(streams(url, options.clients, options.seconds, options.tokens))
            note(f"{options.clients} streams for {options.seconds:.0f} s: requests", str(load["requests"]))
            note("errors", str(load["errors"]))
            note("tokens", f"{load['tokens_per_s']:.0f} /s")
            note(
                "first token p50, p99",
                f"{load['first_token_p50_ms']:.0f}, {load['first_token_p99_ms']:.0f} ms",
            )
            note("pages in use afterwards", f"{metric(port, 'mla_cache_pages_used'):.0f}")
            note("memory before, after", f"{memory:.0f}, {resident_mb(process.pid):.0f} MB")
        if options.mlflow:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            command = [
                sys.executable,
                "-m",
                "mlflow",
                "models",
                "serve",
                "-m",
                str(options.model),
                "--port",
                str(port),
            ]
            # mlflow starts uvicorn by name
            path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            with running([*command, "--env-manager", "local"], {**os.environ, **path}, f"{url}/ping"):
                theirs = asyncio.run(throughput(url, 16, 10, options.tokens))
            note("the same under mlflow models serve", f"{theirs:.1f} requests/s")
    options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
