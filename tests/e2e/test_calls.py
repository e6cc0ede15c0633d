"""Ways to call a model that are not `generate()` under no_grad: each as the plain model's, or refused."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch._dynamo.exc import Unsupported
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

import kvmix_fx
from kvmix_fx import errors
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.integrations.transformers import KVMixCache, KVMixStaticCache
from kvmix_fx.testing.models import tiny_llama

IDS = torch.randint(1, 128, (2, 74), generator=torch.Generator().manual_seed(3))
PROMPT, STEP = IDS[:, :70].contiguous(), IDS[:, 70:71].contiguous()


def packed(model=None, bits=8, **options):
    model = tiny_llama(num_hidden_layers=1) if model is None else model
    return kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, bits, window=16), inner="eager", **options)


def plain():
    return tiny_llama(num_hidden_layers=1)


# gradients on, and arguments left out


def test_a_cache_that_nobody_asked_for_is_plain_and_exact_where_gradients_are_on():
    model = packed(bits=2)
    with pytest.warns(errors.PlainCacheWarning, match="no_grad"):
        out = model(PROMPT)
    assert type(out.past_key_values.layers[0].keys) is torch.Tensor
    assert out.logits.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.PlainCacheWarning)  # once is enough
        got = model(STEP, past_key_values=out.past_key_values).logits
    whole = plain()(IDS[:, :71]).logits[:, -1:]
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-4)
    assert (got - plain()(STEP).logits).abs().max() > 1e-3


def test_a_config_that_says_no_cache_is_followed():
    model = plain()
    model.config.use_cache = False
    packed(model, on_nothing="ignore")
    assert model(PROMPT).past_key_values is None
    with torch.no_grad():
        assert model(PROMPT).past_key_values is None
        assert isinstance(model(PROMPT, use_cache=True).past_key_values.layers[0].keys, QuantizedKVTensor)


def test_a_plain_cache_made_with_gradients_is_packed_when_it_goes_on_without():
    model = packed(bits=2)
    with pytest.warns(errors.PlainCacheWarning):
        past = model(PROMPT).past_key_values
    with torch.no_grad():
        model(STEP, past_key_values=past)
    assert isinstance(past.layers[0].keys, QuantizedKVTensor)


@pytest.mark.parametrize("kind", ["growing", "fixed", "filled", "position"])
def test_a_packed_cache_is_refused_where_gradients_are_on(kind):
    model = packed()
    plan = kvmix_fx.compiled(model).plan
    if kind == "growing":
        past = KVMixCache(plan, model.config)
    elif kind == "fixed":
        past = KVMixStaticCache(plan, model.config, 80)
    else:
        with torch.no_grad():
            past = model(PROMPT).past_key_values
    with pytest.raises(errors.TrainingError, match="no_grad"):
        model(STEP, None, None, past) if kind == "position" else model(STEP, past_key_values=past)


# inference mode


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_cache_made_in_inference_mode_goes_on_outside(kind, n):
    logits, model = [], packed()
    for outside in (torch.no_grad, torch.inference_mode):
        past = None
        if kind == "fixed":
            past = KVMixStaticCache(kvmix_fx.compiled(model).plan, model.config, 80)
        with torch.inference_mode():
            past = model(PROMPT, past_key_values=past, use_cache=True).past_key_values
        with outside():
            for i in range(2):
                step = IDS[:, 70 + i : 70 + i + n].contiguous()
                out = model(step, past_key_values=past)
        assert past.layers[0].keys.stored_tokens() == 70 + 2 * n
        assert isinstance(past.layers[0].keys, QuantizedKVTensor)
        logits.append(out.logits)
    torch.testing.assert_close(*logits)


def test_a_cache_made_outside_goes_on_in_inference_mode_and_outside_again():
    model, want = packed(), plain()
    for one in (model, want):
        past, logits = None, []
        for context, first, last in (
            (torch.no_grad, 0, 70),
            (torch.inference_mode, 70, 71),
            (torch.no_grad, 71, 72),
        ):
            with context():
                out = one(IDS[:, first:last].contiguous(), past_key_values=past, use_cache=True)
            past = out.past_key_values
        logits.append(out.logits)
    assert isinstance(past.layers[0].keys, torch.Tensor)
    torch.testing.assert_close(out.logits.clone(), logits[-1].clone(), atol=0.05, rtol=0)


# what else a call can ask for


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_are_those_of_the_plain_model(attention):
    kwargs = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    answers = []
    for compiled in (True, False):
        model = plain()
        model.set_attn_implementation(attention)
        if compiled:
            packed(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", errors.GraphBreakWarning)
            mask = torch.ones_like(PROMPT)
            answers.append(model.generate(PROMPT, attention_mask=mask, output_hidden_states=True, **kwargs))
    got, want = answers
    assert isinstance(got.past_key_values.layers[0].keys, QuantizedKVTensor)
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert len(a) == len(b) == 2
        torch.testing.assert_close(a[-1], b[-1], atol=0.02, rtol=0.02)
    assert (want.hidden_states[1][-1] - want.hidden_states[2][-1]).abs().max() > 0.1


def test_attention_weights_over_a_packed_cache_are_those_of_what_it_holds():
    model = plain()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        past = model(PROMPT, use_cache=True).past_key_values
        (want,) = model(STEP, past_key_values=past, output_attentions=True).attentions
        packed(model)
        past = model(PROMPT, use_cache=True).past_key_values
        (got,) = model(STEP, past_key_values=past, output_attentions=True).attentions
        assert past.layers[0].keys.shape[2] == 71
        torch.testing.assert_close(got, want, atol=2e-3, rtol=0)
        assert want.std() > 8e-3
        # the step that packs it gives its own exact ones
        past = packed(model)(PROMPT, use_cache=True, output_attentions=True).past_key_values
        assert isinstance(past.layers[0].keys, QuantizedKVTensor)


# dtypes


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=2, vocab_size=128, n_positions=128, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config).eval()


def float_embeddings():
    model = plain().to(torch.bfloat16)
    model.model.embed_tokens.float().register_forward_hook(lambda m, i, o: o.to(torch.bfloat16))
    return model


def float_norms():
    model = plain().to(torch.bfloat16)
    model.model.norm.float()
    model.lm_head.float()
    return model


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("make", [gpt2, float_embeddings, float_norms])
def test_a_cache_has_the_dtype_of_keys_not_of_the_first_weight(make, fixed):
    model = make()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=make is gpt2)
    with autocast, torch.no_grad():
        past = model(PROMPT, use_cache=True).past_key_values
        want = model(STEP, past_key_values=past).logits.float()
        alone = model(STEP).logits.float()
        packed(model)
        past = KVMixStaticCache(kvmix_fx.compiled(model).plan, model.config, 80) if fixed else None
        past = model(PROMPT, past_key_values=past, use_cache=True).past_key_values
        got = model(STEP, past_key_values=past).logits.float()
    assert isinstance(past.layers[0].keys, QuantizedKVTensor)
    assert past.layers[0].keys.dtype == torch.bfloat16
    assert (got - want).abs().max() < (got - alone).abs().max() / 4


def test_a_cache_that_goes_on_under_another_autocast_setting_is_refused():
    model = packed(gpt2())
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            past = model(PROMPT, use_cache=True).past_key_values
        with pytest.raises(errors.CacheShapeError, match="dtype"):
            model(STEP, past_key_values=past)


# rope that looks at positions, code that cannot be traced


def rope(kind):
    if kind == "dynamic":
        parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    else:
        parameters = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
        parameters |= {"rope_theta": 1e4, "original_max_position_embeddings": 72, "factor": 4.0}
    return tiny_llama(num_hidden_layers=1, rope_parameters=parameters, max_position_embeddings=72)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_that_depends_on_positions_breaks_the_graph_and_stays_right(kind):
    """Past position 72 the frequencies change."""
    logits = []
    for compiled in (True, False):
        model = rope(kind)
        if compiled:
            packed(model)
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            past = model(PROMPT, use_cache=True).past_key_values
            for i in range(70, 74):
                out = model(IDS[:, i : i + 1].contiguous(), past_key_values=past)
        breaks = [str(w.message) for w in caught if w.category is errors.GraphBreakWarning]
        # later releases of transformers choose between the factors of longrope without a branch
        assert len(breaks) == compiled or (kind == "longrope" and not breaks)
        assert all("modeling_rope_utils.py:" in text and "fullgraph=False" in text for text in breaks)
        assert isinstance(past.layers[0].keys, QuantizedKVTensor) == compiled
        logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=0.02, rtol=0)
    with torch.no_grad():
        assert (logits[1] - tiny_llama(num_hidden_layers=1)(IDS).logits[:, -1:]).abs().max() > 0.02


def untraceable(model, loops=False):
    forward = model.model.layers[0].mlp.forward

    def printing(x):
        if not loops:
            torch._dynamo.graph_break()
        # as experts that somebody chose are gone through
        for i in (x[0, :, 0] > 0).nonzero() if loops else ():
            x = x + 0 * x[0, i]
        return forward(x)

    model.model.layers[0].mlp.forward = printing
    return model


@pytest.mark.parametrize("loops", [False, True])
def test_a_break_in_a_layer_is_told_once_and_only_if_nobody_said_so(loops):
    model = packed(untraceable(plain(), loops))
    with torch.no_grad():
        if loops:
            with pytest.warns(errors.GraphBreakWarning, match="data-dependent"):
                past = model(PROMPT, use_cache=True).past_key_values
            assert isinstance(past.layers[0].keys, QuantizedKVTensor)
            return
        with pytest.warns(errors.GraphBreakWarning, match=r"test_calls\.py:\d+"):
            past = model(PROMPT, use_cache=True).past_key_values
        with warnings.catch_warnings():
            warnings.simplefilter("error", errors.GraphBreakWarning)
            model(STEP, past_key_values=past)
            packed(untraceable(plain()), fullgraph=False)(PROMPT)
        with pytest.raises(Unsupported):
            packed(untraceable(plain()), fullgraph=True)(PROMPT)


# limits


def two_steps(model):
    past = model(PROMPT, use_cache=True).past_key_values
    model(STEP, past_key_values=past)
    return past.layers[0].keys


needs_limits_apart = pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="this torch counts all graphs of a function against one limit, which calls of ours raise to 64",
)


@needs_limits_apart
@torch.no_grad()
def test_plans_do_not_share_a_limit():
    """Nor with a plan that the model had before, and has again."""
    torch._dynamo.reset()
    model = plain()
    for bits in (2, 3, 2):
        assert two_steps(packed(model, bits, recompile_limit=2)).format.bits == bits


@needs_limits_apart
@torch.no_grad()
def test_models_of_a_class_do_not_share_a_limit():
    torch._dynamo.reset()
    models = [packed(plain(), bits, recompile_limit=2) for bits in (2, 4)]
    assert [two_steps(model).format.bits for model in (*models, *models)] == [2, 4, 2, 4]


@needs_limits_apart
@torch.no_grad()
def test_what_others_compile_and_a_packed_model_do_not_share_a_limit():
    torch._dynamo.reset()
    model = packed(plain(), recompile_limit=2)
    two_steps(model)
    foreign = torch.compile(plain().forward, backend="eager", recompile_limit=2, fullgraph=True)
    foreign(input_ids=PROMPT)
    assert isinstance(two_steps(model), QuantizedKVTensor)


# by position


@pytest.mark.parametrize("kind", ["none", "plain fixed", "fixed", "growing"])
def test_caches_and_masks_by_position_are_those_by_name(kind):
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    logits, model = [], packed()
    plan = kvmix_fx.compiled(model).plan
    for by_position in (True, False):
        past = {
            "none": None,
            "plain fixed": StaticCache(config=model.config, max_cache_len=74),
            "fixed": KVMixStaticCache(plan, model.config, 74),
            "growing": KVMixCache(plan, model.config),
        }[kind]
        with torch.no_grad():
            for first, last in ((0, 70), (70, 71), (71, 72)):
                ids, seen = IDS[:, first:last].contiguous(), mask[:, :last].contiguous()
                positions = (seen.cumsum(1) - 1).clamp(min=0)[:, first:].contiguous()
                if by_position:
                    out = model(ids, seen, positions, past, use_cache=True)
                else:
                    out = model(
                        ids, attention_mask=seen, position_ids=positions, past_key_values=past, use_cache=True
                    )
                past = out.past_key_values
        assert isinstance(past.layers[0].keys, QuantizedKVTensor)
        assert len(kvmix_fx.compiled(model).report.graphs) == 2
        logits.append(out.logits)
    torch.testing.assert_close(*logits)


# masks keep their meaning


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("mask", [None, "ones"])
def test_positions_that_start_again_mean_what_they_mean_to_the_plain_model(mask, use_cache):
    """Two texts in one row: without mask and cache the second does not see the first, with a mask it does."""
    positions = torch.cat([torch.arange(40), torch.arange(30)])[None].expand(2, -1).contiguous()
    given = {"attention_mask": None if mask is None else torch.ones_like(PROMPT), "use_cache": use_cache}
    with torch.no_grad():
        want = plain()(PROMPT, position_ids=positions, **given).logits
        model = packed()
        got = model(PROMPT, position_ids=positions, **given).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
        # positions that go on are another matter, and not confused with these
        got = model(PROMPT, position_ids=torch.arange(70)[None].expand(2, -1).contiguous(), **given).logits
        torch.testing.assert_close(got, plain()(PROMPT).logits, atol=1e-5, rtol=1e-4)
    assert (want - got).abs().max() > 1e-3


def padded(kind, rows, columns):
    """A mask that hides the first 9 tokens of row 0, for queries `rows` of `columns` tokens."""
    flat = torch.ones(2, columns, dtype=torch.long)
    flat[0, :9] = 0
    if kind in (torch.bool, torch.long, torch.float32):
        return flat.to(kind)
    queries = torch.arange(columns - rows, columns)[:, None]
    whole = (torch.arange(columns) <= queries) & flat.bool()[:, None, None, :]
    whole = whole | (torch.arange(columns) == queries)  # a row that sees nothing has no softmax
    return whole if kind == "4d bool" else torch.zeros(whole.shape).masked_fill(~whole, -1e9)


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32, "4d bool", "4d additive"])
def test_every_spelling_of_a_mask(kind):
    logits, alone = [], None
    for model in (plain(), packed()):
        with torch.no_grad():
            out = model(PROMPT, attention_mask=padded(kind, 70, 70), use_cache=True)
            past = out.past_key_values
            step = model(STEP, attention_mask=padded(kind, 1, 71), past_key_values=past)
            alone = alone if alone is not None else model(IDS[:, :71].contiguous()).logits[0, -1]
        logits.append((out.logits[:, 9:], step.logits))
    assert isinstance(past.layers[0].keys, QuantizedKVTensor)
    torch.testing.assert_close(logits[0][0], logits[1][0], atol=1e-5, rtol=1e-4)
    error = (logits[0][1] - logits[1][1]).abs().max()
    assert error < (logits[0][1][0, -1] - alone).abs().max() / 4


# torch.compile on top


@pytest.fixture(scope="module")
def answer():
    """Logits of a step, without another compiler around the model."""
    model = packed()
    with torch.no_grad():
        past = model(PROMPT, use_cache=True).past_key_values
        return model(STEP, past_key_values=past).logits


@pytest.mark.parametrize("outer", ["model", "forward", "function"])
def test_torch_compile_around_a_compiled_model_works(outer, answer):
    model = packed()
    if outer == "model":
        called = torch.compile(model, backend="eager")
    elif outer == "forward":
        called = model
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        called = torch.compile(lambda *a, **k: model(*a, **k), backend="eager")
    with torch.no_grad():
        past = called(PROMPT, use_cache=True).past_key_values
        got = called(STEP, past_key_values=past).logits
    assert isinstance(past.layers[0].keys, QuantizedKVTensor)
    torch.testing.assert_close(got, answer)


def test_torch_compile_around_it_as_one_graph_says_what_to_leave_out():
    called = torch.compile(packed(), backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Unsupported, match=r"leave out the outer torch\.compile"):
        called(PROMPT)
