"""Recording and replaying decode steps."""

from __future__ import annotations

import gc

import pytest
import torch
import transformers
from transformers.cache_utils import StaticSlidingWindowLayer

import kvmix_fx
from kvmix_fx import dynamo, parallel
from kvmix_fx.backend import KVMixBackend
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.dynamo import unwrapped
from kvmix_fx.errors import CapacityError
from kvmix_fx.integrations import transformers as integration
from kvmix_fx.integrations.transformers.pool import GenerationCaches
from kvmix_fx.runtime import recording
from kvmix_fx.runtime.recording import Replayed
from kvmix_fx.testing.models import tiny_llama


def llama():
    """One layer: tracing costs most of a test's time, and steps are recorded whole."""
    return tiny_llama(num_hidden_layers=1)


def step(weight, cache, x, factor):
    """A step that uses a weight, writes its cache and gives back a result and its cache."""
    cache.add_(x)
    return [weight * cache * factor, cache]


def replayed(recorder):
    return Replayed(step, lambda i: i == 1, recorder)


def test_replays_do_what_calls_do(recorder):
    run = replayed(recorder)
    weight, cache, expected = torch.tensor([2.0, 3.0]), torch.zeros(2), torch.zeros(2)
    kept = []
    for n in range(6):
        x = torch.full((2,), float(n))
        expected = expected + x
        result, same = run(weight, cache, x, 10)
        assert same is cache
        torch.testing.assert_close(cache, expected)
        torch.testing.assert_close(result, weight * expected * 10)
        kept.append((result, result.clone()))
    assert (recorder.recorded, recorder.replayed) == (1, 4)
    # a result outlives the steps that follow
    assert all(torch.equal(result, copy) for result, copy in kept)


def test_another_cache_shape_or_number_is_another_recording(recorder):
    run = replayed(recorder)
    weight, caches = torch.ones(2), [torch.zeros(2), torch.zeros(2)]
    for cache in (caches[0],) * 3 + (caches[1],) * 3 + (caches[0],) * 2:
        run(weight, cache, torch.ones(2), 1)
    assert (recorder.recorded, recorder.replayed) == (2, 4)
    torch.testing.assert_close(caches[0], torch.full((2,), 5.0))
    result, _ = run(weight, caches[0], torch.ones(2), 7)
    torch.testing.assert_close(result, torch.full((2,), 42.0))
    run(weight, caches[0], torch.ones(1), 1)
    assert recorder.replayed == 4


def test_a_weight_that_moved_is_not_read_at_its_old_place(recorder):
    run = replayed(recorder)
    weight, cache = torch.ones(2), torch.zeros(2)
    for _ in range(3):
        run(weight, cache, torch.ones(2), 1)
    weight.data = torch.full((2,), 5.0)
    result, _ = run(weight, cache, torch.ones(2), 1)
    torch.testing.assert_close(result, torch.full((2,), 20.0))
    assert recorder.replayed == 1


def test_written_inputs_that_are_not_the_cache_are_written_back(recorder):
    def write(cache, x):
        x.add_(cache)
        return [x]

    run = Replayed(write, lambda i: i == 0, recorder)
    cache = torch.ones(2)
    for n in range(4):
        x = torch.full((2,), float(n))
        (out,) = run(cache, x)
        assert out is x
        torch.testing.assert_close(x, torch.full((2,), n + 1.0))
    assert recorder.replayed == 2


def test_a_changing_cache_is_never_recorded_and_a_dropped_one_is_freed(recorder):
    run = replayed(recorder)
    for _ in range(5):
        run(torch.ones(2), torch.zeros(2), torch.ones(2), 1)
    assert recorder.recorded == 0
    weight, cache = torch.ones(2), torch.zeros(2)
    for _ in range(3):
        run(weight, cache, torch.ones(2), 1)
    place = cache.data_ptr()
    alive = torch.utils.weak.WeakIdRef(cache)
    assert recorder.recorded == 1
    assert place
    del cache
    recorder.__dict__.clear()
    run._entries.clear()
    gc.collect()
    assert alive() is None


def test_a_step_that_cannot_be_recorded_is_done_once_and_the_next_ones_run(recorder):
    def refuse(run, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    run = Replayed(step, lambda i: i == 1, refuse)
    weight, cache = torch.ones(2), torch.zeros(2)
    run(weight, cache, torch.ones(2), 1)
    with pytest.warns(UserWarning, match="not replayed as CUDA graphs: operation not permitted"):
        run(weight, cache, torch.ones(2), 1)
    result, _ = run(weight, cache, torch.ones(2), 1)
    torch.testing.assert_close(result, torch.full((2,), 3.0))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_is_raised_while_a_step_is_recorded(monkeypatch, recorder, error):
    """Work that is recorded has been done: its results are given, or the cache is as before the step."""
    model = llama()
    plan = kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=4)
    ids = torch.randint(1, 60, (1, 56))

    def step(cache, first, last):
        with torch.no_grad():
            return model(ids[:, first:last], past_key_values=cache).logits[:, -1]

    def new():
        return integration.KVMixStaticCache(kvmix_fx.compiled(model).plan, model.config, 128)

    asked, caught = [], []

    def fails(run, inputs):
        asked.append(run)
        if len(asked) == 1:
            raise error("in the middle")
        return recorder(run, inputs)

    kvmix_fx.compile(model, plan, options={"cuda_graphs": False})
    cache = new()
    want = [step(cache, 0, 50), *(step(cache, i, i + 1) for i in range(50, 56))]
    monkeypatch.setattr(recording, "REPLAY_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(recording, "record_cuda", fails)
    kvmix_fx.compile(model, plan)
    cache, got = new(), []
    for first, last in ((0, 50), *((i, i + 1) for i in range(50, 56))):
        held = int(cache.get_seq_length())
        assert held == first
        try:
            got.append(step(cache, first, last))
        except error:
            caught.append(first)
            assert int(cache.get_seq_length()) == held
            got.append(step(cache, first, last))
    torch.testing.assert_close(torch.stack(got), torch.stack(want))
    # without memory for a recording, steps go on as they are; an interrupted one is made later
    assert (len(asked), len(caught)) == ((2, 1) if error is KeyboardInterrupt else (1, 0))
    assert (recorder.replayed > 0) is (error is KeyboardInterrupt)


def generate(model, ids, **kwargs):
    out = model.generate(
        ids, do_sample=False, output_logits=True, return_dict_in_generate=True,
        **{"max_new_tokens": 12, **kwargs},
    )  # fmt: skip
    return torch.stack(out.logits), out


def test_generate_gets_a_fixed_cache_and_replays_its_steps(on_cpu, monkeypatch):
    guarded = []
    monkeypatch.setattr(dynamo, "unwrapped", lambda *a, **kw: guarded.append(1) or unwrapped(*a, **kw))
    model = llama()
    plan = kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=4)
    ids = torch.randint(1, 60, (2, 50))
    plain, _ = generate(model, ids)
    kvmix_fx.compile(model, plan, options={"cuda_graphs": False})
    want, _ = generate(model, ids)
    assert on_cpu.recorded == 0
    guarded.clear()
    kvmix_fx.compile(model, plan)
    for _ in range(2):
        got, out = generate(model, ids)
        assert isinstance(out.past_key_values, integration.KVMixStaticCache)
        torch.testing.assert_close(got, want)
        cache = out.past_key_values.layers[0].keys.qdata.data_ptr()
        del out
    assert not torch.allclose(got, plain)
    assert len(guarded) == 2 * 2  # decode steps to learn from; the prompt is not traced
    # the second call took over the first one's cache, and with it the recording
    assert on_cpu.recorded == 1
    assert on_cpu.replayed == 9 + 11
    report = kvmix_fx.compiled(model).report
    assert [graph.replay == "" for graph in report.graphs] == [True]
    assert "replayed as a CUDA graph" in str(report)
    assert cache


@pytest.mark.parametrize(("length", "replays"), [(40, [21]), (8, [6, 13])])
def test_steps_beside_windows_that_stay_plain_are_replayed(on_cpu, monkeypatch, length, replays):
    """Those count their tokens on the host, as an input and an output of the graph.

    A window that is not full is written by a graph of its own, and no step of that one is short.
    """
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=16, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    plan = kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=4)
    ids = torch.randint(1, 60, (2, length))
    settings = {"max_new_tokens": 24, "min_new_tokens": 24}
    kvmix_fx.compile(model, plan, options={"cuda_graphs": False})
    want, _ = generate(model, ids, **settings)
    guarded = []
    monkeypatch.setattr(dynamo, "unwrapped", lambda *a, **kw: guarded.append(1) or unwrapped(*a, **kw))
    kvmix_fx.compile(model, plan)
    got, out = generate(model, ids, **settings)
    torch.testing.assert_close(got, want)
    assert on_cpu.recorded == len(replays)
    assert on_cpu.replayed == sum(replays)
    # one graph for steps of a window that is full, one before
    assert len(kvmix_fx.compiled(model).report.graphs) == len(replays)
    short = replays[-1]
    assert len(guarded) == 23 - short
    window = out.past_key_values.layers[0]
    assert type(window) is StaticSlidingWindowLayer
    assert window.cumulative_length_int == length + 23
    # the short steps have counted: the conversation goes on with a prompt, and from another cache
    more = torch.cat([out.sequences, ids[:, :5]], 1)
    again, _ = generate(model, more, past_key_values=out.past_key_values)
    kvmix_fx.compile(model, plan, options={"cuda_graphs": False})
    _, cache = generate(model, ids, **settings)
    same, _ = generate(model, more, past_key_values=cache.past_key_values)
    torch.testing.assert_close(again, same)


def test_a_model_of_windows_gets_a_fixed_cache_while_that_takes_less_than_they_do(on_cpu):
    """All of 256 tokens take less packed than 150 at 16 bits, 768 do not; both are packed."""
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=150,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    kinds = {200: integration.KVMixStaticCache, 600: transformers.DynamicCache}
    texts = {length: torch.randint(1, 60, (2, length)) for length in kinds}
    plain = {length: generate(model, ids)[0] for length, ids in texts.items()}
    worst = {}
    for bits in (4, 2):
        plan = kvmix_fx.KVPlan.uniform(model, bits, group_size=16, window=4)
        kvmix_fx.compile(model, plan)
        for length, kind in kinds.items():
            before = on_cpu.replayed
            got, out = generate(model, texts[length])
            assert type(out.past_key_values) is kind
            assert isinstance(out.past_key_values.layers[0].keys, QuantizedKVTensor)
            assert (on_cpu.replayed > before) is (kind is integration.KVMixStaticCache)
            worst[bits, length] = (got[1] - plain[length][1]).abs().max().item()
    assert all(worst[4, length] < worst[2, length] / 2 for length in kinds), worst


def test_rows_without_padding_need_no_mask(on_cpu):
    """The control has another row with padding, so that it always takes a mask."""
    model = llama()
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=4))
    ids, more = torch.randint(1, 60, (1, 50)), torch.randint(1, 60, (1, 20))

    def converse(rows, hidden, padded=0):
        """Logits after a prompt and after the rest of a conversation; whether either needed no mask."""
        prompt = ids.expand(rows, -1)
        mask = torch.ones_like(prompt)
        mask[:, :7] = hidden != "prompt"
        mask[1:, :padded] = 0
        first, out = generate(model, prompt, attention_mask=mask)
        needless = [out.past_key_values.full_rows]
        longer = torch.cat([out.sequences, more.expand(rows, -1)], 1)
        mask = torch.cat([mask, torch.ones(rows, longer.shape[1] - 50, dtype=mask.dtype)], 1)
        mask[:, 20:40] = hidden != "middle of the conversation"
        cache = integration.KVMixStaticCache(kvmix_fx.compiled(model).plan, model.config, 128)
        # the same tokens, then the rest of the conversation
        with torch.no_grad():
            model(out.sequences[:, :-1], attention_mask=mask[:, : out.sequences.shape[1] - 1],
                  past_key_values=cache)  # fmt: skip
        second, _ = generate(model, longer, attention_mask=mask, past_key_values=cache)
        return torch.cat([first[:, 0], second[:, 0]]), [*needless, cache.full_rows]

    # one model for all: each way in turn, on what the ways before have left
    for hidden in ("nothing", "prompt", "middle of the conversation", "nothing"):
        masked, needed = converse(2, hidden, padded=3)
        assert needed == [False, False]
        for rows in (1, 2):
            got, needless = converse(rows, hidden)
            assert needless == [hidden != "prompt", hidden == "nothing"]
            torch.testing.assert_close(got, masked, atol=2e-5, rtol=1e-4)


def test_a_cache_that_is_still_held_is_not_used_again(on_cpu):
    model = llama()
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16))
    ids = torch.randint(1, 60, (1, 40))
    _, first = generate(model, ids)
    kept = first.past_key_values.layers[0].keys.dequantize()
    _, second = generate(model, ids.flip(1))
    assert first.past_key_values.layers[0].keys is not second.past_key_values.layers[0].keys
    assert torch.equal(first.past_key_values.layers[0].keys.dequantize(), kept)
    graphs = len(kvmix_fx.compiled(model).report.graphs)
    del first, second
    # longer than any cache so far, then shorter: room is made once
    _, long = generate(model, torch.randint(1, 60, (1, 300)))
    assert long.past_key_values.layers[0].max_cache_len == 512
    del long
    _, short = generate(model, ids)
    assert short.past_key_values.layers[0].max_cache_len == 512
    assert len(kvmix_fx.compiled(model).report.graphs) == graphs


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_conversation_outgrows_the_cache_of_its_first_turn(on_cpu, monkeypatch, rows, raw):
    model = tiny_llama() if raw else llama()
    plan = kvmix_fx.KVPlan.uniform(model, 2, window=16)
    if raw:
        plan = plan.with_layers(1, key=16, value=16)
    turns = torch.randint(1, 60, (3, rows, 150), generator=torch.Generator().manual_seed(1))

    def talk():
        sequence, past, logits = turns[0], None, []
        for n in range(3):
            result, out = generate(model, sequence, past_key_values=past)
            logits.append(result)
            past = out.past_key_values
            sequence = torch.cat([out.sequences, turns[(n + 1) % 3]], 1)
        return torch.cat(logits), past

    plain, _ = talk()
    kvmix_fx.compile(model, plan, inner="eager")
    got, cache = talk()
    assert isinstance(cache, integration.KVMixStaticCache)
    assert cache.layers[0].max_cache_len == 512
    assert on_cpu.replayed > 20
    monkeypatch.setattr(recording, "REPLAY_DEVICES", ())
    kvmix_fx.compile(model, plan, inner="eager")
    grown, cache = talk()
    assert not isinstance(cache, integration.KVMixStaticCache)
    torch.testing.assert_close(got, grown, atol=2e-4, rtol=1e-4)
    assert (got - plain).abs().max() > 0.02


def test_a_capacity_that_was_chosen_is_kept(on_cpu):
    model = llama()
    plan = kvmix_fx.KVPlan.uniform(model, 2, window=16)
    kvmix_fx.compile(model, plan, inner="eager")
    cache = integration.KVMixStaticCache(plan, model.config, 100)
    with pytest.raises(CapacityError, match="exceed the capacity of 100"):
        generate(model, torch.randint(1, 60, (1, 95)), past_key_values=cache)


def test_a_cache_used_again_knows_nothing_of_what_it_held(on_cpu):
    """Even of NaN, which a mask would let through."""
    model = llama()
    plan = kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=8).for_model(model)
    kvmix_fx.compile(model, plan, inner="eager")
    ids = torch.randint(1, 60, (2, 70))

    def logits(cache):
        with torch.no_grad():
            first = model(ids[:, :60], past_key_values=cache).logits
            return torch.cat([first, *(model(ids[:, i : i + 1], past_key_values=cache).logits
                                       for i in range(60, 70))], 1)  # fmt: skip

    cache = integration.KVMixStaticCache(plan, model.config, 128)
    expected = logits(cache)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            tensor.residual.fill_(float("nan"))
            tensor.qdata.fill_(-1)
    again = integration.KVMixStaticCache.over(plan, cache.layers)
    assert again.get_seq_length() == 0
    assert again.layers[0].keys.live.item() == 0
    assert again.layers[0].keys.qdata is cache.layers[0].keys.qdata
    torch.testing.assert_close(logits(again), expected, atol=0, rtol=0)


def test_dropped_caches_of_many_batch_sizes_do_not_pile_up():
    model = llama()
    caches = GenerationCaches(model, kvmix_fx.KVPlan.uniform(model, 4).for_model(model))
    held = [caches.new(batch, 100) for batch in range(1, 8)]
    newest = held[-1].layers
    while held:
        del held[0]
    gc.collect()
    assert 1 <= len(caches._free) <= recording.MAX_ENTRIES
    assert caches.new(7, 100).layers is newest


def test_a_backend_used_by_itself_keeps_no_calls(on_cpu):
    """Nobody would empty the list, and it would hold every cache that was ever used."""
    model = llama()
    plan = kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16)
    backend = KVMixBackend(plan)
    step = torch.compile(model.forward, backend=backend)
    kvmix_fx.compile(model, plan)
    cache = integration.KVMixStaticCache(plan, model.config, 128)
    with torch.no_grad():
        model(torch.randint(1, 60, (1, 40)), past_key_values=cache)
        # one step: the recorder of this file keeps what it has recorded, a CUDA graph does not
        step(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)
    assert [graph.replay for graph in backend.report.graphs] == [""]
    alive = torch.utils.weak.WeakIdRef(cache.layers[0].keys.qdata)
    del cache
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kwargs", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}])
def test_other_ways_of_generating_keep_their_own_cache(on_cpu, kwargs):
    model = llama()
    ids = torch.randint(1, 60, (1, 40))
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16))
    out = model.generate(ids, do_sample=False, max_new_tokens=6, return_dict_in_generate=True, **kwargs)
    assert not isinstance(out.past_key_values, integration.KVMixStaticCache)


def test_restore_gives_generate_its_own_cache_back(on_cpu):
    model = llama()
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16))
    kvmix_fx.restore(model)
    assert "_prepare_cache_for_generation" not in vars(model)
    _, out = generate(model, torch.randint(1, 60, (1, 8)))
    assert not isinstance(out.past_key_values, integration.KVMixStaticCache)


def test_what_changes_within_generate_is_noticed(on_cpu):
    """The shortcut past the guards serves only steps that are like the last one."""
    model = llama()
    plan = kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=4)
    ids = torch.randint(1, 60, (1, 50))
    other = torch.randint(1, 60, (1, 30))

    class Meddle:
        """Between two steps, use the model for something else, as guidance by a second prompt does."""

        def __init__(self):
            self.past = None

        def __call__(self, input_ids, scores):
            new = other if self.past is None else input_ids[:, -1:]
            out = model(new, past_key_values=self.past, use_cache=True)
            self.past = out.past_key_values
            return scores + out.logits[:, -1]

    kvmix_fx.compile(model, plan, options={"cuda_graphs": False})
    want, _ = generate(model, ids, logits_processor=[Meddle()])
    kvmix_fx.compile(model, plan)
    got, _ = generate(model, ids, logits_processor=[Meddle()])
    torch.testing.assert_close(got, want)


def test_plain_loops_take_no_shortcut(on_cpu):
    """Outside generate() a model may be changed between two steps."""
    model = llama()
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=4))
    ids = torch.randint(1, 60, (1, 50))
    cache = integration.KVMixStaticCache(kvmix_fx.compiled(model).plan, model.config, 128)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for _ in range(5):
            before = model(ids[:, :1], past_key_values=cache).logits
        model.model.norm.variance_epsilon = 1e20
        after = model(ids[:, :1], past_key_values=cache).logits
    assert on_cpu.replayed >= 3
    assert before.abs().max() > 1e-2
    assert after.abs().max() < 1e-8


def test_plain_loops_over_padded_prompts_are_replayed(on_cpu):
    """Their masks grow by a column in every step; a recording needs one shape."""
    model = llama()
    plan = kvmix_fx.KVPlan.uniform(model, 2, window=16)
    ids = torch.randint(1, 128, (2, 90), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[0, :7] = mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def loop(past):
        logits = []
        with torch.no_grad():
            for first, last in ((0, 60), *((i, i + 1) for i in range(60, 90))):
                out = model(
                    ids[:, first:last], attention_mask=mask[:, :last], past_key_values=past,
                    position_ids=positions[:, first:last],
                )  # fmt: skip
                past = out.past_key_values
                logits.append(out.logits[:, -1])
        return torch.stack(logits)

    plain = loop(None)
    kvmix_fx.compile(model, plan, inner="eager")
    grown = loop(None)
    assert on_cpu.replayed == 0
    fixed = loop(integration.KVMixStaticCache(plan, model.config, 90))
    assert (on_cpu.recorded, on_cpu.replayed) == (1, 28)
    torch.testing.assert_close(fixed, grown, atol=2e-4, rtol=1e-4)
    assert (plain - fixed).abs().max() > 0.02


@pytest.fixture
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_torch_says_before_it_destroys_a_process_group(group):
    """What the release of recordings leans on."""
    heard = []

    def callback():
        heard.append(torch.distributed.is_initialized())

    assert parallel.tells_of_end()
    for _ in range(2):
        parallel.before_groups_end(callback)
    torch.distributed.destroy_process_group()
    assert heard == [True]


def test_recordings_are_released_before_the_process_group_goes(group, recorder):
    parallel.before_groups_end(recording.release_all)
    released = []

    def record(run, inputs):
        return recorder(run, inputs)._replace(release=lambda: released.append(1))

    run = recording.Replayed(lambda weight, cache: [cache.add_(weight)], lambda i: i == 1, record)
    weight, cache = torch.ones(2), torch.zeros(2)
    for _ in range(4):
        run(weight, cache)
    assert (recorder.recorded, recorder.replayed, released) == (1, 2, [])
    torch.distributed.destroy_process_group()
    assert released == [1]
    # steps go on, and would be recorded anew
    for _ in range(3):
        run(weight, cache)
    assert (recorder.recorded, recorder.replayed) == (2, 3)
    torch.testing.assert_close(cache, torch.full((2,), 7.0))


def test_steps_that_cannot_be_released_in_time_are_recorded_only_on_demand(monkeypatch, on_cpu):
    model = tiny_llama(num_hidden_layers=1)
    plan = kvmix_fx.KVPlan.uniform(model, 4, 2, group_size=16, window=8)
    ids = torch.randint(1, 100, (2, 40))

    def decode(**options):
        kvmix_fx.compile(model, plan, **options)
        model.generate(ids, max_new_tokens=2, do_sample=False)
        return kvmix_fx.compiled(model).report.graphs[-1].replay

    monkeypatch.setattr("kvmix_fx.backend.process_group_size", lambda: 2)
    monkeypatch.setattr("kvmix_fx.backend.tells_of_end", lambda: False)
    assert "destroy_process_group" in decode()
    assert decode(options={"cuda_graphs": True}) == ""
    monkeypatch.setattr("kvmix_fx.backend.tells_of_end", lambda: True)
    heard = []
    monkeypatch.setattr("kvmix_fx.backend.before_groups_end", heard.append)
    assert decode() == ""
    assert set(heard) == {recording.release_all}
