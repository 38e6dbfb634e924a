"""Memory that is pinned in pieces, with a stand-in for CUDA's runtime that knows what is registered.

Run: uv run pytest tests/checkpoints/test_pinning.py      (seconds)
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agent.checkpoints import pinning
from agent.checkpoints.host_snapshot import HostSnapshot

PIECE = 2 * mmap.PAGESIZE


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and notes which memory is copied to from it."""

    is_cuda = True  # type: ignore[assignment]
    copied: list[tuple[int, int]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            assert args[0].is_contiguous()
            cls.copied.append((args[0].data_ptr(), args[0].data_ptr() + args[0].nbytes))
        return super().__torch_function__(func, types, args, kwargs)


class Runtime:
    """The functions of ``torch.cuda.cudart()`` that pin, and what they have pinned."""

    cudaError = SimpleNamespace(success=0)  # noqa: N815

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.calls = 0
        self.fails_at: int | None = None
        self.meanwhile: Callable[[], None] = lambda: None

    def cudaHostRegister(self, begin: int, size: int, flags: int) -> int:  # noqa: N802
        self.calls += 1
        self.meanwhile()
        if self.calls == self.fails_at:
            return 2  # out of memory
        assert flags == 1 and begin % mmap.PAGESIZE == 0 and 0 < size <= PIECE and size % mmap.PAGESIZE == 0
        assert all(begin + size <= other or end <= begin for other, end in self.ranges.items()), "registered twice"
        self.ranges[begin] = begin + size
        return 0

    def cudaHostUnregister(self, begin: int) -> int:  # noqa: N802
        del self.ranges[begin]  # of a piece that was registered
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    runtime = Runtime()
    stream = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None, synchronize=lambda: None)
    event = SimpleNamespace(record=lambda _: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(pinning, "PIECE", PIECE)
    OnGpu.copied.clear()
    yield runtime
    assert runtime.ranges == {}, "left registered"


def tensors() -> dict[str, torch.Tensor]:
    """Of several types and sizes: within a piece, over several, across an end that is within a tensor, transposed."""
    found = {"large": torch.randn(7000), "bytes": torch.randint(0, 255, (2 * PIECE + 3,), dtype=torch.uint8)}
    found |= {"wide": torch.randn(PIECE // 8, dtype=torch.float64), "turned": torch.randn(90, 70).t()}
    found |= {f"small.{number}": torch.randn(number + 1).bfloat16() for number in range(20)}
    return {name: tensor.as_subclass(OnGpu) for name, tensor in found.items()} | {"step": torch.tensor(3.0)}


def check_copies(snapshot: HostSnapshot) -> torch.Tensor:
    """Takes a snapshot of tensors that then change; returns its memory."""
    files = {"a": tensors(), "b": tensors()}
    expected = {path: {name: torch.Tensor.clone(t) for name, t in some.items()} for path, some in files.items()}
    OnGpu.copied.clear()
    copies = snapshot.begin(files)
    snapshot.settle()
    for some in files.values():
        for tensor in some.values():
            tensor.zero_()
    snapshot.finish()
    for path, some in expected.items():
        assert all(torch.equal(copies[path][name], tensor.as_subclass(torch.Tensor)) for name, tensor in some.items())
    assert snapshot._block is not None
    return snapshot._block


def test_every_byte_is_registered_once_and_no_copy_crosses_from_piece_to_piece(runtime: Runtime) -> None:
    snapshot = HostSnapshot(threads=1)
    block = check_copies(snapshot)
    begin, end = block.data_ptr(), block.data_ptr() + block.nbytes
    ranges = sorted(runtime.ranges.items())
    assert len(ranges) == -(-block.nbytes // PIECE) > 6
    assert ranges[0][0] == begin and end <= ranges[-1][1] < end + mmap.PAGESIZE
    assert all(one[1] == next_one[0] for one, next_one in zip(ranges, ranges[1:], strict=False))
    assert OnGpu.copied
    for first, last in OnGpu.copied:
        assert first == last or (first - begin) // PIECE == (last - 1 - begin) // PIECE
    check_copies(snapshot)
    assert runtime.calls == len(ranges)  # once, for all snapshots
    snapshot.release()


@pytest.mark.parametrize("number", [1, 4])
def test_a_piece_that_cannot_be_pinned_costs_speed_alone(
    runtime: Runtime, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    runtime.fails_at = number
    snapshot = HostSnapshot(threads=1)
    check_copies(snapshot)
    check_copies(snapshot)
    assert runtime.calls == number and len(runtime.ranges) == number - 1
    (record,) = caplog.records
    assert "cannot be pinned (2), so saves will stall longer; try `ulimit -l unlimited`" in record.getMessage()
    snapshot.release()


def test_a_stop_between_two_pieces_ends_the_pinning(runtime: Runtime) -> None:
    snapshot, reached = HostSnapshot(threads=1), threading.Event()

    def stopped() -> None:
        if runtime.calls == 3:
            reached.set()
            assert snapshot._pinned is not None and snapshot._pinned._released.wait(30)

    runtime.meanwhile = stopped
    thread = threading.Thread(target=snapshot.prepare, args=({"a": tensors()},))
    thread.start()
    assert reached.wait(30)
    snapshot.release()  # returns when the third is done
    assert runtime.ranges == {}
    thread.join(30)
    assert not thread.is_alive() and runtime.calls == 3 and runtime.ranges == {}
