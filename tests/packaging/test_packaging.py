from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fresh(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_loads_no_optional_package():
    optional = {"transformers", "torchao", "kvmix_kernels.triton", "typer", "gguf"}
    assert fresh(f"import sys, kvmix_fx; print({optional} & set(sys.modules))") == "set()\n"


def test_importing_patches_nothing():
    code = """
import torch, torch.nn.functional as F
before = (F.scaled_dot_product_attention, torch.cat, torch.compile, torch.Tensor.__getitem__)
settings = torch._dynamo.config.get_config_copy()
import kvmix_fx
assert before == (F.scaled_dot_product_attention, torch.cat, torch.compile, torch.Tensor.__getitem__)
assert settings == torch._dynamo.config.get_config_copy()
assert not torch.cuda.is_initialized()
print("same")
"""
    assert fresh(code) == "same\n"


def test_caches_of_a_missing_transformers_say_what_to_install():
    code = """
import sys
import tomllib
sys.modules["transformers"] = None
import kvmix_fx
try:
    kvmix_fx.KVMixCache
except kvmix_fx.errors.MissingPackageError as error:
    print(error)
"""
    assert 'pip install "kvmix-fx[hf]"' in fresh(code)


def test_the_kernels_folder_is_no_package():
    """It would shadow Hugging Face's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_backend_is_registered():
    (entry,) = entry_points(group="torch_dynamo_backends", name="kvmix")
    assert entry.value == "kvmix_fx.backend:kvmix"


def test_every_file_that_names_the_version_names_the_same():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
