"""The documents: their Python runs as a reader would run it, links lead somewhere, tables are of now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import kvmix_fx
from kvmix_fx.cache import QuantizedKVTensor
from kvmix_fx.errors import MissingPackageError

from . import documents

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    ROOT / "kernels/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LANGUAGES = {"python", "console", "text", "json"}
"""Python is run; the others are commands, what is shown, and files."""


def name(path):
    return str(path.relative_to(ROOT))


def fences(path):
    """(language, text) of every block; indented ones too."""
    return re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def run_blocks(path, names):
    for number, (language, block) in enumerate(fences(path), 1):
        if language == "python":
            exec(compile(block, f"{name(path)}, block {number}", "exec"), names)
            yield dict(names)


@pytest.fixture
def reader(monkeypatch, tmp_path):
    """Where a reader of the first page stands: a folder with a text, and no network."""
    pytest.importorskip("matplotlib").use("Agg")
    documents.answer_for_every_name(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("calibration.txt").write_text("a robot may obey the three laws " * 300)


@pytest.mark.timeout(600)
def test_the_first_lines_of_the_readme_pack_every_layer(reader):
    seen = list(run_blocks(ROOT / "README.md", {}))
    first = seen[0]["out"]
    assert isinstance(kvmix_fx.returned_cache(first).layers[0].keys, QuantizedKVTensor)
    assert first.sequences.shape[1] > 200
    report = kvmix_fx.compiled(seen[0]["model"]).report
    assert report.rewritten_layers() == list(range(documents.LAYERS))
    assert Path("my-plan", "kvmix_plan.json").exists()


START = ROOT / "docs/index.md"
RUN = [p for p in PAGES[1:] if p != START and any(language == "python" for language, _ in fences(p))]


def test_the_site_starts_with_the_lines_of_the_readme():
    """So they need not be run twice."""
    starts = [[text for language, text in fences(p) if language == "python"] for p in (PAGES[0], START)]
    assert starts[1] == starts[0][:1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", RUN, ids=name)
def test_the_blocks_of_a_page_run_in_their_order(reader, path):
    model, tokenizer = documents.model(), documents.tokenizer()
    # what pages take for granted of the first one
    names = {
        "kvmix_fx": kvmix_fx,
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        "inputs": tokenizer("The three laws of robotics are", return_tensors="pt"),
        "plan": kvmix_fx.KVPlan.uniform(model, 4, 2),
        "step": lambda x: x + 1,
    }
    try:
        assert list(run_blocks(path, names))
    except MissingPackageError as error:
        pytest.skip(str(error))
    if path.name == "plans.md":
        assert Path("profile.safetensors").exists()
        assert Path("signals.png").stat().st_size > 1000
    if path.name == "other-ways.md":
        assert all(isinstance(layer.keys, QuantizedKVTensor) for layer in names["growing"].layers)


def test_every_block_says_what_it_is():
    found = {(name(path), language) for path in PAGES for language, _ in fences(path)}
    assert {entry for entry in found if entry[1] not in LANGUAGES} == set()
    assert {path for path, language in found if language == "python"} >= {"README.md", "docs/index.md"}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_and_pictures_lead_somewhere(path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    targets += re.findall(r'^--8<-- "([^"]+)"', text, re.MULTILINE)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        found = path if not file else path.parent / file
        # pages include others from the root
        assert found.exists() or (ROOT / file).exists(), f"{name(path)} names {target}"
        if anchor and not anchor.startswith("only-"):
            titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{name(path)} names {target}"


def test_lines_of_prose_are_short_and_the_readme_is():
    long = [
        f"{name(path)}:{number}"
        for path in PAGES
        if "internals" not in path.parts and path.parent.name != "kernels"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100 and not line.startswith("|")
    ]
    assert not long
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_tables_are_those_of_the_rows_models_and_tests():
    from benchmarks import table

    for path in table.DOCUMENTS:
        assert table.renew(path.read_text()) == path.read_text(), "python -m benchmarks.table --write"


def test_figures_can_be_drawn_and_are_those_of_the_rows(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import figures, style
    from benchmarks.planner.figures import quality
    from benchmarks.rows import load

    rows = load("quality")
    shown = figures.DRAWN | {"planner-quality": lambda theme: quality(theme, rows)}
    for label, draw in shown.items():
        for path in style.drawn(label, draw, tmp_path):
            old, new = (style.FIGURES / path.name).read_text(), path.read_text()
            made_by = [re.search(r"Matplotlib v([\d.]+)", text)[1] for text in (old, new)]
            # other versions draw the same otherwise
            assert old == new or made_by[0] != made_by[1], "python -m benchmarks.figures; also of planner"


def test_every_public_name_can_be_imported_and_is_listed():
    for public in kvmix_fx.__all__:
        assert getattr(kvmix_fx, public) is not None
    assert set(kvmix_fx._HOMES) <= set(kvmix_fx.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        kvmix_fx.no_such_name  # noqa: B018
