"""Ranks of transformers' tensor parallelism against the same model on one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvmix_fx.parallel import Ranks
from kvmix_fx.plan import ModelGeometry
from kvmix_fx.testing.models import tiny_llama

from . import cases
from .running import ROOT, SECONDS, once, results, start

pytest.importorskip("accelerate", reason="transformers loads onto ranks with accelerate")
if not torch.distributed.is_available():
    pytest.skip("this build of torch has no torch.distributed", allow_module_level=True)

# the first test waits for all ranks
pytestmark = pytest.mark.timeout(SECONDS + 60)

EIGHT, TWO, MIXED = cases.PLANS
# all tests share one start
RUN = {
    2: [
        f"llama/growing/{EIGHT}",
        f"llama/growing/{TWO}",
        f"llama/fixed/{EIGHT}",
        f"llama/fixed/{TWO} and beams",
        "llama/profile",
        "smollm2/refused",
    ],
    3: [f"smollm2/growing/{TWO}"],
    4: [f"llama/fixed/{MIXED}", "few heads/refused"],
}
COMPARED = [
    (ranks, case.removesuffix(" and beams"))
    for ranks, run in RUN.items()
    for case in run
    if case.count("/") == 2
]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    def save(folder: Path):
        for name, make in cases.MODELS.items():
            make().save_pretrained(folder / name)
        tiny_llama().save_pretrained(folder / "few heads")  # 2 KV heads

    return once(tmp_path_factory, "models", save)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory, models):
    def of(count):
        module = "tests.distributed.worker"
        folder = once(tmp_path_factory, "ranks", lambda out: start(module, models, out, json.dumps(RUN)))
        return results(folder / str(count), count)

    return of


@pytest.fixture(scope="session")
def whole(tmp_path_factory, models):
    """The same on one process."""

    def of(case):
        from transformers import AutoModelForCausalLM

        name, cache, plan = case.split("/")

        def save(folder):
            model = AutoModelForCausalLM.from_pretrained(models / name).eval()
            beams = f"{case} and beams" in RUN[2]
            found = cases.run(model, cases.PLANS[plan](model), cache, beams)
            torch.save(found, folder / "rank0.pt")

        return results(once(tmp_path_factory, case.replace("/", "-").replace(" ", "-"), save), 1)[0]

    return of


def tolerance(plan):
    """Ranks add up in another order: a few of the many steps of 8 bits are rounded the other way."""
    return 0.02 if plan == EIGHT else 0.005


@pytest.mark.parametrize(("count", "case"), COMPARED)
def test_ranks_equal_one_process(ranks, whole, count, case):
    plan = case.split("/")[-1]
    found, want = [rank[case] for rank in ranks(count)], whole(case)
    # the control: other bits, otherwise the same; beams, which take long to compile, without any plan
    other = whole(case.replace(plan, TWO if plan == EIGHT else EIGHT))
    for run in found[0]["runs"]:
        tensors = want["runs"][run]
        for rank in found:
            got = rank["runs"][run]
            # every rank must choose the same next token
            assert torch.equal(got["logits"], found[0]["runs"][run]["logits"])
            assert torch.equal(got["tokens"], tensors["tokens"])
            torch.testing.assert_close(got["logits"], tensors["logits"], atol=tolerance(plan), rtol=0)
        control = other["runs"].get(run) or want["plain"][run]
        assert (control["logits"] - tensors["logits"]).abs().max() > 20 * tolerance(plan)
    assert all(rank["facts"]["layers"] == want["facts"]["layers"] for rank in found)
    assert want["facts"]["layers"] == ([1] if plan == MIXED else [0, 1])


@pytest.mark.parametrize(("count", "case"), COMPARED)
def test_a_rank_has_its_share_of_the_cache_to_the_byte(ranks, whole, count, case):
    name, cache, plan = case.split("/")
    geometry = ModelGeometry.of(cases.MODELS[name]())
    made, facts = cases.PLANS[plan](geometry), whole(case)["facts"]
    length = facts["length"]
    assert facts["nbytes"] == made.nbytes(3, length, itemsize=4, cache=cache)
    for rank in ranks(count):
        mine = rank[case]["facts"]
        assert mine["heads"] == geometry.num_kv_heads // count
        assert mine["nbytes"] * count == facts["nbytes"]
        assert mine["nbytes"] == made.nbytes(3, length, itemsize=4, cache=cache, tp_size=count)


@pytest.mark.parametrize(
    ("count", "case", "advice"), [(2, "smollm2/refused", "1 or 3"), (4, "few heads/refused", "1 or 2")]
)
def test_heads_that_cannot_be_shared_out_are_refused_before_the_first_forward(ranks, count, case, advice):
    for rank in ranks(count):
        for said in rank[case]:
            assert said.startswith("HeadSplitError")
            assert f"among {count} ranks" in said
            assert f"tp_size of {advice}" in said


def test_profiles_and_plans_are_those_of_the_whole_model(ranks, models):
    from transformers import AutoModelForCausalLM

    profile = cases.profiled(AutoModelForCausalLM.from_pretrained(models / "llama").eval())
    want = cases.numbers(profile)
    spectral = "cache_norm_spectral"
    for rank in ranks(2):
        found = rank["llama/profile"]
        assert found["heads"] == profile.geometry.num_kv_heads == 4
        assert found["architecture"] == profile.model.architecture
        assert found["plan"] == profile.plan(bits=4.0).digest
        assert set(found["unavailable"]) == set(profile.unavailable) | {spectral}
        assert set(found["numbers"]) == set(want) - {spectral}
        for name, tables in found["numbers"].items():
            # codes may be rounded the other way, and divergences are differences of nearly equal numbers
            torch.testing.assert_close(tables, want[name], rtol=1e-2, atol=1e-8, msg=lambda m, n=name: n + m)


def test_ranks_know_each_other(ranks):
    assert [rank["processes"] for rank in ranks(2)] == [2, 2]
    assert Ranks.of(tiny_llama()) == Ranks(1, 0, None)


def test_the_table_of_the_docs_says_what_happened(ranks, whole):
    lines = ["| KV heads | ranks | cache | plan | logits |", "|---:|---:|---|---|---|"]
    heads = {"llama": 4, "smollm2": 3, "few heads": 2}
    for count, run in RUN.items():
        found = ranks(count)[0]
        for case in (name.removesuffix(" and beams") for name in run):
            name, cache, *plan = case.split("/")
            if cache == "refused":
                assert "HeadSplitError" in found[case][0]
                reason = "refused: fewer heads than ranks" if heads[name] < count else "refused: uneven"
                lines.append(f"| {heads[name]} | {count} | any | any | {reason} |")
            elif plan:
                pairs = [
                    (found[case]["runs"][run]["logits"], whole(case)["runs"][run]["logits"])
                    for run in found[case]["runs"]
                ]
                equal = all((a - b).abs().max() <= tolerance(plan[0]) for a, b in pairs)
                short = "mixed" if plan[0] == MIXED else plan[0]
                lines.append(
                    f"| {heads[name]} | {count} | {cache} | {short} | {'equal' if equal else 'differ'} |"
                )
    text = (ROOT / "docs" / "several-gpus.md").read_text()
    table = text.partition("<!-- ranks -->\n")[2].partition("<!-- end -->")[0]
    assert table == "\n".join(lines) + "\n"
