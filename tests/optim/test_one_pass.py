"""The low-memory update gives the same bits however it is computed, and takes few launches.

Run with ``uv run pytest tests/optim/test_one_pass.py``; half a minute, most of it Triton's interpreter.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0
from agent.optim import low_memory_adamw, one_pass, one_pass_c
from agent.optim.low_memory_adamw import LowMemoryAdamW
from agent.optim.one_pass import Factors, OneUpdate, update_in_torch
from agent.optim.one_pass_c import compile_update
from agent.optim.one_pass_check import differences, examples
from agent.optim.optimizer import apply_update, clip_gradients
from agent.optim.stochastic_rounding import random_bits, rounding_key

CPU = torch.device("cpu")
KEY = rounding_key(1, 2, "some.weight")


# ---- the same bits in every way


def in_numpy(update: OneUpdate) -> tuple[np.ndarray, ...]:
    """Weight and moments after an update with float32 moments; numpy rounds each operation by itself."""
    f = Factors(*map(np.float32, update.factors))
    w, g, m, v = (t.float().numpy() for t in (update.weight, update.gradient, *update.moments))
    g = g if update.gradient_scale is None else g * update.gradient_scale.numpy()
    m = m * f.keep_first + g * f.add_first
    v = v * f.keep_second + (g * g) * f.add_second
    w = w * f.decay - (m / (np.sqrt(v) * f.correction + f.eps)) * f.rate
    if update.weight.dtype == torch.bfloat16:
        bits = random_bits(update.key, update.first, torch.empty(w.size, dtype=torch.int32))
        w = ((w.view(np.int32) + bits.view(w.shape).numpy()) & np.int32(-65536)).view(np.float32)
    return w, m, v


def test_an_update_is_the_formula_rounded_operation_by_operation() -> None:
    for example in examples(CPU):
        if not example.eight_bit:
            expected = in_numpy(example)
            update_in_torch(example)
            for ours, theirs in zip((example.weight, *example.moments), expected, strict=True):
                assert np.array_equal(ours.float().numpy(), theirs)


def test_the_factors_are_adams() -> None:
    factors = Factors.of({"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}, 3)
    expected = (0.9, 0.1, 0.99, 0.01, 0.999, 0.01 / (1 - 0.9**3), (1 - 0.99**3) ** -0.5, 1e-8)
    assert factors == pytest.approx(expected, rel=1e-7)
    assert all(float(np.float32(number)) == number for number in factors)


@pytest.mark.parametrize("size", [1, 300, 1500])
def test_the_cut_into_pieces_changes_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_pieces(update: OneUpdate) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(one_pass, "_PIECE", size)
            update_in_torch(update)

    assert [differences(in_pieces, example, 2) for example in examples(CPU)] == [{}] * 24


def printed(code: str, **variables: str) -> str:
    """What a program prints that is started with these variables."""
    environment = {**os.environ, "PYTHONPATH": str(Path(one_pass.__file__).parents[2]), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_the_kernel_interpreted_gives_the_same_bits() -> None:
    pytest.importorskip("triton")
    code = """
import torch
from agent.optim import one_pass_triton
from agent.optim.one_pass_check import differences, examples

one_pass_triton._BLOCKS = 16  # the interpreter takes its time for each program
print([differences(one_pass_triton.update_in_triton, update, 2) for update in examples(torch.device("cpu"))])
"""
    assert printed(code, TRITON_INTERPRET="1") == str([{}] * 24)


def test_the_kernel_compiled_for_a_gpu_rounds_every_operation_and_is_compiled_once(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from agent.optim import one_pass_triton
from agent.optim.one_pass_check import examples

class Pretended:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda _: GPUTarget("cuda", 90, 32)

class Compiles:
    def __getitem__(self, grid):
        return lambda *args, **options: kernels.append(kernel.warmup(*args, grid=grid, **options))

driver.set_active(Pretended())
kernel, kernels = one_pass_triton._update, []
one_pass_triton._update = Compiles()
floats, *_, codes = examples(torch.device("cpu"))
for key, first in (((1, 2), 0), ((2**32 - 1, 16), 1), ((16, 2**32 - 1), 2**40)):
    one_pass_triton.update_in_triton(codes._replace(key=key, first=first, factors=[key[0] / 7] * 8))
one_pass_triton.update_in_triton(codes._replace(weight=codes.weight[:, :1].clone()))
one_pass_triton.update_in_triton(floats)
assert kernels[0] is kernels[1] is kernels[2]
print(*(kernel.asm["ptx"] for kernel in kernels))
"""
    ptx = printed(code, TRITON_CACHE_DIR=str(tmp_path))
    instructions = re.findall(r"\b((?:add|sub|mul|mad|fma|div|sqrt|rcp|rsqrt)\S*\.f32)\b", ptx)
    assert set(instructions) == {f"{name}.rn.f32" for name in ("add", "sub", "mul", "div", "sqrt")}


@pytest.fixture(scope="module")
def in_c() -> Any:
    """The compiled update; that of the examples was compared when it was built."""
    try:
        return compile_update()
    except OSError as error:
        pytest.skip(str(error))


def test_compiled_for_the_cpu_it_gives_the_same_bits_in_threads(in_c: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [differences(in_c, example, 3) for example in examples(CPU)] == [{}] * 24
    generator = torch.Generator().manual_seed(0)
    shape = (9000, 300)
    tensors = torch.randn((3, *shape), generator=generator)
    codes = torch.randint(256, (2, *shape), dtype=torch.uint8, generator=generator)
    scales = torch.rand((2, 9000, 2), generator=generator)
    factors = Factors.of({"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for moments in ((tensors[2], tensors[2].square()), (codes[0], scales[0], codes[1], scales[1])):
        update = OneUpdate(tensors[0].bfloat16(), tensors[1].bfloat16(), moments, factors, KEY)
        assert differences(in_c, update) == {}


# ---- the optimizer's way


def parameters(shapes: dict[str, tuple[int, ...]]) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(n, nn.Parameter(torch.randn(shape, generator=generator).bfloat16())) for n, shape in shapes.items()]


def optimizer_of(named: list[tuple[str, nn.Parameter]], seed: int = 0) -> LowMemoryAdamW:
    return LowMemoryAdamW(named, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01, eight_bit=True, seed=seed)


def updated(optimizer: LowMemoryAdamW, named: list[tuple[str, nn.Parameter]], updates: range) -> list[Tensor]:
    for number in updates:
        for index, (_, parameter) in enumerate(named):
            generator = torch.Generator().manual_seed(100 * number + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
        clip_gradients(optimizer, 1.0)
        apply_update(optimizer, 1e-3, number)
    return [parameter.detach().clone() for _, parameter in named]


SHAPES = {"matrix": (64, 80), "twin": (64, 80), "odd": (7, 601), "vector": (33,), "number": ()}


def weights(updates: range = range(3), seed: int = 0) -> list[Tensor]:
    named = parameters(SHAPES)
    return updated(optimizer_of(named, seed), named, updates)


def test_the_compiler_is_used_where_it_pays_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, in_c: Any) -> None:
    in_torch, calls = weights(), []
    monkeypatch.setattr(low_memory_adamw, "_in_c", lambda: lambda update: (calls.append(1), in_c(update)))
    assert all(map(torch.equal, weights(), in_torch)) and not calls
    monkeypatch.setattr(low_memory_adamw, "_WORTH_COMPILING", sum(p.numel() for _, p in parameters(SHAPES)))
    assert all(map(torch.equal, weights(), in_torch)) and len(calls) == 3 * len(SHAPES)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What this process found out about the machine is found out anew, during the test and after it."""
    ways = (low_memory_adamw._in_c, low_memory_adamw._in_triton)
    for way in ways:
        way.cache_clear()
    yield
    for way in ways:
        way.cache_clear()


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc", "true"])
def test_without_a_compiler_that_works_torch_goes_on(
    compiler: str, forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = weights()
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(low_memory_adamw, "_WORTH_COMPILING", 0)
    with caplog.at_level(logging.INFO):
        assert all(map(torch.equal, weights(), expected))
    assert [record.levelname for record in caplog.records if "torch computes them" in record.message] == ["INFO"]


def test_a_compiler_whose_results_differ_is_found_out(monkeypatch: pytest.MonkeyPatch, in_c: Any) -> None:
    monkeypatch.setattr(one_pass_c, "_OPTIONS", ("-O1", "-Dsqrtf=fabsf"))
    with pytest.raises(ValueError, match="differs from torch"):
        compile_update()


def test_without_triton_a_gpu_gets_torchs_operators_and_one_warning(
    forgotten: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "agent.optim.one_pass_triton", None)
    assert low_memory_adamw._in_triton() is None and low_memory_adamw._in_triton() is None
    assert len([record for record in caplog.records if "needs triton" in record.message]) == 1


def test_seed_update_and_name_decide_how_a_weight_is_rounded() -> None:
    assert all(map(torch.equal, weights(range(1)), weights(range(1))))
    assert not torch.equal(weights(range(1))[0], weights(range(1), seed=1)[0])
    seen = []
    for update in (0, 0, 1):
        named = parameters({"matrix": (64, 80), "twin": (64, 80)})
        with torch.no_grad():
            named[1][1].copy_(named[0][1])
        optimizer = optimizer_of(named)
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        apply_update(optimizer, 1e-3, update)
        seen.append([parameter.detach() for _, parameter in named])
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][0], seen[0][1])  # two names
    assert not torch.equal(seen[0][0], seen[2][0])  # two updates


def test_a_gradient_in_another_memory_layout_is_the_same_gradient() -> None:
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        named = parameters({"convolution": (32, 8, 5, 5)})
        generator = torch.Generator().manual_seed(1)
        gradient = torch.randn(named[0][1].shape, generator=generator).bfloat16()
        named[0][1].grad = gradient.to(memory_format=layout)
        apply_update(optimizer_of(named), 1e-3, 0)
        ends.append(named[0][1].detach())
    assert torch.equal(*ends)


def test_a_counter_that_something_else_wrote_is_read_again() -> None:
    ends = []
    for written in (True, False):
        named = parameters(SHAPES)
        optimizer = optimizer_of(named)
        updated(optimizer, named, range(2))
        for state in optimizer.state.values():
            state["step"] = state["step"].fill_(40.0) if written else torch.tensor(40.0)
        ends.append(updated(optimizer, named, range(2, 4)))
        assert {float(optimizer.state[parameter]["step"]) for _, parameter in named} == {42.0}
    assert all(map(torch.equal, *ends))
    assert not all(map(torch.equal, ends[0], weights(range(4))))


def test_a_parameter_that_had_no_gradient_before_makes_its_first_step() -> None:
    named = parameters({"early": (40,), "late": (40,)})
    optimizer = optimizer_of(named)
    for number in range(2):
        for _, parameter in named[: number + 1]:
            parameter.grad = torch.ones_like(parameter)
        apply_update(optimizer, 1e-3, number)
    alone = parameters({"early": (40,), "late": (40,)})[1:]
    alone[0][1].grad = torch.ones_like(alone[0][1])
    apply_update(optimizer_of(alone), 1e-3, 1)
    assert torch.equal(named[1][1], alone[0][1])


# ---- split over processes, and how many launches


@pytest.fixture
def two_processes() -> Iterator[Any]:
    """Makes this process the first or second of two that never answer."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank: int) -> Any:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        return init_device_mesh("cpu", (2,))

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def split(named: list[tuple[str, nn.Parameter]], mesh: Any) -> list[tuple[str, nn.Parameter]]:
    """This process's rows of the parameters, and of their gradients."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def part(tensor: Any) -> Tensor:
        return distribute_tensor(tensor.detach(), mesh, [Shard(0)], src_data_rank=None)

    found = [(name, nn.Parameter(part(parameter))) for name, parameter in named]
    for (_, ours), (_, whole) in zip(found, named, strict=True):
        ours.grad = part(whole.grad)
    return found


def test_rows_of_a_split_tensor_are_updated_as_in_the_whole(two_processes: Any) -> None:
    shapes = {"matrix": (65, 81), "odd": (7, 601), "vector": (33,), "short": (1, 5000)}

    def fresh() -> list[tuple[str, nn.Parameter]]:
        named = parameters(shapes)
        for _, parameter in named:
            parameter.grad = parameter.detach().flip(0) * 0.1
        return named

    whole = fresh()
    optimizer = optimizer_of(whole)
    apply_update(optimizer, 1e-3, 0)
    for rank in range(2):
        named = split(fresh(), two_processes(rank))
        split_optimizer = optimizer_of(named)
        apply_update(split_optimizer, 1e-3, 0)
        for (name, ours), (_, theirs) in zip(named, whole, strict=True):
            each = -(-len(theirs) // 2)
            rows = slice(rank * each, (rank + 1) * each)
            assert torch.equal(ours.to_local(), theirs[rows]), (name, rank)  # type: ignore[operator]
            for kind, moment in optimizer.state[theirs].items():
                if kind != "step":
                    assert torch.equal(split_optimizer.state[ours][kind].to_local(), moment[rows]), (name, kind)


class Operators(TorchDispatchMode):
    """Counts torch's operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Launcher:
    """In the kernel's place; it counts."""

    count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(grid)
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.count += 1


@pytest.mark.parametrize("sharded", [False, True])
def test_an_update_of_the_full_model_takes_few_launches(
    sharded: bool, two_processes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from agent.optim import one_pass_triton

    with torch.device("meta"):
        policy = PI0(PI0Config())
    # As many tensors, each with blocks where the real one has them.
    named = parameters({name: tuple(min(n, 64) for n in p.shape) for name, p in policy.named_parameters()})
    assert len(named) > 700
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    if sharded:
        named = split(named, two_processes(1))
    optimizer, launcher = optimizer_of(named), Launcher()
    monkeypatch.setattr(one_pass_triton, "_update", launcher)
    monkeypatch.setattr(low_memory_adamw, "_in_c", lambda: one_pass_triton.update_in_triton)
    monkeypatch.setattr(low_memory_adamw, "_WORTH_COMPILING", 0)
    clip_gradients(optimizer, 1.0)
    apply_update(optimizer, 1e-3, 0)  # makes the state
    launcher.count = 0
    with Operators() as operators:
        clip_gradients(optimizer, 1.0)
        apply_update(optimizer, 1e-3, 1)
    print(f"{len(named)} tensors, {launcher.count} launches, {operators.count} operators")
    assert 0.9 * len(named) < launcher.count <= len(named) and launcher.count + operators.count <= 2000
