"""Building a run: data, model, weights, optimizer, in a stated order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agent.checkpoints import weights
from agent.checkpoints.finding import find_weights
from agent.checkpoints.manifest import Folder, Verification
from agent.checkpoints.store import PRETRAINED, CheckpointStore
from agent.configuration_pipeline import TrainPipelineConfig
from agent.data.build import Data, build_data
from agent.data.normalization.robot_statistics import GivenStatistics, Normalization, RelativeActions
from agent.data.samples.instructions import Wording
from agent.data.samples.transforms import SampleSpec
from agent.lifecycle import history, software
from agent.lifecycle.run_folder import RunFolder
from agent.lifecycle.watchdog import Watchdog
from agent.models import flow_matching, registry
from agent.optim.ema import Ema
from agent.optim.learning_rate import LearningRate
from agent.optim.optimizer import freeze, make_optimizer
from agent.parallel import sharding
from agent.parallel.launch import Launch
from agent.parallel.processes import Processes
from agent.parallel.wrap import parallelize
from agent.reproducibility import make_deterministic
from agent.settings.plan import make_plan
from agent.tracking.metrics import Metrics
from agent.training import resuming
from agent.training.config_changes import began_with, settle
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
    if config.deterministic:
        make_deterministic()
    torch.autograd.set_detect_anomaly(config.debug)
    keep = (config.keep_checkpoints, config.keep_training_states)
    checkpoints = CheckpointStore(
        config.run_dir,
        *keep,
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
    if config.use_bf16 and (slow := software.slow_bfloat16(processes.device.type)) is not None:
        log.warning("%s; write use_bf16: false, unless this is a try of what a GPU will compute", slow)
    model_config: Any = config.model_cfg
    with torch.device("meta"):
        policy = registry.policy_class(model_config)(model_config)
    if config.precision == "bfloat16_stochastic":
        policy.to(torch.bfloat16)
    log.info(freeze(policy, policy.frozen_parameters()))
    if config.parallel == "fsdp":
        _shard(config, policy, processes)
    policy.to_empty(device=processes.device)
    optimizer = make_optimizer(
        policy,
        lr=model_config.optimizer_lr,
        betas=tuple(model_config.optimizer_betas),
        eps=model_config.optimizer_eps,
        weight_decay=model_config.optimizer_weight_decay,
        eight_bit=config.optimizer == "adamw8bit",
        seed=config.seed,
    )
    ema = Ema(policy, config.ema_decay) if config.ema_decay is not None else None
    resumed = resuming.resume(config, data, checkpoints, candidates, processes, policy, optimizer, ema)
    if resumed is None:
        _first_weights(config, processes, policy)
        settle(config, None)
    state = resumed or TrainState()
    learning_rate = LearningRate.plan(
        model_config.optimizer_lr,
        model_config.scheduler_decay_lr,
        model_config.scheduler_warmup_steps,
        model_config.scheduler_decay_steps,
        plan.n_updates,
        model_config.scheduler_decay_start,
    )
    log.info(learning_rate.describe())
    if folder is not None:
        for line in history.story(folder.status["attempts"]):
            log.info(line)
        folder.note(first_step=state.step, checkpoint_step=state.step, checkpoint_step_at_start=state.step)
        folder.update("running", state.step)
    model = parallelize(
        policy,
        processes,
        activation_checkpointing=config.activation_checkpointing or "none",
        compile_mode=model_config.compile_mode if config.use_torch_compile else None,
    )
    if ema is not None and resumed is None:
        ema.begin()  # only now does every process have the weights, which DDP hands out
    metrics = Metrics(config.run_dir, plan.n_updates, config.log_freq) if processes.is_main else None
    return Run(
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


def _shard(config: TrainPipelineConfig, policy: Any, processes: Processes) -> None:
    if processes.world_size == 1:
        log.info("parallel: fsdp has no effect on one process, which holds all there is")
        return
    if config.check_replicas_every:
        log.info("check_replicas_every has no effect under parallel: fsdp, where no process has a copy to compare")
    sharding.shard(policy, processes, torch.bfloat16 if config.use_bf16 else None)


def build_run_data(config: TrainPipelineConfig, processes: Processes, own: Sequence[Path] = ()) -> Data:
    """The data sets of a run, checked against the model; completes the model config's features.

    Args:
        config: of the run.
        processes: of the run; the first reads the data sets first.
        own: checkpoints that the run might continue from, the newest first.
    """
    model: Any = config.model_cfg
    spec = SampleSpec(
        chunk_size=model.chunk_size,
        max_state_dim=model.max_state_dim,
        max_action_dim=model.max_action_dim,
        image_resolution=tuple(model.image_resolution),
        tokenizer_max_length=model.tokenizer_max_length,
        camera_slots=tuple(model.camera_slots),
        state_dim=model.state_dim,
        action_dim=model.action_dim,
    )
    draw = partial(
        flow_matching.draw,
        config.seed,
        chunk_size=model.chunk_size,
        action_dim=model.max_action_dim,
        alpha=model.time_sampling_beta_alpha,
        beta=model.time_sampling_beta_beta,
        scale=model.time_sampling_scale,
        offset=model.time_sampling_offset,
    )
    pairs = config.flow_samples_per_observation
    data = processes.main_first(
        lambda: build_data(
            config.data,
            spec,
            seed=config.seed,
            draw=draw if pairs == 1 else partial(flow_matching.draw_several, pairs, *draw.args, **draw.keywords),
            validation_draw=partial(draw, purpose="validation"),
            normalization=Normalization(
                model.normalization_mapping,
                _given_statistics(config, own),
                RelativeActions(model.relative_exclude_joints, model.action_feature_names)
                if model.use_relative_actions
                else None,
                resuming.narrow_rule(own),
            ),
            wording=Wording(model.tokenizer_path, config.task_paraphrase),
            began_with=began_with(own),
        )
    )
    for line in data.report:
        log.info(line)
    largest, vocabulary = data.reader.tokens.largest(), model.language.vocab_size
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer {model.tokenizer_path} gives token {largest}, the model's vocabulary has {vocabulary}; raise "
            "vocab_size in model_cfg.paligemma_variant, or use the tokenizer that the model was made for"
        )
    model.adopt_features(data.spec.camera_slots, data.spec.state_dim, data.spec.action_dim, data.robots[0].action_names)
    return data


def _given_statistics(config: TrainPipelineConfig, own: Sequence[Path]) -> GivenStatistics | None:
    reference = config.load_from_checkpoint
    if config.data.statistics == "dataset" or reference is None:
        return None
    try:
        files = find_weights(reference, "load_from_checkpoint")
    except ValueError as error:
        if not own:
            raise
        # Every checkpoint of this run holds the same ones: the weights that it began with may be gone by now.
        log.info("statistics from %s, for load_from_checkpoint is not there any more (%s)", own[0], error)
        files = find_weights(str(own[0] / PRETRAINED), "resume")
    try:
        names = registry.deployment(config.model_cfg).dimension_names(files[0].parent)
        values = registry.adapter(config.model_cfg).read_statistics(files, config.model_cfg)
        return GivenStatistics(reference, values, {key.rpartition(".")[2]: some for key, some in names.items()})
    except ValueError as error:
        raise ValueError(
            f"data.statistics: checkpoint: {error}; write dataset, or another load_from_checkpoint"
        ) from None


def _first_weights(config: TrainPipelineConfig, processes: Processes, policy: Any) -> None:
    """Fills every tensor of the policy for a run that begins."""
    model_config: Any = config.model_cfg
    adapter = registry.adapter(model_config)
    if config.load_from_checkpoint is not None:
        _load(config.load_from_checkpoint, "load_from_checkpoint", adapter.from_lerobot, config, processes, policy)
        return
    drawn: Any = None
    if processes.is_main:  # the others get rank 0's; a node's memory would not hold all of them at once
        # Drawn on the CPU, so that the weights do not depend on the device.
        with torch.device("meta"):
            drawn = registry.policy_class(model_config)(model_config)
        drawn.to_empty(device="cpu")
        drawn.init_weights(torch.Generator().manual_seed(config.seed))
        drawn = drawn.state_dict()
    for name, tensor in policy.state_dict().items():
        if sharding.is_sharded(tensor):
            sharding.fill_from_main(tensor, drawn[name] if drawn is not None else None)
        elif drawn is not None:  # and to the others by DDP
            sharding.fill(tensor, drawn[name])
    if model_config.paligemma_pretrained_path is not None:
        key = "model_cfg.paligemma_pretrained_path"
        _load(model_config.paligemma_pretrained_path, key, adapter.from_paligemma, config, processes, policy)


def _load(reference: str, key: str, match: Any, config: TrainPipelineConfig, processes: Processes, policy: Any) -> None:
    found = processes.main_first(partial(find_weights, reference, key))
    files = [file.parent.resolve() / file.name for file in found]
    fit, folder = registry.adapter(config.model_cfg).fit, Folder(files[0].parent)
    verification = None
    if folder.checkpoint is not None and processes.is_main:  # another run's, with checksums
        verification = Verification(folder.checkpoint, f"{folder.path.relative_to(folder.checkpoint)}/")
    coverage = weights.load_into(
        policy.state_dict(),
        files,
        partial(match, config=config.model_cfg),
        fit,
        verification.checksum if verification is not None else None,
    )
    if damage := processes.main_decides(verification.result if verification is not None else lambda: None):
        raise ValueError(f"{key}: the checkpoint {folder.checkpoint} is damaged: {damage}; name another one")
    log.info(coverage.table())
