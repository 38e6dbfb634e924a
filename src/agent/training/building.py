"""Building a run: data, model, weights, optimizer, in a stated order."""

from __future__ import annotations

import logging
from functools import partial

import torch

from agent.checkpoints.store import CheckpointStore
from agent.configuration_pipeline import TrainPipelineConfig
from agent.lifecycle import history, software
from agent.lifecycle.run_folder import RunFolder
from agent.lifecycle.watchdog import Watchdog
from agent.models.common.attention_kernels import choose_attention
from agent.models.common.fp8 import use_fp8
from agent.models.policy import Policy
from agent.optim.ema import Ema
from agent.optim.learning_rate import LearningRate
from agent.optim.optimizer import freeze, make_optimizer
from agent.parallel import sharding
from agent.parallel.compilation import choose_mode
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes
from agent.parallel.wrap import parallelize
from agent.reproducibility import make_deterministic
from agent.settings.plan import Plan, make_plan
from agent.tracking.metrics import Metrics
from agent.training import resuming
from agent.training.config_changes import settle
from agent.training.first_weights import first_weights
from agent.training.run_data import build_run_data
from agent.training.step import graphed_passes
from agent.training.train_state import Run, TrainState
from agent.validation.record import ValidationRecords

log = logging.getLogger(__name__)


def build(
    config: TrainPipelineConfig, launch: Launch, processes: Processes, folder: RunFolder | None, watchdog: Watchdog
) -> Run:
    """Data, model, optimizer, weights, in this order.

    Raises:
        ValueError: for every mistake in config, data or weights; nothing has been trained then.
    """
    _make_exact(config)
    checkpoints = CheckpointStore(
        config.run_dir,
        config.keep_checkpoints,
        config.keep_training_states,
        choose_best=ValidationRecords(config.run_dir).best,
        require_place=folder.require_in_place if folder is not None else None,
    )
    candidates = processes.main_decides(partial(resuming.candidates, config, checkpoints))
    log.info("reading the data sets and their statistics")
    watchdog.alive("reading the data sets", patience=4)
    data = build_run_data(config, processes, candidates)
    watchdog.alive("building the model and loading its weights", patience=4)
    plan = make_plan(config, launch.world_size, data.mixture.frames)
    log.info(plan.describe(config))
    log.info("building the model and loading its weights")
    policy = _policy(config, processes)
    optimizer = _optimizer(config, policy)
    ema = Ema(policy, config.ema_decay) if config.ema_decay is not None else None
    resumed = resuming.resume(config, data, checkpoints, candidates, processes, policy, optimizer, ema)
    if resumed is None:
        first_weights(config, processes, policy)
        settle(config, None)
    state = resumed or TrainState()
    learning_rate = _learning_rate(config, plan)
    log.info(learning_rate.describe())
    if folder is not None:
        _note_start(folder, state)
    model = parallelize(
        policy,
        processes,
        activation_checkpointing=config.activation_checkpointing or "none",
        compile_mode=choose_mode(config.use_torch_compile, config.trainable.compile_mode, processes.device),
    )
    if ema is not None and resumed is None:
        ema.begin()  # only now does every process have the weights, which DDP hands out
    metrics = Metrics(config.run_dir, plan.n_updates, config.log_freq) if processes.is_main else None
    run = Run(
        config=config,
        plan=plan,
        processes=processes,
        folder=folder,
        checkpoints=checkpoints,
        data=data,
        policy=policy,
        model=model,
        optimizer=optimizer,
        learning_rate=learning_rate,
        state=state,
        metrics=metrics,
        ema=ema,
    )
    run.graphs = graphed_passes(run)
    return run


def _make_exact(config: TrainPipelineConfig) -> None:
    """Chooses deterministic operations, and searches for where a NaN arises, where these are asked for."""
    if config.deterministic:
        make_deterministic()
    torch.autograd.set_detect_anomaly(config.debug)


def _policy(config: TrainPipelineConfig, processes: Processes) -> Policy:
    """The network on this process's device, sharded if that is asked for; its weights are not set yet."""
    if config.use_bf16 and (slow := software.slow_bfloat16(processes.device.type)) is not None:
        log.warning("%s; write use_bf16: false, unless this is a try of what a GPU will compute", slow)
    with torch.device("meta"):
        policy = config.family.policy(config.trainable)
    if config.precision == "bfloat16_stochastic":
        policy.to(torch.bfloat16)
    if config.fp8 == "mlp":
        layers = policy.fp8_layers()
        if not layers:
            raise ValueError(f"fp8: mlp: {config.trainable.title} has no layers for it; write fp8: none")
        use_fp8(layers, processes.device)
    log.info(freeze(policy, policy.frozen_parameters()))
    if config.parallel == "fsdp":
        _shard(config, policy, processes)
    policy.to_empty(device=processes.device)
    if processes.device.type == "cuda":
        choose_attention(policy, processes.device, torch.bfloat16 if config.use_bf16 else torch.float32)
    return policy


def _shard(config: TrainPipelineConfig, policy: Policy, processes: Processes) -> None:
    if processes.world_size == 1:
        log.info("parallel: fsdp has no effect on one process, which holds all there is")
        return
    if config.check_replicas_every:
        log.info("check_replicas_every has no effect under parallel: fsdp, where no process has a copy to compare")
    sharding.shard(policy, processes, torch.bfloat16 if config.use_bf16 else None)


def _optimizer(config: TrainPipelineConfig, policy: Policy) -> torch.optim.Optimizer:
    model = config.trainable
    return make_optimizer(
        policy,
        lr=model.optimizer_lr,
        betas=model.optimizer_betas,
        eps=model.optimizer_eps,
        weight_decay=model.optimizer_weight_decay,
        eight_bit=config.optimizer == "adamw8bit",
        seed=config.seed,
    )


def _learning_rate(config: TrainPipelineConfig, plan: Plan) -> LearningRate:
    model = config.trainable
    assert model.scheduler_decay_start is not None, "settled by now"
    return LearningRate.plan(
        model.optimizer_lr,
        model.scheduler_decay_lr,
        model.scheduler_warmup_steps,
        model.scheduler_decay_steps,
        plan.n_updates,
        model.scheduler_decay_start,
    )


def _note_start(folder: RunFolder, state: TrainState) -> None:
    """Tells the run's story so far, and notes where this attempt begins."""
    for line in history.story(folder.status["attempts"]):
        log.info(line)
    folder.note(first_step=state.step, checkpoint_step=state.step, checkpoint_step_at_start=state.step)
    folder.update("running", state.step)
