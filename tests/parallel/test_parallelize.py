"""Activation checkpointing, compilation, DDP and FSDP, in real runs where processes matter.

Run: uv run pytest tests/parallel/test_parallelize.py      (about two minutes; ``-m slow`` compiles for real)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked import ForkServer
from support.launching import Workplace
from support.records import recorded, records, samples_of_updates, what_was_computed
from support.small_model import lively_model, make_batch
from torch.utils._python_dispatch import TorchDispatchMode

from agent.checkpoints import tensor_reader
from agent.parallel.compilation import agree_on_compilation
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes
from agent.parallel.recompute import recompute
from agent.parallel.wrap import parallelize

FSDP = ("--parallel", "fsdp")
PRETRAINED = "pretrained_model/model.safetensors"
EXACT = "training_state/model.safetensors"
FOUR = ("--per_device_batch_size", "1")
UPDATES = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Runs of half the usual length: half of the parameters on each of two ranks makes an update slow."""
    place = Workplace.make(tmp_path_factory.mktemp("place"))
    path = place.folder / "tiny.yaml"
    shorter = {"n_updates": UPDATES, "eval_freq": 5, "save_model_freq": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | shorter))
    return place


@pytest.fixture(scope="module")
def ddp(place: Workplace, server: ForkServer) -> str:
    """10 updates on two ranks with accumulation 2, each with a copy of the model."""
    output = server.start(place, "ddp", ranks=2).wait()
    assert place.status("ddp")["state"] == "finished", output
    return "ddp"


@pytest.fixture(scope="module")
def fsdp(place: Workplace, server: ForkServer) -> str:
    """The same, each with a half of the model."""
    run = server.start(place, "fsdp", *FSDP, ranks=2, hook="record", **recorded(place, "fsdp"))
    output = run.wait()
    assert place.status("fsdp")["state"] == "finished", output
    assert "parameters split over 2 processes" in output and "check_replicas_every has no effect" in output
    return "fsdp"


def assert_same_curve(place: Workplace, name: str, other: str) -> None:
    ours, theirs = place.metrics(name), place.metrics(other)
    assert len(ours) == len(theirs) == UPDATES
    for line, expected in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert ("val/loss" in line) == ("val/loss" in expected)
        for key in (key for key in expected if key.startswith("val/")):
            assert line[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def all_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer of a checkpoint by name, whichever files they are in."""
    files = [checkpoint / PRETRAINED]
    files += sorted(checkpoint.glob("training_state/optimizer*.safetensors"))
    return {name: tensor for path in files for name, tensor in tensor_reader.read(path).items()}


# ---- DDP


def test_gradients_have_no_memory_beside_the_buckets(place: Workplace, server: ForkServer) -> None:
    target = place.folder / "blocks"
    options = ("--n_updates", "2", "--eval_freq", "0")
    run = server.start(place, "buckets", *options, ranks=2, hook="count_blocks_of_gradients", BLOCKS=str(target))
    output = run.wait()
    assert place.status("buckets")["state"] == "finished", output
    for rank in range(2):
        found = [json.loads(line) for line in Path(f"{target}.{rank}").read_text().splitlines()]
        assert len(found) == 4  # two updates of two micro-batches, of which the first is not added up at once
        assert all(blocks <= 2 < gradients for blocks, gradients in found), found


# ---- FSDP


def test_fsdp_trains_and_validates_as_ddp_does(place: Workplace, ddp: str, fsdp: str) -> None:
    assert_same_curve(place, fsdp, ddp)


def test_fsdp_writes_the_files_that_ddp_writes(place: Workplace, ddp: str, fsdp: str) -> None:
    ours, theirs = (
        {str(path.relative_to(place.checkpoint(name))) for path in place.checkpoint(name).rglob("*")}
        for name in (fsdp, ddp)
    )
    assert ours == theirs
    ours, theirs = (all_tensors(place.checkpoint(name)) for name in (fsdp, ddp))
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert torch.allclose(ours[name], tensor, rtol=1e-2, atol=2e-5), name


def test_fsdp_killed_and_continued_is_bit_for_bit_the_same(place: Workplace, fsdp: str, server: ForkServer) -> None:
    for kill_at in (3, 7, None):
        run = server.start(place, "killed", *FSDP, ranks=2, hook="record", **recorded(place, "killed"))
        if kill_at is None:
            output = run.wait()
        else:
            run.wait_for_step(kill_at)
            run.kill_all()
    assert place.status("killed")["state"] == "finished", output
    for rank in range(2):
        expected = {r["step"]: r["digest"] for r in records(place, fsdp, rank)}
        found = records(place, "killed", rank)
        assert len(found) > UPDATES
        assert [r["digest"] for r in found] == [expected[r["step"]] for r in found]
    assert what_was_computed(place.metrics("killed")) == what_was_computed(place.metrics(fsdp))
    assert place.tensors("killed") == place.tensors(fsdp)


def test_a_run_moves_between_ddp_and_fsdp_and_world_sizes(
    place: Workplace, ddp: str, fsdp: str, server: ForkServer
) -> None:
    stages = [((), 2, 3), (FSDP, 4, 5), ((), 1, 7), (FSDP, 2, None)]
    for options, ranks, until in stages:
        run = server.start(place, "moved", *FOUR, *options, ranks=ranks, hook="record", **recorded(place, "moved"))
        if until is not None:
            run.wait_for_step(until)
            (place.folder / "runs" / "moved" / "stop").write_text("enough")
        output = run.wait()
        assert place.status("moved")["state"] == ("preempted" if until else "finished"), output
    assert_same_curve(place, "moved", ddp)
    assert samples_of_updates(place, "moved", 4) == samples_of_updates(place, fsdp, 2)


def test_fsdp_with_uneven_shards_validation_and_frozen_parts(place: Workplace, server: ForkServer) -> None:
    # Nine dimensions over four ranks; five samples to validate with, one rank with two of them; part of the model frozen.
    options = ("--model_cfg.max_action_dim", "9", "--eval_size", "5", "--freeze_vlm", "true", *FOUR)
    for name, extra in (("frozen-ddp", ()), ("frozen-fsdp", FSDP)):
        output = server.start(place, name, *options, *extra, ranks=4).wait()
        assert place.status(name)["state"] == "finished", output
    assert_same_curve(place, "frozen-fsdp", "frozen-ddp")


def test_fsdp_begins_from_weights_of_another_shape(place: Workplace, ddp: str, server: ForkServer) -> None:
    source = (
        "--load_from_checkpoint",
        str(place.checkpoint(ddp)),
        "--model_cfg.max_state_dim",
        "9",
        "--eval_freq",
        "0",
    )
    for name, extra in (("wide-ddp", ()), ("wide-fsdp", FSDP)):
        output = server.start(place, name, *source, *extra, ranks=2).wait()
        assert place.status(name)["state"] == "finished", output
        assert "max_state_dim is 8 in the file" in output
    assert_same_curve(place, "wide-fsdp", "wide-ddp")


def test_fsdp_in_bfloat16_computes_what_ddp_computes_and_stores_float32(place: Workplace, server: ForkServer) -> None:
    for name, extra in (("half-ddp", ()), ("half-fsdp", FSDP)):
        options = ("--use_bf16", "true", "--save_dtype", "bfloat16", "--save_model_freq", str(UPDATES))
        output = server.start(place, name, *options, *extra, ranks=2).wait()
        assert place.status(name)["state"] == "finished", output
    ours, theirs = ([line["loss"] for line in place.metrics(name)] for name in ("half-fsdp", "half-ddp"))
    # Were the norms' weights gathered in bfloat16, the losses would part by 2e-4 and some weights by 5e-3.
    assert ours == pytest.approx(theirs, rel=1e-5)
    rounded, exact, expected = (
        tensor_reader.read(place.checkpoint(name) / path)
        for name, path in (("half-fsdp", PRETRAINED), ("half-fsdp", EXACT), ("half-ddp", EXACT))
    )
    for name, tensor in expected.items():
        assert torch.allclose(exact[name], tensor, rtol=0, atol=1e-4), name
    assert rounded.keys() == exact.keys()
    for name, tensor in exact.items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16)), name
    assert exact["model.state_proj.weight"].dtype == torch.float32


def test_fsdp_on_one_process_is_a_copy(place: Workplace, server: ForkServer) -> None:
    output = server.start(place, "single", *FSDP, "--n_updates", "2", "--eval_freq", "0").wait()
    assert place.status("single")["state"] == "finished" and "no effect on one process" in output, output


def test_a_failed_gradient_stops_fsdp_on_all_ranks(place: Workplace, server: ForkServer) -> None:
    options = ("--model_cfg.optimizer_lr", "1e30", "--max_grad_norm", "0", *FSDP)
    output = server.start(place, "exploding", *options, ranks=2).wait()
    status = place.status("exploding")
    assert status["state"] == "failed" and "weights are unchanged" in status["reason"], output


# ---- activation checkpointing


class _Count(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls[func.overloadpacket.__name__] = self.calls.get(func.overloadpacket.__name__, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_recomputed_changes_no_bit(bf16: bool) -> None:
    losses, gradients = {}, {}
    for how in ("none", "blocks", "full"):
        model = lively_model().train()
        recompute(model.wrap_units(), how)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses[how] = model(make_batch())["flow"]
        losses[how].sum().backward()
        gradients[how] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for how in ("blocks", "full"):
        assert torch.equal(losses[how], losses["none"])
        assert gradients[how].keys() == gradients["none"].keys()
        assert all(torch.equal(gradients[how][name], g) for name, g in gradients["none"].items())


def test_blocks_recomputes_what_is_elementwise_and_full_everything() -> None:
    calls = {}
    for how in ("none", "blocks", "full"):
        model = lively_model().train()
        recompute(model.wrap_units(), how)
        loss = model(make_batch())["flow"].sum()
        with _Count() as count:
            loss.backward()
        calls[how] = count.calls
    products, attention = "addmm mm".split(), [name for name in calls["full"] if name.startswith("_scaled_dot")]
    assert any(name.endswith(("attention", "attention_for_cpu")) for name in attention), attention
    for name in products:
        assert calls["blocks"].get(name, 0) == calls["none"].get(name, 0)
    assert sum(calls["full"].get(name, 0) for name in products) > sum(calls["none"].get(name, 0) for name in products)
    forward = [name for name in attention if "backward" not in name]
    assert forward and all(calls["blocks"].get(name, 0) == 0 < calls["full"][name] for name in forward)
    assert calls["none"].get("gelu", 0) == 0 < calls["blocks"]["gelu"] == calls["full"]["gelu"]


@pytest.mark.parametrize("how", ["blocks", "full"])
def test_runs_that_recompute_are_the_same(place: Workplace, ddp: str, fsdp: str, server: ForkServer, how: str) -> None:
    for base, options in ((ddp, ()), (fsdp, FSDP)):
        name = f"{how}-{base}"
        output = server.start(place, name, *options, "--activation_checkpointing", how, ranks=2).wait()
        assert place.status(name)["state"] == "finished", output
        assert what_was_computed(place.metrics(name)) == what_was_computed(place.metrics(base))
        assert place.tensors(name) == place.tensors(base)


# ---- compilation

COMPILED = ("--use_torch_compile", "true", "--model_cfg.compile_mode", "default", "--eval_freq", "0")
WARNING = "runs uncompiled"
ONE = Processes(Launch(), torch.device("cpu"))


def test_without_a_compiler_the_run_is_eager_and_says_why_once(
    place: Workplace, ddp: str, server: ForkServer, tmp_path: Path
) -> None:
    run = server.start(
        place,
        "no-compiler",
        *COMPILED,
        ranks=2,
        hook="no_compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
    )
    output = run.wait()
    assert place.status("no-compiler")["state"] == "finished", output
    assert output.count(WARNING) == 1 and "/nowhere/g++" in next(x for x in output.splitlines() if WARNING in x), output
    losses = [line["loss"] for line in place.metrics("no-compiler")]
    assert losses == [line["loss"] for line in place.metrics(ddp)]


@pytest.mark.parametrize("options", [(), ("--activation_checkpointing", "full"), FSDP], ids=["ddp", "full", "fsdp"])
def test_when_one_rank_cannot_compile_none_does(
    place: Workplace, ddp: str, fsdp: str, server: ForkServer, options: tuple[str, ...]
) -> None:
    name = "broken-" + "-".join(options).strip("-")
    hook = "compile_on_rank_0_alone"
    output = server.start(place, name, *COMPILED, *options, ranks=2, hook=hook).wait()
    assert place.status(name)["state"] == "finished", output
    assert output.count(WARNING) == 1
    line = next(x for x in output.splitlines() if WARNING in x)
    assert "on rank 1" in line and "RuntimeError: this compiler is broken" in line
    base = fsdp if options == FSDP else ddp
    assert [x["loss"] for x in place.metrics(name)] == [x["loss"] for x in place.metrics(base)]


def test_a_compiled_block_is_one_graph_whatever_ddps_buckets_are(place: Workplace, server: ForkServer) -> None:
    hook, one = "small_buckets", (*COMPILED, *FOUR, "--n_updates", "1")
    output = server.start(place, "small-buckets", *one, ranks=2, hook=hook).wait()
    assert place.status("small-buckets")["state"] == "finished" and WARNING not in output, output
    counts = [int(number) for number in re.findall(r"traced (\d+) graphs", output)]
    # As many as for one process: at most one for each kind of layer and of pass.
    alone = server.start(place, "no-buckets", *one, hook=hook).wait()
    assert counts == 2 * [int(number) for number in re.findall(r"traced (\d+) graphs", alone)], (output, alone)


def test_a_block_that_fails_later_runs_eagerly_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    working = [True]

    def compiler(function: Callable, mode: str) -> Callable:
        def compiled(*arguments: Any) -> Any:
            if not working[0]:
                raise RuntimeError("no room for a new variant")
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    policy = parallelize(lively_model(), ONE, activation_checkpointing="full", compile_mode="default")
    policy.train()
    expected = policy(make_batch())["flow"]
    agree_on_compilation(policy, ONE)
    assert not caplog.records
    working[0] = False
    losses = policy(make_batch())["flow"]
    losses.sum().backward()
    assert torch.equal(losses, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "some blocks cannot be compiled anew and run uncompiled here: RuntimeError: no room for a new variant"
    ]


def test_a_mistake_in_a_block_is_not_taken_for_a_compilers() -> None:
    policy = parallelize(lively_model(), ONE, activation_checkpointing="none", compile_mode="default")
    with pytest.raises(RuntimeError, match="expected input with shape"):
        policy.expert.layers[0](torch.zeros(1, 2, 3), None, None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [(), (*FSDP, "--activation_checkpointing", "full")], ids=["ddp", "fsdp, full"])
def test_a_second_start_compiles_nothing_anew(
    place: Workplace, ddp: str, server: ForkServer, tmp_path: Path, options: tuple[str, ...]
) -> None:
    name, reports, quick = "compiled-" + "-".join(options).strip("-"), [], tmp_path / "g++"
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')  # optimising takes three quarters of the compiler's time
    quick.chmod(0o755)
    for _ in range(2):
        shutil.rmtree(place.folder / "runs" / name, ignore_errors=True)
        compiler = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": str(quick)}
        # One sample at a time is never padded, so that there are few variants to compile.
        run = server.start(place, name, *COMPILED, *FOUR, *options, ranks=2, hook="report_compilations", **compiler)
        output = run.wait(timeout=900)
        assert place.status(name)["state"] == "finished" and WARNING not in output, output
        reports.append([json.loads(found) for found in re.findall(r"^compiled (.*)$", output, re.MULTILINE)])
    assert len(reports[0]) == len(reports[1]) == 2
    for report in reports[1]:
        assert report["graphs"] > 0
        assert report["aot"]["hit"] > 0 and report["aot"]["miss"] == report["inductor"]["miss"] == 0, reports
    for line, expected in zip(place.metrics(name), place.metrics(ddp), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
