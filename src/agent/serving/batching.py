"""Gathers the requests of several clients, so that one call of the policy answers them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agent.batch import Draws
from agent.serving.latency import Latencies

log = logging.getLogger(__name__)
Act = Callable[[Sequence[dict[str, Any]], Sequence[Draws]], Sequence[np.ndarray | RuntimeError]]


@dataclass(frozen=True)
class Answer:
    """An action chunk, and how long it took."""

    actions: np.ndarray
    """(T, a) float32."""
    queue_ms: float
    infer_ms: float
    batch_size: int


@dataclass
class _Waiting:
    observation: dict[str, Any]
    draws: Draws
    is_gone: Callable[[], bool]
    answer: asyncio.Future[Answer | None]
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Has one thread work through batches, one at a time.

    While a batch is in the policy, the next one gathers. Afterwards it waits for at most ``window_s`` for more, and not at
    all once every client has a request in it, so that a single client never waits.

    Args:
        act: the policy, see ``LoadedPolicy.act_each``.
        clients: how many clients there are now.
        latencies: counts batches.
        max_batch: most requests of a batch.
        window_s: longest wait for company, once the policy is free and has a request.
    """

    def __init__(
        self, act: Act, clients: Callable[[], int], latencies: Latencies, max_batch: int, window_s: float
    ) -> None:
        self._act, self._clients, self._latencies = act, clients, latencies
        self._max_batch, self._window_s = max_batch, window_s
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")

    async def infer(self, observation: dict[str, Any], draws: Draws, is_gone: Callable[[], bool]) -> Answer | None:
        """The policy's answer to a checked observation; None if ``is_gone`` when its turn comes.

        Raises:
            Exception: whatever the policy raised on this observation.
        """
        waiting = _Waiting(observation, draws, is_gone, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(waiting)
        return await waiting.answer

    async def run(self) -> None:
        """Works until it is cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                batch = [waiting for waiting in await self._collect() if self._is_wanted(waiting)]
                if not batch:
                    continue
                start = time.monotonic()
                results = await loop.run_in_executor(self._thread, self._one_by_one_if_need_be, batch)
                infer_ms = (time.monotonic() - start) * 1000
                self._latencies.inferred(len(batch), infer_ms)
                for waiting, result in zip(batch, results, strict=True):
                    if waiting.answer.done():
                        continue  # the connection's handler was cancelled
                    if isinstance(result, Exception):
                        waiting.answer.set_exception(result)
                    else:
                        queue_ms = (start - waiting.arrived) * 1000
                        waiting.answer.set_result(Answer(result, queue_ms, infer_ms, len(batch)))
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _collect(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        # From now and not from its arrival, which may be a batch ago: the clients of that batch come back just now, and
        # would for ever take turns with this one.
        end = time.monotonic() + self._window_s
        while len(batch) < self._max_batch:
            try:
                batch.append(self._queue.get_nowait())
                continue
            except asyncio.QueueEmpty:
                left = end - time.monotonic()
            if left <= 0 or len(batch) >= self._clients():
                break
            try:
                batch.append(await asyncio.wait_for(self._queue.get(), left))
            except TimeoutError:
                break
        return batch

    @staticmethod
    def _is_wanted(waiting: _Waiting) -> bool:
        if waiting.is_gone() and not waiting.answer.done():
            waiting.answer.set_result(None)
        return not waiting.answer.done()

    def _one_by_one_if_need_be(self, batch: list[_Waiting]) -> Sequence[np.ndarray | Exception]:
        """Computes the actions in the thread. A batch that raises is tried one by one, so that no request fails another."""
        try:
            return self._act([w.observation for w in batch], [w.draws for w in batch])
        except Exception as error:  # the clients get it, and the log
            log.exception("the policy failed on a batch of %d", len(batch))
            if len(batch) == 1:
                return [error]
            return [result for waiting in batch for result in self._one_by_one_if_need_be([waiting])]
