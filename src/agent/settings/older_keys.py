"""Knows the keys of training YAMLs that this code's predecessors read, and what to write instead of each.

They are refused, not translated: most have no counterpart of the same meaning, and a file that is converted once says
what it does. Hydra's and the predecessors' own names are in one table, by dotted key; ``*`` stands for one part.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from agent.spelling import literal


def _datasets(mixture: Any) -> str:
    shipped = next((name for name in ("bridge", "fractal") if name in str(mixture).lower()), None)
    if shipped:
        return f"write data.train.datasets: !include ../data/{shipped}.yaml"
    return "write data.train.datasets, a list with one {repo_id: …, root: …} for each data set of the mixture"


def _chunk(horizon: Any) -> str:
    write = "model_cfg.chunk_size says; remove the line"
    return write if horizon is None else f"write model_cfg.chunk_size: {literal(horizon)}"


_SIZES = "sizes are the model config's: write model_cfg.paligemma_variant, action_expert_variant and vision_variant"
_WORKERS = "write data.train.num_workers, the processes per GPU that read samples"
_ONE_STEP = "π0 sees one observation step; remove the line"
_PROCESSES = "torchrun --nproc_per_node says how many GPUs of the one node are used; remove the line"
_LORA = "low-rank adapters and quantisation are not supported; remove the line, and freeze with freeze_vlm"
_AVERAGES = "write ema_decay: 0.999 at the top for a moving average of the weights, or remove the line"
_HYDRA = "nothing here reads Hydra's keys; remove the line"
_METRICS = "the metrics are always the same ones, see metrics.jsonl; remove the line"
_SCHEDULE = "write model_cfg.scheduler_warmup_steps, scheduler_decay_steps and scheduler_decay_lr"
_TOKENS = "write model_cfg.tokenizer_max_length, of the instruction alone"
_SIMULATION = (
    "simulation is Meta-World's, by a process of its own: write eval_cfg: {{tasks: [reach-v3]}} (docs/simulation.md), or "
    "remove it. Held-out episodes are measured all the same: eval_freq, eval_size, eval_thresholds"
)
_RLDS = (
    "RLDS data is not read; convert it to the LeRobot v3 format (python -m agent.data.from_rlds) and write its folder as "
    "`root` in an entry of data.{part}.datasets"
)

# Dotted key → what to write, or a function of the value. {value} is what the file has, {part} is train or val.
INSTEAD: dict[str, str | Callable[[Any], str]] = {
    "data.train.dataset_mix": _datasets,
    "data.train.split": (
        "a data set has its own; write `split: {value}`, or a slice such as train[:95%], in its entry of "
        "data.train.datasets"
    ),
    "data.val.split": "write data.val.fraction, held out of the training episodes, or data.val.datasets",
    "data.val.dataset_mix": "write data.val.datasets, or data.val.fraction, held out of the training episodes",
    "data.*.data_path": _RLDS,
    "data.*.window_size": _ONE_STEP,
    "data.*.action_horizon": _chunk,
    "data.*.max_action_future": "as many actions as model_cfg.chunk_size are read; remove the line",
    "data.*.skip_unlabeled": (
        "every episode needs an instruction; remove the line, and choose the labelled ones with `episodes` in the "
        "entry of data.{part}.datasets"
    ),
    "data.*.load_proprio": "the state is always read, from `state` in an entry of data.{part}.datasets; remove the line",
    "data.*.shuffle_buffer_size": "all samples are shuffled, by `seed` and without a buffer; remove the line",
    "data.train.num_parallel_calls": _WORKERS,
    "data.train.traj_transform_threads": _WORKERS,
    "data.train.traj_read_threads": _WORKERS,
    "data.val.num_parallel_calls": "validation reads as the training does; remove the line",
    "data.val.traj_transform_threads": "validation reads as the training does; remove the line",
    "data.val.traj_read_threads": "validation reads as the training does; remove the line",
    "data.dataset_stats": (
        "statistics are computed from the training episodes and stored in every checkpoint; remove the key. Which ones "
        "are used is model_cfg.normalization_mapping"
    ),
    **dict.fromkeys(
        ("data.train_episode_count", "data.train.train_episode_count"),
        "frames are counted in the data sets; remove the line. The length of the run is n_epochs or n_updates",
    ),
    **dict.fromkeys(("n_nodes", "multi_gpu", "mechanism", "gpu_id"), _PROCESSES),
    "device": "write model_cfg.device: {value}, or remove the line: the GPU is used if there is one",
    "use_amp": "use_bf16 alone decides the precision; remove the line",
    "log_dir": "`export VLA_LOG_DIR=…` (set_path.sh); the run's folder is ${{VLA_LOG_DIR}}/<name>. Remove the line",
    "train_vlm": lambda train: f"write freeze_vlm: {literal(not train)}",
    "pretrained_model_path": "write model_cfg.paligemma_pretrained_path: {value}",
    "load_pretrained_weights": "model_cfg.paligemma_pretrained_path decides, null for fresh weights; remove the line",
    "resume_checkpoint_path": (
        "a run continues from its own newest checkpoint when it is started again; remove the line, or write "
        "load_from_checkpoint: {value} to begin a new run with these weights"
    ),
    **dict.fromkeys(("train_log_metrics", "eval_log_metrics"), _METRICS),
    **dict.fromkeys(("eval_cfg.simulator_name", "eval_cfg.role", "env"), _SIMULATION),
    "save_model_start": "checkpoints are saved from the beginning, and keep_checkpoints of them kept; remove the line",
    "wandb.api_key": "a key does not belong in a file; remove the line, and run `wandb login` or `export WANDB_API_KEY=…`",
    **dict.fromkeys(("wandb.run", "wandb.name"), "the run on wandb has the run's name; write `name` at the top"),
    **dict.fromkeys(("wandb.disable", "wandb.disabled"), lambda off: f"write use_wandb: {literal(not off)} at the top"),
    **dict.fromkeys(("wandb.enable", "wandb.enabled"), lambda on: f"write use_wandb: {literal(bool(on))} at the top"),
    "wandb.id": "write wandb.run_id: {value}",
    **dict.fromkeys(("wandb.group", "wandb.tags", "wandb.notes"), "set it on wandb's page of the run; remove the line"),
    "wandb.log_freq": "write log_freq: {value} at the top",
    "action_lr": "write model_cfg.optimizer_lr: {value}",
    "vlm_lr": "all parts learn at model_cfg.optimizer_lr; remove the line, or write freeze_vlm: true",
    "action_weight_decay": "write model_cfg.optimizer_weight_decay: {value}",
    "vlm_weight_decay": "one for all parts; write model_cfg.optimizer_weight_decay",
    **dict.fromkeys(("action_lr_scheduler", "vlm_lr_scheduler"), _SCHEDULE),
    "flow_sampling": "time is drawn from the Beta distribution of model_cfg.time_sampling_*; remove the line",
    "final_action_clip_value": "sampled actions are not clipped; remove the line",
    "cond_steps": _ONE_STEP,
    "horizon_steps": _chunk,
    "action_dim": "it is read from the data set, at most model_cfg.max_action_dim; remove the line",
    "proprio_dim": "it is read from the data set, at most model_cfg.max_state_dim; remove the line",
    **dict.fromkeys(("max_seq_len", "max_image_text_tokens", "tokenizer_padding"), _TOKENS),
    **dict.fromkeys(("image_token_index", "pad_token_id"), "the tokenizer says; remove the line"),
    **dict.fromkeys(
        ("mixture", "joint", "vision", "vision_projector", "time_hidden_size", "vocab_size"),
        _SIZES,
    ),
    "action_expert_adaptive_mode": "the time enters by concatenation, as in π0; remove the line",
    **dict.fromkeys(("quantize", "lora", "lora_r", "lora_dropout"), _LORA),
    **dict.fromkeys(("use_ema", "ema_start", "ema_freq", "ema_device"), _AVERAGES),
    **dict.fromkeys(("use_swa", "swa_start", "swa_freq", "swa_device"), _AVERAGES),
    **dict.fromkeys(("defaults", "hydra", "_target_"), _HYDRA),
}

# Keys of LeRobot's training command and its train_config.json, as INSTEAD.
LEROBOT: dict[str, str] = {
    "policy": (
        "write model_cfg: !include FILE, the policy's config.json, and load_from_checkpoint: FOLDER for its weights; "
        "single values are model_cfg.chunk_size and so on"
    ),
    "dataset": "write data.train.datasets, a list with {{repo_id: …, root: …}} for each data set",
    "rename_map": "write `cameras` in an entry of data.train.datasets",
    "batch_size": "that of one GPU: write per_device_batch_size: {value}, and global_batch_size for all GPUs together",
    "steps": "write n_updates: {value}",
    "output_dir": "`export VLA_LOG_DIR=…` (set_path.sh); the run's folder is ${{VLA_LOG_DIR}}/<name>",
    "job_name": "write name: {value}",
    "save_freq": "write save_model_freq: {value}",
    "scheduler": _SCHEDULE,
    "peft": _LORA,
    **dict.fromkeys(("lr", "learning_rate"), "write model_cfg.optimizer_lr: {value}"),
}

# Keys that still exist, with values that they no longer take: (key, value) → what to write.
VALUES = {
    ("task_paraphrase", True): "write the path of a JSON of instruction → paraphrases",
    ("task_paraphrase", False): "write null, or remove the line",
    ("save_model_freq", None): "write the updates between checkpoints, or remove the line",
}

MISSING = {"data": "write data: {train: {datasets: !include ../data/bridge.yaml}}, or your own list of data sets"}
"""Required keys that older files could leave out → what to write."""


def instead(key: str, value: Any) -> str | None:
    """Says whose key this is and what to write instead with this value; None for a key that no predecessor had."""
    if key in LEROBOT:
        return f"a key of LeRobot's; {LEROBOT[key].format(value=literal(value))}"
    found = next((INSTEAD[pattern] for pattern in INSTEAD if fnmatchcase(key, pattern)), None)
    if found is None:
        return None
    if not callable(found):
        text = found.format(value=literal(value), part=key.split(".")[1] if "." in key else "")
    else:
        text = found(value)
    return f"a key of older configs; {text}"


def instead_of_value(key: str, value: Any) -> str | None:
    """Says what to write instead of an older value of a key that still exists; None for other values."""
    if value is None or isinstance(value, bool):
        return VALUES.get((key, value))
    return None
