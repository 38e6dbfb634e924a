"""Training in a process group on one card gives what plain training gives: sharded, in DDP, and by two processes."""

from __future__ import annotations

import os
import socket
from typing import Any

import numpy as np
import torch
from contenders import MAX_GRAD_NORM, draw_weights, make_batch, model_config, rows_of
from torch import nn

from agent.batch import Batch, to_device
from agent.models.pi.model import PI0
from agent.optim.optimizer import apply_update, clip_gradients, freeze, make_optimizer
from agent.parallel import sharding
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes
from agent.parallel.wrap import accumulating, forget_gradients, parallelize
from gpu_steps.place import Place, away

UPDATES, BATCH = 3, 4
EXACT, ROUNDED = 1e-5, 5e-3  # of losses and weights
Result = tuple[list[float], dict[str, np.ndarray]]
"""The loss of each update, and the weights after the last."""


def run(place: Place) -> None:
    """One process without a group, then one with, then two."""
    options = (place.size("reduced"), place.device)
    for bf16 in (False, True) if place.gpu else (False,):
        plain = _in_processes(options, "plain", bf16, 1)[0]
        kinds = ("fsdp", "ddp") if not bf16 else ("fsdp",)
        for kind in kinds:
            _compare(place, f"{kind}, one process", bf16, plain, _in_processes(options, kind, bf16, 1)[0])
        if not bf16:
            for rank, found in enumerate(_in_processes(options, "two", bf16, 2)):
                _compare(place, f"two processes on one device, rank {rank}", bf16, plain, found)


def _compare(place: Place, check: str, bf16: bool, plain: Result, found: Result) -> None:
    loss = max(abs(a - b) / abs(b) for a, b in zip(found[0], plain[0], strict=True))
    # All together: of a bias whose gradient is nothing but rounding AdamW makes a step as of any other.
    whole = [torch.cat([torch.from_numpy(result[1][name]).flatten() for name in plain[1]]) for result in (found, plain)]
    weights = away(*whole)
    limit = ROUNDED if bf16 else EXACT
    precision = "bfloat16" if bf16 else "float32"
    place.tell(f"{check}, {precision}", max(loss, weights) < limit, loss=loss, weights=weights)


def _in_processes(options: tuple[str, torch.device], kind: str, bf16: bool, ranks: int) -> list[Result]:
    """What each of so many new processes finds; a process group cannot be left and joined anew in one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context: Any = torch.multiprocessing.get_context("fork" if options[1].type == "cpu" else "spawn")
    receivers = []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        context.Process(target=_work, args=(rank, ranks, port, options, kind, bf16, sender), daemon=True).start()
        sender.close()  # so that the end of a process that failed is an end of what can be received
        receivers.append(receiver)
    return [receiver.recv() for receiver in receivers]


def _work(
    rank: int, ranks: int, port: int, options: tuple[str, torch.device], kind: str, bf16: bool, sender: Any
) -> None:
    """Trains on this rank's share of the batch."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    size, device = options
    launch = Launch() if kind == "plain" else Launch(rank, 0, ranks, ranks, under_torchrun=True)
    # NCCL takes a card for one process only; gloo adds up tensors of a GPU, too.
    processes = Processes(launch, torch.device("cpu") if kind == "two" else device)
    processes.device = device
    config = model_config(size, 2)
    with torch.device("meta"):
        policy = PI0(config)
    freeze(policy, policy.frozen_parameters())
    if kind == "fsdp":
        sharding.shard(policy, processes, torch.bfloat16 if bf16 else None)
    policy.to_empty(device=device)
    with torch.device("meta"):
        whole = PI0(config)
    draw_weights(whole.to_empty(device=device))
    with torch.no_grad():
        for parameter, source in zip(policy.parameters(), whole.parameters(), strict=True):
            sharding.fill(parameter, source)
    model: nn.Module = parallelize(policy, processes, activation_checkpointing="none", compile_mode=None)
    if kind == "ddp":  # as `parallelize` wraps it where there are several
        model = nn.parallel.DistributedDataParallel(policy, broadcast_buffers=False, gradient_as_bucket_view=True,
                                                    static_graph=True)  # fmt: skip
    batch = make_batch(config, 2, BATCH, config.tokenizer_max_length)
    losses = _train(policy, model, _share(batch, rank, ranks), bf16, processes)
    # As numpy's: the memory of a tensor would go with this process.
    sender.send((losses, {name: sharding.whole(p).float().cpu().numpy() for name, p in policy.named_parameters()}))
    processes.close()


def _share(batch: Batch, rank: int, ranks: int) -> Batch:
    each = BATCH // ranks
    return rows_of(batch, slice(rank * each, (rank + 1) * each))


def _train(policy: PI0, model: nn.Module, batch: Batch, bf16: bool, processes: Processes) -> list[float]:
    optimizer = make_optimizer(policy, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    device, found = processes.device, []
    there = to_device(batch, device)
    for number in range(UPDATES):
        with accumulating(model, last=True), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            losses = policy.total(model(there))
        (losses.sum() * processes.world_size / BATCH).backward()
        clip_gradients(optimizer, MAX_GRAD_NORM)
        apply_update(optimizer, 1e-4, number)
        forget_gradients(model, optimizer)
        found.append(processes.sum([float(losses.detach().sum())])[0] / BATCH)
    return found
