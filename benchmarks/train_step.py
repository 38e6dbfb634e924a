"""The training step against LeRobot's: samples per second, the fraction of the device's arithmetic, peak memory.

    uv run python benchmarks/train_step.py --size reduced --cameras 3 --present 1 --batch 2 --peer lerobot

Both train the same weights on the same batch: forward, backward, clipping, AdamW (fused on both sides); on a CPU in turns, on
a GPU one after the other, each in a process of its own, because two of the full size do not fit one card. `--present` of the
model's cameras have an image. LeRobot is tried in several configurations (float32, `dtype: bfloat16`, and on a GPU that one
compiled as `--peer_compile` says), this code in float32 and, on a GPU only, bfloat16 autocast; on a CPU both. What does not
fit a GPU is tried again with recomputed activations, and its name says so. `ratio` compares the fastest of ours with the
fastest of theirs: the median over the rounds of the quotient of times within a round.

`loss_relative_difference` compares both in float32, uncompiled, with the same noise and time; more than 1e-4 ends the
benchmark. The table also says how far each configuration as timed is from LeRobot in float32. `--padding language` takes
instructions of different lengths. Under `--padding mixed` every other sample has one camera besides, which LeRobot cannot
be told, so losses are not compared.

`flop_per_sample` is what the mathematics needs (`agent.models.pi.accounting`), `matrix_flops` what the device does in
products of square matrices of the type that ours was timed in, measured between the rounds, `fraction` the part of it
reached. Peak memory is what torch has allocated on a GPU; on a CPU what a fresh process grows by that builds the model
and makes two updates. The last line is JSON. With `--profile` a table by module follows the other one: where the time
of a step goes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from contenders import MAX_GRAD_NORM, SIZES, Contender, Ours, make_batch, model_config, train_config

from agent.models.pi.accounting import flop_per_sample
from agent.optim.optimizer import apply_update, clip_gradients

LARGEST_DIFFERENCE = 1e-4
LARGEST_ROUNDED_DIFFERENCE = 2e-2  # as timed, in bfloat16


def main() -> None:
    """Reads the options, measures, reports."""
    options = read_options()
    names = list(configurations(options))
    if options.device == "cuda":
        result = decide([in_child("spawn", compete, options, [name]) for name in names])
    else:
        # Nothing has been computed in this process, so that children can be forked from it, after the imports.
        import lerobot.policies.pi0.modeling_pi0  # noqa: F401

        result = decide([in_child("fork", compete, options, names)])
        fastest = (result["ours"], result["peer"])
        result["peaks"] = {name: in_child("fork", memory_on_cpu, options, name) for name in fastest}
    print(report(options, result))


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="reduced")
    parser.add_argument("--cameras", type=int, default=3, help="camera slots of the model")
    parser.add_argument("--present", type=int, default=3, help="of which so many have an image")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--peer", choices=["lerobot"], default="lerobot")
    parser.add_argument("--peer_compile", choices=["none", "default", "max-autotune"], default="none",
                        help="on a GPU the peer is compiled too; its own mode is max-autotune: many minutes")  # fmt: skip
    parser.add_argument("--language", type=int, help="tokens of the instruction; the model's most when not given")
    parser.add_argument("--padding", choices=["none", "language", "mixed"], default="none")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="ours")
    parser.add_argument("--activation_checkpointing", choices=["none", "blocks", "full"], default="none", help="ours")
    parser.add_argument("--compile", action="store_true", help="ours with use_torch_compile; eager when not given")
    parser.add_argument("--fp8", choices=["none", "mlp"], default="none", help="ours")
    parser.add_argument("--low_memory", action="store_true", help="ours with adamw8bit and bfloat16_stochastic")
    parser.add_argument("--cuda_graph", choices=["none", "auto"], default="none", help="ours")
    parser.add_argument("--rounds", type=int, help="default: 6 on a CPU, 3 on a GPU")
    parser.add_argument("--steps", type=int, help="timed updates of a turn; default: 1 on a CPU, 5 on a GPU")
    parser.add_argument("--profile", action="store_true", help="also where the time of our step goes, by module")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if not 1 <= options.present <= options.cameras:
        parser.error(f"--present {options.present} is not within 1..--cameras {options.cameras}")
    gpu = options.device == "cuda"
    options.rounds = options.rounds or (3 if gpu else 6)
    options.steps = options.steps or (5 if gpu else 1)
    options.language = options.language or model_config(options.size, 1).tokenizer_max_length
    return options


# ---- who competes


def configurations(options: argparse.Namespace) -> dict[str, Callable[..., Contender]]:
    """Name → what builds it from batch and device; with ``smaller`` so that it needs less memory."""
    gpu = options.device == "cuda"
    precisions = ["bfloat16"] if gpu else ["float32", "bfloat16"]
    if options.precision != "auto":
        precisions = [options.precision]

    def ours(precision: str, batch: Any, device: torch.device, smaller: bool = False) -> Contender:
        config = train_config(
            model_config(options.size, options.cameras),
            options.batch,
            use_bf16=precision == "bfloat16",
            activation_checkpointing="blocks" if smaller else options.activation_checkpointing,
            use_torch_compile=options.compile,
            fp8=options.fp8,
            cuda_graph=options.cuda_graph,
            optimizer="adamw8bit" if options.low_memory else "adamw",
            precision="bfloat16_stochastic" if options.low_memory else "float32_master",
        )
        return Ours(config, batch, device)

    def theirs(batch: Any, device: torch.device, smaller: bool = False, **settings: Any) -> Contender:
        from lerobot_contender import LeRobot

        return LeRobot(model_config(options.size, options.cameras), batch, device, checkpointing=smaller, **settings)

    table: dict[str, Callable[..., Contender]] = {f"agent {p}": partial(ours, p) for p in precisions}
    table |= {f"LeRobot {dtype}": partial(theirs, dtype=dtype) for dtype in ("float32", "bfloat16")}
    if gpu and options.peer_compile != "none":
        table["LeRobot bfloat16 compiled"] = partial(theirs, dtype="bfloat16", compile_mode=options.peer_compile)
    return table


def inputs(options: argparse.Namespace) -> tuple[Any, torch.device]:
    """Batch and device."""
    config = model_config(options.size, options.cameras)
    batch = make_batch(config, options.present, options.batch, options.language, padding=options.padding)
    return batch, torch.device(options.device)


# ---- time


def compete(
    options: argparse.Namespace, names: Sequence[str], after: Callable[[Contender], None] | None = None
) -> dict[str, Any]:
    """Losses, times, peak memory (on a GPU) of these contenders, in turns; ``after`` is called with each at the end."""
    batch, device = inputs(options)
    contenders: dict[str, Contender] = {}
    found: dict[str, Any] = {key: {} for key in ("losses", "exact", "peaks", "called", "profile")}
    gpu = device.type == "cuda"
    for name in names:
        build = partial(configurations(options)[name], batch, device)
        contender, found["losses"][name], found["exact"][name] = fitting(build)
        contenders[name], found["called"][name] = contender, contender.name
    found["times"] = {name: [] for name in contenders}
    # On a CPU ours is timed in both types, and its rate is that of the one which is faster.
    found["rates"] = {dtype: [] for dtype in ((torch.bfloat16,) if gpu else (torch.float32, torch.bfloat16))}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, contender in contenders.items():
            seconds, peak = turn(contender, options.steps)
            found["peaks"][name] = max(peak, found["peaks"].get(name, 0))
            if round_:
                found["times"][name].append(seconds)
        for dtype, rates in found["rates"].items():
            rates.append(matrix_rate(device, dtype))
    for contender in contenders.values() if after is not None else ():
        after(contender)
    if options.profile:
        found["profile"] = {n: profile(c) for n, c in contenders.items() if isinstance(c, Ours)}
    return found


def decide(shares: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Puts together what processes found of their contenders, and finds the fastest of either side."""
    keys = ("losses", "exact", "peaks", "called", "profile", "times")
    result: dict[str, Any] = {key: {k: v for share in shares for k, v in share[key].items()} for key in keys}
    times, reference = result["times"], result["losses"]["LeRobot float32"]
    fastest = {who: min((n for n in times if n.startswith(who)), key=lambda n: statistics.median(times[n]))
               for who in ("agent", "LeRobot")}  # fmt: skip
    result["ours"], result["peer"], result["reference"] = fastest["agent"], fastest["LeRobot"], reference
    result["difference"] = abs(next(iter(result["exact"].values())) - reference) / abs(reference)
    dtype = torch.bfloat16 if "bfloat16" in result["ours"] else torch.float32
    result["matrix_flops"] = statistics.median(rate for share in shares for rate in share["rates"][dtype])
    return result


def fitting(build: Callable[..., Contender]) -> tuple[Contender, float, float]:
    """The contender, its loss and that in float32; where the GPU's memory is too small, one that recomputes activations."""
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return started(build())
    gc.collect()  # of the first one nothing is referred to any more
    torch.cuda.empty_cache()
    return started(build(smaller=True))


def started(contender: Contender) -> tuple[Contender, float, float]:
    """The same, which on a GPU has made an update: only then is it known to fit."""
    loss, exact = contender.loss(), contender.loss(exact=True)
    if contender.device.type == "cuda":
        turn(contender, 1)
    return contender, loss, exact


def turn(contender: Contender, steps: int) -> tuple[float, int]:
    """Seconds of an update, and on a GPU the most bytes allocated meanwhile."""
    gpu = contender.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    contender.arm()
    if gpu:
        for _ in range(2):  # allocates the optimizer's state and fills the allocator's pools
            contender.step()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        contender.step()
    if gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / steps
    return seconds, torch.cuda.max_memory_allocated() if gpu else 0


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a product of square matrices: 8192 on a GPU, 1024 on a CPU. The best of some."""
    side, repeats = (8192, 20) if device.type == "cuda" else (1024, 5)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - begin) / repeats)
    return 2 * side**3 / min(seconds)


# ---- processes of their own, and memory on a CPU


def in_child(method: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, computed in a process of its own: a fork of this one, or one that is started anew."""
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, *arguments))  # type: ignore[attr-defined]
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        sys.exit(f"{function.__name__} ended with exit code {process.exitcode}")
    finally:
        process.join()


def _answer(sender: Any, function: Callable[..., Any], *arguments: Any) -> None:
    sender.send(function(*arguments))


def memory_on_cpu(options: argparse.Namespace, name: str) -> int:
    """Bytes that this process grows by while it builds a contender and makes two updates."""
    batch, device = inputs(options)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the threads and buffers of the library
    before = memory("VmRSS")
    contender = configurations(options)[name](batch, device)
    contender.arm()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of building
    for _ in range(2):
        contender.step()
    return memory("VmHWM") - before


def memory(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# ---- where the time goes


_GROUPS = (
    (".mlp", "MLPs"),
    ("_proj", "projections of attention"),
    ("norm", "norms"),
)


def profile(ours: Ours, steps: int = 3) -> list[tuple[str, float]]:
    """Part of a step → its share of the time, largest first.

    What is no module of its own (attention, rotations, residual sums, the loss) is the rest of forward and backward
    pass. On a GPU the device is waited for at every boundary, which makes the step slower and the shares rougher.
    """
    ours.arm()
    spent: dict[str, float] = defaultdict(float)
    begun: dict[str, float] = {}

    def now() -> float:
        if ours.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(name: str) -> Callable[..., None]:
        return lambda *_: begun.update({name: now()})

    def stop(name: str, group: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            spent[group] += now() - begun[name]

        return hook

    handles = []
    for name, module in ours.policy.named_modules():
        kind = next(
            (kind for ending, kind in _GROUPS if name.split("layers.")[-1].partition(".")[2] and ending in name), None
        )
        inside_mlp = ".mlp." in name
        if kind is None or inside_mlp or not hasattr(module, "forward") or name.endswith("self_attn"):
            continue
        part = name.split(".")[0]
        handles += [
            module.register_forward_pre_hook(start(name)),
            module.register_forward_hook(stop(name, f"{part}: {kind}, forward")),
            module.register_full_backward_pre_hook(start(name)),
            module.register_full_backward_hook(stop(name, f"{part}: {kind}, backward")),
        ]
    run, total = ours.run, 0.0
    assert run is not None
    for _ in range(steps):
        marks = [now()]
        with run.precision():
            losses = run.policy.total(run.model(ours.batch))
        marks.append(now())
        losses.mean().backward()
        marks.append(now())
        clip_gradients(run.optimizer, MAX_GRAD_NORM)
        marks.append(now())
        apply_update(run.optimizer, 1e-5, run.state.step)
        run.optimizer.zero_grad(set_to_none=True)
        marks.append(now())
        for name, (begin, end) in zip(("forward", "backward", "clipping", "optimizer"), pairwise(marks), strict=True):
            spent[name] += end - begin
        total += marks[-1] - marks[0]
    for handle in handles:
        handle.remove()
    for which in ("forward", "backward"):
        spent[f"attention, rotations, sums, embeddings, {which}"] = spent.pop(which) - sum(
            seconds for name, seconds in spent.items() if name.endswith(f", {which}")
        )
    return sorted(((name, seconds / total) for name, seconds in spent.items()), key=lambda row: -row[1])


def report(options: argparse.Namespace, result: dict[str, Any]) -> str:
    """A table for people and a line for programs.

    Raises:
        SystemExit: if the losses differ.
    """
    times, reference = result["times"], result["reference"]
    ours, peer = result["ours"], result["peer"]
    print(f"{options.size}, {options.present} of {options.cameras} cameras, batch {options.batch}, {options.language} "
          f"language tokens, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"padding {options.padding}, {options.rounds} rounds, medians")  # fmt: skip
    print(f"{'':<30}{'s/step':>9}{'min':>9}{'max':>9}{'samples/s':>11}{'loss, from float32 LeRobot':>29}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        away = abs(result["losses"][name] - reference) / abs(reference)
        rate = options.batch / median
        print(
            f"{result['called'][name]:<30}{median:9.3f}{min(seconds):9.3f}{max(seconds):9.3f}{rate:11.2f}{away:29.1e}"
        )
        if away > LARGEST_ROUNDED_DIFFERENCE and options.padding != "mixed":
            sys.exit(f"the loss of {name} is {result['losses'][name]:.6f}, of LeRobot in float32 {reference:.6f}")
    if result["difference"] > LARGEST_DIFFERENCE and options.padding != "mixed":
        sys.exit(f"in float32 the losses differ by {result['difference']:.1e}: not the same mathematics")
    for name, share in result["profile"].get(ours, []):
        print(f"  {name:<40}{100 * share:6.1f} %")
    ratio = statistics.median(theirs / mine for mine, theirs in zip(times[ours], times[peer], strict=True))
    flop = flop_per_sample(model_config(options.size, options.cameras), options.present, options.language)
    samples_per_s = options.batch / statistics.median(times[ours])
    print(f"{ours} is {ratio:.2f} times as fast as {peer}")
    return json.dumps({
        "ratio": round(ratio, 3),
        "loss_relative_difference": result["difference"],
        "samples_per_s": round(samples_per_s, 3),
        "peer_samples_per_s": round(options.batch / statistics.median(times[peer]), 3),
        "flop_per_sample": flop,
        "matrix_flops": result["matrix_flops"],
        "fraction": round(samples_per_s * flop / result["matrix_flops"], 4),
        "peak_bytes": result["peaks"][ours],
        "peer_peak_bytes": result["peaks"][peer],
    })  # fmt: skip


if __name__ == "__main__":
    main()
