"""Kernels compiled ahead: what is compiled is what will be launched, and nothing is lost where that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.jit import MockTensor

from kvmix_kernels.cached import allocate
from kvmix_kernels.layout import make_format
from kvmix_kernels.triton import ahead, attention, storage


class Jitted:
    """Notes what is compiled and what is launched."""

    params = "those of the kernel"

    def __init__(self):
        self.compiled, self.launched, self.go = [], [], threading.Event()
        self.go.set()

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append((grid, args, kwargs))

    def warmup(self, *args, grid, **kwargs):
        assert self.go.wait(30)
        self.compiled.append((args, kwargs))


def test_a_launch_waits_for_what_is_being_compiled():
    jitted = Jitted()
    kernel = ahead.Kernel(jitted)
    assert kernel.params == Jitted.params
    jitted.go.clear()
    ahead.start(lambda x, n: kernel[(n,)](x, (n, x), BITS=2), (torch.ones(3, dtype=torch.float16), 5))
    launch = threading.Thread(target=lambda: kernel[(7,)](1))
    launch.start()
    assert not jitted.launched
    jitted.go.set()
    launch.join(30)
    assert jitted.launched == [((7,), (1,), {})]
    [((x, (n, y)), options)] = jitted.compiled
    assert [type(t) for t in (x, y)] == [MockTensor, MockTensor]
    assert (x.dtype, n, options) == (torch.float16, 5, {"BITS": 2})
    assert not ahead.compiling()


def test_what_cannot_be_compiled_ahead_is_launched_all_the_same():
    jitted = Jitted()
    kernel = ahead.Kernel(jitted)

    def launcher(x):
        kernel[(1,)](x.item())

    with FakeTensorMode():
        fake = torch.empty(())
    ahead.start(launcher, (fake,))
    kernel[(2,)](3)
    assert jitted.launched == [((2,), (3,), {})]
    assert not jitted.compiled


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("launcher", [attention.attend, storage.append_])
def test_what_is_compiled_is_what_is_launched(launcher, masked, monkeypatch):
    kernels = []
    for module, name in (
        (attention, "attend_kernel"),
        (attention, "combine_kernel"),
        (storage, "append_kernel"),
    ):
        kernels.append(Jitted())
        monkeypatch.setattr(module, name, ahead.Kernel(kernels[-1]))
    k, v = make_format(2, "channel", 32, 128, 0, 16), make_format(4, "token", 32, 128, 0, 16)
    cache = [allocate(2, 2, 64, 3, fmt.residual_slots, fmt, torch.float16, "cpu").tensors for fmt in (k, v)]
    query, (keys, values) = torch.randn(2, 4, 1, 64).half(), torch.randn(2, 2, 2, 1, 64).half()
    mask, start = torch.ones(2, 1, 1, 400, dtype=torch.bool) if masked else None, torch.tensor(300)
    formats = k.encode(), v.encode()
    if launcher is attention.attend:
        args = (query, keys, values, *cache, mask, start, 400, 0.125, *formats)
    else:
        args = (*cache, keys, values, mask, start, 400, *formats)
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
    ahead.start(launcher, fakes)
    ahead.wait()
    launcher(*args)
    count = 0
    for kernel in kernels:
        assert len(kernel.compiled) == len(kernel.launched)
        for compiled, (_, *launched) in zip(kernel.compiled, kernel.launched, strict=True):
            assert described(compiled) == described(launched)
            count += 1
    assert count == (2 if launcher is attention.attend else 1)


@pytest.mark.parametrize("given", [None, "theirs"])
def test_a_second_process_looks_where_the_first_has_put_its_kernels(given, tmp_path):
    """Inductor points Triton's variable at a folder of its own where it compiles, and only there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"} | {"HOME": str(tmp_path)}
    if given:
        environment["TRITON_CACHE_DIR"] = str(tmp_path / given)
    lines = [
        "import os, kvmix_kernels.triton",
        "os.environ['TRITON_CACHE_DIR'] = os.getenv('TRITON_CACHE_DIR') or 'of Inductor'",
        "from triton import knobs; print(knobs.cache.dir)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    folder = tmp_path / given if given else tmp_path / ".triton" / "cache"
    assert done.stdout.splitlines()[-1] == str(folder)


def described(value):
    return pytree.tree_map(lambda x: x.dtype if hasattr(x, "dtype") else x, tuple(value))
