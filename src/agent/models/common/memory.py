"""Predicts the GPU memory of training from sizes alone, without building a model or importing torch.

Weights, gradients and optimizer state are counted exactly. Activations are the tensors that autograd keeps of each unit of
the model, with fused attention. The peak is the maximum over the units in the backward pass of: the activations of this and
all earlier units, the gradients of all later ones, the activations that this unit recomputes, and its temporary buffers. A
family lists its units in the order of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agent.models.common.sizes import GemmaVariant, VisionVariant

_OPTIMIZER_BLOCK = 256  # numbers that share a scale in the eight-bit optimizer
_OPTIMIZER_SMALL = 4096  # it keeps the state of smaller tensors in float32
_OPTIMIZER_PIECE = (1 << 22) * 40  # bytes of buffers while an update is computed piece by piece
CONTEXT = 600 << 20
"""An allowance in bytes for the CUDA context and cuBLAS's workspace, which torch does not count."""


@dataclass(frozen=True)
class Training:
    """Holds the settings beside the model that determine memory; values are those of the training YAML."""

    batch: int
    """Samples that the GPU holds at once."""
    cameras: int
    """Cameras with an image."""
    language_tokens: int | None = None
    """Tokens of the longest instruction, rounded up to a multiple of 8; None for the model's maximum."""
    draws: int = 1
    """``flow_samples_per_observation``."""
    activation_checkpointing: str = "none"
    optimizer: str = "adamw"
    precision: str = "float32_master"
    use_bf16: bool = True
    accumulates: bool = False
    """Whether an update has several micro-batches, so that gradients exist during the forward pass."""
    ema: bool = False
    """Whether there is an ``ema_decay``."""
    shards: int = 1
    """Processes that shard weights, gradients, optimizer and average (``parallel: fsdp``); 1 for no sharding."""


@dataclass(frozen=True)
class Memory:
    """Holds the predicted memory of one process, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Activations kept at the end of the forward pass, without copies of weights."""
    ema: int
    """The moving average of the weights, in float32."""
    peak: int
    """The most that torch has allocated at once."""

    @property
    def card(self) -> int:
        """Returns the memory that the GPU must have: the peak plus an allowance for what torch does not count."""
        return self.peak + CONTEXT


@dataclass(frozen=True)
class Unit:
    """Describes a piece of the model that runs at once: its parameters as numbers of elements, its activations in bytes."""

    shapes: tuple[tuple[int, ...], ...]
    """Shapes of all parameters, the trained ones first."""
    frozen: int = 0
    """Elements of the parameters that are not trained."""
    products: int = 0
    """Elements of the trained matrices and their biases, of which autocast makes a bfloat16 copy."""
    kept: int = 0
    """Bytes kept for the backward pass, with the activation checkpointing that is set."""
    again: int = 0
    """Bytes of activations that the backward pass recomputes."""
    hand: int = 0
    """Bytes of temporary buffers in its backward pass."""
    passing: int = 0
    """Bytes of temporary buffers in the forward pass of a unit that is not trained."""
    layer: bool = False
    """Whether sharding gathers its weights in the type of its matrix products."""

    @property
    def numbers(self) -> int:
        return sum(product_of(shape) for shape in self.shapes)

    @property
    def trained(self) -> int:
        return self.numbers - self.frozen


def predict(model: Iterable[Unit], training: Training) -> Memory:
    """Predicts the memory of one process that trains a model, given as its units, on one GPU.

    Raises:
        ValueError: for an unknown value of ``training``.
    """
    for key, known in (
        ("activation_checkpointing", ("none", "blocks", "full")),
        ("optimizer", ("adamw", "adamw8bit")),
        ("precision", ("float32_master", "bfloat16_stochastic")),
    ):
        if getattr(training, key) not in known:
            raise ValueError(f"{key}: {getattr(training, key)!r} is unknown; write {' or '.join(known)}")
    units = list(model)
    number = 2 if training.precision == "bfloat16_stochastic" else 4
    parameters = number * sum(unit.numbers for unit in units)
    gradients = number * sum(unit.trained for unit in units)
    state = sum(_state(unit, training.optimizer) for unit in units)
    ema = 4 * sum(unit.trained for unit in units) if training.ema else 0
    parameters, gradients, state, ema = (-(-total // training.shards) for total in (parameters, gradients, state, ema))
    passes = _peak_of_shards if training.shards > 1 else _peak_of_passes
    low_memory = training.optimizer == "adamw8bit" or number == 2
    update = gradients + (_OPTIMIZER_PIECE if low_memory else 0)
    peak = parameters + state + ema + max(passes(units, training, number), update)
    return Memory(parameters, gradients, state, sum(unit.kept for unit in units), ema, peak)


def _peak_of_passes(units: list[Unit], training: Training, number: int) -> int:
    """Returns the peak of activations, gradients and copies of weights; ``number`` is the bytes of one weight."""
    # Autocast keeps its copies of the weights until the forward pass ends; autograd keeps those that it saved for longer.
    copied = 2 if training.use_bf16 and number == 4 else 0
    stay = copied if training.activation_checkpointing == "none" else 0
    activations = sum(unit.kept for unit in units)
    before = number * sum(unit.trained for unit in units) if training.accumulates else 0
    most = before + activations + copied * sum(unit.products for unit in units)
    most = max(most, before + _most_passing(units))
    held, done = activations + stay * sum(unit.products for unit in units), 0
    for unit in reversed(units):
        own = (copied - stay) * unit.products + unit.again + unit.hand
        most = max(most, held + max(before, done) + own, held + max(before, done + number * unit.trained) + unit.hand)
        held -= unit.kept + stay * unit.products
        done += number * unit.trained
    return most


def _most_passing(units: list[Unit]) -> int:
    most = held = 0
    for unit in units:
        most = max(most, held + unit.passing)
        held += unit.kept
    return most


def _peak_of_shards(units: list[Unit], training: Training, number: int) -> int:
    """Returns the peak under FSDP2, which gathers a unit's weights for its passes and keeps a shard of its gradients.

    In the backward pass the preceding unit is gathered ahead of time. Gradients are summed over the processes in float32,
    from a copy. The backward pass keeps no copy of weights that are gathered again for it.
    """
    width = 2 if training.use_bf16 else number
    gathered = [(width if unit.layer else number) * unit.numbers for unit in units]
    before = number * sum(unit.trained for unit in units) // training.shards if training.accumulates else 0
    most = held = done = 0
    for unit, weights in zip(units, gathered, strict=True):
        # The gathered weights exist twice: as received from the processes, and in the tensors' own layout.
        most = max(most, before + held + weights + max(weights, unit.passing))
        held += unit.kept
    for place, unit in reversed(list(enumerate(units))):
        weights = gathered[place] + (gathered[place - 1] if place else 0)
        own = (width if unit.layer else number) * unit.trained + 4 * unit.trained
        most = max(most, held + max(before, done) + weights + max(unit.again + unit.hand, own))
        held -= unit.kept
        done += number * unit.trained // training.shards
    return most


def _state(unit: Unit, optimizer: str) -> int:
    """Returns the bytes of the optimizer's state for a unit."""
    total, left = 0, unit.trained
    for shape in unit.shapes:
        numbers = product_of(shape)
        if left < numbers:  # the shapes of what is trained come first
            continue
        left -= numbers
        if optimizer == "adamw8bit" and len(shape) > 1 and numbers >= _OPTIMIZER_SMALL:
            total += 2 * numbers + 2 * 4 * shape[0] * -(-product_of(shape[1:]) // _OPTIMIZER_BLOCK)
        else:
            total += 8 * numbers
    return total


def vision_units(
    table: VisionVariant, patches: int, tokens: int, product: int, mode: str, trained: bool
) -> Iterator[Unit]:
    """Yields the units of a vision tower: its embedding and its layers. ``tokens`` is 0 if there are no images.

    Args:
        table: the tower's sizes.
        patches: tokens of one image.
        tokens: tokens of all images of a micro-batch.
        product: bytes of a number in a matrix product.
        mode: the value of ``activation_checkpointing``.
        trained: whether the tower is trained.
    """
    w, m = table.width, table.mlp_dim
    embedding = ((w, 3, table.patch_size, table.patch_size), (w,), (patches, w))
    pixels = tokens * 3 * table.patch_size**2
    numbers = sum(map(product_of, embedding))
    yield Unit(
        embedding,
        frozen=0 if trained else numbers,
        products=product_of(embedding[0]) if trained else 0,
        kept=pixels * product if trained else 0,
        hand=tokens * w * 4 if trained else 0,
    )
    shapes = (*((w, w), (w,)) * 4, (m, w), (m,), (w, m), (w,), *((w,),) * 4)
    scores = 4 * table.heads * tokens
    all_kept = tokens * (2 * (4 * w + 8 + product * w) + product * (4 * w + 2 * m)) + scores
    inputs = tokens * 4 * w
    some_kept = inputs + tokens * product * (6 * w + m) + scores
    kept = {"none": all_kept, "blocks": some_kept, "full": inputs}[mode]
    matrices = 4 * (w * w + w) + 2 * w * m + w + m
    for _ in range(table.depth):
        if trained:
            hand = tokens * (4 * w + 2 * product * m) + product * w * m
            yield Unit(shapes, 0, matrices, kept, 0 if mode == "none" else all_kept - inputs, hand, layer=True)
        else:
            passing = tokens * (8 * w + product * (w + 2 * m))
            yield Unit(shapes, frozen=sum(map(product_of, shapes)), passing=passing, layer=True)


def gemma_unit(
    table: GemmaVariant, tokens: int, past: int, product: int, mode: str, trained: bool, keys_values_only: bool = False
) -> Unit:
    """Returns the unit of a language model's layer, or of an expert's layer, which also attends to ``past`` tokens."""
    w, m, heads, pair = table.width, table.mlp_dim, table.heads * table.head_dim, table.kv_heads * table.head_dim
    keys_values = ((pair, w), (pair, w), (w,))
    rest = ((heads, w), (w, heads), (m, w), (m, w), (w, m), (w,))
    matrices = 2 * pair * w + (0 if keys_values_only else 2 * heads * w + 3 * m * w)
    shapes = (*keys_values, *rest)
    norm, inputs = tokens * (4 * w + 4 + product * w), tokens * 4 * w
    own_pair = 2 * product * pair * tokens
    if not trained:
        # Without gradients only keys and values remain, for the expert; the temporary buffers are two residuals, a norm and
        # the MLP's three products.
        passing = 0 if keys_values_only else tokens * (8 * w + product * (w + 3 * m))
        return Unit(shapes, frozen=sum(map(product_of, shapes)), kept=own_pair, passing=passing, layer=True)
    if keys_values_only:
        all_kept = norm + own_pair
        kept = {
            "none": all_kept,
            "blocks": all_kept - tokens * (4 + product * w) + own_pair // 2,
            "full": inputs + own_pair,
        }
        again = all_kept - inputs
        return Unit(shapes, sum(map(product_of, rest)), matrices, kept[mode], again, tokens * 4 * w, layer=True)
    scores = 4 * table.heads * tokens
    # The expert's own keys and values are concatenated to the prefix's, which makes a copy.
    attended = own_pair + 2 * product * pair * past
    all_kept = 2 * norm + attended + tokens * product * (2 * heads + 4 * m) + scores
    # The language model's keys and values are kept, because they are the expert's input.
    full = inputs + (0 if past else own_pair)
    blocks = full + tokens * product * (2 * heads + 2 * w + 2 * m) + scores + own_pair // (1 if past else 2)
    kept_bytes = {"none": all_kept, "blocks": blocks, "full": full}[mode]
    again = 0 if mode == "none" else all_kept - full
    if mode == "blocks":
        again = all_kept - tokens * product * (heads + 2 * m) - full
    hand = tokens * (4 * w + 2 * product * m) + product * w * m
    return Unit(shapes, 0, matrices, kept_bytes, again, hand, layer=True)


def product_of(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
