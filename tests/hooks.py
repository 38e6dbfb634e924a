"""What the ranks of a forked run do besides training: record, or break something on purpose."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def record() -> None:
    """Writes, before each update, a digest of weights and optimizer, and with it the samples of each micro-batch."""
    import torch
    import xxhash

    from agent import optim, sharding, trainer

    target = Path(os.environ["RECORD"] + f".{_rank()}")
    train_step = trainer.train_step

    def recording(run: Any, batches: Any, clock: Any) -> Any:
        digest = xxhash.xxh3_128()
        tensors = {**dict(run.policy.named_parameters()), **optim.optimizer_tensors(run.optimizer, run.policy)}
        for name in sorted(tensors):
            local = sharding.rows(tensors[name]).local.contiguous()
            digest.update(local.view(-1).view(torch.uint8).numpy())  # numpy has no bfloat16
        seen: list[list[int]] = []

        def watched() -> Any:
            for batch in batches:
                for k, provenance, time_k in zip(batch.sample_index, batch.provenance, batch.time, strict=True):
                    seen.append([int(k), *provenance.tolist(), float(time_k)])
                yield batch

        result = train_step(run, watched(), clock)
        with open(target, "a") as stream:
            line = {"step": run.state.step, "digest": digest.hexdigest(), "samples": seen}
            stream.write(json.dumps(line) + "\n")
        return result

    trainer.train_step = recording


def infinite_gradient() -> None:
    """On rank 1, the gradients of the updates named in ``BREAK_AT`` are infinite."""
    from agent import building

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

    from agent import trainer

    train_step = trainer.train_step

    def flipping(run: Any, batches: Any, clock: Any) -> Any:
        result = train_step(run, batches, clock)
        if run.state.step == 5 and _rank() == 1:
            run.policy.state_proj.weight.data.view(torch.int32)[0, 0] ^= 1
        return result

    trainer.train_step = flipping


def slow_validation() -> None:
    """Validation says when it begins and takes a while."""
    from agent import trainer

    validate = trainer.validate

    def slow(run: Any) -> Any:
        print("validation begins", flush=True)
        time.sleep(1.0)
        return validate(run)

    trainer.validate = slow


def slow_save() -> None:
    """Writing a checkpoint says when it begins and takes a while."""
    from agent import checkpoint

    seal = checkpoint.seal

    def slow(*arguments: Any, **keywords: Any) -> Any:
        print("save begins", flush=True)
        time.sleep(1.0)
        return seal(*arguments, **keywords)

    checkpoint.seal = slow


def slow_start() -> None:
    """Building says when it begins and takes a while."""
    from agent import building

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
