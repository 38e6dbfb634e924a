"""A save at full size: how long the memory takes to pin, how long training waits, and whether the bits arrive."""

from __future__ import annotations

import torch
from contenders import Ours, make_batch, model_config, train_config
from torch import Tensor

from agent.checkpoints import tensor_file, tensor_reader
from agent.checkpoints.host_snapshot import HostSnapshot
from agent.optim.optimizer import optimizer_tensors
from gpu_steps.place import Place

UPDATES = 10
LARGEST_STALL = 0.02  # of so many updates


def run(place: Place) -> None:
    """Weights and float32 moments are copied while updates go on; the weights are written and read back."""
    config = model_config(place.size("full"), 2)
    config.freeze_lm_head = True
    batch = make_batch(config, 2, 4, config.tokenizer_max_length)
    ours = Ours(train_config(config, 4, use_bf16=True, activation_checkpointing="full"), batch, place.device)
    ours.arm()
    assert ours.run is not None
    for _ in range(3):
        ours.step()
    moments = optimizer_tensors(ours.run.optimizer, ours.policy)
    files = {"model.safetensors": dict(ours.policy.state_dict()), "optimizer.safetensors": moments}
    snapshot = HostSnapshot()
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    seconds = place.timed(lambda: snapshot.prepare(files))
    place.tell("pin", None, bytes=size, seconds=seconds)

    ours.run.optimizer.register_step_pre_hook(lambda *_: snapshot.settle())  # as the product's saver does
    plain = min(place.timed(lambda: _updates(ours)) for _ in range(2))
    originals = {path: {name: t.clone() for name, t in tensors.items()} for path, tensors in files.items()}
    copies = {}
    saving = place.timed(lambda: (copies.update(snapshot.begin(files)), _updates(ours)))
    snapshot.finish()
    stall = (saving - plain) / plain
    passed = stall < LARGEST_STALL if place.gpu else None
    place.tell("stall", passed, updates=UPDATES, plain_s=plain, saving_s=saving, share=stall)
    different = [
        name
        for path, tensors in originals.items()
        for name, tensor in tensors.items()
        if not torch.equal(copies[path][name], tensor.cpu())
    ]
    place.tell("bits of the copies", not different, different=different[:5])
    del originals
    _disk(place, copies["model.safetensors"])


def _updates(ours: Ours) -> None:
    for _ in range(UPDATES):
        ours.step()


def _disk(place: Place, weights: dict[str, Tensor]) -> None:
    path = place.work / "model.safetensors"
    write_s = place.timed(lambda: tensor_file.write(path, weights))
    place.tell("write", None, bytes=path.stat().st_size, seconds=write_s)
    targets = {name: torch.empty(t.shape, dtype=t.dtype, device=place.device) for name, t in weights.items()}
    load_s = place.timed(lambda: tensor_reader.stream(path, targets))
    different = [name for name, tensor in weights.items() if not torch.equal(targets[name].cpu(), tensor)]
    place.tell("load", not different, seconds=load_s, different=different[:5])
