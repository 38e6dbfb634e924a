"""Checks what follows from the config's numbers: batches, epochs, the learning rate, and instructions that are cut."""

from __future__ import annotations

from copy import deepcopy

from agent.optim.learning_rate import LearningRate
from agent.preflight.context import Context
from agent.preflight.report import NotChecked, Row, failed, unchecked
from agent.settings.plan import Plan, accumulation_steps, make_plan
from agent.training.config_changes import settle


def check(context: Context) -> list[Row]:
    """Computes with the number of GPUs that the job will have."""
    return [*_batch(context), *_course(context), *_tokens(context)]


def plan(context: Context) -> Plan:
    """Makes the plan of the run's batches and updates.

    Raises:
        NotChecked: if the frames are not known or the batch does not divide.
    """
    frames = context.data.mixture.frames
    try:
        return make_plan(context.config, context.gpus[0], frames)
    except ValueError as error:
        raise NotChecked("the batch does not divide") from error


def _batch(context: Context) -> list[Row]:
    config, (gpus, source) = context.config, context.gpus
    try:
        steps = accumulation_steps(config, gpus)
    except ValueError as error:
        return [failed("batch", f"{error} (with {gpus} processes: {source})")]
    text = (
        f"{config.global_batch_size} = {config.per_device_batch_size} per device × {gpus} processes ({source}) × "
        f"{steps} accumulation steps"
    )
    return [Row("batch", "pass", text)]


def _course(context: Context) -> list[Row]:
    try:
        numbers = plan(context)
    except NotChecked as error:
        return [unchecked("schedule", error, "")]
    config, model = context.config, context.model
    epochs = numbers.n_updates / numbers.updates_per_epoch
    text = (
        f"{numbers.train_frames} training frames = {numbers.updates_per_epoch:.1f} updates per epoch; {numbers.n_updates} "
        f"updates = {epochs:.2f} epochs"
    )
    whole, _ = context.own
    settled = deepcopy(config)
    kept = settle(settled, whole[0] if whole else None)
    begins = settled.trainable.scheduler_decay_start
    assert begins is not None, "settled now"
    rate = LearningRate.plan(
        model.optimizer_lr,
        model.scheduler_decay_lr,
        model.scheduler_warmup_steps,
        model.scheduler_decay_steps,
        numbers.n_updates,
        begins,
    )
    last = numbers.n_updates - 1
    points = {update: rate.at(update) for update in (0, last // 4, last // 2, last * 3 // 4, last)}
    course = ", ".join(f"{value:.3g} at update {update + 1}" for update, value in points.items())
    course += f"; {rate.warmup_updates} updates of warm-up{rate.fall()}"
    rows = [
        Row("epochs", "pass", text) if epochs <= 100 else Row("epochs", "warn", text, "fewer n_epochs or n_updates"),
        Row("learning rate", "pass", "; ".join([course, *kept]), details={"lr": points}),
    ]
    if rate.warmup_updates != model.scheduler_warmup_steps:
        text = (
            f"the run is shorter than its warm-up or its decay: warm-up {model.scheduler_warmup_steps} → "
            f"{rate.warmup_updates} updates"
        )
        rows.append(
            Row("learning rate", "warn", text, "write a smaller model_cfg.scheduler_warmup_steps, or train longer")
        )
    if config.save_model_freq > numbers.n_updates:
        text = (
            f"save_model_freq is {config.save_model_freq}, the run has {numbers.n_updates} updates: a crash costs all"
        )
        if config.checkpoint_interval_minutes is None:
            rows.append(
                Row("checkpoints", "warn", text, "write a smaller save_model_freq, or checkpoint_interval_minutes")
            )
    return rows


def _tokens(context: Context) -> list[Row]:
    if context.config.family.prompt(context.model) is None:
        return []
    try:
        if context.tokenizer_problem is not None:
            raise NotChecked("the tokenizer is not here")
        tokens, texts = context.data.reader.tokens, context.texts
    except NotChecked as error:
        return [unchecked("instructions", error, "")]
    most = context.spec.tokenizer_max_length
    if not tokens.too_long:
        longest = max(len(tokens(text)) for text in texts)
        return [Row("instructions", "pass", f"{len(texts)}, the longest of {longest} tokens; {most} are allowed")]
    task, count = max(tokens.too_long.items(), key=lambda item: item[1])
    text = f"{len(tokens.too_long)} are cut at {most} tokens, the longest has {count}: {task!r}"
    change = f"write tokenizer_max_length: {-(-count // 8) * 8} in model_cfg"
    return [Row("instructions", "warn", text, change, {"too_long": tokens.too_long})]
