"""Starts the policy server: checks the command line, takes the port, loads the policy and warms it up.

Mistakes show before minutes of loading. Connections are the work of ``server.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import ipaddress
import logging
import os
import socket
import sys
from typing import TYPE_CHECKING, Any

from agent.serving.configuration import Limits

if TYPE_CHECKING:
    from agent.inference import LoadedPolicy
    from agent.serving.server import Server

TOKEN = "VLA_SERVE_TOKEN"
log = logging.getLogger("agent.serve")  # the name of the command, in every line of its log


def serve(options: argparse.Namespace) -> None:
    """Loads the policy and serves it until a signal ends it.

    Raises:
        ValueError: for everything that the user has to put right.
    """
    from agent.tracking.console import setup_logging

    token = _token(options)
    renames = _renames(options.rename)
    setup_logging(rank=0, debug=False)
    # A scanner's nonsense and a dropped handshake are no errors of ours; what matters of a connection is logged here.
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    listener = _bind(options.host, options.port)  # before minutes of loading
    if token is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        log.warning("%s is open to the network and there is no token; set %s or bind 127.0.0.1", options.host, TOKEN)

    from agent.inference import load_policy
    from agent.serving.requests import Translation
    from agent.serving.server import Server

    policy = load_policy(options.checkpoint, options.device, options.dtype, options.tokenizer, options.statistics)
    translation = Translation(policy, renames, options.ignore, options.default_prompt)
    metadata = _metadata(policy)
    log.info("%s on %s: %s", policy.pretrained, policy.device, metadata)
    _warm_up(policy, options.max_batch)
    limits = Limits(options.max_batch, options.batch_window_ms, options.max_message_mb, options.log_every)
    server = Server(policy, translation, metadata, token, options.seed, limits)
    try:
        run(server, listener)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise _refusal(options.host, options.port, error) from None


def run(server: Server, listener: socket.socket) -> None:
    """Serves until a signal, and then ends the process if requests or clients were given up.

    Python would wait for the policy's thread, and asyncio for clients that neither go on nor leave.
    """
    runner = asyncio.Runner()
    try:
        clean = runner.run(server.serve(listener))
    except BaseException:
        runner.close()
        raise
    if clean:
        runner.close()
        return
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _metadata(policy: LoadedPolicy) -> dict[str, Any]:
    """Describes the policy to a client that connects."""
    robot = {} if policy.robot is None else {"robot": policy.robot}
    names = {f"{feature.rpartition('.')[2]}_names": some for feature, some in policy.dimension_names.items()}
    return {
        **robot,
        **names,
        "policy": policy.config.type,
        "checkpoint": policy.name,
        "cameras": {slot: list(shape) for slot, shape in policy.cameras.items()},
        "state_dim": policy.state_dim,
        "action_dim": policy.action_dim,
        "action_horizon": policy.chunk_size,
        "n_action_steps": policy.action_steps,
    }


def _warm_up(policy: LoadedPolicy, max_batch: int) -> None:
    """Makes the first calls, which are slow; on a GPU also the largest batch, to see now whether it fits."""
    import time

    import numpy as np
    import torch

    blank = {slot: np.zeros((8, 8, 3), np.uint8) for slot in policy.cameras}
    observation = {**blank, "observation.state": np.zeros(policy.state_dim), "task": "warm up"}
    for size in [1, 1, max_batch] if policy.device.type == "cuda" else [1, 1]:
        start = time.monotonic()
        try:
            policy.act([observation] * size, [policy.draws(0, "warm up", k) for k in range(size)])
        except torch.OutOfMemoryError:
            raise ValueError(
                f"--max_batch: a batch of {size} does not fit into the memory of {policy.device}; write a smaller one, or "
                "--dtype bfloat16"
            ) from None
    log.info("an action chunk takes %.0f ms for a batch of %d", (time.monotonic() - start) * 1000, size)


def _token(options: argparse.Namespace) -> str | None:
    token = options.token if options.token is not None else os.environ.get(TOKEN)
    if token is not None and (not token.strip() or token != token.strip() or not token.isascii()):
        where = "--token" if options.token is not None else TOKEN
        raise ValueError(
            f"{where}: it must be printable ASCII without blanks around it, and not empty; unset it for none"
        )
    return token


def _renames(pairs: list[str]) -> dict[str, str]:
    renames = {}
    for pair in pairs:
        theirs, equals, ours = pair.partition("=")
        if not (theirs and equals and ours):
            raise ValueError(
                f"--rename: {pair!r} is not of the form CLIENT'S_KEY=KEY_OF_THE_POLICY, or KEY,KEY=observation.state"
            )
        if not all(theirs.split(",")) or theirs in renames:
            raise ValueError(
                f"--rename: {pair!r}: {'a key is empty' if theirs not in renames else 'it is given twice'}"
            )
        renames[theirs] = ours
    return renames


def _bind(host: str, port: int) -> socket.socket:
    """Binds a socket that does not listen yet, so that no client waits while the policy is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise _refusal(host, port, error) from None
    return listener


def _refusal(host: str, port: int, error: Exception) -> ValueError:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return ValueError(f"--port: {port} on {host} is in use by another program; stop that or write another port")
    return ValueError(f"--host, --port: cannot listen on {host}, port {port}: {error}")
