"""The weights that a run begins with: those of a checkpoint, or drawn at random, with a part that was trained before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial

import torch

from agent.checkpoints import weights
from agent.checkpoints.finding import find_weights
from agent.checkpoints.manifest import Folder, Verification
from agent.configuration_pipeline import TrainPipelineConfig
from agent.models.common.names import Match
from agent.models.family import Family
from agent.models.lerobot_config import TrainableConfig
from agent.models.policy import Policy
from agent.parallel import sharding
from agent.parallel.processes import Processes

log = logging.getLogger(__name__)


def first_weights(config: TrainPipelineConfig, processes: Processes, policy: Policy) -> None:
    """Fills every tensor of the policy for a run that begins."""
    model = config.trainable
    family = config.family
    if config.load_from_checkpoint is not None:
        match = partial(family.names.from_policy, config=model)
        _load(config.load_from_checkpoint, "load_from_checkpoint", match, family, processes, policy)
        return
    drawn: dict[str, torch.Tensor] | None = None
    if processes.is_main:  # the others get rank 0's; a node's memory would not hold all of them at once
        # Drawn on the CPU, so that the weights do not depend on the device.
        with torch.device("meta"):
            fresh = family.policy(model)
        fresh.to_empty(device="cpu")
        fresh.init_weights(torch.Generator().manual_seed(config.seed))
        drawn = fresh.state_dict()
    for name, tensor in policy.state_dict().items():
        if sharding.is_sharded(tensor):
            sharding.fill_from_main(tensor, drawn[name] if drawn is not None else None)
        elif drawn is not None:  # and to the others by DDP
            sharding.fill(tensor, drawn[name])
    for key in model.base_weights:
        if (reference := getattr(model, key)) is not None:
            match = partial(family.names.from_base, key, config=model)
            _load(reference, f"model_cfg.{key}", match, family, processes, policy)


def _load(
    reference: str,
    key: str,
    match: Callable[[Iterable[str]], Match],
    family: Family[TrainableConfig],
    processes: Processes,
    policy: Policy,
) -> None:
    found = processes.main_first(partial(find_weights, reference, key))
    files = [file.parent.resolve() / file.name for file in found]
    folder = Folder(files[0].parent)
    verification = None
    if folder.checkpoint is not None and processes.is_main:  # another run's, with checksums
        verification = Verification(folder.checkpoint, f"{folder.path.relative_to(folder.checkpoint)}/")
    checksums = verification.checksum if verification is not None else None
    coverage = weights.load_into(policy.state_dict(), files, match, family.names.fit, checksums)
    if damage := processes.main_decides(verification.result if verification is not None else lambda: None):
        raise ValueError(f"{key}: the checkpoint {folder.checkpoint} is damaged: {damage}; name another one")
    log.info(coverage.table())
