"""The policy server: a real process, real sockets, openpi's own client, and clients that misbehave.

Run: pytest tests/serving/test_serve.py      (about thirty seconds, most of them starting processes)
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
import websockets.asyncio.client
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from support.launching import REPOSITORY, Workplace
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

import agent.serving.server
from agent.inference import LoadedPolicy, load_policy
from agent.serving import wire
from agent.serving.batching import Answer, Batcher
from agent.serving.configuration import Limits
from agent.serving.latency import Latencies
from agent.serving.requests import Translation
from agent.serving.server import Server

# openpi's client connects in a way that its library will give up.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager")

FRONT, SEED, WINDOW_MS, TOKEN = "observation.images.front", 5, 1000, "s3cret"


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "agent.serve", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )


class Served:
    """A server's process and what it has said so far."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = start(*arguments, "--port", "0", **environment)
        self.said: list[str] = []
        self.open: list[ClientConnection] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.wait_for(r"serving on ws://127\.0\.0\.1:(\d+)"))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """The group of the first line that matches, or the whole of it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.log())):
            assert self._reader.is_alive() and time.monotonic() < end, f"no {pattern} in:\n{self.log()}"
            time.sleep(0.02)
        return found[found.re.groups]

    def log(self) -> str:
        return "".join(self.said)

    def client(self) -> WebsocketClientPolicy:
        """openpi's, closed at the end of the test."""
        client = WebsocketClientPolicy("127.0.0.1", self.port, api_key=TOKEN)
        self.open.append(client._ws)
        return client

    def raw(self, token: str | None = f"Bearer {TOKEN}") -> ClientConnection:
        """A connection that is past the server's greeting, closed at the end of the test."""
        headers = {} if token is None else {"Authorization": token}
        url = f"ws://127.0.0.1:{self.port}"
        connection = connect(url, additional_headers=headers, compression=None, max_size=None, legacy=True)
        self.open.append(connection)
        assert b"action_horizon" in connection.recv()
        return connection

    def health(self) -> tuple[int, bytes]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=10) as response:
            return response.status, response.read()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one update."""
    workplace = Workplace.make(tmp_path_factory.mktemp("work"))
    code, output = workplace.run("--n_updates", "1", "--global_batch_size", "2", "--eval_freq", "0", "--name", "tiny")
    assert code == 0, output
    return workplace.folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def policy(run_folder: Path) -> LoadedPolicy:
    return load_policy(str(run_folder), device="cpu")


@pytest.fixture(autouse=True)
def _close(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        served = request.getfixturevalue("server")
        while served.open:
            served.open.pop().close()


@pytest.fixture(scope="module")
def server(run_folder: Path) -> Iterator[Served]:
    limits = ("--max_batch", "4", "--batch_window_ms", str(WINDOW_MS), "--max_message_mb", "0.5", "--log_every", "1")
    names = ("--rename", "cam=observation.images.front", "--device", "cpu")
    served = Served("--checkpoint", str(run_folder), "--seed", str(SEED), *limits, *names, VLA_SERVE_TOKEN=TOKEN)
    yield served
    served.process.kill()
    served.process.wait()


def request(number: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(number)
    picture = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
    return {"observation/images/front": picture, "observation/state": generator.random(7), "prompt": "open the drawer"}


def expected(policy: LoadedPolicy, given: dict[str, Any], k: int = 0, seed: int = SEED) -> np.ndarray:
    picture, state, task = given.values()
    observation = {FRONT: picture, "observation.state": state, "task": task}
    return policy.act([observation], [policy.draws(seed, "serve", k)])[0]


def agree(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape == (4, 7) and bool(np.allclose(ours, theirs, rtol=1e-4, atol=1e-5))


def together(count: int, do: Any) -> list[Any]:
    """What ``do(i)`` returns in threads that run at once."""
    results: list[Any] = [None] * count

    def work(i: int) -> None:
        results[i] = do(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


# ── what is served ──────────────────────────────────────────────────────────────────────────────────────────────


def test_openpis_client_gets_the_policys_actions(server, policy):
    client = server.client()
    assert client.get_server_metadata() == {
        "policy": "pi0",
        "checkpoint": "tiny, update 1",
        "cameras": {FRONT: [3, 32, 32]},
        "state_dim": 7,
        "action_dim": 7,
        "action_horizon": 4,
        "n_action_steps": 4,
    }
    for k in range(2):
        answer = client.infer(request(k))
        assert answer["actions"].dtype == np.float32 and agree(answer["actions"], expected(policy, request(k), k))
        timing = answer["server_timing"]
        assert 0 < timing["infer_ms"] < 1e4 and 0 <= timing["queue_ms"] < 1e4 and timing["batch_size"] == 1
        assert ("prev_total_ms" in timing) == (k == 1)


def test_a_single_client_does_not_wait_for_company(server):
    client = server.client()
    client.infer(request())
    waits = [client.infer(request())["server_timing"]["queue_ms"] for _ in range(3)]
    assert min(waits) < WINDOW_MS / 2


@pytest.mark.parametrize(
    "form",
    [
        lambda p, s, t: {FRONT: p, "observation.state": s, "task": t},
        lambda p, s, t: {"observation/front": p, "state": s, "prompt": t},
        lambda p, s, t: {"observation": {"images": {"front": p}, "state": list(map(float, s))}, "prompt": t},
        lambda p, s, t: {"images": {"front": p.transpose(2, 0, 1)}, "state": s, "prompt": t},
        lambda p, s, t: {"cam": p, "state": s, "prompt": t},
    ],
    ids=["the model's names", "short", "nested", "as for ALOHA, channels first", "renamed"],
)
def test_names_and_forms(server, policy, form):
    assert agree(server.client().infer(form(*request().values()))["actions"], expected(policy, request()))


def test_openpis_own_robots_without_a_change(policy):
    """Its clients for ALOHA send four cameras and, on the robot, no prompt; for DROID the state in two parts."""
    seen: list[dict[str, Any]] = []
    pictures = [np.full((3, 8, 8), n, np.uint8) for n in range(4)]
    aloha: Any = SimpleNamespace(
        cameras={"observation.images.top": (3, 8, 8), "observation.images.wrist": (3, 8, 8)},
        check=seen.append,
        renamed={},
    )
    renames = {"images/cam_high": "observation.images.top", "images/cam_left_wrist": "observation.images.wrist"}
    names = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    sent = {"state": np.ones(14), "images": dict(zip(names, pictures, strict=True))}
    translation = Translation(aloha, renames, ["images/cam_low", "images.cam_right_wrist"], "do something")
    assert (
        translation.observation(sent)
        == seen[0]
        == {
            "observation.state": sent["state"],
            "observation.images.top": pictures[0],
            "observation.images.wrist": pictures[2],
            "task": "do something",
        }
    )
    assert translation.observation({**sent, "prompt": "else"})["task"] == "else"

    parts = "observation/joint_position,observation/gripper_position"
    droid = {"observation/joint_position": np.arange(6.0), "observation/gripper_position": np.ones(1), "prompt": "x"}
    cameras = {"observation/exterior_image_1_left": pictures[0].T, "observation/wrist_image_left": pictures[1].T}
    joined = {parts: "observation.state", "observation/exterior_image_1_left": FRONT}
    translation = Translation(policy, joined, ["observation/wrist_image_left"])
    got = translation.observation({**droid, **cameras})
    assert got["observation.state"].tolist() == [0, 1, 2, 3, 4, 5, 1] and set(got) == {
        FRONT,
        "observation.state",
        "task",
    }
    assert (
        translation.observation({**cameras, **droid, "observation/gripper_position": 1.0})["observation.state"][6] == 1
    )
    backwards = Translation(policy, {"observation.gripper_position,observation.joint_position": "observation.state"})
    got = backwards.observation({**droid, FRONT: pictures[0]})
    assert got["observation.state"].tolist() == [1, 0, 1, 2, 3, 4, 5]
    for wrong, message in (
        (
            {**droid, "observation/gripper_position": "shut"},
            "observation/gripper_position: got str, expected a part of",
        ),
        (
            {**droid, "observation/joint_position": np.zeros(7)},
            f"{parts} .observation.state.: got shape .8,., expected 7",
        ),
        (
            {key: droid[key] for key in droid if "grip" not in key},
            "the request has no observation.gripper_position; obs",
        ),
        ({**droid, "state": np.zeros(7)}, f"state and {parts} are both observation.state; give it once"),
    ):
        with pytest.raises(ValueError, match=message):
            translation.observation({**cameras, **wrong})


def test_a_refusal_names_the_options_that_openpis_clients_need(policy):
    """What DROID's client sends to a policy of one camera; and these options are then enough."""
    picture = np.zeros((8, 8, 3), np.uint8)
    sent = {
        "observation/exterior_image_1_left": picture,
        "observation/wrist_image_left": picture,
        "observation/joint_position": np.zeros(6),
        "observation/gripper_position": np.zeros(1),
        "prompt": "do something",
    }
    with pytest.raises(ValueError, match="Or start the server with what belongs together, for example ") as refusal:
        Translation(policy, {}).observation(sent)
    words = shlex.split(str(refusal.value).partition("for example ")[2])
    options = list(zip(words[::2], words[1::2], strict=True))
    assert options == [
        ("--rename", f"observation/exterior_image_1_left={FRONT}"),
        ("--rename", "observation/joint_position,observation/gripper_position=observation.state"),
        ("--ignore", "observation/wrist_image_left"),
    ]
    renames = dict(value.split("=") for option, value in options if option == "--rename")
    ignored = [value for option, value in options if option == "--ignore"]
    assert set(Translation(policy, renames, ignored).observation(sent)) == {FRONT, "observation.state", "task"}
    with pytest.raises(ValueError, match=r"has no prompt \(task\).*--ignore drops .*, prompt"):
        Translation(policy, renames, [*ignored, "prompt"]).observation(sent)


def test_concurrent_clients_form_a_batch(server, policy):
    clients = [server.client() for _ in range(5)]
    answers = together(5, lambda i: clients[i].infer(request(i)))
    # Of five, max_batch = 4 go together; on a busy machine the first may have left with fewer.
    sizes = [answer["server_timing"]["batch_size"] for answer in answers]
    assert max(sizes) in (3, 4), sizes
    for i, answer in enumerate(answers):
        assert agree(answer["actions"], expected(policy, request(i)))
    line = server.wait_for(r"requests in .*batch mean [\d.]+ max [34]")
    assert line
    for what in ("total ms", "queue ms", "model ms"):
        assert re.search(rf"{what} p50 [\d.]+ p90 [\d.]+ p99 [\d.]+", server.log())


def test_health(server):
    assert server.health() == (200, b"OK\n")


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in request().items() if name != key}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, r"the request has no observation.images.front, observation.state, prompt \(task\); a request holds"),
        (
            without("prompt"),
            r"the request has no prompt \(task\); a request holds observation/images/front \(observation.images.front\), "
            r"observation/state .*, prompt \(task\). Or start the server with --default_prompt 'what the robot is to do'$",
        ),
        (  # who uses the policy's own names
            {FRONT: request()["observation/images/front"], "observation.state": np.zeros(7)},
            "the request has no task; a request holds observation.images.front, observation.state, task. Or start",
        ),
        ({**request(), "prompt": b"open"}, r"prompt \(task\): got b'open', expected an instruction"),
        ({**request(), "task": "open"}, "task and prompt are both task; give it once"),
        (
            {**request(), "wrist": 1},
            r"the policy knows no 'wrist'; a request holds .*, prompt \(task\). Or start the server with --ignore wrist$",
        ),
        (
            {"images": {"a": np.zeros((3, 8, 8), np.uint8)}, "qpos": np.zeros(6), "grip": 1.0, "prompt": "x", "t": 3.5},
            "the request has no observation.images.front, observation.state, and the policy knows no 'images/a', 'qpos', "
            "'grip', 't'; .*observation.images.front is given as None where the robot has no such camera. Or start the "
            "server with what belongs together, for example --rename images/a=observation.images.front --ignore qpos "
            "--ignore grip --ignore t$",
        ),
        (
            {"a b": np.zeros((8, 8, 3), np.uint8), "arm": {"qpos": [0.5] * 6, "grip": 1.0}, "say": "x"},
            "for example --rename 'a b'=observation.images.front --rename arm/qpos,arm/grip=observation.state "
            "--rename say=task$",
        ),
        (
            {**request(), "observation/state": np.array([0, 0, 0, 0, 0, 0, np.nan])},
            r"observation/state \(observation.state\): got nan at dimension 6, expected 7 finite numbers",
        ),
        ({**request(), "observation/state": np.zeros((1, 7))}, r"got shape \(1, 7\), expected 7 finite numbers"),
        (
            {**request(), "observation/images/front": np.zeros((3, 4, 4))},
            r"observation/images/front \(observation.images.front\): got float64 of shape \(3, 4, 4\), expected uint8",
        ),
        (
            {**request(), "observation/images/front": None},
            r"observation/images/front \(observation.images.front\): got None, expected a picture of at least one camera",
        ),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_the_next_one_served(server, policy, bad, message):
    client = server.client()
    with pytest.raises(RuntimeError, match=message):
        client.infer(bad)
    assert agree(client.infer(request())["actions"], expected(policy, request()))


PACKED = msgpack_numpy.packb(request())


def array(**changes: Any) -> bytes:
    entry = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2], **changes}
    return msgpack.packb({"state": {key.encode(): value for key, value in entry.items()}})


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ("hello", "got a text of 5 characters, expected a binary message of msgpack"),
        (b"", "the message of 0 bytes is no whole msgpack"),
        (PACKED[:-3], f"the message of {len(PACKED) - 3} bytes is no whole msgpack"),
        (PACKED + b"\0", "is no whole msgpack .ExtraData"),
        (b"\xc1" * 40, "the message of 40 bytes is no whole msgpack"),
        (b"\x91" * 5000, "is no whole msgpack .StackError"),
        # What unpacks for long, while nobody else is served.
        (
            b"\xdf\x00\x01\x86\xa0" + b"\xc0\xc0" * 100_000,
            "has a map of 100000 entries, at most 256 are taken; pictures",
        ),
        (
            msgpack.packb({"state": [0] * 100_000}),
            "has a list of 100000 items, at most 4096 are taken; pictures and long",
        ),
        (
            msgpack.packb([[{}] * 4096] * 30),
            "the message has more than 100000 entries and items; pictures and long vectors",
        ),
        (msgpack.packb([[[{}] * 40] * 40] * 65), "the message has more than 100000 entries and items"),
        (msgpack.packb({"prompt": "x" * 70_000}), "has a text of 70000 bytes, at most 65536 are taken"),
        (
            array(dtype="f4," * 20_000),
            "an array of the message cannot be read: its type is 'f4,f4,.*, expected numbers",
        ),
        (b"\x82\xa1a\x01\xa1a\x02", "the message has the key 'a' twice in a map"),
        (b"\x81\xa1a" * 1010 + b"\x01", "refused: a/a/[a/]+: maps are nested more than 10 deep"),
        (msgpack.packb([1, 2]), "the message is a msgpack list, expected a map"),
        (msgpack.packb({b"a": 2}), "the message has a key b'a', expected texts"),
        (array(dtype="|O"), "an array of the message cannot be read: its type is object, expected numbers"),
        (array(dtype="nonsense"), "an array of the message cannot be read: .*nonsense"),
        (array(dtype="(2,f4"), "an array of the message cannot be read: "),
        (array(shape=[2**40, 2**40]), r"shape .* of float32 takes \d+ bytes, it has 8"),
        (array(shape=[-1, -2]), r"shape \(-1, -2\) of float32 takes 8 bytes, it has 8"),
        (array(data="text"), "an array of the message cannot be read"),
        (
            msgpack.packb({"a": {b"__npgeneric__": True}}),
            "an array of the message cannot be read: .*dtype.* is missing",
        ),
    ],
)
def test_a_bad_frame_is_answered_and_the_connection_stays(server, policy, frame, message):
    connection = server.raw()
    connection.send(frame)
    answer = connection.recv(timeout=30)
    assert isinstance(answer, str) and re.search(message, answer), answer
    connection.send(PACKED)
    actions = msgpack_numpy.unpackb(connection.recv(timeout=30))["actions"]
    assert agree(actions, expected(policy, request()))


def test_a_refusal_is_short_whatever_it_names(server):
    connection = server.raw()
    connection.send(msgpack.packb({"k" * 50_000: 1}))
    answer = connection.recv(timeout=30)
    assert (
        answer.startswith("refused: the request has no ")
        and "the policy knows no 'kkk" in answer
        and len(answer) < 2100
    )
    assert max(map(len, server.said)) < 3000


def test_actions_that_are_not_finite_are_the_failure_of_one(server, policy):
    """Nobody else pays for them, and the log has them once."""
    clients = [server.client() for _ in range(3)]
    far_off = {**request(), "observation/state": np.full(7, 3e38)}

    def ask(i: int) -> Any:
        try:
            return clients[i].infer(far_off if i == 0 else request(i))
        except RuntimeError as error:
            return str(error)

    for k in range(2):
        failed, *answers = together(3, ask)
        assert "the server failed on this request: RuntimeError: the policy's actions are not finite" in failed
        for i, answer in enumerate(answers, 1):
            assert agree(answer["actions"], expected(policy, request(i), k))
    server.wait_for(r"\d failed")
    assert server.log().count("failed: RuntimeError: the policy's actions are not finite") == 1
    assert "Traceback" not in server.log()


def test_the_log_has_no_warnings_of_libraries(server):
    channels_first = np.ascontiguousarray(request()["observation/images/front"].transpose(2, 0, 1))
    server.client().infer({**request(), "observation/images/front": channels_first})
    server.client().infer({**request(), "prompt": "open " * 300})
    server.wait_for("is cut at")
    assert "UserWarning" not in server.log() and max(map(len, server.said)) < 3000


def test_an_oversize_message_ends_its_connection_alone(server, policy):
    client, other = server.client(), server.client()
    with pytest.raises(ConnectionClosed) as closed:
        client.infer({**request(), "observation/images/front": np.zeros((500, 500, 3), np.uint8)})
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009, closed.value
    server.wait_for(r"gone, sent 1009 \(message too big\).*exceeds limit of 524288 bytes")
    assert agree(other.infer(request())["actions"], expected(policy, request()))


def test_who_leaves_in_mid_request_harms_nobody(server, policy):
    idle = server.raw()  # for whose company the next request waits
    leaving = server.raw()
    leaving.send(PACKED)
    leaving.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    leaving.socket.shutdown(socket.SHUT_RDWR)
    half = socket.create_connection(("127.0.0.1", server.port))
    half.sendall(b"GET / HTTP/1.1\r\nUpg")  # leaves in mid-handshake
    half.close()
    with socket.create_connection(("127.0.0.1", server.port)) as noise:
        noise.sendall(b"\x16\x03\x01" + os.urandom(200) + b"\r\n\r\n")  # no HTTP at all
        noise.recv(1000)
    idle.send(PACKED)
    assert agree(msgpack_numpy.unpackb(idle.recv(timeout=30))["actions"], expected(policy, request()))
    assert server.health()[0] == 200
    assert "Traceback" not in server.log()


# ── starting ────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(*arguments: str, **environment: str) -> str:
    process = start(*arguments, **environment)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in output, output
    return output


def test_a_port_in_use(server):
    output = refused("--checkpoint", "anything", "--port", str(server.port))
    assert output == (
        f"error: --port: {server.port} on 127.0.0.1 is in use by another program; stop that or write another port\n"
    )


def test_a_checkpoint_without_processors(run_folder, tmp_path):
    copied = shutil.copytree((run_folder / "checkpoints" / "last" / "pretrained_model").resolve(), tmp_path / "copy")
    (copied / "policy_preprocessor.json").unlink()
    output = refused("--checkpoint", str(copied), "--port", "0")
    assert "copy has no policy_preprocessor.json: " in output and "Name a checkpoint that training saved" in output


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--host", "0.0.0.0"], {}, "W 0.0.0.0 is open to the network and there is no token; set VLA_SERVE_TOKEN"),
        (["--host", "203.0.113.7"], {}, "error: --host, --port: cannot listen on 203.0.113.7, port 0: "),
        ([], {"VLA_SERVE_TOKEN": ""}, "error: VLA_SERVE_TOKEN: it must be printable ASCII"),
        (["--rename", "cam"], {}, "error: --rename: 'cam' is not of the form"),
        (["--rename", "a,=observation.state"], {}, "error: --rename: 'a,=observation.state': a key is empty"),
        (["--max_batch", "0"], {}, "argument --max_batch: 0 is no whole number from 1 on"),
        (["--batch_window_ms", "nan"], {}, "argument --batch_window_ms: nan is no number above 0"),
    ],
)
def test_mistakes_in_the_command(arguments, environment, message):
    output = refused("--checkpoint", "nowhere", "--port", "0", *arguments, **environment)
    assert message in output
    if "W " in message:
        assert "error: --checkpoint: there is no nowhere" in output


def test_a_robot_that_the_policy_does_not_know(run_folder):
    output = refused("--checkpoint", str(run_folder), "--port", "0", "--statistics", "lab/arm")
    assert "error: --statistics: " in output and "leave the option out" in output


@pytest.mark.parametrize(
    ("renames", "ignored", "message"),
    [
        ({"cam": "wrist"}, [], "--rename: cam=wrist: the policy has no wrist; it has observation.images.fro"),
        ({"a,b": FRONT}, [], f"--rename: a,b={FRONT}: only observation.state can be put together from several"),
        (
            {"a,b": "observation.state", "c,d": "observation.state"},
            [],
            "c,d=observation.state: it is put together already",
        ),
        (
            {"a,b": "observation.state", "a": FRONT},
            [],
            "--rename: a is given twice; a key of the client has one meaning",
        ),
        ({"a,a": "observation.state"}, [], "--rename: a is given twice"),
        ({"images/cam": FRONT}, ["images"], "--ignore: images.cam is also named by --rename; write one of them"),
    ],
)
def test_options_that_lead_nowhere(policy, renames, ignored, message):
    with pytest.raises(ValueError, match=message):
        Translation(policy, renames, ignored)
    with pytest.raises(ValueError, match="--default_prompt: got '', expected an instruction"):
        Translation(policy, {}, [], "")


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_short_names_of_two_cameras_that_are_alike_are_no_names():
    seen: list[dict] = []
    fake: Any = SimpleNamespace(
        cameras={
            "observation.image": (3, 8, 8),
            "observation.images.image": (3, 8, 8),
            "observation.images.b": (3, 8, 8),
        },
        check=seen.append,
        renamed={},
    )
    translation = Translation(fake, {})
    given = {"observation/image": 1, "observation/images/image": 2, "b": 3, "image": 4, "state": 5, "prompt": "x"}
    expected = {"observation.image": 1, "observation.images.image": 2, "observation.images.b": 3, "image": 4}
    assert translation.observation(given) == {**expected, "observation.state": 5, "task": "x"} == seen[0]


def test_the_wire_is_openpis():
    message = {
        "a": np.arange(6, dtype=np.int16).reshape(2, 3),
        "b": np.float64(0.5),
        "c": [1, "x", None, np.bool_(True)],
    }
    for back in (msgpack_numpy.unpackb(wire.pack(message)), wire.unpack(msgpack_numpy.packb(message))):
        assert np.array_equal(back["a"], message["a"]) and back["a"].dtype == np.int16
        assert back["b"] == 0.5 and back["c"] == [1, "x", None, True]
    assert wire.pack(message) == msgpack_numpy.packb(message)
    assert not wire.unpack(msgpack_numpy.packb(message))["a"].flags.writeable


def batched(act: Any, gone: list[bool], max_batch: int = 8) -> tuple[list[Any], Latencies]:
    """Requests that arrive together: their answers or exceptions."""
    latencies = Latencies()

    async def all_of_them() -> list[Any]:
        batcher = Batcher(act, lambda: len(gone), latencies, max_batch, 0.2)
        asks = [batcher.infer({"i": i}, np.zeros(1), lambda i=i: gone[i]) for i in range(len(gone))]
        work = asyncio.create_task(batcher.run())
        answers = await asyncio.gather(*asks, return_exceptions=True)
        work.cancel()
        return answers

    return asyncio.run(all_of_them()), latencies


def test_one_that_fails_does_not_fail_its_company(caplog):
    def act(observations: Any, noise: Any) -> list[np.ndarray]:
        if any(observation["i"] == 1 for observation in observations):
            raise RuntimeError("not finite")
        return [np.full(1, observation["i"]) for observation in observations]

    with caplog.at_level(logging.CRITICAL):
        (first, second, third), latencies = batched(act, [False] * 3)
    assert isinstance(second, RuntimeError) and latencies.batches == [3]
    assert (first.actions, third.actions) == (0, 2) and first.batch_size == 3


def test_a_line_of_latencies_between_a_batch_and_its_answers():
    latencies = Latencies()
    latencies.inferred(2, 5.0)
    assert latencies.line() is None  # nobody was answered yet
    latencies.answered(7.0, 1.0)
    latencies.answered(8.0, 1.0)
    line = latencies.line()
    assert line is not None and "2 requests in 0 s; total ms p50 7.5" in line and "model" not in line


def test_a_policy_that_does_not_return_holds_up_no_end(tmp_path):
    """Python waits for its threads at the end; the process does not."""
    program = """
import os, signal, socket, threading, time
from types import SimpleNamespace
import agent.serving.server as module
from agent.serving.configuration import Limits
from agent.serving.requests import Translation
from agent.serving.startup import run
from websockets.sync.client import connect
module._PATIENCE_S = 0.5
def hangs(observations, noise):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3600)
policy = SimpleNamespace(act_each=hangs, cameras={}, renamed={}, check=lambda o: None, draws=lambda *a: 0)
server = module.Server(policy, Translation(policy, {}), {}, None, None, Limits(1, 1.0, 1.0, 60.0))
listener = socket.create_server(("127.0.0.1", 0))
def ask():
    client = connect(f"ws://127.0.0.1:{listener.getsockname()[1]}")
    client.recv()
    client.send(b"\\x80")
    client.recv()
threading.Thread(target=ask, daemon=True).start()
run(server, listener)
print("not here: the policy's thread is waited for")
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0 and process.stdout == "", process.stdout + process.stderr


@pytest.mark.parametrize("begun", ["nothing", "a handshake", "a frame", "a close"])
def test_half_of_a_message_holds_up_no_end(monkeypatch, begun):
    """A client that has begun something and does not go on; without a limit at the end these would be waited for."""
    module = agent.serving.server
    monkeypatch.setattr(module, "_PATIENCE_S", 0.5)
    for limit in ("_OPENING_S", "_CLOSING_S", "_TAKING_S"):
        monkeypatch.setattr(module, limit, 3600.0)
    policy: Any = SimpleNamespace(act_each=None, cameras={}, renamed={})
    server = Server(policy, Translation(policy, {}), {"a": 1}, None, None, Limits(1, 1.0, 1.0, 60.0))
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def begin_and_interrupt() -> None:
        with socket.create_connection(listener.getsockname()) as client:  # by the answer the server listens to signals
            client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"" if begun == "nothing" else HANDSHAKE[:40] if begun == "a handshake" else HANDSHAKE)
            if begun in ("a frame", "a close"):
                assert client.recv(12) == b"HTTP/1.1 101"
            if begun == "a frame":  # half a megabyte is announced, ten bytes come
                client.sendall(b"\x82\xff" + struct.pack("!Q", 500_000) + bytes(4) + b"x" * 10)
            if begun == "a close":  # two bytes and a mask are announced
                client.sendall(b"\x88\x82\0\0")
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended.wait(120)

    async def both() -> None:
        client = asyncio.create_task(asyncio.to_thread(begin_and_interrupt))
        assert await server.serve(listener) is False
        ended.set()
        await client

    asyncio.run(asyncio.wait_for(both(), 120))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_ends_it_too(number):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not as under nohup
    policy: Any = SimpleNamespace(act_each=None, cameras={}, renamed={})
    server = Server(policy, Translation(policy, {}), {"a": 1}, None, None, Limits(1, 1.0, 1.0, 60.0))
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"ws://127.0.0.1:{listener.getsockname()[1]}"

    async def connected_and_interrupted() -> None:
        serving = asyncio.create_task(server.serve(listener))
        async with asyncio.timeout(20), websockets.asyncio.client.connect(address) as connection:
            assert wire.unpack(await connection.recv()) == {"a": 1}
            os.kill(os.getpid(), number)
            with pytest.raises(ConnectionClosed, match="the server is stopping"):
                await connection.recv()
            await serving

    try:
        asyncio.run(connected_and_interrupted())
    finally:
        signal.signal(signal.SIGHUP, before)


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
BAD_FRAMES = (b"\x82\xe4" + bytes(4) + b"\xc1" * 100) * 50  # each is answered with a text


@pytest.mark.parametrize(("taking_s", "patience_s"), [(1.0, 60.0), (60.0, 1.0)])
def test_who_reads_nothing_is_dropped_and_holds_up_no_end(monkeypatch, caplog, taking_s, patience_s):
    monkeypatch.setattr(agent.serving.server, "_TAKING_S", taking_s)
    monkeypatch.setattr(agent.serving.server, "_PATIENCE_S", patience_s)
    policy: Any = SimpleNamespace(act_each=None, cameras={}, renamed={})
    server = Server(policy, Translation(policy, {}), {"a": 1}, None, None, Limits(1, 1.0, 1.0, 60.0))
    listener = socket.create_server(("127.0.0.1", 0))

    def flood_and_interrupt() -> None:
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(HANDSHAKE)
            assert client.recv(12) == b"HTTP/1.1 101"
            client.settimeout(1)
            # The answers have filled all buffers and the server reads no more, or it has dropped the connection.
            with pytest.raises((TimeoutError, ConnectionError)):
                while True:
                    client.sendall(BAD_FRAMES)
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended.wait(60)

    async def both() -> None:
        flood = asyncio.create_task(asyncio.to_thread(flood_and_interrupt))
        await server.serve(listener)
        ended.set()
        await flood

    ended = threading.Event()
    with caplog.at_level(logging.CRITICAL):
        asyncio.run(asyncio.wait_for(both(), 40))


def test_an_error_of_the_server_itself_ends_one_connection(caplog):
    def check(observation: Any) -> None:
        raise KeyError("a mistake in the server")

    policy: Any = SimpleNamespace(act_each=None, cameras={}, check=check, renamed={})
    server = Server(policy, Translation(policy, {}), {"a": 1}, None, None, Limits(1, 1.0, 1.0, 60.0))
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"ws://127.0.0.1:{listener.getsockname()[1]}"

    async def both() -> None:
        serving = asyncio.create_task(server.serve(listener))
        async with asyncio.timeout(60), websockets.asyncio.client.connect(address) as first:
            await first.recv()
            await first.send(wire.pack({"x": 1}))
            with pytest.raises(ConnectionClosed, match="1011 .*the server failed; its log says how"):
                await first.recv()
            async with websockets.asyncio.client.connect(address) as second:
                assert wire.unpack(await second.recv()) == {"a": 1}
                os.kill(os.getpid(), signal.SIGTERM)
                await serving

    asyncio.run(both())
    assert "a mistake in the server" in caplog.text


def test_no_work_is_done_for_who_has_gone():
    asked: list[list[int]] = []

    def act(observations: Any, noise: Any) -> list[np.ndarray]:
        asked.append([observation["i"] for observation in observations])
        return [np.zeros(1) for _ in observations]

    answers, _ = batched(act, [False, True, False, False, False], max_batch=3)
    assert asked == [[0, 2], [3, 4]] and answers[1] is None
    assert all(isinstance(answer, Answer) for i, answer in enumerate(answers) if i != 1)


# ── tokens, and the end ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_token_is_asked_for(server):
    for token in (None, "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \u00e9"):
        with pytest.raises(InvalidStatus) as status:
            server.raw(token)
        assert status.value.response.status_code == 401
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=10)
    for form in (f"Api-Key {TOKEN}", f"bearer {TOKEN}", f"BEARER {TOKEN}"):  # openpi's way; the word has no case
        server.raw(form)
    assert server.health()[0] == 200 and TOKEN not in server.log()


def test_an_end_that_finishes_the_requests_under_way(server, policy):
    idle, client = server.raw(), server.client()
    half, silent = (socket.create_connection(("127.0.0.1", server.port)) for _ in range(2))
    half.sendall(HANDSHAKE[:40])  # these two begin something, do not go on, and hold up no end
    silent.sendall(HANDSHAKE.replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer " + TOKEN.encode()))
    assert silent.recv(12) == b"HTTP/1.1 101"
    silent.sendall(b"\x82\xff" + struct.pack("!Q", 50_000) + bytes(4) + b"x" * 10)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(client.infer(request())))
    asking.start()
    time.sleep(WINDOW_MS / 3000)  # the request waits for the idle client's company
    server.process.send_signal(signal.SIGTERM)
    with pytest.raises(ConnectionClosed, match="the server is stopping"):
        idle.recv(timeout=60)
    asking.join(60)
    assert answers and agree(answers[0]["actions"], expected(policy, request()))
    assert server.process.wait(120) == 0
    half.close()
    silent.close()
    server.wait_for("stopped")
    assert "stopping, requests under way: 1" in server.log() and "Traceback" not in server.log()
