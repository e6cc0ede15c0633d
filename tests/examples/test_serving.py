"""examples/serving with the real openai client: two replicas of SmolLM2, one of which is killed."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

ray = pytest.importorskip("ray", reason='Ray Serve is not installed: pip install "kvmix-fx[serve]"')
pytest.importorskip("ray.serve", reason='Ray Serve is not installed: pip install "kvmix-fx[serve]"')
openai = pytest.importorskip("openai", reason="the openai client is not installed")

import torch

import kvmix_fx
from kvmix_fx.plan import default_plan
from kvmix_fx.testing.smollm2 import load_smollm2, smollm2_config

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(900)]

QUESTION = [{"role": "user", "content": "Name three animals that live in the sea."}]
PROMPT, NEW = 192, 128


@pytest.fixture(scope="module")
def settings():
    from examples.serving.app import Settings

    plan = default_plan(smollm2_config())
    memory = 2.5 * plan.nbytes(1, PROMPT + NEW, itemsize=4, cache="fixed")
    return Settings(replicas=2, memory=memory, prompt_tokens=PROMPT, new_tokens=NEW)


@pytest.fixture(scope="module")
def client(settings):
    from ray import serve

    from examples.serving.app import build

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(settings))
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300
        )
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(client, messages=QUESTION, max_tokens=24, **more):
    more.setdefault("temperature", 0)
    return client.chat.completions.create(model="smollm2", messages=messages, max_tokens=max_tokens, **more)


def streamed(client, **more):
    """(text, why it ended, replica) of a streamed answer."""
    text, finish, replica = "", None, None
    for event in ask(client, stream=True, **more):
        choice, replica = event.choices[0], event.system_fingerprint
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
    return text, finish, replica


def test_the_memory_says_how_many_sequences_or_bits(settings):
    from examples.serving.app import fit

    usual = default_plan(smollm2_config())
    plan, rows = fit(settings)
    assert (plan.digest, rows) == (usual.digest, 2)
    # of a short sequence most tokens are raw, whatever the bits
    memory = 2.5 * usual.nbytes(1, 1024, itemsize=4, cache="fixed")
    settings = settings.model_copy(update={"memory": memory, "prompt_tokens": 1024 - NEW})
    bits = []
    for sequences in (1, 2):
        plan, rows = fit(settings.model_copy(update={"sequences": sequences}))
        assert rows == sequences
        assert plan.nbytes(rows, 1024, itemsize=4, cache="fixed") <= memory
        bits.append(plan.nominal_bits())
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > bits[-1]
    with pytest.raises(ValueError, match="raise it, or lower sequences"):
        fit(settings.model_copy(update={"sequences": 9}))


def test_an_answer_is_that_of_the_packed_model(client, settings):
    from examples.serving.app import fit

    answer = ask(client)
    model, tokenizer = load_smollm2()
    kvmix_fx.compile(model, fit(settings)[0])
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer.choices[0].message.content == text
    assert answer.usage.prompt_tokens == ids.shape[1]
    assert answer.usage.completion_tokens == out.shape[1] - ids.shape[1]
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert streamed(client)[:2] == (text, answer.choices[0].finish_reason)


def test_requests_that_come_together_keep_their_own_lengths_and_temperatures(client):
    with ThreadPoolExecutor(8) as threads:
        asked = [
            threads.submit(ask, client, max_tokens=4 + n, temperature=0 if n % 2 else 1.3) for n in range(8)
        ]
        answers = [answer.result() for answer in asked]
    for n, answer in enumerate(answers):
        assert answer.usage.completion_tokens <= 4 + n
        if answer.usage.completion_tokens < 4 + n:
            assert answer.choices[0].finish_reason == "stop"
    greedy = [answers[n].choices[0].message.content for n in (1, 3, 5, 7)]
    # each is the beginning of the next; the last word may be cut
    assert all(b.startswith(a[:-2]) for a, b in zip(greedy, greedy[1:], strict=False))
    assert len({answer.system_fingerprint for answer in answers}) == 2


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        ({"max_tokens": NEW + 1}, 400, f"at most {NEW} are served"),
        ({"messages": [{"role": "user", "content": "word " * 2 * PROMPT}]}, 400, f"at most {PROMPT}"),
        ({"top_p": 0.5}, 400, "top_p: Extra inputs"),
    ],
)
def test_what_is_not_served_is_said(client, more, status, message):
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        ask(client, **more)
    assert caught.value.status_code == status


def test_a_killed_replica_takes_no_answer_along_unnoticed(client):
    long = {
        "messages": [{"role": "user", "content": "Write a long story about a lighthouse."}],
        "max_tokens": NEW,
    }
    begun, outcomes = threading.Event(), []

    def stream():
        text = ""
        try:
            for event in ask(client, stream=True, **long):
                text += event.choices[0].delta.content or ""
                if len(text) > 20:
                    begun.set()
                    running.add(event.system_fingerprint)
            outcomes.append(("stream", "finished", text))
        except openai.APIError as error:
            outcomes.append(("stream", str(error), text))

    def whole():
        answer = ask(client, **long)
        outcomes.append(("whole", answer.choices[0].finish_reason, answer.choices[0].message.content))

    running = set()
    threads = [threading.Thread(target=target) for target in (stream, stream, whole, whole)]
    for thread in threads:
        thread.start()
    assert begun.wait(120)
    victim = sorted(running)[0]
    kill(victim)
    for thread in threads:
        thread.join(300)
    assert len(outcomes) == 4
    streams = [end for kind, end, _ in outcomes if kind == "stream"]
    # the one that was under way says so; what the client has not seen yet comes from another replica
    assert any("the replica died while it answered" in end for end in streams)
    assert all(end == "finished" or "the replica died" in end for end in streams)
    assert all(text and end in ("stop", "length") for kind, end, text in outcomes if kind == "whole")

    assert ask(client).choices[0].message.content
    # a new replica takes its place
    until = time.monotonic() + 400
    while True:
        names = replicas()
        if len(names) == 2 and victim not in names:
            break
        assert time.monotonic() < until
        time.sleep(1)


def replicas():
    """Actors of running replicas by their id."""
    return {
        actor["name"].rsplit("#", 1)[1]: actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "#Replica#" in actor["name"]
    }


def kill(replica):
    actor = replicas()[replica]
    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
