"""generate() over packed caches, judged on raw logits against an oracle, with a control that must fail."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.integrations.transformers import KVMixCache, KVMixStaticCache
from kvmix_fx.plan import QuantSpec
from kvmix_fx.testing.graphs import count_ops
from kvmix_fx.testing.models import tiny_llama
from kvmix_kernels import layout, ops

from .marks import needs_installed
from .oracle import OracleCache, worst

NEW = 60
NOISE = 2e-4
DAMAGE = 0.02


def plan_for(model, **kwargs):
    plan = kvmix_fx.KVPlan.uniform(model, 2, 2, window=16, sink_length=0, **kwargs)
    return plan.with_layers("last:1", key=4, value=3)


def prompt(rows=2, length=70):
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(3))


def padded(rows=2, length=70, pad=25):
    ids = prompt(rows, length)
    ids[0, :pad] = 0
    return ids, (torch.arange(length) >= pad) | (torch.arange(rows)[:, None] > 0)


def generate(model, ids, mask=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    mask = torch.ones_like(ids) if mask is None else mask.long()
    settings = {"max_new_tokens": NEW, "do_sample": False} | kwargs
    return model.generate(
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings
    )


def skip_if_inductor_cannot(static):
    """Without kvmix, torch.compile(model) fails likewise: the C++ uses a name that was never declared."""
    if torch.__version__ < "2.13" and not static:
        pytest.skip(
            "Inductor of this torch writes wrong C++ for the mask of a growing cache, also without kvmix"
        )


# ways that share a trace are tried on one compiled model: tracing it takes longer than all of them
CASES = {
    "growing": {
        "greedy": ({}, False),
        "left padded": ({}, True),
        "sampling": ({"do_sample": True, "temperature": 1.5}, False),
        "several returns": ({"do_sample": True, "num_return_sequences": 3}, False),
        "beams": ({"num_beams": 3}, False),
        "padded beams": ({"num_beams": 2, "num_return_sequences": 2}, True),
        "greedy once more": ({}, False),
    },
    "chunked": {"chunked prefill": ({"prefill_chunk_size": 30}, False)},
    "static": {
        "static": ({"cache_implementation": "static"}, False),
        "static, left padded": ({"cache_implementation": "static"}, True),
        "static beams": ({"cache_implementation": "static", "num_beams": 2}, False),
    },
    "one row": {"prompt lookup": ({"prompt_lookup_num_tokens": 4}, False)},
}


@pytest.mark.parametrize("group", CASES)
def test_logits_equal_the_oracle(group, subtests):
    model, uncompiled = tiny_llama(), tiny_llama()
    plan = plan_for(model)
    kvmix_fx.compile(model, plan, inner="eager")
    for case, (kwargs, pads) in CASES[group].items():
        with subtests.test(case):
            check_logits(case, kwargs, pads, model, uncompiled, plan)
    report = kvmix_fx.compiled(model).report
    assert report.rewritten_layers() == [0, 1]
    assert not report.skipped()


def check_logits(case, kwargs, pads, model, uncompiled, plan):
    rows = 1 if case == "prompt lookup" else 2
    ids, mask = padded() if pads else (prompt(rows), None)
    if case == "prompt lookup":
        ids = ids[:, :23].repeat(1, 3)  # something to look up
    plain = generate(uncompiled, ids, mask, **kwargs)
    repeat = kwargs.get("num_beams", 1) if "num_beams" in kwargs else kwargs.get("num_return_sequences", 1)
    valid = None
    if mask is not None:
        valid = torch.cat([mask, torch.ones(ids.shape[0], NEW, dtype=torch.bool)], 1).repeat_interleave(
            repeat, 0
        )
    same = {k: v for k, v in kwargs.items() if k != "cache_implementation"}
    want = generate(uncompiled, ids, mask, past_key_values=OracleCache(plan, valid), **same)
    got = generate(model, ids, mask, **kwargs)
    assert torch.equal(got.sequences, want.sequences)
    assert worst(got.logits, want.logits) < NOISE
    # the control: the unquantized run must differ, else this test could not see a cache left unpacked
    assert worst(plain.logits, want.logits) > DAMAGE
    assert all(isinstance(layer.keys, QuantizedKVTensor) for layer in got.past_key_values.layers)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_cache_object_handed_in(kind, compiled):
    model = tiny_llama()
    plan = plan_for(model)
    ids = prompt()
    want = generate(model, ids, past_key_values=OracleCache(plan))
    cache = (
        KVMixCache(plan, model.config)
        if kind == "growing"
        else KVMixStaticCache(plan, model.config, 70 + NEW)
    )
    if compiled:
        kvmix_fx.compile(model, plan, inner="eager")
    got = generate(model, ids, past_key_values=cache)
    if compiled:
        assert worst(got.logits, want.logits) < NOISE
    else:
        # without the pass a step flushes before it attends, one step earlier than the oracle
        before_first_flush = 16 + 2 * 32 - 70
        assert worst(got.logits[:before_first_flush], want.logits[:before_first_flush]) < NOISE
    assert got.past_key_values is cache


def test_no_recompiles_while_the_sequence_grows_or_prompts_change():
    model = tiny_llama()
    kvmix_fx.compile(model, plan_for(model), inner="eager")
    report = kvmix_fx.compiled(model).report
    generate(model, prompt())
    assert len(report.graphs) == 2  # prefill and decode
    for length in (40, 200, 71):
        generate(model, prompt(2, length), max_new_tokens=150)
    assert len(report.graphs) == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    generate(model, prompt(), cache_implementation="static")
    assert len(report.graphs) == 4
    for length in (40, 90):
        generate(model, prompt(2, length), cache_implementation="static", max_new_tokens=170 - length)
    generate(model, prompt(), cache_implementation="static", max_new_tokens=300)
    assert len(report.graphs) == 4


def test_streaming_and_continuing_a_conversation():
    from transformers import TextIteratorStreamer

    class Words:
        def decode(self, tokens, **kwargs):
            return " ".join(str(int(t)) for t in tokens) + " "

    model = tiny_llama()
    plan = plan_for(model)
    ids = prompt(1)
    oracle = OracleCache(plan)
    first = generate(model, ids, past_key_values=oracle)
    more = torch.cat([first.sequences, prompt(1, 45)], 1)
    want = generate(model, more, past_key_values=oracle)
    kvmix_fx.compile(model, plan, inner="eager")
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    got = generate(model, ids, streamer=streamer)
    assert "".join(streamer).split() == [str(t) for t in first.sequences[0, 70:].tolist()]
    again = generate(model, more, past_key_values=got.past_key_values)
    assert worst(again.logits, want.logits) < NOISE
    assert again.past_key_values.layers[0].keys.shape[2] == more.shape[1] + NEW - 1


def test_one_prompt_token():
    # float64: elsewhere a code now and then rounds the other way, and here every token is decoded
    model = tiny_llama().double()
    plan = plan_for(model)
    ids = prompt(1, 1)
    want = generate(model, ids, past_key_values=OracleCache(plan), max_new_tokens=80)
    kvmix_fx.compile(model, plan, inner="eager")
    got = generate(model, ids, max_new_tokens=80)
    assert worst(got.logits, want.logits) < NOISE


def test_assisted_decoding():
    model, helper = tiny_llama(), tiny_llama(1, num_hidden_layers=1)
    plan = plan_for(model)
    ids = prompt(1)
    plain = generate(model, ids)
    want = generate(model, ids, past_key_values=OracleCache(plan))
    kvmix_fx.compile(model, plan, inner="eager")
    got = generate(model, ids, assistant_model=helper)
    assert worst(got.logits[:10], want.logits[:10]) < NOISE
    assert worst(plain.logits[:10], want.logits[:10]) > DAMAGE


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("static", [False, True])
def test_other_inner_compilers(inner, static):
    # one layer: its kernels are those of every layer, and compiling C++ takes longest
    model = tiny_llama(num_hidden_layers=1)
    plan = kvmix_fx.KVPlan.uniform(model, 2, 3, window=16)
    ids, mask = padded()
    kwargs = {"max_new_tokens": 50}
    valid = torch.cat([mask, torch.ones(2, 50, dtype=torch.bool)], 1)
    want = generate(model, ids, mask, past_key_values=OracleCache(plan, valid), **kwargs)
    if static:
        kwargs["cache_implementation"] = "static"
    if inner == "inductor":
        skip_if_inductor_cannot(static)
    kvmix_fx.compile(model, plan, inner=inner)
    got = generate(model, ids, mask, **kwargs)
    assert worst(got.logits, want.logits) < NOISE
    assert len(kvmix_fx.compiled(model).report.graphs) == 2


def test_an_all_16_plan_changes_nothing():
    model = tiny_llama()
    ids = prompt()
    want = generate(model, ids)
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 16), inner="eager")
    got = generate(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


@pytest.mark.parametrize("static", [False, True])
def test_an_all_16_plan_changes_nothing_but_float_noise_with_inductor(static):
    skip_if_inductor_cannot(static)
    model = tiny_llama(num_hidden_layers=1)
    ids = prompt()
    want = generate(model, ids, max_new_tokens=12)
    kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 16), inner="inductor")
    got = generate(model, ids, max_new_tokens=12, **({"cache_implementation": "static"} if static else {}))
    assert worst(got.logits, want.logits) < 1e-5


def test_a_second_plan_never_reuses_the_first_ones_code():
    model = tiny_llama(num_hidden_layers=1)
    ids = prompt()
    for bits in (2, 8, 4):
        plan = kvmix_fx.KVPlan.uniform(model, bits, window=16)
        kvmix_fx.restore(model)
        want = generate(model, ids, past_key_values=OracleCache(plan))
        kvmix_fx.compile(model, plan, inner="eager")
        got = generate(model, ids)
        assert worst(got.logits, want.logits) < NOISE
        assert got.past_key_values.layers[0].keys.format.bits == bits


def test_restore_brings_back_the_unquantized_model():
    model = tiny_llama()
    before = dict(vars(model))
    ids = prompt()
    want = generate(model, ids)
    kvmix_fx.compile(model, plan_for(model), inner="eager")
    kvmix_fx.restore(model)
    assert vars(model) == before
    got = generate(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


@needs_installed
def test_the_backend_by_name():
    model = tiny_llama()
    plan = plan_for(model)
    ids = prompt()
    want = generate(model, ids, past_key_values=OracleCache(plan))
    model.compile(backend="kvmix", options={"plan": plan, "inner": "eager"})
    got = generate(model, ids)
    assert worst(got.logits, want.logits) < NOISE


def test_cache_bytes_are_what_the_plan_says():
    model = tiny_llama()
    plan = plan_for(model).for_model(model)
    kvmix_fx.compile(model, plan, inner="eager")
    for cache, kwargs in (("growing", {}), ("fixed", {"cache_implementation": "static"})):
        out = generate(model, prompt(), **kwargs).past_key_values
        allocated = sum(t.packed_nbytes for layer in out.layers for t in (layer.keys, layer.values))
        length = 70 + NEW - 1 if cache == "growing" else out.layers[0].max_cache_len
        assert allocated == plan.nbytes(2, length, itemsize=4, cache=cache)


def test_explain_lists_every_site_and_changes_nothing():
    model = tiny_llama()
    before = dict(vars(model))
    report = kvmix_fx.explain(model, prompt(), plan_for(model))
    assert [(s.layer, s.key_bits, s.value_bits) for s in report.graphs[1].sites] == [(0, 2, 2), (1, 4, 3)]
    assert all(s.bytes_per_token for s in report.sites)
    assert "layer 1: " in str(report)
    assert vars(model) == before


@pytest.mark.parametrize("raw", [0, 1])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", ["growing", "static", "fixed"])
def test_layers_at_16_bits_beside_packed_ones(raw, rows, kind):
    model = tiny_llama()
    plan = kvmix_fx.KVPlan.uniform(model, 2, window=16).with_layers(raw, key=16, value=16)
    ids = prompt(rows)
    plain = generate(model, ids)
    want = generate(model, ids, past_key_values=OracleCache(plan))
    graphs = []

    def inner(gm, _inputs):
        graphs.append(gm)
        return gm

    kvmix_fx.compile(model, plan, inner=inner)
    settings = {
        "growing": {},
        "static": {"cache_implementation": "static"},
        "fixed": {"past_key_values": KVMixStaticCache(plan, model.config, 70 + NEW)},
    }[kind]
    got = generate(model, ids, **settings)
    assert worst(got.logits, want.logits) < NOISE
    assert worst(plain.logits, want.logits) > DAMAGE
    report = kvmix_fx.compiled(model).report
    assert report.rewritten_layers() == [1 - raw]
    assert {(s.layer, s.reason) for s in report.skipped()} == {(raw, "the plan keeps this layer at 16 bits")}
    assert len(report.graphs) == 2
    # the masks of plain layers ask the first layer for its size; that must not unpack it
    assert not any(count_ops(gm, ops.dequantize) for gm in graphs)
    assert any(count_ops(gm, ops.attend) for gm in graphs)


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_tiles_are_ordered_by_the_queries_of_all_steps(kind):
    """The first layer's queries and keys are those of the plain model: its tiles must be ordered by them."""
    model = tiny_llama(num_hidden_layers=1)
    ids = prompt(2)
    keys = QuantSpec(4, "channel", 16, tiers=((16, 8), (4, 8), (2, 16)), order="tile")
    plan = kvmix_fx.KVPlan.uniform(model, 2).with_layers("all", key=keys, window=8)
    kvmix_fx.compile(model, plan, inner="eager")
    options = {"cache_implementation": "static"} if kind == "static" else {}
    out = generate(model, ids, **options)
    packed = out.past_key_values.layers[0].keys
    stored = packed.stored_tokens()
    assert stored == ids.shape[1] + NEW - 1

    heard = []

    def listen(module, query, key, *args, **kwargs):
        heard.append((query, key))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("listening", listen)
    plain = tiny_llama(num_hidden_layers=1)
    plain.set_attn_implementation("listening")
    with torch.no_grad():
        plain(out.sequences[:, :stored])
    (query, key), fmt = heard[0], packed.format
    tiles = fmt.packed_tiles(stored)
    assert tiles == 3  # of which the prompt packs one
    orders = {}
    for order in (layout.ORDER_TILE, layout.ORDER_TILE_KEYS):
        wanted = ops.quantize_pack(key, None, fmt._replace(order=order).encode(), query)
        orders[order] = wanted[4][:, :, :tiles]
    same = {
        order: (packed.cached.order[:, :, :tiles] == other).float().mean() for order, other in orders.items()
    }
    # two channels that are nearly as important may change places
    assert same[layout.ORDER_TILE] > 0.95
    assert same[layout.ORDER_TILE_KEYS] < 0.6  # the control: without the queries it is another order


def test_a_model_may_be_used_in_many_ways():
    """More graphs than PyTorch's default limit of 8: gradient modes, caches, capacities, ways of calling."""
    model = tiny_llama(num_hidden_layers=1)
    plan = kvmix_fx.KVPlan.uniform(model, 2, window=16)
    ids = prompt()
    kvmix_fx.compile(model, plan, inner="eager")
    want = generate(model, ids)
    with torch.inference_mode():
        got = generate(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    for new in (20, 30, 40, 50):
        generate(model, ids, cache_implementation="static", max_new_tokens=new)
    with torch.no_grad():
        out = model(ids)
        past = model(ids[:, :1].contiguous(), past_key_values=out.past_key_values).past_key_values
        past.crop(-5)
        assert isinstance(past.layers[0].keys, QuantizedKVTensor)
        past = model(ids[:, :1].contiguous(), past_key_values=past).past_key_values
        assert past.layers[0].keys.shape[2] == 67
        past.batch_repeat_interleave(2)
        past = model(ids.repeat_interleave(2, 0)[:, :1].contiguous(), past_key_values=past).past_key_values
        past.batch_select_indices(torch.tensor([0, 3]))
        past = model(ids[:, :1].contiguous(), past_key_values=past).past_key_values
        assert past.layers[0].keys.shape[:3] == (2, 2, 69)
        past.reset()
        # later releases of transformers let go of them
        left = past.layers[0].keys
        assert left is None or not left.dequantize().any()
    assert len(kvmix_fx.compiled(model).report.graphs) > 8
