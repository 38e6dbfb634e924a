"""Building a run: data, model, weights, optimizer, in a stated order."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from agent import history, optim, weights
from agent.checkpoint import PRETRAINED, TRAINING, CheckpointStore
from agent.configuration_pipeline import TrainPipelineConfig, changes_since, dump, make_plan
from agent.data.build import Data, build_data
from agent.data.transforms import SampleSpec
from agent.distributed import Launch, Processes
from agent.metrics import Metrics
from agent.models import flow_matching, registry
from agent.parallelize import parallelize
from agent.reproducibility import make_deterministic
from agent.run_folder import RunFolder
from agent.saving import restore
from agent.train_state import Run, TrainState

log = logging.getLogger(__name__)


def build(config: TrainPipelineConfig, launch: Launch, processes: Processes, folder: RunFolder | None) -> Run:
    """Data, model, weights, optimizer, in this order.

    Raises:
        ValueError: for every mistake in config, data or weights; nothing has been trained then.
    """
    if config.deterministic:
        make_deterministic()
    torch.autograd.set_detect_anomaly(config.debug)
    checkpoints = CheckpointStore(config.run_dir, config.keep_checkpoints)
    resume_from = processes.main_decides(partial(_find_resume, config, checkpoints))
    data = build_run_data(config, processes)
    plan = make_plan(config, launch.world_size, data.mixture.frames)
    log.info(plan.describe(config))
    if resume_from is not None:
        processes.main_decides(partial(_refuse_changes, config, data, resume_from))
    policy = _build_policy(config, processes, resume_from)
    log.info(optim.freeze(policy, policy.frozen_parameters()))
    model_config: Any = config.model_cfg
    optimizer = optim.make_optimizer(
        policy,
        lr=model_config.optimizer_lr,
        betas=tuple(model_config.optimizer_betas),
        eps=model_config.optimizer_eps,
        weight_decay=model_config.optimizer_weight_decay,
    )
    learning_rate = optim.LearningRate.plan(
        model_config.optimizer_lr,
        model_config.scheduler_decay_lr,
        model_config.scheduler_warmup_steps,
        model_config.scheduler_decay_steps,
        plan.n_updates,
    )
    log.info(learning_rate.describe())
    state = TrainState() if resume_from is None else restore(resume_from, optimizer, policy)
    if folder is not None:
        for line in history.story(folder.status["attempts"]):
            log.info(line)
        folder.note(first_step=state.step, checkpoint_step=state.step, checkpoint_step_at_start=state.step)
        folder.update("running", state.step)
    model = parallelize(
        policy,
        processes,
        activation_checkpointing=model_config.gradient_checkpointing,
        compile_mode=model_config.compile_mode if config.use_torch_compile else None,
    )
    metrics = Metrics(config.run_dir, plan.n_updates) if processes.is_main else None
    return Run(
        config, plan, processes, folder, checkpoints, data, policy, model, optimizer, learning_rate, state, metrics
    )


def _find_resume(config: TrainPipelineConfig, checkpoints: CheckpointStore) -> Path | None:
    found = checkpoints.newest()
    for text in found.passed_over:
        log.warning("passed over a damaged checkpoint: %s", text)
    order = "start: own checkpoint of this run → load_from_checkpoint → from scratch; taking "
    if not config.resume_run:
        if found.path is not None:
            raise ValueError(
                f"resume_run is false, but {found.path} exists and would be overwritten; give this run another name, "
                "or remove its folder"
            )
    elif found.path is not None:
        log.info("%sown checkpoint %s", order, found.path)
        return found.path
    elif found.passed_over:
        raise ValueError(
            "every checkpoint of this run is damaged:\n  "
            + "\n  ".join(found.passed_over)
            + "\nThe run is not started "
            "over silently; remove the folder `checkpoints` to start from the beginning"
        )
    log.info(order + (f"weights of {config.load_from_checkpoint}" if config.load_from_checkpoint else "a fresh start"))
    return None


def _refuse_changes(config: TrainPipelineConfig, data: Data, checkpoint: Path) -> None:
    saved = yaml.safe_load((checkpoint / TRAINING / "config.yaml").read_text(encoding="utf-8"))
    changes = changes_since(saved, dump(config))
    fingerprint = json.loads((checkpoint / TRAINING / "state.json").read_text(encoding="utf-8"))["data_fingerprint"]
    if fingerprint != data.fingerprint:
        changes.append(
            "the training data itself (states, actions, episodes or instructions as tokens): "
            f"fingerprint {fingerprint} → {data.fingerprint}"
        )
    if changes and not config.resume_changes:
        raise ValueError(
            f"this run was started with another config than the one it would continue with ({checkpoint}):\n  "
            + "\n  ".join(changes)
            + "\nTake these changes back, give the new run another name, or allow them with --resume_changes true"
        )
    for line in changes:
        log.warning("resume_changes: %s", line)


def build_run_data(config: TrainPipelineConfig, processes: Processes) -> Data:
    """The data sets of a run, checked against the model; completes the model config's features."""
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
    data = processes.main_first(
        lambda: build_data(
            config.data,
            spec,
            seed=config.seed,
            draw=draw,
            validation_draw=partial(draw, purpose="validation"),
            normalization_mapping=model.normalization_mapping,
            tokenizer_path=model.tokenizer_path,
            task_paraphrase=config.task_paraphrase,
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
    model.adopt_features(data.spec.camera_slots, data.spec.state_dim, data.spec.action_dim)
    return data


def _build_policy(config: TrainPipelineConfig, processes: Processes, resume_from: Path | None) -> Any:
    """The policy on its device, every tensor of it filled and accounted for."""
    model_config: Any = config.model_cfg
    adapter = registry.adapter(model_config)
    with torch.device("meta"):
        policy = registry.policy_class(model_config)(model_config)
    source: tuple[str, str, Any] | None = None
    if resume_from is not None:
        source = (str(resume_from / PRETRAINED), "resume", adapter.from_lerobot)
    elif config.load_from_checkpoint is not None:
        source = (config.load_from_checkpoint, "load_from_checkpoint", adapter.from_lerobot)
    elif model_config.paligemma_pretrained_path is not None:
        source = (model_config.paligemma_pretrained_path, "model_cfg.paligemma_pretrained_path", adapter.from_paligemma)
    if source is None or source[2] is adapter.from_paligemma:
        # Drawn on the CPU, so that the weights do not depend on the device.
        policy.to_empty(device="cpu")
        policy.init_weights(torch.Generator().manual_seed(config.seed))
        policy.to(processes.device)
    else:
        policy.to_empty(device=processes.device)
    if source is not None:
        reference, key, match = source
        files = processes.main_first(partial(weights.find_weights, reference, key))
        coverage = weights.load_into(
            policy.state_dict(), files, partial(match, config=model_config), partial(adapter.fit, config=model_config)
        )
        log.info(coverage.table())
    return policy
