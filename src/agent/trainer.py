"""Building a run in a stated order, and the training loop."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agent import optim, weights
from agent.batch import Batch, to_device
from agent.checkpoint import PRETRAINED, TRAINING, CheckpointStore
from agent.configuration_pipeline import Plan, TrainPipelineConfig, changes_since, dump, dump_yaml, make_plan
from agent.data.build import Data, build_data
from agent.data.loader import TrainLoader, validation_batches
from agent.data.normalization import to_lerobot_stats
from agent.data.transforms import SampleSpec
from agent.distributed import Launch, Processes, StopRequest
from agent.evaluate import evaluate
from agent.metrics import Metrics
from agent.models import flow_matching, registry
from agent.parallelize import parallelize
from agent.reproducibility import make_deterministic
from agent.run_folder import RunFolder, write_atomically

log = logging.getLogger(__name__)

_FAILED_SAVES_ALLOWED = 3


@dataclass
class TrainState:
    """All counters that a resume continues. Everything random is a function of these and the seed."""

    step: int = 0
    """Optimizer updates done."""
    samples_seen: int = 0
    """Samples of the stream consumed; the next one is the sample with this number."""
    wandb_run_id: str | None = None
    """The wandb run, the same across restarts."""


@dataclass
class Run:
    """Everything that the loop works with."""

    config: TrainPipelineConfig
    plan: Plan
    processes: Processes
    folder: RunFolder | None  # on rank 0
    checkpoints: CheckpointStore
    data: Data
    policy: Any
    model: Any  # the policy, or DDP around it
    optimizer: torch.optim.Optimizer
    learning_rate: optim.LearningRate
    state: TrainState
    metrics: Metrics | None  # on rank 0
    failed_saves: int = 0


# ── building ────────────────────────────────────────────────────────────────────────────────────────────────────


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
    state = TrainState() if resume_from is None else _restore(resume_from, optimizer, policy)
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


def _restore(checkpoint: Path, optimizer: torch.optim.Optimizer, policy: Any) -> TrainState:
    optim.restore_optimizer(optimizer, policy, load_file(checkpoint / TRAINING / "optimizer.safetensors"))
    saved = json.loads((checkpoint / TRAINING / "state.json").read_text(encoding="utf-8"))
    return TrainState(**{field.name: saved[field.name] for field in fields(TrainState)})


# ── training ────────────────────────────────────────────────────────────────────────────────────────────────────


def train(run: Run, stop: StopRequest) -> str:
    """Trains to the last update, or until asked to stop.

    Returns:
        The reason for an early stop, empty when the run is finished.
    """
    config, state, processes = run.config, run.state, run.processes
    loader = TrainLoader(
        run.data.reader,
        run.data.mixture,
        global_batch=config.global_batch_size,
        per_device_batch=config.per_device_batch_size,
        rank=processes.rank,
        world=processes.world_size,
        first_update=state.step,
        num_workers=config.data.train.num_workers,
        prefetch_factor=config.data.train.prefetch_factor,
        pin=processes.device.type == "cuda",
    )
    run.model.train()
    with contextlib.closing(loader):
        batches = _warmed_up(run, iter(loader))
        clock = _Clock()
        while state.step < run.plan.n_updates:
            with clock.updating():
                result = train_step(run, batches, clock)
            state.step += 1
            state.samples_seen += config.global_batch_size
            last = state.step == run.plan.n_updates
            record: dict[str, float] = {}
            if config.eval_freq and (state.step % config.eval_freq == 0 or last):
                record |= validate(run)
            if record or last or state.step % config.log_freq == 0:
                _report(run, result, clock, record)
            reason = stop.agreed(processes)
            if last or reason or state.step % config.save_model_freq == 0:
                save(run, must_succeed=last)
            if reason and not last:
                return reason
    return ""


def _warmed_up(run: Run, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, after one pass over the first whose gradients are thrown away.

    DDP sorts its gradient buckets after the first backward pass, so without this the first update of every start
    would add in another order than the same update of a run that was not interrupted.
    """
    first = next(batches)
    with precision(run):
        loss = run.model(to_device(first, run.processes.device)).sum()
    loss.backward()
    run.optimizer.zero_grad(set_to_none=True)
    return itertools.chain([first], batches)


def precision(run: Run) -> contextlib.AbstractContextManager:
    """bfloat16 autocast over float32 parameters, or nothing."""
    if run.config.use_bf16:
        return torch.autocast(run.processes.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@dataclass(frozen=True)
class StepResult:
    """One update, still on the device."""

    loss_sum: torch.Tensor
    """Sum of this process's sample losses."""
    grad_norm: float
    lr: float


def train_step(run: Run, batches: Iterator[Batch], clock: _Clock) -> StepResult:
    """One optimizer update over ``accumulation_steps`` micro-batches.

    Raises:
        FloatingPointError: if the loss or the gradient is not finite, before any weight changes.
    """
    config, steps = run.config, run.plan.accumulation_steps
    # DDP averages over the processes; with this factor the sum over everything is the mean over the global batch.
    scale = run.processes.world_size / config.global_batch_size
    seen: list[tuple[Batch, torch.Tensor]] = []
    for micro in range(steps):
        with clock.waiting_for_data():
            batch = next(batches)
        postpone = micro < steps - 1 and run.processes.world_size > 1
        with run.model.no_sync() if postpone else contextlib.nullcontext():
            with precision(run):
                losses = run.model(to_device(batch, run.processes.device))
            (losses.sum() * scale).backward()
        seen.append((batch, losses.detach()))
    max_norm = config.max_grad_norm or math.inf
    parameters = [p for p in run.policy.parameters() if p.requires_grad]
    grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    if not math.isfinite(grad_norm):
        raise FloatingPointError(_name_the_samples(run, seen, grad_norm))
    lr = run.learning_rate.at(run.state.step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return StepResult(torch.stack([losses.sum() for _, losses in seen]).sum(), grad_norm, lr)


def _name_the_samples(run: Run, seen: list[tuple[Batch, torch.Tensor]], grad_norm: float) -> str:
    bad = [
        (int(batch.sample_index[i]), *batch.provenance[i].tolist())
        for batch, losses in seen
        for i in torch.nonzero(~torch.isfinite(losses.cpu())).flatten().tolist()
    ]
    everywhere = sorted(sample for share in run.processes.gather(bad) for sample in share)
    where = f"update {run.state.step + 1}: "
    if not everywhere:
        first = run.state.samples_seen
        return (
            f"{where}the gradient's norm is {grad_norm} although every loss is finite (samples {first} to "
            f"{first + run.config.global_batch_size - 1}); the weights are unchanged. Lower the learning rate, or look "
            "for the operation with --debug true"
        )
    named = "; ".join(f"sample {k}: data set {d}, episode {e}, frame {f}" for k, d, e, f in everywhere[:8])
    return f"{where}the loss of {len(everywhere)} samples is not finite ({named}); the weights are unchanged"


class _Clock:
    """Where the time of the updates goes. Validation and checkpoints are not counted."""

    def __init__(self) -> None:
        self._updates, self._busy, self._waited = 0, 0.0, 0.0

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Around one update."""
        begin = time.perf_counter()
        yield
        self._busy += time.perf_counter() - begin
        self._updates += 1

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the wait for a micro-batch."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    def read(self) -> tuple[float, float]:
        """Seconds per update and the fraction of them spent waiting for data, since the last reading."""
        step_s, fraction = self._busy / self._updates, self._waited / self._busy
        self.__init__()  # type: ignore[misc]
        return step_s, fraction


def validate(run: Run) -> dict[str, float]:
    """The metrics of a validation; training's random streams do not move."""
    config = run.config
    if run.data.validation is None:  # nothing held out
        return {}
    batches = validation_batches(
        run.data.validation,
        size=config.eval_size,
        batch=config.per_device_batch_size,
        rank=run.processes.rank,
        world=run.processes.world_size,
    )
    return evaluate(
        run.policy,
        batches,
        run.processes,
        unnormalize=run.data.action_normalizer.unnormalize,
        mean_action=run.data.action_statistics.mean,
        thresholds=config.eval_thresholds,
        precision=partial(precision, run),
    )


def _report(run: Run, result: StepResult, clock: _Clock, validation: dict[str, float]) -> None:
    """One line of metrics, gathered from all processes once."""
    config, state, processes = run.config, run.state, run.processes
    step_s, waited = clock.read()
    loss, total_wait = processes.sum([float(result.loss_sum), waited])
    record = {
        "step": state.step,
        "loss": loss / config.global_batch_size,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "step_s": step_s,
        "samples_per_s": config.global_batch_size / step_s,
        "data_wait": total_wait / processes.world_size,
        "memory_gb": _peak_memory_gb(processes.device),
        "epoch": state.step / run.plan.updates_per_epoch,
        "samples_seen": state.samples_seen,
        "eta_s": (run.plan.n_updates - state.step) * step_s,
        **validation,
    }
    if run.metrics is not None and run.folder is not None:
        run.metrics.write(record)
        run.folder.update("running", state.step)


def _peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held: the GPU's where there is one, else the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def save(run: Run, must_succeed: bool) -> None:
    """A checkpoint of this update. A failure costs this checkpoint, not the run, up to three in a row.

    Raises:
        RuntimeError: if it failed three times in a row, or if this one is needed.
    """
    begin = time.perf_counter()
    problem = run.processes.main_decides(partial(_save_on_main, run))
    if problem is None:
        run.failed_saves = 0
        log.info("checkpoint at update %d saved in %.1f s", run.state.step, time.perf_counter() - begin)
        return
    run.failed_saves += 1
    text = f"the checkpoint at update {run.state.step} could not be written: {problem}; earlier checkpoints are intact"
    if must_succeed or run.failed_saves >= _FAILED_SAVES_ALLOWED:
        raise RuntimeError(text)
    log.error("%s; training goes on (failure %d of %d in a row)", text, run.failed_saves, _FAILED_SAVES_ALLOWED)


def _save_on_main(run: Run) -> str | None:
    try:
        run.checkpoints.save(run.state.step, partial(_write_checkpoint, run))
    except OSError as error:
        return f"{error.strerror or error} ({error.filename or run.checkpoints.folder})"
    except SafetensorError as error:  # safetensors wraps the operating system's error in its own
        return str(error)
    return None


def _write_checkpoint(run: Run, folder: Path) -> None:
    statistics = to_lerobot_stats(run.data.state_statistics, run.data.action_statistics)
    writer = registry.pretrained_writer(run.config.model_cfg)
    writer(folder / PRETRAINED, run.config.model_cfg, run.policy.state_dict(), statistics, run.plan.n_updates)
    training = folder / TRAINING
    tensors = {name: t.contiguous() for name, t in optim.optimizer_tensors(run.optimizer, run.policy).items()}
    save_file(tensors, training / "optimizer.safetensors")
    details = {
        "data_fingerprint": run.data.fingerprint,
        "world_size": run.processes.world_size,
        "torch": torch.__version__,
    }
    (training / "state.json").write_text(
        json.dumps({**asdict(run.state), **details}, indent=1) + "\n", encoding="utf-8"
    )
    (training / "config.yaml").write_text(dump_yaml(run.config), encoding="utf-8")


def start_reporting(run: Run) -> None:
    """Opens metrics, wandb and ``config.yaml`` on rank 0."""

    def on_main() -> str | None:
        assert run.metrics is not None and run.folder is not None
        write_atomically(run.config.run_dir / "config.yaml", dump_yaml(run.config))
        wandb = run.config.wandb if run.config.use_wandb else None
        if wandb is not None and wandb.run_id is None:
            wandb = replace(wandb, run_id=run.state.wandb_run_id)
        assert run.config.name is not None
        return run.metrics.open(run.state.step, wandb, run.config.run_dir, run.config.name, dump(run.config))

    run.state.wandb_run_id = run.processes.main_decides(on_main) or run.state.wandb_run_id
