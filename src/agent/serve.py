"""Serves a saved policy to robots: ``uv run python -m agent.serve --checkpoint DIR --port 8000``.

``--checkpoint`` is a run folder (its newest checkpoint is taken), a checkpoint, or its ``pretrained_model``. The protocol
is openpi's: its client, ``openpi_client.websocket_client_policy.WebsocketClientPolicy``, connects as it is.
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

if TYPE_CHECKING:
    from agent.inference import LoadedPolicy
    from agent.serving.server import Server

TOKEN = "VLA_SERVE_TOKEN"
log = logging.getLogger("agent.serve")


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
    from agent.serving.server import Limits, Server

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
    """Serves until a signal. What was given up then ends with the process: Python would wait for the policy's thread, and
    asyncio for clients that neither go on nor leave."""
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
    """What a client is told when it connects."""
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
    """The first calls are slow; and on a GPU the largest batch shows now whether it fits."""
    import time

    import numpy as np
    import torch

    blank = {slot: np.zeros((8, 8, 3), np.uint8) for slot in policy.cameras}
    observation = {**blank, "observation.state": np.zeros(policy.state_dim), "task": "warm up"}
    for size in [1, 1, max_batch] if policy.device.type == "cuda" else [1, 1]:
        start = time.monotonic()
        try:
            policy.act([observation] * size, [policy.noise(0, "warm up", k) for k in range(size)])
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
    """A socket that is bound and does not listen yet, so that nobody waits while the policy is loaded."""
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


def main(arguments: list[str]) -> int:
    """Exit code 2 for what the user has to put right, 0 after SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m agent.serve", description=str(__doc__).split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="run folder, checkpoint or pretrained_model")
    add("--port", type=_whole(0), default=8000, help="default: 8000; 0 takes a free one and logs it")
    add("--host", default="127.0.0.1", help="address to bind; default: 127.0.0.1, this machine alone; 0.0.0.0 for all")
    add("--token", help=f"that clients must send; better in {TOKEN}, which other users do not see")
    add("--max_batch", type=_whole(1), default=8, help="most requests answered by one call of the policy; default: 8")
    add("--batch_window_ms", type=_number, default=3.0, help="longest wait for other clients' requests; default: 3")
    add("--max_message_mb", type=_number, default=32.0, help="largest request; default: 32")
    add("--device", help="cpu, cuda, cuda:1; default: the GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="of weights and products; default: as the checkpoint says")
    add("--statistics", metavar="NAME", help="of a policy of several robots: the data set or robot to act on")
    add("--tokenizer", metavar="NAME", help="folder of the tokenizer, if not where the checkpoint says")
    add(
        "--seed", type=_whole(0), help="same requests on a connection, same actions; default: drawn for each connection"
    )
    named = "a client's key for one of the policy's; KEY,KEY=observation.state puts a state together from parts"
    add("--rename", action="append", default=[], metavar="THEIRS=OURS", help=named)
    unused = "a client's key, or map of keys, that the policy has no use for; as often as needed"
    add("--ignore", action="append", default=[], metavar="KEY", help=unused)
    add("--default_prompt", metavar="TEXT", help="the instruction for requests without one")
    add("--log_every", type=_number, default=60.0, metavar="S", help="seconds between latency lines; default: 60")
    options = parser.parse_args(arguments)
    try:
        serve(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while loading, or the second one
        return 130
    return 0


def _whole(least: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
        return int(text)

    return parse


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
