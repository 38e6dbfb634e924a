"""What the ranks of a forked run do besides training: record, or break something on purpose."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def record() -> None:
    """Writes, before each update, a digest of weights and optimizer, and with it the samples of each micro-batch."""
    import torch
    import xxhash

    from agent.optim.optimizer import optimizer_tensors
    from agent.parallel import sharding
    from agent.training import trainer

    target = Path(os.environ["RECORD"] + f".{_rank()}")
    train_step = trainer.train_step

    def recording(run: Any, batches: Any, clock: Any) -> Any:
        digest = xxhash.xxh3_128()
        tensors = {**dict(run.policy.named_parameters()), **optimizer_tensors(run.optimizer, run.policy)}
        for name in sorted(tensors):
            local = sharding.rows(tensors[name]).local.contiguous()
            digest.update(local.view(-1).view(torch.uint8).numpy())  # numpy has no bfloat16
        seen: list[list[int]] = []

        def watched() -> Any:
            for batch in batches:
                for k, provenance, time_k in zip(batch.sample_index, batch.provenance, batch.draws.time, strict=True):
                    seen.append([int(k), *provenance.tolist(), float(time_k)])
                yield batch

        result = train_step(run, watched(), clock)
        with open(target, "a") as stream:
            line = {"step": run.state.step, "digest": digest.hexdigest(), "samples": seen}
            stream.write(json.dumps(line) + "\n")
        return result

    trainer.train_step = recording


def first_narrow_rule() -> None:
    """A run begins as runs did whose statistics took deviations below 1e-4 for none."""
    from agent.training import resuming

    resuming.NARROW_RULE = 1


def follow_a_reference() -> None:
    """Beside each update torch's AdamW makes one on the clipped gradient of the mean loss, with the numbers of ``REFERENCE``.

    Writes what that gave, and how far the weights are from those of the run.
    """
    import itertools

    import torch

    from agent.batch import to_device
    from agent.training import trainer

    train_step, numbers = trainer.train_step, json.loads(os.environ["REFERENCE"])
    copies: dict[str, torch.Tensor] = {}
    optimizers: list[torch.optim.Optimizer] = []

    def followed(run: Any, batches: Any, clock: Any) -> Any:
        share = list(itertools.islice(batches, run.plan.accumulation_steps))
        trained = {name: p for name, p in run.policy.named_parameters() if p.requires_grad}
        if not copies:
            copies.update({name: p.detach().clone() for name, p in trained.items()})
            optimizers.append(torch.optim.AdamW(copies.values(), **numbers["adamw"]))
        with run.precision():
            loss = torch.cat([run.model(to_device(batch, run.processes.device))["flow"] for batch in share]).mean()
        for copy, gradient in zip(copies.values(), torch.autograd.grad(loss, list(trained.values())), strict=True):
            copy.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(copies.values(), numbers["max_norm"])
        optimizers[0].param_groups[0]["lr"] = numbers["lr"][run.state.step]
        optimizers[0].step()
        result = train_step(run, iter(share), clock)
        furthest = max(float((p - copies[name]).detach().abs().max()) for name, p in trained.items())
        with open(numbers["target"], "a") as stream:
            stream.write(json.dumps({"loss": float(loss), "grad_norm": float(norm), "furthest": furthest}) + "\n")
        return result

    trainer.train_step = followed


def processor_without_bfloat16() -> None:
    """As PyTorch sees a Xeon before Sapphire Rapids, and most desktop processors."""
    import torch

    known = {name: on for name, on in torch.cpu.get_capabilities().items() if "bf16" not in name}
    torch.cpu.get_capabilities = lambda: known


def processor_with_bfloat16() -> None:
    """As PyTorch sees an EPYC from Genoa on."""
    import torch

    known = {**torch.cpu.get_capabilities(), "avx512_bf16": True}
    torch.cpu.get_capabilities = lambda: known


def infinite_gradient() -> None:
    """On rank 1, the gradients of the updates named in ``BREAK_AT`` are infinite."""
    from agent.training import building

    parallelize, at = building.parallelize, json.loads(os.environ["BREAK_AT"])

    def broken(policy: Any, *arguments: Any, **keywords: Any) -> Any:
        calls = [int(os.environ.get("FIRST", "0")) - 2]  # the passes before the first update count as none

        def spoil(gradient: Any) -> Any:
            calls[0] += 1
            return gradient * float("inf") if calls[0] in at else gradient

        if _rank() == 1:
            next(p for p in policy.parameters() if p.requires_grad).register_hook(spoil)
        return parallelize(policy, *arguments, **keywords)

    building.parallelize = broken


def flip_a_bit() -> None:
    """On rank 1, one bit of one weight changes after update 5."""
    import torch

    from agent.training import trainer

    train_step = trainer.train_step

    def flipping(run: Any, batches: Any, clock: Any) -> Any:
        result = train_step(run, batches, clock)
        if run.state.step == 5 and _rank() == 1:
            run.policy.state_proj.weight.data.view(torch.int32)[0, 0] ^= 1
        return result

    trainer.train_step = flipping


def memory_exhausted() -> None:
    """The fourth update finds no memory, as on a GPU that others use too."""
    import torch

    from agent.training import trainer

    train_step = trainer.train_step

    def exhausted(run: Any, batches: Any, clock: Any) -> Any:
        if run.state.step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train_step(run, batches, clock)

    trainer.train_step = exhausted


def report_determinism() -> None:
    """Before training it is said what kernels torch will choose."""
    import torch

    from agent.training import trainer

    train = trainer.train
    torch.backends.cudnn.benchmark = True

    def reporting(*arguments: Any, **keywords: Any) -> Any:
        chosen, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        filled = torch.utils.deterministic.fill_uninitialized_memory
        print(f"deterministic: {chosen}, benchmark: {benchmark}, workspace: {workspace}, filled: {filled}", flush=True)
        return train(*arguments, **keywords)

    trainer.train = reporting


def broken_picture() -> None:
    """Validations cannot be drawn, and not for want of room."""

    from agent.training import validating

    def broken(path: Path, record: Any) -> None:
        raise ZeroDivisionError("no pixels")

    validating.draw = broken


def unforeseen_damage() -> None:
    """The metadata of a data set are damaged in a way that nobody has thought of."""
    from agent.preflight import survey

    def damaged(repo_id: str, root: Path) -> Any:
        raise ZeroDivisionError("division by zero")

    survey.read_metadata = damaged


def gated() -> None:
    """No update beyond the number in the file ``GATE`` begins before a larger one stands there."""
    from agent.training import trainer

    train_step, gate = trainer.train_step, Path(os.environ["GATE"])

    def waiting(run: Any, batches: Any, clock: Any) -> Any:
        while run.state.step >= int(gate.read_text() or 0):
            time.sleep(0.02)
        return train_step(run, batches, clock)

    trainer.train_step = waiting


def fail_while_ending() -> None:
    """The third update hangs, and fails when the watchdog ends the run, as when the peer of a collective is gone."""
    from agent.training import trainer

    train_step = trainer.train_step

    def hanging(run: Any, batches: Any, clock: Any) -> Any:
        if run.state.step < 2:
            return train_step(run, batches, clock)
        status = run.folder.path / "status.json"
        while "hang" not in status.read_text():
            time.sleep(0.05)
        raise RuntimeError("Connection closed by peer")

    trainer.train_step = hanging


def slow_validation() -> None:
    """Validation says when it begins, and takes a while for each batch."""

    from agent.data.loading.loader import TrainLoader

    batches = TrainLoader.validation_batches

    def slow(self: Any) -> Any:
        print("validation begins", flush=True)
        for item in batches(self):
            time.sleep(0.4)
            yield item
        print("validation ends", flush=True)

    TrainLoader.validation_batches = slow  # type: ignore[method-assign]


def slow_save() -> None:
    """Writing a checkpoint says when it begins and takes a while."""
    from agent.checkpoints import store as checkpoint

    seal = checkpoint.seal

    def slow(*arguments: Any, **keywords: Any) -> Any:
        print("save begins", flush=True)
        time.sleep(float(os.environ.get("SAVE_S", "1")))
        return seal(*arguments, **keywords)

    checkpoint.seal = slow


def slow_copies() -> None:
    """The threads that copy a checkpoint's tensors begin a while later, when training has long gone on."""
    from agent.checkpoints.host_snapshot import HostSnapshot

    finish = HostSnapshot.finish

    def slow(self: Any) -> None:
        time.sleep(0.5)
        finish(self)

    HostSnapshot.finish = slow  # type: ignore[method-assign]


def unanswered_files() -> None:
    """Reading a checkpoint to verify it fails, as it does while a file server restarts."""
    import errno

    from agent.checkpoints import manifest

    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    manifest.checksum = stale


def slow_start() -> None:
    """Building says when it begins and takes a while."""
    from agent.training import building

    build = building.build

    def slow(*arguments: Any, **keywords: Any) -> Any:
        print("build begins", flush=True)
        time.sleep(1.0)
        return build(*arguments, **keywords)

    building.build = slow


def record_and_break() -> None:
    """Both."""
    record()
    infinite_gradient()


def count_waits() -> None:
    """Writes, for each update, what waits for the device in its micro-batches, and what waits after them."""
    import itertools
    import warnings

    import torch

    from agent.models.pi.model import PI0
    from agent.training import step, trainer

    target = Path(os.environ["WAITS"] + f".{_rank()}")
    train_step, clip, forward = trainer.train_step, step.clip_gradients, PI0.forward
    gpu = torch.cuda.is_available()
    if gpu:
        torch.set_warn_always(True)

    def marked(*arguments: Any, **keywords: Any) -> Any:
        with torch.profiler.record_function(END_OF_MICRO_BATCHES):
            warnings.warn(END_OF_MICRO_BATCHES, stacklevel=1)
            return clip(*arguments, **keywords)

    def watched(run: Any, batches: Any, clock: Any) -> Any:
        share = list(itertools.islice(batches, run.plan.accumulation_steps))  # reading data may wait for what it likes
        if gpu:
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught, torch.profiler.profile() as profile:
            warnings.simplefilter("always")
            result = train_step(run, iter(share), clock)
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
            events = [str(w.message) for w in caught]
            waits = [e for e in events if "synchronizing" in e or e == END_OF_MICRO_BATCHES]
        else:
            ordered = sorted(profile.events(), key=lambda event: event.time_range.start)
            waits = [e.name for e in ordered if e.name in (*WAITS, END_OF_MICRO_BATCHES)]
        end = waits.index(END_OF_MICRO_BATCHES)
        with open(target, "a") as stream:
            stream.write(json.dumps({"within": waits[:end], "after": waits[end + 1 :]}) + "\n")
        return result

    def looking(model: Any, batch: Any) -> Any:
        losses = forward(model, batch)
        assert float(losses["flow"].detach().sum()) >= 0
        return losses

    trainer.train_step, step.clip_gradients = watched, marked
    if "LOOK" in os.environ:
        PI0.forward = looking  # type: ignore[method-assign]


END_OF_MICRO_BATCHES = "end of the micro-batches"
# Every read of a tensor's value, or of a shape that depends on one, is among these. On a GPU each of them waits.
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")


def count_batches_in_memory() -> None:
    """Writes, each time a micro-batch is taken, how many of the update's earlier ones are still in memory."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from agent.training import trainer

    train_step, target = trainer.train_step, Path(os.environ["BATCHES"])

    def counting(run: Any, batches: Any, clock: Any) -> Any:
        blocks: list[StorageWeakRef] = []

        def counted() -> Any:
            while True:
                with open(target, "a") as stream:
                    stream.write(f"{sum(not block.expired() for block in blocks)}\n")
                batch = next(batches)
                blocks.append(StorageWeakRef(batch.draws.noise.untyped_storage()))
                yield batch
                del batch

        return train_step(run, counted(), clock)

    trainer.train_step = counting


def report_compilations() -> None:
    """Compiles with ``$CXX``; says at the end of training how many graphs were looked up among those of earlier starts."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    from agent.training import trainer

    config.cpp.cxx = (None, os.environ["CXX"])
    train = trainer.train

    def reporting(*arguments: Any, **keywords: Any) -> Any:
        result = train(*arguments, **keywords)
        found = {key: counters["inductor"][f"fxgraph_cache_{key}"] for key in ("hit", "miss", "bypass")}
        whole = {key: counters["aot_autograd"][f"autograd_cache_{key}"] for key in ("hit", "miss", "bypass")}
        print("compiled " + json.dumps({"graphs": counters["stats"]["unique_graphs"], "inductor": found, "aot": whole}))
        return result

    trainer.train = reporting


def count_blocks_of_gradients() -> None:
    """Writes, after each micro-batch, in how many blocks of memory the gradients are, and how many gradients there are."""
    import contextlib

    from agent.training import step

    accumulating, target = step.accumulating, Path(os.environ["BLOCKS"] + f".{_rank()}")

    @contextlib.contextmanager
    def counted(model: Any, last: bool) -> Any:
        with accumulating(model, last):
            yield
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        blocks = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        with open(target, "a") as stream:
            stream.write(json.dumps([len(blocks), len(gradients)]) + "\n")

    step.accumulating = counted


def small_buckets() -> None:
    """DDP adds gradients up in buckets smaller than a block of the model, as they are beside large models; blocks are
    traced, not compiled, and it is said how many graphs that gave."""
    from functools import partial

    import torch

    from agent.training import trainer

    compiler, train, graphs = torch.compile, trainer.train, [0]

    def counting(graph: Any, inputs: Any) -> Any:
        graphs[0] += 1
        return graph.forward

    def reporting(*arguments: Any, **keywords: Any) -> Any:
        result = train(*arguments, **keywords)
        print(f"traced {graphs[0]} graphs")
        return result

    torch.compile = lambda body, mode: compiler(body, backend=counting)  # type: ignore[assignment]
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1 << 11  # type: ignore[attr-defined]
    torch.nn.parallel.DistributedDataParallel = partial(  # type: ignore[misc, assignment]
        torch.nn.parallel.DistributedDataParallel, bucket_cap_mb=1 / 256
    )
    trainer.train = reporting


def compile_on_rank_0_alone() -> None:
    """The compiler of rank 1 fails."""
    import torch

    compiler = torch.compile

    def failing(function: Any, **keywords: Any) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            raise RuntimeError("this compiler is broken")

        return compiler(function, backend=backend if _rank() == 1 else "aot_eager")

    torch.compile = failing  # type: ignore[assignment]


def no_compiler() -> None:
    """There is no C++ compiler. (Its name has been read from the environment when this process was forked.)"""
    import torch._inductor.config

    torch._inductor.config.cpp.cxx = (None, "/nowhere/g++")


def _replace_draw(make: Any) -> None:
    """Noise and time of a sample are drawn by what ``make`` gives for the run's own draw; it travels to the workers."""
    from agent.training import building

    build = building.build

    def replaced(*arguments: Any, **keywords: Any) -> Any:
        run = build(*arguments, **keywords)
        run.data.reader.draw = make(run.data.reader.draw)
        return run

    building.build = replaced


def broken_noise() -> None:
    """Nothing can be drawn."""
    _replace_draw(lambda draw: _no_noise)


def _no_noise(k: int) -> Any:
    raise ArithmeticError(f"no noise for {k}")


def slow_samples() -> None:
    """On rank 1, a sample takes a fifth of a second."""
    if _rank() == 1:
        _replace_draw(lambda draw: partial(_slow, draw))


def _slow(draw: Any, k: int) -> Any:
    time.sleep(0.2)
    return draw(k)


def fail_on_rank_1_while_building() -> None:
    """Rank 1 cannot build the model."""
    from agent.training import building

    parallelize = building.parallelize

    def broken(policy: Any, *arguments: Any, **keywords: Any) -> Any:
        if _rank() == 1:
            raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[os.environ["BROKEN"]]("no such kernel here")
        return parallelize(policy, *arguments, **keywords)

    building.parallelize = broken


def know_the_tiny_family() -> None:
    """The type ``tiny`` is registered."""
    from support import tiny_family

    tiny_family.register()


def graphs_without_a_gpu() -> None:
    """Small batches run from graphs, as on a GPU; a graph here is the pass itself, made again over the same memory."""
    from agent.training import step_graph

    step_graph.possible = lambda processes: processes.world_size == 1
    step_graph.cuda_capture = lambda function: function
    step_graph._GAIN = 0.0
