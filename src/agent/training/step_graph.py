"""Makes the forward and backward pass of a micro-batch, from a CUDA graph where the batch is small.

A small batch leaves a GPU waiting for the CPU, which launches thousands of kernels one by one. A graph launches those of a whole
pass at once, with the same kernels and so the same numbers. It belongs to one set of shapes and to fixed memory: the batch is
copied into its inputs, and gradients are added to buffers that stay. Batches of samples with different numbers of tokens have no
graph, because their shapes change all the time.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from agent.batch import Batch, map_tensors, to_device

if TYPE_CHECKING:
    from agent.parallel.processes import Processes

log = logging.getLogger(__name__)

Losses = dict[str, Tensor]
Pass = Callable[[Batch], Losses]
"""Makes a forward and backward pass over a batch on the device, adds to the gradients, and returns losses (B,) by name."""

LARGEST_BATCH = 8  # samples; a larger batch keeps the GPU busy
MOST_GRAPHS = 8  # each has inputs and outputs of its own; what is between shares memory
_SEEN_BEFORE = 2  # a shape gets a graph when it comes again and again
_TRIES = 3  # passes before a capture, which allocate what is allocated once
_GAIN = 1.05  # a graph that is not at least so many times as fast is not used


class GraphedPasses:
    """Makes passes from a graph where one exists or pays, else one by one.

    Args:
        compute: the pass.
        parameters: the trained ones, on the device. Their gradients stay in their memory from the first graph on; whoever clears
            them must set them to zero, see :attr:`active`.
        device: where the parameters are.
        capture: makes a function that repeats what its argument does, see :func:`cuda_capture`.
    """

    def __init__(
        self,
        compute: Pass,
        parameters: list[torch.nn.Parameter],
        device: torch.device,
        capture: Callable[[Callable[[], Losses]], Callable[[], Losses]],
    ) -> None:
        self._compute, self._parameters, self._device, self._capture = compute, parameters, device, capture
        self._graphs: dict[Any, tuple[Batch, Callable[[], Losses]] | None] = {}
        self._seen: Counter[Any] = Counter()

    @property
    def active(self) -> bool:
        """Whether gradients must keep their memory, because a graph adds to it."""
        return any(graph is not None for graph in self._graphs.values())

    def __call__(self, batch: Batch, first: bool) -> Losses:
        """Makes the pass of a batch on the host.

        Args:
            batch: of any shapes.
            first: whether the gradients are zero or absent, as in the first micro-batch of an update. A graph is made only then,
                because its trial passes leave gradients behind.

        Returns:
            The losses (B,) by name, in memory of their own.
        """
        key = _shapes(batch)
        if key is None:
            return self._compute(to_device(batch, self._device))
        self._seen[key] += 1
        if key not in self._graphs and first and self._seen[key] > _SEEN_BEFORE and len(self._graphs) < MOST_GRAPHS:
            self._graphs[key] = self._try(batch)
        graph = self._graphs.get(key)
        if graph is None:
            return self._compute(to_device(batch, self._device))
        inputs, replay = graph
        _fill(inputs, batch)
        return {name: losses.clone() for name, losses in replay().items()}

    def _try(self, batch: Batch) -> tuple[Batch, Callable[[], Losses]] | None:
        """Makes a graph for batches of these shapes; None if that fails, computes something else, or does not pay."""
        inputs = map_tensors(batch, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device))
        _fill(inputs, batch)
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        expected, seconds = self._timed(lambda: self._compute(inputs))
        norm = self._gradient_norm()
        try:
            replay = self._capture(lambda: self._compute(inputs))
            self._clear()
            found, replayed = self._timed(replay)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            log.warning("no CUDA graph of a step, which runs without: %s", str(error).splitlines()[0])
            self._clear()
            return None
        same = all(torch.allclose(found[name], losses, rtol=1e-5) for name, losses in expected.items())
        same = same and bool(torch.isclose(self._gradient_norm(), norm, rtol=1e-3))
        self._clear()
        if not same:
            log.warning("a CUDA graph of a step computes something else than the step, which runs without")
            return None
        gain = seconds / replayed
        used = "" if gain >= _GAIN else ", not used"
        log.info("CUDA graph of a step of %d samples: %.2f times as fast%s", len(batch), gain, used)
        return (inputs, replay) if gain >= _GAIN else None

    def _timed(self, run: Callable[[], Losses]) -> tuple[Losses, float]:
        """Returns the losses of a pass that begins without gradients, and the seconds of one, the quickest of some."""
        seconds = []
        for _ in range(_TRIES):
            self._clear()
            begin = time.perf_counter()
            losses = {name: some.clone() for name, some in run().items()}
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds.append(time.perf_counter() - begin)
        return losses, min(seconds)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _clear(self) -> None:
        torch._foreach_zero_(self._gradients())

    def _gradient_norm(self) -> Tensor:
        return torch.stack(torch._foreach_norm(self._gradients(), dtype=torch.float32)).norm()


def possible(processes: Processes) -> bool:
    """Whether graphs can be made: on a GPU, by a process that is alone and so has no collectives in its passes."""
    return processes.device.type == "cuda" and processes.world_size == 1


def cuda_capture(function: Callable[[], Losses]) -> Callable[[], Losses]:
    """Captures what a function does on the GPU; the result does it again and returns the same tensors with new numbers."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once more, on a stream as the capture has it
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        losses = function()

    def replay() -> Losses:
        graph.replay()
        return losses

    return replay


def _pool() -> Any:
    """Returns the memory that all graphs share, because they run one after the other."""
    if not hasattr(_pool, "handle"):
        _pool.handle = torch.cuda.graph_pool_handle()  # type: ignore[attr-defined]
    return _pool.handle  # type: ignore[attr-defined]


def _shapes(batch: Batch) -> Any:
    """Returns the shapes of a batch as a key; None if its samples differ in cameras or in the tokens of their instructions."""
    real = batch.observation.parts()
    if len(batch) > LARGEST_BATCH or len(set(real.tokens)) > 1 or not all(map(all, real.cameras.values())):
        return None
    shapes: list[Any] = [tuple(real.cameras), real.tokens[0]]
    map_tensors(batch, lambda tensor: shapes.append((tuple(tensor.shape), tensor.dtype)))
    return tuple(shapes)


def _fill(inputs: Batch, batch: Batch) -> None:
    """Copies a batch on the host into tensors on the device."""
    new: list[Tensor] = []
    map_tensors(batch, new.append)
    given = iter(new)
    map_tensors(inputs, lambda tensor: tensor.copy_(next(given), non_blocking=True))
