"""profile(): signals, what is kept of them, and what bad input is told."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import kvmix_fx
from kvmix_fx.errors import (
    CalibrationError,
    HeadSizeError,
    ProfileFileError,
    ProfileMismatchError,
    SignalError,
    SignalUnavailable,
)
from kvmix_fx.plan import QuantSpec
from kvmix_fx.plan.prices import Menu
from kvmix_fx.profiling import Profile, calibration
from kvmix_fx.profiling.calibration import load_calibration
from kvmix_fx.profiling.measure import known_signals
from kvmix_fx.profiling.segments import SegmentedGraph
from kvmix_fx.profiling.signals import fit_distortion
from kvmix_fx.testing.models import PACKED, tiny_architecture, tiny_llama

MENU = Menu(
    tuple(QuantSpec(bits, "channel", 32) for bits in (2, 3, 4, 8)),
    tuple(QuantSpec(bits, "token", "head") for bits in (2, 3, 4, 8)),
)
ALL = known_signals()


def tokens(rows: int = 2, length: int = 160) -> torch.Tensor:
    return torch.randint(1, 128, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def measured() -> Profile:
    torch.set_num_threads(1)
    return kvmix_fx.profile(tiny_llama(), tokens(), signals=ALL, menu=MENU)


def test_every_signal_is_measured(measured: Profile) -> None:
    assert set(measured.signals) == set(ALL)
    assert not measured.unavailable
    for name in ALL:
        keys, values = measured.per_layer(name)
        assert min(*keys, *values) > 0


def test_fisher_predicts_the_divergence(measured: Profile) -> None:
    """To second order, where errors are small; gradient and error apart predict it within a factor."""
    exact = measured.prices["kl"]
    for name, factor in (("fisher", 1.6), ("fitted_distortion", 4)):
        found = measured.prices[name]
        for layer in range(2):
            for role in ("keys", "values"):
                for bits in range(1, 3):
                    ratio = getattr(found, role)[layer][bits] / getattr(exact, role)[layer][bits]
                    assert 1 / factor < ratio < factor, (name, layer, role, bits, ratio)


def test_scaled_prices_share_what_all_layers_cost_as_fisher_does(measured: Profile) -> None:
    """Per format one factor; the sums are near those of the tensors one by one, since losses add up."""
    exact, plain, scaled = (measured.prices[name] for name in ("kl", "fisher", "fisher_scaled"))
    for role in ("keys", "values"):
        for n in range(3):
            one, two, truth = ([row[n] for row in getattr(prices, role)] for prices in (plain, scaled, exact))
            assert two[0] / one[0] == pytest.approx(two[1] / one[1])
            assert sum(two) == pytest.approx(sum(truth), rel=0.25)


def test_prices_fall_with_the_bits(measured: Profile) -> None:
    for found in measured.prices.values():
        for row in (*found.keys, *found.values):
            assert list(row) == sorted(row, reverse=True)


def test_padding_and_batches_change_nothing() -> None:
    """A right-padded row counts like the same tokens alone, and rows are read one by one."""
    model, ids = tiny_llama(), tokens(2, 192)
    ids[1, 150:] = 0
    mask = torch.ones_like(ids)
    mask[1, 150:] = 0
    names = ["fisher", "gradient_error", "weight_gradient", "cache_norm_spectral"]
    both = kvmix_fx.profile(model, {"input_ids": ids, "attention_mask": mask}, signals=names, menu=MENU)
    other = ids.clone()
    other[1, 150:] = 77
    again = kvmix_fx.profile(model, {"input_ids": other, "attention_mask": mask}, signals=names, menu=MENU)
    for name in names:
        for mine, theirs in zip(both.per_layer(name), again.per_layer(name), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
    short = kvmix_fx.profile(model, ids[1:, :150], signals="weight_gradient")
    first = kvmix_fx.profile(model, ids[:1], signals="weight_gradient")
    mean = (np.array(short.per_layer("weight_gradient")) + np.array(first.per_layer("weight_gradient"))) / 2
    assert np.array(both.per_layer("weight_gradient")) == pytest.approx(mean, rel=1e-4)


def test_weight_norms_are_refused_under_qk_norm() -> None:
    model = tiny_architecture(*PACKED["qwen3"])
    with pytest.raises(SignalUnavailable, match=r"ask for another.*normalized after their projection"):
        kvmix_fx.profile(model, tokens(1), signals="weight_norm_frobenius")
    profile = kvmix_fx.profile(
        model,
        tokens(1),
        signals=["weight_norm_frobenius", "cache_norm_frobenius"],
    )
    assert profile.signals == ("cache_norm_frobenius",)
    with pytest.raises(SignalError, match=r"normalized after their projection.*cache_norm_frobenius"):
        profile.signal("weight_norm_frobenius")


@pytest.fixture(scope="module")
def untouched() -> Profile:
    return kvmix_fx.profile(tiny_llama(), tokens(1), signals="weight_gradient")


@pytest.mark.parametrize("state", ["frozen", "training", "inference mode", "compiled", "quantized"])
def test_models_in_any_state_are_profiled_and_left_as_they_were(state: str, untouched: Profile) -> None:
    model, want = tiny_llama(), untouched.scores["weight_gradient"]
    if state == "frozen":
        model.requires_grad_(False)
    elif state == "training":
        model.train()
        model.model.layers[0].eval()
    elif state == "compiled":
        kvmix_fx.compile(model, kvmix_fx.KVPlan.uniform(model, 2, 2), inner="eager")
    elif state == "quantized":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    elif state == "inference mode":
        with torch.inference_mode():
            model = tiny_llama()
    flags = [(module.training, list(vars(module))) for module in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode(state == "inference mode"):
        found = kvmix_fx.profile(model, tokens(1), signals=["weight_gradient"])
    assert [(module.training, list(vars(module))) for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(p.grad is None for p in model.parameters())
    rel = 0.1 if state == "quantized" else 1e-4
    assert found.scores["weight_gradient"].keys == pytest.approx(want.keys, rel=rel)
    assert found.scores["weight_gradient"].values == pytest.approx(want.values, rel=rel)


def test_a_model_is_restored_when_the_loss_is_not_finite() -> None:
    model = tiny_llama().train()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"prompt 0 is nan.*bfloat16"):
        kvmix_fx.profile(model, tokens(1))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_unusable_text_is_refused() -> None:
    model = tiny_llama()
    cases = [
        (tokens(1, 100), "at least 136 tokens"),
        (torch.zeros(1, 200), "integer tensor"),
        (torch.full((1, 200), 500), "token id 500"),
        ("", "empty"),
        ("some text", "tokenizer"),
        ("no-such-file.txt", "cannot be read"),
        (Path("no-such-file.txt"), "cannot be read"),
        (3.5, "float"),
    ]
    for data, message in cases:
        with pytest.raises(CalibrationError, match=message):
            kvmix_fx.profile(model, data)
    with pytest.raises(SignalError, match="guess"):
        kvmix_fx.profile(model, tokens(), signals=["guess"])
    odd = Menu((QuantSpec(2, "token", 48),), (QuantSpec(2, "token", 32),))
    with pytest.raises(HeadSizeError):
        kvmix_fx.profile(model, tokens(), menu=odd)


class Letters:
    """A tokenizer of one token per character."""

    bos_token_id = 1

    def __init__(self, begins: bool = False) -> None:
        self.begins = begins

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        start = [1] if self.begins and add_special_tokens else []
        return {"input_ids": start + [ord(letter) % 120 + 2 for letter in text]}


def test_text_is_cut_into_prompts_spread_over_it(tmp_path: Path) -> None:
    text = "".join(" " if n % 10 == 9 else chr(97 + n // 100) for n in range(1999))
    spread = load_calibration(text, Letters(), prompts=3, length=200)
    assert spread.ids.shape == (3, 200)
    assert spread.ids[0, 0] == ord("a") % 120 + 2
    assert spread.ids[2, -1] == ord(text[-1]) % 120 + 2
    begun = load_calibration(text, Letters(begins=True), prompts=3, length=200)
    assert begun.ids[:, 0].tolist() == [1, 1, 1]
    few = load_calibration(text[:500], Letters(), prompts=8, length=200)
    assert few.lengths == (200, 200)
    short = load_calibration(text[:150], Letters(), prompts=8, length=200)
    assert short.lengths == (150,)
    with pytest.raises(CalibrationError, match="100 tokens, too short"):
        load_calibration(text[:100], Letters())
    path = tmp_path / "a.txt"
    path.write_text(text)
    for given in (path, str(path), [text]):
        assert torch.equal(load_calibration(given, Letters(), prompts=3, length=200).ids, spread.ids)
    assert spread.describe()["sha256"] != begun.describe()["sha256"]


def test_the_text_that_comes_along_is_long_enough() -> None:
    shipped = load_calibration(None, Letters())
    assert shipped.source == "kvmix_fx calibration.txt"
    assert len(shipped.lengths) == 8


def test_a_profile_survives_its_file(measured: Profile, tmp_path: Path) -> None:
    path = measured.save(tmp_path / "p.safetensors")
    loaded = Profile.load(path)
    assert loaded == measured
    assert loaded.plan(bits=4.0) == measured.plan(bits=4.0)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ProfileFileError, match="digest"):
        Profile.load(path)
    for wrong in (b"", b"no profile"):
        path.write_bytes(wrong)
        with pytest.raises(ProfileFileError):
            Profile.load(path)
    with pytest.raises(ProfileFileError):
        Profile.load(tmp_path / "missing")


def test_plans_tell_where_they_come_from(measured: Profile) -> None:
    plan = measured.plan(bits=4.0, signal="weight_gradient", allocator="greedy")
    assert plan.bits_per_element() <= 4.0
    assert plan.provenance["signal"] == "weight_gradient"
    assert plan.provenance["allocator"] == "greedy"
    assert plan.provenance["budget"] == {"bits": 4.0}
    assert plan.provenance["data"] == measured.data
    assert plan.provenance["model"] == measured.model.name
    assert measured.plan(total_bytes=200_000, batch=1, length=1000).nbytes(1, 1000) <= 200_000


def test_scores_of_another_model_are_refused(measured: Profile) -> None:
    measured.check_model(tiny_llama(seed=3))
    with pytest.raises(ProfileMismatchError, match="num_layers=3"):
        measured.check_model(tiny_llama(num_hidden_layers=3))
    with pytest.raises(ProfileMismatchError, match="other parameters"):
        measured.check_model(tiny_llama(intermediate_size=64))


def test_the_plot_shows_every_signal(measured: Profile, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    some = replace(measured, prices={"fisher": measured.prices["fisher"]}, scores={})
    assert some.plot(tmp_path / "p.svg").read_text().count("<svg") == 1


def test_distortion_is_fitted_for_each_way_of_grouping() -> None:
    formats = (*(QuantSpec(b, "token", g) for g in (16, 32) for b in (2, 3, 4)), QuantSpec(2))
    errors = [3.0 * 5.0**-bits for bits in (2, 3, 4)] + [7.0 * 4.0**-bits for bits in (2, 3, 4)] + [0.25]
    assert fit_distortion(formats, errors) == pytest.approx(errors)
    bent = [2.0, *errors[1:]]
    fitted = fit_distortion(formats, bent)
    assert fitted[0] < 2.0
    assert fitted[3:] == pytest.approx(errors[3:])


def test_a_cut_graph_computes_what_the_whole_does() -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, object]:
            a = x * 2
            b = (a + y).exp()
            c = a - b
            return {"c": c * y, "both": (a, [b])}

    gm = torch.fx.symbolic_trace(Chain())
    starts = [node for node in gm.graph.nodes if node.name in ("add", "sub")]
    cut = SegmentedGraph(gm, starts)
    assert len(cut.segments) == 3
    x, y = torch.randn(2, 3, requires_grad=True).unbind()
    whole = Chain()(x, y)
    cut.keep = True
    parts = cut(x, y)
    cut.keep, cut.resume_at = False, 2
    for got in (parts, cut(None, None)):
        assert torch.equal(got["c"], whole["c"])
        assert torch.equal(got["both"][1][0], whole["both"][1][0])
    cut.resume_at, cut.checkpointing = None, True
    one, two = (torch.autograd.grad(r["c"].sum(), x)[0] for r in (whole, cut(x, y)))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("datasets:org/corpus", ("org/corpus", None, "train")),
        ("datasets:org/corpus/en:validation", ("org/corpus", "en", "validation")),
    ],
)
def test_a_data_set_is_read_by_its_id(monkeypatch, name, asked):
    """The library stands aside: what it is asked for, and which column is taken."""
    seen = []

    def load_dataset(identifier, config, *, split, streaming):
        seen.append((identifier, config, split))
        assert streaming
        return iter([{"id": 1, "text": "one two "}, {"id": 2, "text": "three"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    text, source = calibration._text(name, "calibration")
    assert seen == [asked]
    assert text.split() == ["one", "two", "three"]
    assert source == name


def test_a_data_set_that_cannot_be_read_says_so(monkeypatch):
    def load_dataset(*_, **__):
        raise FileNotFoundError("no such data set")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CalibrationError, match="no such data set"):
        calibration._text("datasets:org/none", "calibration")
