"""Collects the contents of a π0 export for each format: tensor names, statistics and config files.

``lerobot``     LeRobot 0.6.1, which is also how checkpoints are written here
``lerobot_v1``  LeRobot before 0.4 (2025): other names, statistics among the weights, a config.json of its own keys
``openpi``      openpi's PyTorch port: 0.6's names without ``model.``, statistics in ``assets/``

An export is refused if the other program would silently compute something else. Sizes that the other program does not know
are exported with a note, because it refuses them by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from agent.models.common.sizes import GEMMA, VISION
from agent.models.family import Contents, Statistics
from agent.models.lerobot_config import ACTION, STATE
from agent.models.pi import adapter
from agent.models.pi.configuration import PI0Config

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Maps format → its name of the token embedding, which identifies the layout.
_EMBEDDINGS = {
    "lerobot": "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight",
    "lerobot_v1": "model.paligemma_with_expert.paligemma.language_model.model.embed_tokens.weight",
    "openpi": "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight",
}
_HEADS = {
    "lerobot": "model.paligemma_with_expert.paligemma.lm_head.weight",
    "lerobot_v1": "model.paligemma_with_expert.paligemma.language_model.lm_head.weight",
    "openpi": "paligemma_with_expert.paligemma.lm_head.weight",
}
# The statistics that each normalisation mode reads.
_V1_STATISTICS = {"IDENTITY": (), "MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max")}
_OPENPI_STATISTICS = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("mean", "std", "q01", "q99")}
_PERIODS = (4e-3, 4.0)  # fixed in LeRobot v1 and openpi


def contents(
    target: str,
    config: PI0Config,
    written: dict[str, Any],
    statistics: Statistics | None,
    dtype: torch.dtype,
    asset: str,
) -> Contents:
    """Collects the contents of an export, see ``agent.models.family.SavedForm.export``."""
    names, heads = tensor_names(target, config), {expert_head(target): zero_head(config)}
    if target == "lerobot":
        return Contents(names, heads, {"config.json": written}, _size_notes(target, config))
    _check_periods(target, config)
    if config.use_relative_actions and target == "lerobot_v1":
        raise ValueError(
            "config.json: use_relative_actions is true, and LeRobot v1 would execute relative actions as absolute ones; "
            "export to lerobot"
        )
    modes = {name: config.normalization_mapping.get(name, "IDENTITY") for name in ("STATE", "ACTION")}
    if statistics is None:
        raise ValueError(
            f"{target} stores the statistics of state and actions, and this checkpoint has no "
            "policy_preprocessor.json with a normalizer_processor; export a checkpoint that has its processors"
        )
    if target == "lerobot_v1":
        heads |= _v1_buffers(modes, statistics)
        return Contents(names, heads, {"config.json": _v1_config(config, written)}, _size_notes(target, config))
    documents = {
        "config.json": _openpi_config(config, dtype),
        f"assets/{asset}/norm_stats.json": _openpi_statistics(modes, statistics),
    }
    notes = _size_notes(target, config)
    if modes["STATE"] == "QUANTILES":
        notes.append("it was trained with quantiles: set use_quantile_norm=True in openpi's data config")
    if config.use_relative_actions:
        absolute = ", ".join(config.relative_exclude_joints) or "none"
        notes.append(
            "it was trained on actions relative to the state: put DeltaActions and AbsoluteActions into openpi's data config, "
            f"with a mask that leaves out the dimensions named {absolute}"
        )
    return Contents(names, heads, documents, notes)


def tensor_names(target: str, config: PI0Config) -> dict[str, str]:
    """Maps every tensor's name in a format → our name."""
    layout = next(layout for layout in adapter.POLICIES if layout.theirs(adapter.EMBEDDING) == _EMBEDDINGS[target])
    names: dict[str, str] = {}
    for ours in adapter.shapes(config):
        theirs = layout.theirs(ours)
        assert theirs is not None, f"{ours} has no name in {target}"
        names[theirs] = ours
    # LeRobot's strict loading requires the tied embedding under both names. openpi loads with safetensors' load_model, which
    # refuses the second name of a tied tensor; openpi itself writes the head.
    names[_HEADS[target]] = adapter.EMBEDDING
    if target == "openpi":
        del names[_EMBEDDINGS[target]]
    return names


def expert_head(target: str) -> str:
    """Returns a format's name of the expert's language head, which loading requires although nothing reads it."""
    prefix = _EMBEDDINGS[target].partition("paligemma_with_expert.")[0]
    return f"{prefix}paligemma_with_expert.gemma_expert.lm_head.weight"


def zero_head(config: PI0Config) -> Tensor:
    """Returns the expert's language head: one zero, expanded, in a small type because the file stores it in full."""
    return torch.zeros((), dtype=torch.bfloat16).expand(config.expert.vocab_size, config.expert.width)


def _check_periods(target: str, config: PI0Config) -> None:
    if (config.min_period, config.max_period) != _PERIODS:
        raise ValueError(
            f"config.json: min_period {config.min_period} and max_period {config.max_period} are {_PERIODS[0]} and "
            f"{_PERIODS[1]} in {target}, which has no key for them: it would act differently. Export to lerobot"
        )


def _size_notes(target: str, config: PI0Config) -> list[str]:
    """Returns a note if the program that reads the format does not know these sizes."""
    sizes = (config.language, config.expert, config.vision)
    dims = (config.max_state_dim, config.max_action_dim)
    # LeRobot has a name for gemma_300m, but fixes the width of the projector to that of gemma_2b.
    known = sizes == (GEMMA["gemma_2b"], GEMMA["gemma_300m"], VISION["so400m"])
    if target != "lerobot":
        known = known and tuple(config.image_resolution) == (224, 224)
    if target == "openpi":
        known = known and dims == (32, 32)
    return [] if known else [f"the model's sizes are not the published π0's: {target} will refuse it"]


def _v1_buffers(modes: dict[str, str], statistics: Statistics) -> dict[str, Tensor]:
    """Returns the statistics under the names of LeRobot v1's normalisation modules; there are none for IDENTITY."""
    places = {"STATE": (STATE, ("normalize_inputs",)), "ACTION": (ACTION, ("normalize_targets", "unnormalize_outputs"))}
    buffers = {}
    for kind, (feature, modules) in places.items():
        if modes[kind] not in _V1_STATISTICS:
            raise ValueError(
                f"config.json: normalization_mapping.{kind} is {modes[kind]}, which LeRobot v1 does not know (it has "
                f"{', '.join(_V1_STATISTICS)}); export to lerobot"
            )
        for module in modules:
            for name in _V1_STATISTICS[modes[kind]]:
                key = f"{module}.buffer_{feature.replace('.', '_')}.{name}"
                buffers[key] = torch.from_numpy(_statistic(statistics, feature, name).astype("float32"))
    return buffers


def _statistic(statistics: Statistics, feature: str, name: str) -> np.ndarray:
    try:
        return statistics[feature][name]
    except KeyError:
        raise ValueError(f"the checkpoint's statistics have no {feature}.{name}, which this format stores") from None


def _v1_config(config: PI0Config, written: dict[str, Any]) -> dict[str, Any]:
    """Returns ``config.json`` with exactly the keys of LeRobot v1, which refuses others."""
    same = (
        "type n_obs_steps normalization_mapping input_features output_features chunk_size n_action_steps "
        "max_state_dim max_action_dim empty_cameras tokenizer_max_length freeze_vision_encoder train_expert_only "
        "optimizer_lr optimizer_betas optimizer_eps optimizer_weight_decay "
        "scheduler_warmup_steps scheduler_decay_steps scheduler_decay_lr"
    ).split()
    known = config.to_lerobot() | written
    return {key: known[key] for key in same} | {
        "resize_imgs_with_padding": list(config.image_resolution),
        "adapt_to_pi_aloha": False,
        "use_delta_joint_actions_aloha": False,
        "proj_width": config.expert.width,
        "num_steps": config.num_inference_steps,
        "use_cache": True,
        "attention_implementation": "eager",
        "train_state_proj": True,
    }


def _openpi_config(config: PI0Config, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the file that openpi's conversion writes for reference; openpi takes the sizes from its training config."""
    written = config.to_lerobot()
    return {
        "action_dim": config.max_action_dim,
        "action_horizon": config.chunk_size,
        "paligemma_variant": written["paligemma_variant"],
        "action_expert_variant": written["action_expert_variant"],
        "precision": str(dtype).removeprefix("torch."),
    }


def _openpi_statistics(modes: dict[str, str], statistics: Statistics) -> dict[str, Any]:
    """Returns the content of openpi's ``norm_stats.json``."""
    if set(modes.values()) not in ({"MEAN_STD"}, {"QUANTILES"}):
        raise ValueError(
            f"config.json: normalization_mapping is {modes['STATE']} for STATE and {modes['ACTION']} for ACTION; openpi "
            "knows MEAN_STD for both or QUANTILES for both; export to lerobot"
        )
    values: dict[str, dict[str, list[float]]] = {}
    for theirs, feature in {"state": STATE, "actions": ACTION}.items():
        needed = _OPENPI_STATISTICS[modes["STATE"]]
        # Quantiles are written even where the mode does not read them, if there are any: statistics that came with weights
        # can lack them.
        more = [
            name
            for name in _OPENPI_STATISTICS["QUANTILES"]
            if name not in needed and name in statistics.get(feature, {})
        ]
        values[theirs] = {name: _statistic(statistics, feature, name).tolist() for name in (*needed, *more)}
    return {"norm_stats": values}
