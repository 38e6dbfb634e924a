"""Speaks with clients over websockets, in the protocol of openpi's client: connections, tokens, health, an orderly end.

The server sends its metadata first. Then each request, a binary message, gets one answer: a binary message with
``actions`` and ``server_timing``, or a text that says what was wrong with the request. The connection stays open after
such a text.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import logging
import secrets
import signal
import socket
import time
from typing import TYPE_CHECKING, Any

import websockets.asyncio.server as websocket_server
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from agent.batch import Draws
from agent.serving import wire
from agent.serving.batching import Batcher
from agent.serving.configuration import Limits
from agent.serving.latency import Latencies
from agent.serving.requests import Translation

if TYPE_CHECKING:
    from websockets.http11 import Request, Response

    from agent.inference import LoadedPolicy

log = logging.getLogger(__name__)
_STOPPING = 1001, "the server is stopping"
_LONGEST = 2000  # characters of a refusal
_PATIENCE_S = 8.0  # at the end, with requests under way and with clients: `docker stop` kills after ten seconds
_OPENING_S = 10.0  # a client may take for its handshake
_CLOSING_S = 10.0  # and for closing its connection
_TAKING_S = 30.0  # and for reading what it is sent


class Server:
    """Serves a policy.

    Args:
        policy: that answers.
        translation: of requests to its observations.
        metadata: what a client is told first.
        token: that clients must present, None for none.
        seed: of the actions' noise, None to draw one for each connection.
        limits: see :class:`Limits`.
    """

    def __init__(
        self,
        policy: LoadedPolicy,
        translation: Translation,
        metadata: dict[str, Any],
        token: str | None,
        seed: int | None,
        limits: Limits,
    ) -> None:
        self._policy, self._translation, self._token, self._seed = policy, translation, token, seed
        self._greeting, self._limits = wire.pack(metadata), limits
        self._latencies = Latencies()
        self._connections: set[websocket_server.ServerConnection] = set()
        self._at_work: set[websocket_server.ServerConnection] = set()
        self._complained: set[tuple[websocket_server.ServerConnection, str]] = set()
        self._stopping = False
        self._batcher = Batcher(
            policy.act_each, lambda: len(self._connections), self._latencies, limits.max_batch, limits.window_ms / 1000
        )

    async def serve(self, listener: socket.socket) -> bool:
        """Serves on a bound socket until SIGTERM, SIGINT or SIGHUP, then finishes the requests under way.

        Returns:
            False if requests or clients were given up: only the end of the process ends these for certain.

        Raises:
            OSError: if the socket cannot listen.
        """
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        # nohup sets SIGHUP to be ignored, and means it.
        numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
        for number in numbers:
            loop.add_signal_handler(number, stop.set)
        server = await websocket_server.serve(
            self._connection,
            sock=listener,
            process_request=self._admit,
            compression=None,
            max_size=int(self._limits.max_message_mb * 2**20),
            max_queue=1,  # a client waits for its answer
            open_timeout=_OPENING_S,
            close_timeout=_CLOSING_S,
        )
        host, port = listener.getsockname()[:2]
        log.info("serving on ws://%s:%d", f"[{host}]" if ":" in host else host, port)
        work = asyncio.create_task(self._batcher.run())
        report = asyncio.create_task(self._report())
        ended = asyncio.create_task(stop.wait())
        await asyncio.wait([ended, work, report], return_when=asyncio.FIRST_COMPLETED)
        for number in numbers:
            loop.remove_signal_handler(number)  # a second one ends it at once
        clean = await self._end(server) if stop.is_set() else True
        for task in (report, work):
            if task.done():
                task.result()  # raises what ended it
            task.cancel()
        self._log_latencies()
        return clean

    async def _end(self, server: websocket_server.Server) -> bool:
        """Ends what is under way, and says whether all of it came to its end in time."""
        log.info("stopping, requests under way: %d", len(self._at_work))
        self._stopping = True  # whoever is at work closes its connection afterwards
        server.close(close_connections=False)
        idle = self._connections - self._at_work
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await asyncio.gather(*(connection.close(*_STOPPING) for connection in idle))
                await server.wait_closed()
        except TimeoutError:  # clients that are in the middle of a message or of their handshake, and do not go on, too
            text = "gave up on %d requests under way and %d silent clients after %.0f s"
            log.warning(text, len(self._at_work), len(self._connections - self._at_work), _PATIENCE_S)
            for connection in self._connections:
                connection.transport.abort()
            log.info("stopped")
            return False
        log.info("stopped")
        return True

    def _admit(self, connection: websocket_server.ServerConnection, request: Request) -> Response | None:
        """Answers health checks of anyone, and admits clients that have the token."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self._token is None:
            return None
        kind, _, given = (request.headers.get_all("Authorization") or [""])[0].partition(" ")
        # "Api-Key" is what openpi's client sends; the word has no case (RFC 9110). The comparison takes equally long
        # wherever the first difference is.
        if kind.lower() in ("bearer", "api-key") and hmac.compare_digest(
            given.strip().encode(errors="surrogateescape"), self._token.encode()
        ):
            return None
        log.warning("%s: refused, no token or a wrong one", _name(connection))
        response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Bearer …\n")
        response.headers["WWW-Authenticate"] = "Bearer"
        return response

    async def _connection(self, connection: websocket_server.ServerConnection) -> None:
        self._connections.add(connection)
        log.info("%s: connected, clients: %d", _name(connection), len(self._connections))
        try:
            await self._send(connection, self._greeting)
            await self._conversation(connection)
        except ConnectionClosed as closed:
            log.info("%s: gone, %s", _name(connection), closed)
        except Exception:  # the others are served on
            log.exception("%s: the server failed on this connection", _name(connection))
            await connection.close(1011, "the server failed; its log says how")
        finally:
            self._connections.discard(connection)
            self._at_work.discard(connection)
            self._complained -= {(connection, "refused"), (connection, "failed")}

    async def _conversation(self, connection: websocket_server.ServerConnection) -> None:
        seed = self._seed if self._seed is not None else secrets.randbits(63)
        number, before_ms = 0, None
        while not self._stopping:
            frame = await connection.recv()
            self._at_work.add(connection)
            start = time.monotonic()
            try:
                observation = self._observation(frame)
            except ValueError as error:
                self._latencies.refused += 1
                said = str(error)
                said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]} …"  # a key can be as long as a message
                self._complain(connection, "refused", said)
                await self._send(connection, f"refused: {said}")
            else:
                draws = self._policy.draws(seed, "serve", number)
                number += 1
                before_ms = await self._answer(connection, observation, draws, start, before_ms)
            self._at_work.discard(connection)
        await connection.close(*_STOPPING)

    def _observation(self, frame: str | bytes) -> dict[str, Any]:
        if isinstance(frame, str):
            raise ValueError(f"got a text of {len(frame)} characters, expected a binary message of msgpack")
        return self._translation.observation(wire.unpack(frame))

    async def _answer(
        self,
        connection: websocket_server.ServerConnection,
        observation: dict[str, Any],
        draws: Draws,
        start: float,
        before_ms: float | None,
    ) -> float | None:
        """Sends the actions; returns how long all of it took, in milliseconds."""
        try:
            answer = await self._batcher.infer(observation, draws, lambda: connection.state is not State.OPEN)
        except Exception as error:  # the server goes on
            self._latencies.failed += 1
            said = f"{type(error).__name__}: {error}"
            self._complain(connection, "failed", said)
            await self._send(connection, f"the server failed on this request: {said}")
            return None
        if answer is None:
            return None  # the next look at the connection finds it closed
        timing = {"infer_ms": answer.infer_ms, "queue_ms": answer.queue_ms, "batch_size": answer.batch_size}
        if before_ms is not None:
            timing["prev_total_ms"] = before_ms
        await self._send(connection, wire.pack({"actions": answer.actions, "server_timing": timing}))
        total_ms = (time.monotonic() - start) * 1000
        self._latencies.answered(total_ms, answer.queue_ms)
        return total_ms

    def _complain(self, connection: websocket_server.ServerConnection, outcome: str, why: str) -> None:
        """Logs the first such request of a connection: a client that repeats it at 30 Hz need not fill the log."""
        level = logging.DEBUG if (connection, outcome) in self._complained else logging.WARNING
        self._complained.add((connection, outcome))
        log.log(level, "%s: %s: %s", _name(connection), outcome, why)

    async def _send(self, connection: websocket_server.ServerConnection, message: str | bytes) -> None:
        """Sends a message; drops a client that reads nothing for long: a ping or a close would wait behind the message.

        Raises:
            ConnectionClosed: if the client has gone, or is dropped.
        """
        try:
            async with asyncio.timeout(_TAKING_S):
                await connection.send(message)
        except TimeoutError:
            log.warning("%s: dropped, it has read nothing for %.0f s", _name(connection), _TAKING_S)
            connection.transport.abort()
            await connection.wait_closed()
            raise connection.protocol.close_exc from None

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(self._limits.log_every_s)
            self._log_latencies()

    def _log_latencies(self) -> None:
        if line := self._latencies.line():
            log.info("%s; clients: %d", line, len(self._connections))


def _name(connection: websocket_server.ServerConnection) -> str:
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if address else "a client that has gone"
