from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# before any kernel module is imported: without a GPU, kernels run in the interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "tests", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "thorough", deadline=None, max_examples=400, suppress_health_check=[HealthCheck.too_slow]
)
# hours: what it finds is kept in .hypothesis, and tried first when it is started again
settings.register_profile(
    "fuzz",
    settings.get_profile("thorough"),
    max_examples=int(os.environ.get("KVMIX_EXAMPLES", "100000")),
    print_blob=True,
)
# on a GPU nearly every example compiles a kernel of its own
settings.register_profile("brief", settings.get_profile("tests"), max_examples=6)
settings.load_profile(os.environ.get("KVMIX_HYPOTHESIS_PROFILE", "tests"))

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.manual_seed(0)
    # tiny tensors gain nothing from threads, and several test processes share the cores
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # every trace ends with a full collection: without this it walks through all imported modules, each time
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # what stays frozen is not freed at exit, and extension modules report it as leaked
    gc.unfreeze()
