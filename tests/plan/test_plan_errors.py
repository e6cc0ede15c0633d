"""The error classes, and what importing the plan brings in."""

import inspect
import pickle
import subprocess
import sys

import pytest

import kvmix_fx.errors
import kvmix_kernels.errors
from kvmix_fx.errors import KVMixError, MissingPackageError, PlanFieldError, PlanFileError, PlanVersionError

CLASSES = {name: getattr(kvmix_fx.errors, name) for name in kvmix_fx.errors.__all__}
ERRORS = {name: kind for name, kind in CLASSES.items() if not issubclass(kind, Warning)}


def test_every_error_of_the_kernels_is_offered_here():
    theirs = dict(inspect.getmembers(kvmix_kernels.errors, inspect.isclass))
    assert theirs.items() <= CLASSES.items()


def test_every_error_of_the_module_is_listed():
    assert set(CLASSES) == {name for name, _ in inspect.getmembers(kvmix_fx.errors, inspect.isclass)}


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS.keys())
def test_errors_share_a_base_say_what_they_mean_and_pickle(kind):
    assert issubclass(kind, KVMixError)
    assert kind.__doc__
    if kind is not KVMixError:
        expected = ValueError | TypeError | RuntimeError | ImportError | MemoryError | AssertionError
        assert issubclass(kind, expected)
    twin = pickle.loads(pickle.dumps(kind("what to do")))
    assert (type(twin), str(twin)) == (kind, "what to do")


def test_field_errors_keep_the_field():
    assert pickle.loads(pickle.dumps(PlanFieldError("wrong", "bits"))).field == "bits"


def test_newer_files_are_caught_as_file_errors():
    assert issubclass(PlanVersionError, PlanFileError)


def test_missing_packages_are_named_with_the_extra_that_brings_them():
    error = MissingPackageError.for_extra("lm_eval", "eval", "kvmix eval")
    assert isinstance(error, ImportError)
    assert str(error) == 'kvmix eval needs lm_eval, which is not installed: pip install "kvmix-fx[eval]"'


def test_importing_and_using_the_plan_brings_in_no_heavy_package(tmp_path):
    """The plan alone: the parent package is put in as an empty one, whatever it imports itself."""
    script = f"""
import sys, types
parent = types.ModuleType("kvmix_fx")
parent.__path__ = {list(kvmix_fx.__path__)!r}
sys.modules["kvmix_fx"] = parent
from kvmix_fx.plan import KVPlan, ModelGeometry
plan = KVPlan.preset("kivi", ModelGeometry(4, 2, 64))
plan.save_pretrained({str(tmp_path)!r})
assert KVPlan.from_pretrained({str(tmp_path)!r}) == plan
plan.nbytes(1, 100), plan.describe()
print(sorted({{"torch", "triton", "transformers", "huggingface_hub", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
