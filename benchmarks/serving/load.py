"""Load on two servers of which one is killed: what becomes of every request.

    python -m benchmarks.serving.load --requests 200 --at-once 20

Two `kvmix serve` on loopback, a model each. Clients, `--at-once` of them, stream answers from one of both in
turn, and go to the other one when theirs cannot be reached or ends before its first token. After
`--kill-after` answers the first server is killed (SIGKILL); at the end the other is asked to stop (SIGTERM)
while answers run. A request is answered (its stream says that it has finished), answered by the other
server, or ends with an error that its client raises. Anything else is lost, which must not happen.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, Row, make_row, save
from kvmix_fx.testing.texts import prose

SUITE = "serving"


def free_port() -> int:
    """One on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """A `kvmix serve` of its own."""

    def __init__(self, model: str, memory: str) -> None:
        """Start it; it loads its model meanwhile."""
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "kvmix_fx", "serve", model, "--memory", memory, "--port", str(port),
                "--grace", "20", "--max-batch-tokens", "256",
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def wait(self, seconds: float) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it does not.
        """
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"no server at {self.url}")

    def metric(self, name: str) -> float:
        """One of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"kvmix_{name} ")))


class Load:
    """Clients of some servers, and what became of their requests."""

    def __init__(self, servers: list[Server], model: str, new: int) -> None:
        """`new`: tokens of an answer at most."""
        import openai

        self.servers, self.model, self.new = servers, model, new
        self.clients = [
            openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0, timeout=120)
            for one in servers
        ]
        self.errors: Any = (openai.APIError, OSError)
        self.http_errors = _http_errors()
        self.outcomes: Counter[str] = Counter()
        self.first: list[float] = []
        self.whole: list[float] = []
        self.said: Counter[str] = Counter()
        self._lock = threading.Lock()

    def answered(self) -> int:
        """Requests that have an answer."""
        with self._lock:
            return sum(n for name, n in self.outcomes.items() if name.startswith("answered"))

    def ask(self, number: int, prompt: str) -> None:
        """One request, and to what it comes."""
        outcome, begun = "lost", time.perf_counter()
        for attempt in range(2):
            at = (number + attempt) % len(self.servers)
            seen, reason = 0, None
            try:
                stream = self.clients[at].chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": prompt}], stream=True,
                    max_tokens=self.new, temperature=0,
                )  # fmt: skip
                for event in stream:
                    for choice in event.choices:
                        if choice.delta.content:
                            seen += 1
                            if seen == 1:
                                first = time.perf_counter() - begun
                        reason = choice.finish_reason or reason
            except (*self.errors, *self.http_errors) as error:
                outcome = "error after some tokens" if seen else "error"
                with self._lock:
                    self.said[f"{type(error).__name__}: {str(error)[:60]}"] += 1
                if seen:
                    break
                continue
            if reason is None:
                # an end without a reason is one that nobody was told of
                outcome = "lost"
                break
            outcome = "answered by the other" if attempt else "answered"
            with self._lock:
                self.first.append(first if seen else time.perf_counter() - begun)
                self.whole.append(time.perf_counter() - begun)
            break
        with self._lock:
            self.outcomes[outcome] += 1


def _http_errors() -> tuple[type[Exception], ...]:
    try:
        import httpx
    except ImportError:
        return ()
    return (httpx.HTTPError,)


def run(options: argparse.Namespace) -> list[Row]:
    """Start, ask, kill, stop."""
    servers = [Server(options.model, options.memory) for _ in range(2)]
    try:
        for one in servers:
            one.wait(300)
        print("both answer", flush=True)
        load = Load(servers, options.model, options.new)
        drawn, text = random.Random(3), prose()
        prompts = []
        for _ in range(options.requests):
            at = drawn.randrange(len(text) - 1000)
            prompts.append(text[at : at + drawn.randint(40, 240)])
        begun, killed = time.perf_counter(), 0.0
        with ThreadPoolExecutor(options.at_once) as pool:
            futures = [pool.submit(load.ask, i, prompt) for i, prompt in enumerate(prompts)]
            said = 0
            while not all(future.done() for future in futures):
                done = load.answered()
                if not killed and done >= options.kill_after:
                    servers[0].process.kill()
                    killed = time.perf_counter() - begun
                    print(f"killed one after {killed:.1f} s and {done} answers", flush=True)
                if done // 20 > said:
                    said = done // 20
                    print(f"{time.perf_counter() - begun:.0f} s: {dict(load.outcomes)}", flush=True)
                time.sleep(0.05)
            for future in futures:
                future.result()
        seconds = time.perf_counter() - begun
        running = servers[1].metric("requests_running")
        used = servers[1].metric("pages_used")
        print(f"{seconds:.1f} s: {dict(load.outcomes)}; running {running:g}, pages used {used:g}")
        print(f"errors: {dict(load.said)}")
        # a stop while answers run: they end, and new ones are refused
        last = Load(servers[1:], options.model, options.new)
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(last.ask, 0, prompts[i]) for i in range(4)]
            time.sleep(0.5)
            servers[1].process.send_signal(signal.SIGTERM)
            for future in waiting:
                future.result()
        code = servers[1].process.wait(60)
        print(f"SIGTERM with 4 requests running: {dict(last.outcomes)}, exit code {code}")
    finally:
        for one in servers:
            if one.process.poll() is None:
                one.process.kill()
    case = (
        f"{options.model} {options.requests} requests, {options.at_once} at a time, two servers, one killed "
        f"after {options.kill_after}"
    )
    provider = "kvmix serve k4v2 g32 w32 s4"
    ordered, first = sorted(load.whole), sorted(load.first)
    figures = [
        ("answered", load.outcomes["answered"], "requests"),
        ("answered by the other server", load.outcomes["answered by the other"], "requests"),
        ("ended with an error", sum(n for name, n in load.outcomes.items() if "error" in name), "requests"),
        ("lost without an error", load.outcomes["lost"], "requests"),
        ("requests still running at the end", running, "requests"),
        ("seconds", seconds, "s"),
        ("time to first token, p50", first[len(first) // 2], "s"),
        ("time to first token, p99", first[len(first) * 99 // 100], "s"),
        ("time of an answer, p50", ordered[len(ordered) // 2], "s"),
        ("time of an answer, p99", ordered[len(ordered) * 99 // 100], "s"),
        ("answered of 4 that ran when it was stopped", last.outcomes["answered"], "requests"),
        ("exit code when it was stopped", code, "code"),
    ]
    return [make_row(SUITE, case, provider, name, float(value), unit) for name, value, unit in figures]


def main() -> None:
    """Measure, print, write rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=20)
    parser.add_argument("--kill-after", type=int, default=60)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    save(run(options), options.output)


if __name__ == "__main__":
    main()
