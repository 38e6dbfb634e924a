"""Our writer of safetensors files against the library, and the snapshot in host memory that it writes from.

Run: pytest tests/checkpoints/test_tensor_file.py   (about three seconds)
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from agent.checkpoints import tensor_file, tensor_reader
from agent.checkpoints.host_snapshot import HostSnapshot

TYPES = list(tensor_file.TYPES)


def every_type() -> dict[str, torch.Tensor]:
    """Names in an order that is neither the alphabet's nor the file's."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{index % 3}/{dtype}": torch.randint(0, 2, (3, index + 1), generator=generator).to(dtype)
        for index, dtype in enumerate(TYPES)
    }
    extra = {
        "a/scalar": torch.tensor(3.5),
        "Z/empty": torch.empty(0, 4),
        'é "quoted"\n\\': torch.ones(2, dtype=torch.bfloat16),
        "a/large": torch.randn(3000, 2000, generator=generator),  # more than one chunk
        "b/empty of another type": torch.empty(3, 0, dtype=torch.int8),
    }
    return extra | tensors


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == right[name].dtype and a.shape == right[name].shape and torch.equal(a, right[name])
        for name, a in left.items()
    )


def test_the_bytes_are_the_librarys_and_the_hash_is_the_files(tmp_path):
    tensors = every_type()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    written = tensor_file.write(tmp_path / "ours", tensors)
    data = (tmp_path / "ours").read_bytes()
    assert data == (tmp_path / "theirs").read_bytes()
    assert written == tensor_file.Written(len(data), xxhash.xxh3_128(data).hexdigest())
    assert tensor_file.file_size(tensors) == len(data)
    assert same(load_file(tmp_path / "ours"), tensors) and same(tensor_reader.read(tmp_path / "ours"), tensors)
    with safe_open(tmp_path / "ours", "pt") as archive:
        assert archive.metadata() == {"format": "pt"}


def test_one_type_each_and_nothing_at_all(tmp_path):
    for number, tensors in enumerate([{}, *({"x": torch.ones(5).to(dtype)} for dtype in TYPES)]):
        path = tmp_path / str(number)
        tensor_file.write(path, tensors)
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "theirs").read_bytes()
        assert same(tensor_reader.read(path), tensors)


def test_shared_memory_slices_and_an_expanded_number(tmp_path):
    base = torch.arange(100.0)
    shared = {
        "tied": base.view(10, 10),
        "embedding": base,
        "slice": base[7:20],
        "next": base[20:40],
        "zeros": torch.zeros((), dtype=torch.bfloat16).expand(3000, 4000),  # 24 MB of file, two bytes of memory
        "row": torch.full((1, 1), 2.5).expand(1, 7),
    }
    tensor_file.write(tmp_path / "ours", shared)
    apart = {name: t.clone(memory_format=torch.contiguous_format) for name, t in shared.items()}
    save_file(apart, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_random_sets_of_tensors(tmp_path):
    generator = torch.Generator().manual_seed(1)

    def number(below: int) -> int:
        return int(torch.randint(0, below, (), generator=generator))

    for _ in range(50):
        tensors = {}
        for index in range(number(8)):
            shape = [number(6) for _ in range(number(4))]
            tensors[f"{number(100)}.{index}"] = torch.randint(0, 2, shape, generator=generator).to(TYPES[number(16)])
        copies = taken(HostSnapshot(), {"file": tensors})["file"]
        tensor_file.write(tmp_path / "ours", copies)
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("call", ["write", "fsync", "close"])
def test_an_error_of_the_disk_is_raised_wherever_it_comes(tmp_path, monkeypatch, call):
    original = getattr(os, call)

    def failing(handle, *args):
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name == "file":
            if call == "close":
                original(handle)
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(handle, *args)

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match="No space left"):
        tensor_file.write(tmp_path / "file", {"x": torch.ones(3)})


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, block: write(handle, block[:1000]))
    tensors = {"x": torch.randn(5000)}
    tensor_file.write(tmp_path / "file", tensors)
    assert same(load_file(tmp_path / "file"), tensors)


def test_writing_can_be_given_up(tmp_path):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(tensor_file.Cancelled):
        tensor_file.write(tmp_path / "file", {"x": torch.ones(3)}, cancel)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "file"
    tensor_file.write(path, every_type())
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    cases = [good[:size] for size in (0, 5, 8, 100, 8 + length, len(good) - 1)]
    cases += [b"\xff" * 8 + good[8:], good[:8] + b"[" + good[9:], good.replace(b'"F32"', b'"F99"')]
    for data in cases:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="truncated or damaged"):
            tensor_reader.read(path)


def test_a_file_in_parts(tmp_path):
    (tmp_path / "state").mkdir()
    tensors = every_type()
    names = list(tensors)
    for part in range(3):
        some = {name: tensors[name] for name in names[part::3]}
        tensor_file.write(tmp_path / "state" / f"optimizer-{part:05d}-of-00003.safetensors", some)
    files = tensor_reader.parts(tmp_path, "state/optimizer")
    assert same({name: t for path in files for name, t in tensor_reader.read(path).items()}, tensors)
    (tmp_path / "state" / "optimizer-00001-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="nor all of its parts"):
        tensor_reader.parts(tmp_path, "state/optimizer")
    tensor_file.write(tmp_path / "state" / "optimizer.safetensors", tensors)
    assert tensor_reader.parts(tmp_path, "state/optimizer") == [tmp_path / "state" / "optimizer.safetensors"]
    with pytest.raises(ValueError, match="nor all of its parts"):
        tensor_reader.parts(tmp_path, "state/other")


@pytest.mark.parametrize("block", [64, 1 << 22])
def test_a_file_is_read_once_into_what_is_there(tmp_path, monkeypatch, block):
    # Into memory of the same type, of another, of fewer rows, past what nobody wants; the checksum gets all of it.
    monkeypatch.setattr(tensor_reader, "_BLOCK", block)
    written = {name: torch.randn(37, 5) for name in ("a", "b", "c", "d", "e")} | {"one": torch.tensor(3.0)}
    tensor_file.write(tmp_path / "file", written)
    targets = {
        "a": torch.zeros(37, 5),
        "b": torch.zeros(37, 5, dtype=torch.bfloat16),
        "d": torch.zeros(20, 5),
        "e": torch.zeros(36, 5, dtype=torch.float64),
        "one": torch.tensor(0.0),
    }
    for digest in (None, xxhash.xxh3_128()):
        for target in targets.values():
            target.zero_()
        tensor_reader.stream(tmp_path / "file", targets, digest)
        for name, target in targets.items():
            expected = written[name][: len(target)] if target.ndim else written[name]
            assert torch.equal(target, expected.to(target.dtype)), name
    assert digest is not None and digest.hexdigest() == xxhash.xxh3_128_hexdigest((tmp_path / "file").read_bytes())


def test_what_goes_to_the_host_waits_for_no_gpu(tmp_path, monkeypatch):
    # Weights of another shape go by way of the host, while the rest of their file goes to the GPU.
    class Pinned(tensor_reader._Buffer):
        def __init__(self, pin):
            super().__init__(pin=False)
            self.copied = SimpleNamespace(synchronize=lambda: None)

    monkeypatch.setattr(tensor_reader, "_Buffer", Pinned)
    written = torch.randn(37, 5).bfloat16()
    tensor_file.write(tmp_path / "file", {"a": written})
    target = torch.zeros(37, 5)
    tensor_reader.stream(tmp_path / "file", {"a": target})
    assert torch.equal(target, written.float())


@pytest.mark.gpu
def test_a_file_goes_to_the_gpu_and_to_the_host(tmp_path):
    written = {name: torch.randn(37, 5).bfloat16() for name in ("a", "b")}
    tensor_file.write(tmp_path / "file", written)
    targets = {"a": torch.zeros(37, 5, device="cuda"), "b": torch.zeros(37, 5)}
    tensor_reader.stream(tmp_path / "file", targets)
    assert same({name: tensor.cpu() for name, tensor in targets.items()}, {n: t.float() for n, t in written.items()})


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path, read_header = tmp_path / "file", tensor_reader._header
    tensor_file.write(path, {"a": torch.randn(1000)})

    def then_shrink(*arguments):
        header = read_header(*arguments)
        os.truncate(path, 1000)
        return header

    monkeypatch.setattr(tensor_reader, "_header", then_shrink)
    with pytest.raises(ValueError, match="became shorter"):
        tensor_reader.stream(path, {"a": torch.zeros(1000)})


def test_a_checksum_that_fails_is_not_silent(tmp_path):
    class Broken:
        def update(self, block):
            raise MemoryError("no room")

    tensor_file.write(tmp_path / "file", {"a": torch.randn(1000)})
    with pytest.raises(MemoryError, match="no room"):
        tensor_reader.stream(tmp_path / "file", {"a": torch.zeros(1000)}, Broken())


def test_numbers_are_rounded_on_their_way(tmp_path):
    tensors = every_type() | {"big": torch.randn(3, 5000), "one": torch.tensor(1 / 3).expand(7, 3)}
    written = tensor_file.write(tmp_path / "file", tensors, dtype=torch.bfloat16)
    assert written.size == tensor_file.file_size(tensors, torch.bfloat16) == (tmp_path / "file").stat().st_size
    rounded = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()}
    assert same(load_file(tmp_path / "file"), rounded)
    tensor_file.write(tmp_path / "same", {name: tensor.contiguous() for name, tensor in rounded.items()})
    assert (tmp_path / "file").read_bytes() == (tmp_path / "same").read_bytes()


# ── the snapshot ────────────────────────────────────────────────────────────────────────────────────────────────


def taken(snapshot, files):
    copies = snapshot.begin(files)
    snapshot.settle()
    snapshot.finish()
    return copies


def test_a_snapshot_holds_what_was_and_its_memory_is_reused():
    snapshot = HostSnapshot(threads=3)
    tensors = every_type() | {"transposed": torch.randn(40, 30).t(), "huge": torch.randn(5000, 4000)}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    copies = taken(snapshot, {"file": tensors})["file"]
    for tensor in tensors.values():
        tensor.zero_()
    assert same({name: copies[name] for name in expected}, expected)
    where = {name: tensor.data_ptr() for name, tensor in copies.items()}
    again = taken(snapshot, {"file": dict(reversed(tensors.items()))})["file"]
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == where
    assert not any(tensor.any() for tensor in again.values())
    # Other tensors need another layout.
    other = taken(snapshot, {"file": {"huge": torch.ones(3)}})["file"]
    assert same(other, {"huge": torch.ones(3)})


def test_shared_memory_is_copied_once_and_an_expanded_number_is_one_number():
    tensor = torch.randn(1000, 10)
    zeros = torch.zeros((), dtype=torch.bfloat16).expand(100_000, 1000)
    files = {
        "a": {"x": tensor, "tied": tensor, "other shape": tensor.view(10, 1000)},
        "b": {"x": tensor.detach(), "z": zeros},
    }
    snapshot = HostSnapshot()
    copies = taken(snapshot, files)
    assert snapshot._block is not None and snapshot._block.nbytes < 3 * tensor.nbytes
    assert copies["a"]["x"].data_ptr() == copies["a"]["tied"].data_ptr() == copies["b"]["x"].data_ptr()
    assert all(same(copies[path], tensors) for path, tensors in files.items())


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_is_pinned_and_right(tmp_path):
    tensors = {name: tensor.cuda() for name, tensor in every_type().items()} | {"step": torch.tensor(3.0)}
    expected = {name: tensor.cpu() for name, tensor in tensors.items()}
    snapshot = HostSnapshot()
    for _ in range(2):
        copies = taken(snapshot, {"file": tensors})["file"]
        for tensor in tensors.values():
            if tensor.is_cuda:
                tensor.zero_()
        torch.cuda.synchronize()
        assert copies["a/large"].is_pinned()
        assert same({name: copies[name] for name in expected}, expected)
        for name, tensor in tensors.items():
            tensor.copy_(expected[name])
    snapshot.release()
