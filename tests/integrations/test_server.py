"""The server of `kvmix serve`, on loopback, asked by the openai client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvmix_fx.errors import CommandError, MissingPackageError
from kvmix_fx.integrations.transformers.batching import require_engine
from kvmix_fx.plan import KVPlan
from kvmix_fx.testing.batching import free_share
from kvmix_fx.testing.models import tiny_llama

try:
    require_engine("these tests")
except MissingPackageError as error:
    pytest.skip(str(error), allow_module_level=True)

openai = pytest.importorskip("openai", reason='pip install "kvmix-fx[server]"')
uvicorn = pytest.importorskip("uvicorn", reason='pip install "kvmix-fx[server]"')

NAME = "tiny"
WORDS = [f"w{i}" for i in range(120)]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i + 4 for i, word in enumerate(WORDS)} | {"<pad>": 0, "<unk>": 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", chat_template=TEMPLATE
    )


class Served:
    """A server in a thread of this process."""

    def __init__(self, queue_limit: int) -> None:
        from kvmix_fx.integrations.transformers.batching.server import build_app, start_manager

        model = tiny_llama(num_hidden_layers=1)
        self.manager = start_manager(model, KVPlan.uniform(model, 8), 1 << 22, max_batch_tokens=64)
        app = build_app(NAME, make_tokenizer(), self.manager, queue_limit)
        self.server = uvicorn.Server(
            uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5)
        )
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=20) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        text = self.get("metrics")
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"kvmix_{name} ")))

    def wait_until(self, holds) -> None:
        end = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture(scope="module")
def served():
    one = Served(queue_limit=6)
    yield one
    one.stop()
    assert not one.thread.is_alive()
    # a graceful stop closes the manager too
    assert not one.manager.is_running()
    assert one.manager.model.config._attn_implementation == "sdpa"


def complete(served, prompt, tokens=4, **given):
    return served.client.completions.create(model=NAME, prompt=prompt, max_tokens=tokens, **given)


def test_the_client_gets_completions_and_chats_whole_and_in_pieces(served):
    whole = complete(served, " ".join(WORDS[:40]))
    assert whole.usage.prompt_tokens == 40
    assert whole.usage.completion_tokens == 4
    assert whole.choices[0].finish_reason == "length"
    pieces = list(complete(served, " ".join(WORDS[:40]), stream=True))
    assert "".join(piece.choices[0].text for piece in pieces).split() == whole.choices[0].text.split()
    chat = served.client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": " ".join(WORDS[:40])}], max_tokens=4
    )
    assert chat.choices[0].message.content.split() == whole.choices[0].text.split()
    assert [model.id for model in served.client.models.list()] == [NAME]
    assert json.loads(served.get("health")) == {"status": "ok"}


def test_requests_side_by_side_sample_each_in_its_own_way(served):
    prompt = " ".join(WORDS[5:60])
    with ThreadPoolExecutor(6) as several:
        greedy = [several.submit(complete, served, prompt, 12, temperature=0) for _ in range(3)]
        warm = [several.submit(complete, served, prompt, 12, temperature=1.7) for _ in range(3)]
        first, second = ({one.result().choices[0].text for one in some} for some in (greedy, warm))
    assert len(first) == 1
    assert len(second) == 3


def test_what_cannot_be_done_is_refused_and_the_others_go_on(served):
    with pytest.raises(openai.BadRequestError, match="do not fit into the pool"):
        complete(served, WORDS[0], 1 << 20)
    with pytest.raises(openai.BadRequestError, match="stop is not available"):
        complete(served, WORDS[0], stop=["w1"])
    with pytest.raises(openai.BadRequestError, match="frequency_penalty is not available"):
        complete(served, WORDS[0], frequency_penalty=0.5)
    with pytest.raises(openai.BadRequestError, match="pinned to 'tiny'"):
        served.client.completions.create(model="other", prompt="w1")
    assert complete(served, WORDS[0]).usage.completion_tokens == 4


def test_a_full_queue_is_429_and_a_client_that_goes_returns_its_pages(served):
    with ThreadPoolExecutor(8) as several:
        with served.manager.pause():
            # nothing is taken from the queue meanwhile
            waiting = [several.submit(complete, served, WORDS[i], 30) for i in range(6)]
            served.wait_until(lambda: served.metric("requests_waiting") == 6)
            with pytest.raises(openai.RateLimitError, match="6 requests are waiting already"):
                complete(served, WORDS[9])
        assert all(one.result().usage.completion_tokens == 30 for one in waiting)
    for stream in (False, True):
        before = served.metric("tokens_new_total")
        if stream:
            with complete(served, WORDS[3], 6000, stream=True) as pieces:
                next(iter(pieces))
        else:
            with pytest.raises(openai.APITimeoutError):
                complete(served, WORDS[3], 6000, timeout=0.3)
        served.wait_until(lambda: served.metric("requests_running") == 0)
        assert 0 < served.metric("tokens_new_total") - before < 6000
    assert served.metric("requests_refused_total") == 1
    assert served.metric("requests_failed_total") == 0
    assert served.metric("plan_bits") == pytest.approx(9.0)
    assert free_share(served.manager) == 1
    assert served.metric("pages_used") == 0


def test_sizes_of_memory():
    from kvmix_fx.cli.serve import bytes_of

    assert [bytes_of(text) for text in ("8GiB", "1.5 MiB", "4096")] == [8 << 30, 3 << 19, 4096]
    for wrong in ("8GB", "lots", "1.2.3"):
        with pytest.raises(CommandError, match="--memory takes bytes"):
            bytes_of(wrong)


@pytest.mark.timeout(180)
def test_the_command_serves_on_two_ranks_and_ends_with_what_it_has_done(tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kvmix_fx", "serve", str(tmp_path), "--memory", "4MiB", "--json"]
    command += ["--tp", "2", "--port", str(port), "--dtype", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as served:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60
        )
        # it refuses connections until the model is there
        while True:
            try:
                answer = client.completions.create(model=str(tmp_path), prompt="w1 w2", max_tokens=3)
                break
            except openai.APIConnectionError:
                assert served.poll() is None
                time.sleep(0.2)
        assert answer.usage.completion_tokens == 3
        served.terminate()
        content = json.loads(served.stdout.read())
    assert served.returncode == 0
    assert content == {"model": str(tmp_path), "requests": 1, "failed": 0, "new_tokens": 3}
