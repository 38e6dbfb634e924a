"""The data of a run: what the policy asks of them, what a checkpoint gives, and what the policy learns from them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from agent.checkpoints.finding import find_weights
from agent.checkpoints.store import PRETRAINED
from agent.configuration_pipeline import TrainPipelineConfig
from agent.data.build import Data, build_data
from agent.data.normalization.robot_statistics import GivenStatistics, Normalization, RelativeActions
from agent.data.samples.wording import Wording
from agent.deployment.robots import dimension_names
from agent.parallel.processes import Processes
from agent.training import resuming
from agent.training.config_changes import began_with

log = logging.getLogger(__name__)


def build_run_data(config: TrainPipelineConfig, processes: Processes, own: Sequence[Path] = ()) -> Data:
    """The data sets of a run, checked against the model; completes the model config's features.

    Args:
        config: of the run.
        processes: of the run; the first reads the data sets first.
        own: checkpoints that the run might continue from, the newest first.
    """
    model = config.trainable
    family = config.family
    prompt = family.prompt(model)
    draws = partial(family.draws, model, config.seed)
    data = processes.main_first(
        lambda: build_data(
            config.data,
            family.sample_spec(model),
            seed=config.seed,
            draw=draws("train", config.flow_samples_per_observation),
            validation_draw=draws("validation"),
            normalization=Normalization(
                model.normalization_mapping,
                _given_statistics(config, own),
                RelativeActions(model.relative_exclude_joints, model.action_feature_names)
                if model.use_relative_actions
                else None,
                resuming.narrow_rule(own),
            ),
            wording=Wording(prompt, config.task_paraphrase),
            began_with=began_with(own),
        )
    )
    for line in data.report:
        log.info(line)
    if prompt is not None and (largest := data.reader.tokens.largest()) >= prompt.vocabulary:
        raise ValueError(
            f"the tokenizer {prompt.tokenizer} gives token {largest}, the model's vocabulary has {prompt.vocabulary}; raise "
            f"{prompt.vocabulary_key}, or use the tokenizer that the model was made for"
        )
    model.adopt_features(data.spec, data.robots[0].action_names)
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
        names = dimension_names(files[0].parent)
        values = config.family.saved.read_statistics(files, config.trainable)
        return GivenStatistics(reference, values, {key.rpartition(".")[2]: some for key, some in names.items()})
    except ValueError as error:
        raise ValueError(
            f"data.statistics: checkpoint: {error}; write dataset, or another load_from_checkpoint"
        ) from None
