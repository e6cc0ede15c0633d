"""How an attention launch is cut: arithmetic that needs neither a GPU nor Triton's interpreter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmix_fx.testing.tensors import formats
from kvmix_kernels.layout import make_format
from kvmix_kernels.triton import launch_plan
from kvmix_kernels.triton.configs import AttendConfig, Gpu
from kvmix_kernels.triton.launch_plan import Step, attend_plan

steps = st.builds(
    Step,
    heads=st.integers(1, 600),
    rows=st.integers(1, 300),
    D=st.just(64),
    Dv=st.just(64),
    length=st.integers(0, 200_000),
    new=st.integers(0, 40),
    positive=st.booleans(),
    half=st.booleans(),
    alike=st.booleans(),
)
gpus = st.sampled_from((Gpu(), Gpu("NVIDIA_H100_80GB_HBM3"), Gpu("NVIDIA_H100_80GB_HBM3", 46)))


@given(formats(64), formats(64), steps, gpus)
def test_every_query_row_and_every_group_has_a_program(k, v, step, gpu):
    plan = attend_plan(k, v, step, gpu)
    assert plan.columns * plan.column_blocks >= step.rows > plan.columns * (plan.column_blocks - 1)
    assert plan.splits > plan.bulk_splits or step.length + step.new == 0
    assert plan.merge_splits >= plan.splits
    assert plan.merge_chunk <= plan.merge_splits
    if plan.bulk:
        groups = launch_plan._bulk_groups(k, v, step.length, plan.unit)
        share = -(-groups // plan.bulk_splits)
        # an empty share costs a program for nothing
        assert 0 < plan.bulk_splits <= groups
        # the offsets of a share fit into its scratch, in whole parts
        assert plan.room >= share
        assert plan.room % plan.part == 0
        assert plan.scratch == plan.room + (step.D if k.order else 0)
        assert plan.tokens % plan.unit == 0 or plan.unit % plan.tokens == 0
    else:
        assert plan.bulk_splits == plan.room == plan.scratch == 0
    assert plan.bulk or not plan.merge_rotated


@given(formats(64), formats(64), steps)
def test_only_scores_that_grow_with_products_take_the_fast_path(k, v, step):
    assert not attend_plan(k, v, step._replace(positive=False), Gpu()).bulk


@given(formats(64), steps)
def test_raw_tokens_alone_are_never_read_as_packed(v, step):
    raw = make_format(16)
    assert not attend_plan(raw, raw, step, Gpu()).rest_packed
    assert attend_plan(raw, v, step, Gpu()).rest_packed is not v.is_raw


def test_raw_tokens_fit_into_less_shared_memory():
    raw = make_format(16)
    for size in (64, 128, 256):
        step = Step(64, 4, size, size, 8192, 1, True, True, True)
        own = attend_plan(raw, raw, step, Gpu("NVIDIA_H100_80GB_HBM3"))
        less = attend_plan(raw, raw, step, Gpu("NVIDIA_H100_80GB_HBM3", 58, 101376))
        stages, tokens = less.rest_stages, less.rest_tokens
        assert (stages + 2) * tokens * 2 * size * 2 < 101376
        assert (stages, tokens) <= (own.rest_stages, own.rest_tokens)
    assert (own.rest_stages, own.rest_tokens) == (3, 32)


def test_a_config_that_is_given_wins_over_the_tuned_one():
    k, v = make_format(2, "channel", 128, 128), make_format(2, "token", 0, 128)
    step = Step(512, 4, 64, 64, 8192, 1, True, True, True)
    config = AttendConfig(tokens=64, warps=8, stages=4, programs=77, max_groups=3)
    plan = attend_plan(k, v, step, Gpu(), config)
    assert (plan.tokens, plan.warps, plan.stages) == (64, 8, 4)
    assert plan != attend_plan(k, v, step, Gpu())
    # more groups than the programs can take in shares of three need more programs
    assert plan.bulk_splits == -(-63 // 3)


def test_shares_of_the_case_that_is_quoted_most():
    k, v = make_format(2, "channel", 128, 128, window=0), make_format(2, "token", 0, 128, window=0)
    step = Step(512, 4, 128, 128, 8193, 1, True, True, True)
    plan = attend_plan(k, v, step, Gpu("NVIDIA_H100_80GB_HBM3"))
    assert plan.bulk
    assert plan.spread == 1
    assert (plan.columns, plan.column_blocks) == (8, 1)
    # 64 groups in equal shares, and one program for what is not packed
    assert 64 % plan.bulk_splits == 0
    assert plan.splits == plan.bulk_splits + 2


def test_keys_with_scales_per_token_are_shared_out_as_those_in_groups_of_128():
    step, gpu = Step(512, 4, 128, 128, 8193, 1, True, True, True), Gpu("NVIDIA_H200")
    grouped = make_format(2, "channel", 128, 128, window=0)
    for tile in (128, 32):
        v = make_format(2, "token", 64, tile, window=0)
        plan, like = (attend_plan(k, v._replace(tile=k.tile), step, gpu) for k in (v, grouped))
        assert (plan.bulk, plan.unit) == (True, tile)
        # steps may have several tiles, and are of no more numbers than a warp has registers for
        assert (plan.tokens, like.tokens) == (64, 128)
        assert plan.bulk_splits == like.bulk_splits == 2


def test_raw_tokens_are_shared_out_where_programs_are_few():
    k = make_format(2, "channel", 128, 128, 4, 128)
    v = make_format(2, "token", 0, 128, 4, 128)
    gpu = Gpu("NVIDIA_H200")
    plans = [
        attend_plan(k, v, Step(heads, 4, 128, 128, 8193, 1, True, True, True), gpu) for heads in (8, 128, 512)
    ]
    # sink, window, a tile not yet full and the step's own: 261 tokens
    assert [plan.splits - plan.bulk_splits for plan in plans] == [9, 5, 3]


def test_a_long_window_takes_no_more_programs_than_there_are():
    assert launch_plan.shares_of_rest(4357, 64, 1056) == 35
    assert launch_plan.shares_of_rest(4357, 8, 1056) == 88
