"""One family of errors: whoever catches `KVMixError` or imports from `kvmix_fx.errors` misses none."""

from __future__ import annotations

import ast
import builtins
from pathlib import Path

import pytest
import torch

import kvmix_fx
from kvmix_fx import errors

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "kvmix_fx").rglob("*.py"), *(ROOT / "kernels" / "kvmix_kernels").rglob("*.py")]
HOMES = (ROOT / "kvmix_fx" / "errors.py", ROOT / "kernels" / "kvmix_kernels" / "errors.py")
BUILTINS = {name for name, x in vars(builtins).items() if isinstance(x, type) and issubclass(x, Exception)}
# what the language or a caller within the same file asks for
ALLOWED = {
    ("__init__.py", "AttributeError"),  # of a module's __getattr__
    ("signals.py", "NotImplementedError"),  # of a base class
    ("native.py", "FileNotFoundError"),  # caught there: no compiler
    ("native.py", "PermissionError"),  # caught there: somebody else's library
    ("io.py", "ValueError"),  # in hooks of json, which turns no other kind into a decoding error
    ("sizes.py", "LookupError"),
    ("texts.py", "ValueError"),  # of the tests' own texts
}


def classes(file):
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]


def test_every_error_class_is_defined_in_one_of_two_files_and_offered_in_one():
    families = {node.name for home in HOMES for node in classes(home)}
    elsewhere = [
        (file.name, node.name)
        for file in FILES
        if file not in HOMES
        for node in classes(file)
        for base in node.bases
        if isinstance(base, ast.Name) and base.id in families | BUILTINS
    ]
    assert elsewhere == [("observe.py", "_Seen")]  # ends a call and is caught there
    assert families == set(errors.__all__)


def test_nothing_else_is_raised_than_this_family():
    found = {
        (file.name, node.exc.func.id)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id in BUILTINS
    }
    assert found <= ALLOWED


def test_an_unknown_word_for_on_nothing_is_an_option_error():
    with pytest.raises(errors.BackendOptionError, match="on_nothing"):
        kvmix_fx.compile(torch.nn.Identity(), None, on_nothing="warn")
