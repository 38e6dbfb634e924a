"""Serves a saved policy to robots: ``uv run python -m agent.serve --checkpoint DIR --port 8000``.

``--checkpoint`` is a run folder (its newest checkpoint is taken), a checkpoint, or its ``pretrained_model``. The protocol
is openpi's: its client, ``openpi_client.websocket_client_policy.WebsocketClientPolicy``, connects as it is.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from agent.serving.startup import TOKEN, serve


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
