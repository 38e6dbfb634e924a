"""Holds the counters of a run, and names all that the training loop works with."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from agent.checkpoints.store import CheckpointStore
from agent.configuration_pipeline import TrainPipelineConfig, dump_yaml
from agent.data.build import Data
from agent.lifecycle.run_folder import RunFolder
from agent.models.policy import Policy
from agent.optim.ema import Ema
from agent.optim.learning_rate import LearningRate
from agent.parallel.processes import Processes
from agent.settings.plan import Plan
from agent.tracking.metrics import Metrics
from agent.training.step_graph import GraphedPasses


@dataclass
class TrainState:
    """All counters that a resume continues. Everything random is a function of these and the seed."""

    step: int = 0
    """Optimizer updates done, skipped ones included."""
    samples_seen: int = 0
    """Samples of the stream consumed; the next one is the sample with this number."""
    skipped_updates: int = 0
    """Updates whose gradient was not finite, and which changed nothing."""
    skipped_in_a_row: int = 0
    """How many of the latest updates in a row were skipped."""
    wandb_run_id: str | None = None
    """The wandb run, the same across restarts."""
    drawn: dict[str, int] = field(default_factory=dict)
    """Data set → how many samples it has given, where there are several."""
    unreported: dict[str, float | None] | None = None
    """The line of ``metrics.jsonl`` for the last update, which waits for the validation that a stop has cut short."""


@dataclass
class Run:
    """Everything that the loop works with."""

    config: TrainPipelineConfig
    plan: Plan
    processes: Processes
    folder: RunFolder | None  # on rank 0
    checkpoints: CheckpointStore
    data: Data
    policy: Policy
    model: nn.Module  # the policy, or DDP around it
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    state: TrainState
    metrics: Metrics | None  # on rank 0
    ema: Ema | None = None
    graphs: GraphedPasses | None = None  # where small batches may run from CUDA graphs

    @cached_property
    def config_yaml(self) -> str:
        """The resolved config as YAML; made once, because a built run's config does not change and saves wait for it."""
        return dump_yaml(self.config)

    def precision(self) -> contextlib.AbstractContextManager:
        """Returns the context of a forward pass: bfloat16 autocast over float32 parameters, or nothing."""
        if self.config.use_bf16:
            return torch.autocast(self.processes.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()
