"""Tables of what works, from the tiny models and the tests that show it. `benchmarks.table` writes them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvmix_fx.testing.models import LEFT_ALONE, PACKED, STORED, WINDOWS, WRITTEN_OUT

TESTS = Path(__file__).resolve().parent.parent / "tests"

SHOWN = (
    ("default dynamic cache, growing", "e2e/test_generate.py", "test_logits_equal_the_oracle"),
    ("`KVMixCache`, `KVMixStaticCache` handed in", "e2e/test_generate.py", "test_a_cache_object_handed_in"),
    ("streaming, continuing a conversation", "e2e/test_generate.py",
     "test_streaming_and_continuing_a_conversation"),
    ("a fixed cache that outgrows its first turn", "runtime/test_recording.py",
     "test_a_conversation_outgrows_the_cache_of_its_first_turn"),
    ("assisted decoding", "e2e/test_generate.py", "test_assisted_decoding"),
    ("Inductor, `aot_eager` inside", "e2e/test_generate.py", "test_other_inner_compilers"),
    ("some layers at 16 bits, others packed", "e2e/test_generate.py",
     "test_layers_at_16_bits_beside_packed_ones"),
    ("`torch.compile(backend=\"kvmix\")`", "e2e/test_generate.py", "test_the_backend_by_name"),
    ("a packed cache cut back, reordered, copied, saved", "cache/test_tensor.py",
     "test_copies_and_files_keep_every_bit"),
    ("every spelling of a mask", "e2e/test_calls.py", "test_every_spelling_of_a_mask"),
    ("attention weights asked for", "e2e/test_calls.py",
     "test_attention_weights_over_a_packed_cache_are_those_of_what_it_holds"),
    ("head sizes 64, 80, 96, 128, 256 in half precision", "e2e/test_architectures.py",
     "test_head_sizes_and_half_precision"),
    ("adapters (PEFT) and other wrappers", "e2e/test_wrappers.py", "test_peft_generates_from_a_packed_cache"),
    ("a copy of a compiled model", "e2e/test_wrappers.py",
     "test_a_wrapper_is_restored_with_what_is_inside_and_copied_with_it"),
    ("tensor parallelism", "distributed/test_tensor_parallel.py", "test_ranks_equal_one_process"),
)  # fmt: skip
"""What works besides ways of decoding: in words, and the test that fails if it does not."""


def models() -> list[list[str]]:
    """Rows of architecture, attention, what happens."""
    found: dict[tuple[str, str], list[str]] = {}
    for attention, tried in (("sdpa", PACKED), ("eager", WRITTEN_OUT)):
        for name, (config, _) in tried.items():
            found.setdefault((config, _variant(name)), []).append(attention)
    rows = [
        [_title(config), variant or "-", " and ".join(f"`{name}`" for name in ways), "packed"]
        for (config, variant), ways in found.items()
    ]
    for name, (config, _, attention) in WINDOWS.items():
        rows.append([_title(config), _variant(name) or "-", f"`{attention}`", "packed in growing caches"])
    for name, (config, _, attention) in STORED.items():
        rows.append([_title(config), _variant(name) or "-", f"`{attention}`", "packed, unpacked by steps"])
    for name, (config, _, reason) in LEFT_ALONE.items():
        rows.append([_title(config), _variant(name) or "-", "`sdpa`", f'left at 16 bits, "{reason}"'])
    return rows


def _title(config: str) -> str:
    return config.removesuffix("Config")


def _variant(name: str) -> str:
    before, _, after = name.partition(", ")
    return after or before.partition(" ")[2]


def ways_of_decoding() -> list[list[str]]:
    """Rows of name, keywords of `generate()`, whether prompts are padded: the cases of test_generate.py."""
    for node in _parsed("e2e/test_generate.py").body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CASES":
            return list(_cases(ast.literal_eval(node.value)))
    raise LookupError("tests/e2e/test_generate.py has no CASES any more")


def _cases(found: dict[str, Any]) -> Iterator[list[str]]:
    """Of one level or, where cases share a model, of two."""
    for name, case in found.items():
        if isinstance(case, dict):
            yield from _cases(case)
            continue
        given, padded = case
        words = ", ".join(f"`{key}={value!r}`" for key, value in given.items())
        yield [name, words or "-", "left padded" if padded else "-"]


def also_works() -> list[list[str]]:
    """Rows of what works and the test that shows it.

    Raises:
        LookupError: there is no such test any more.
    """
    rows = []
    for words, path, test in SHOWN:
        names = {node.name for node in _parsed(path).body if isinstance(node, ast.FunctionDef)}
        if test not in names:
            raise LookupError(f"tests/{path} has no {test} any more: mend SHOWN in benchmarks/support.py")
        rows.append([words, f"`tests/{path}`"])
    return rows


@functools.cache
def _parsed(path: str) -> ast.Module:
    return ast.parse((TESTS / path).read_text())
