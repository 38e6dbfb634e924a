"""agent.export: the same weights in every format, the model card, and the upload to a hub on this machine.

Run: pytest tests/deployment/test_export.py   (about a minute: two training runs of a few updates, and processes that upload)
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import draccus
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.launching import Workplace
from support.small_model import reference

from agent import export
from agent.checkpoints import weights
from agent.checkpoints.finding import find_weights
from agent.inference import load_policy
from agent.models.base import ModelConfig
from agent.models.pi import adapter, formats
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0

FORMATS = ["lerobot", "lerobot_v1", "openpi"]
TOKENIZER = "google/paligemma-3b-pt-224"


@dataclass
class Runs:
    """Two runs: ``first``, and ``second``, which began with a copy of its weights that says it came from pi0_base."""

    workplace: Workplace
    folder: Path

    def run(self, name: str) -> Path:
        return self.workplace.folder / "runs" / name

    def pretrained(self, name: str = "first") -> Path:
        return self.workplace.checkpoint(name) / "pretrained_model"

    def metrics_of_last_validation(self, name: str) -> dict:
        return [line for line in self.workplace.metrics(name) if "val/loss" in line][-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, server) -> Runs:
    folder = tmp_path_factory.mktemp("export")
    workplace = Workplace.make(folder)
    common = ["--n_updates", "4", "--eval_freq", "2", "--data.val.fraction", "0.2", "--model_cfg.license", "apache-2.0"]
    code, said = server.run(workplace, "first", *common)
    assert code == 0, said
    runs = Runs(workplace, folder)
    base = folder / "base"
    shutil.copytree(runs.pretrained(), base)
    config = json.loads((base / "config.json").read_text()) | {"pretrained_path": "lerobot/pi0_base"}
    (base / "config.json").write_text(json.dumps(config))
    code, said = server.run(workplace, "second", *common, "--load_from_checkpoint", str(base))
    assert code == 0, said
    return runs


def exported(checkpoint: Path, out: Path, target: str, *options: str) -> Path:
    assert export.main(["--checkpoint", str(checkpoint), "--to", target, "--out", str(out), *options]) == 0
    return out


def refusal(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert export.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def our_tensors(pretrained: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint by the model's names, read by the library."""
    found, config = load_file(pretrained / "model.safetensors"), config_of(pretrained)
    return {ours: found[theirs] for ours, theirs in adapter.expected(config).items()}


def config_of(pretrained: Path) -> PI0Config:
    return draccus.decode(ModelConfig, json.loads((pretrained / "config.json").read_text()))


# ── formats ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["run", "checkpoint", "pretrained_model"])
@pytest.mark.parametrize("target", FORMATS)
def test_every_format_loads_back_bit_for_bit(runs, tmp_path, target, where):
    pretrained = runs.pretrained()
    checkpoint = {"run": runs.run("first"), "checkpoint": pretrained.parent, "pretrained_model": pretrained}[where]
    out = exported(checkpoint, tmp_path / "out", target)
    config = config_of(pretrained)
    model = PI0(config)
    files = find_weights(str(out), "--out")
    coverage = weights.load_into(model.state_dict(), files, partial(adapter.from_policy, config=config), adapter.fit)
    expected = our_tensors(pretrained)
    assert len(coverage.loaded) == len(expected) and not coverage.adapted
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def statistics_names(target: str) -> set[str]:
    if target != "lerobot_v1":
        return set()
    places = ("normalize_inputs.buffer_observation_state", "normalize_targets.buffer_action")
    return {f"{place}.{name}" for place in (*places, "unnormalize_outputs.buffer_action") for name in ("mean", "std")}


@pytest.mark.parametrize("target", FORMATS)
def test_the_tensors_of_the_full_model_have_the_published_names(target):
    ours = {*formats.tensor_names(target, PI0Config()), formats.expert_head(target)}
    if target == "openpi":  # safetensors' save_model stores the tied embedding once, as the head
        embedding = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
        published = reference("pi0_tensors_lerobot_0.6.json").keys() - {embedding}
        published = {name.removeprefix("model.") for name in published}
    else:
        version = "0.6" if target == "lerobot" else "v1"
        published = set(reference(f"pi0_tensors_lerobot_{version}.json"))
    assert ours == published


@pytest.mark.parametrize("target", FORMATS)
def test_bfloat16_rounds_the_weights_alone(runs, tmp_path, target):
    names, head = formats.tensor_names(target, config_of(runs.pretrained())), formats.expert_head(target)
    out = exported(runs.run("first"), tmp_path / "out", target, "--save_dtype", "bfloat16")
    tensors, expected = load_file(out / "model.safetensors"), our_tensors(runs.pretrained())
    assert tensors.keys() == names.keys() | {head} | statistics_names(target)
    for name, tensor in tensors.items():
        if name == head:
            assert tensor.dtype == torch.bfloat16 and not tensor.any()
        elif name not in names:
            assert tensor.dtype == torch.float32
        else:
            assert torch.equal(tensor, expected[names[name]].bfloat16()), name
    again = exported(out, tmp_path / "again", "lerobot", "--save_dtype", "float32") if target == "lerobot" else None
    if again is not None:
        for name, tensor in our_tensors(again).items():
            assert torch.equal(tensor, expected[name].bfloat16().float()), name


def preprocessor_statistics(pretrained: Path) -> dict[str, torch.Tensor]:
    (file,) = pretrained.glob("policy_preprocessor_step_*_normalizer_processor.safetensors")
    return load_file(file)


def test_lerobot_export_is_the_checkpoint(runs, tmp_path):
    out = exported(runs.run("first"), tmp_path / "out", "lerobot")
    ours = {path.name: path for path in runs.pretrained().iterdir()}
    theirs = {path.name: path for path in out.iterdir()}
    assert theirs.keys() == ours.keys() | {"README.md"}
    for name, path in ours.items():
        if name.endswith(".json"):
            assert json.loads(theirs[name].read_text()) == json.loads(path.read_text()), name
        else:
            assert theirs[name].read_bytes() == path.read_bytes(), name
    started = exported(runs.folder / "base", tmp_path / "base", "lerobot")
    assert json.loads((started / "config.json").read_text())["pretrained_path"] == "lerobot/pi0_base"


def test_a_folder_of_the_hubs_cache_is_exported(runs, tmp_path):
    cached, blobs = tmp_path / "models--you--pi0" / "snapshots" / "main", tmp_path / "models--you--pi0" / "blobs"
    shutil.copytree(runs.pretrained(), cached)
    blobs.mkdir()
    for number, path in enumerate(sorted(cached.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    out = exported(cached, tmp_path / "out", "lerobot")
    assert (out / "model.safetensors").read_bytes() == (runs.pretrained() / "model.safetensors").read_bytes()


def test_a_folder_that_weights_came_from_is_not_published(runs, tmp_path):
    source = shutil.copytree(runs.pretrained(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"pretrained_path": str(runs.folder / "base")}))
    out = exported(source, tmp_path / "out", "lerobot")
    assert json.loads((out / "config.json").read_text()) == config | {"pretrained_path": None}


def test_lerobot_v1_holds_statistics_and_its_own_config(runs, tmp_path):
    out = exported(runs.run("first"), tmp_path / "out", "lerobot_v1")
    tensors, statistics = load_file(out / "model.safetensors"), preprocessor_statistics(runs.pretrained())
    for name in statistics_names("lerobot_v1"):
        feature = "observation.state" if "observation_state" in name else "action"
        assert torch.equal(tensors[name], statistics[f"{feature}.{name.rpartition('.')[2]}"]), name
    config, ours = json.loads((out / "config.json").read_text()), config_of(runs.pretrained())
    # The keys of PI0Config in LeRobot's releases of 2025 up to 0.3; one that is unknown there is an error there.
    assert set(config) == set(
        "type n_obs_steps normalization_mapping input_features output_features chunk_size n_action_steps max_state_dim "
        "max_action_dim resize_imgs_with_padding empty_cameras adapt_to_pi_aloha use_delta_joint_actions_aloha "
        "tokenizer_max_length proj_width num_steps use_cache attention_implementation freeze_vision_encoder "
        "train_expert_only train_state_proj optimizer_lr optimizer_betas optimizer_eps optimizer_weight_decay "
        "scheduler_warmup_steps scheduler_decay_steps scheduler_decay_lr".split()
    )
    assert (config["proj_width"], config["num_steps"], config["resize_imgs_with_padding"]) == (32, 2, [32, 32])
    assert config["input_features"] == json.loads((runs.pretrained() / "config.json").read_text())["input_features"]
    assert config["n_action_steps"] == ours.action_steps


def test_openpi_has_its_assets_and_config(runs, tmp_path):
    out = exported(runs.run("first"), tmp_path / "out", "openpi", "--save_dtype", "bfloat16")
    found = json.loads((out / "assets" / "test" / "data" / "norm_stats.json").read_text())["norm_stats"]
    statistics = preprocessor_statistics(runs.pretrained())
    assert found.keys() == {"state", "actions"}
    for key, feature in (("state", "observation.state"), ("actions", "action")):
        assert found[key].keys() == {"mean", "std", "q01", "q99"}
        for name, values in found[key].items():
            assert torch.equal(torch.tensor(values), statistics[f"{feature}.{name}"]), (key, name)
    config = json.loads((out / "config.json").read_text())
    assert (config["action_dim"], config["action_horizon"], config["precision"]) == (8, 4, "bfloat16")
    assert config.keys() == {"action_dim", "action_horizon", "paligemma_variant", "action_expert_variant", "precision"}


def test_openpi_needs_no_statistics_that_it_does_not_read(runs, tmp_path):
    source = shutil.copytree(runs.pretrained(), tmp_path / "source")  # as weights of LeRobot v1 bring them
    (file,) = source.glob("policy_preprocessor_*.safetensors")
    save_file({k: v for k, v in load_file(file).items() if k.endswith((".mean", ".std"))}, file)
    out = exported(source, tmp_path / "out", "openpi")
    (found,) = (json.loads(path.read_text())["norm_stats"] for path in out.glob("assets/**/norm_stats.json"))
    assert {key: set(entry) for key, entry in found.items()} == {"state": {"mean", "std"}, "actions": {"mean", "std"}}


@pytest.mark.parametrize(("mode", "buffers"), [("MIN_MAX", ("min", "max")), ("IDENTITY", ())])
def test_lerobot_v1_stores_what_the_normalisation_reads(runs, tmp_path, mode, buffers):
    source = with_config(runs, tmp_path, normalization_mapping={"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode})
    tensors = load_file(exported(source, tmp_path / "out", "lerobot_v1") / "model.safetensors")
    found = {name for name in tensors if name.startswith(("normalize_", "unnormalize_"))}
    assert found == {name.rpartition(".")[0] + f".{b}" for name in statistics_names("lerobot_v1") for b in buffers}


def with_config(runs: Runs, tmp_path: Path, **changes) -> Path:
    source = shutil.copytree(runs.pretrained(), tmp_path / "source")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return source


# ── refusals ────────────────────────────────────────────────────────────────────────────────────────────────────


def mapping(state: str, action: str) -> dict:
    return {"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": state, "ACTION": action}}


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("lerobot", {"type": "act"}, "config.json is of a model of type 'act' (ACT); name a checkpoint of π0"),
        ("lerobot", {"type": None}, "config.json names no type of model; name a checkpoint of π0"),
        ("lerobot", {"use_peft": True}, "config.json: use_peft: low-rank adapters are not supported; write false"),
        ("lerobot", {"chunk_sise": 3}, "chunk_sise"),
        ("lerobot", {"max_state_dim": 12}, "max_state_dim"),
        ("lerobot_v1", mapping("QUANTILES", "MEAN_STD"), "normalization_mapping.STATE is QUANTILES, which LeRobot v1"),
        ("openpi", mapping("MIN_MAX", "MIN_MAX"), "openpi knows MEAN_STD for both or QUANTILES for both"),
        ("openpi", mapping("MEAN_STD", "QUANTILES"), "openpi knows MEAN_STD for both or QUANTILES for both"),
        ("lerobot_v1", {"min_period": 0.001}, "min_period 0.001 and max_period 4.0 are 0.004 and 4.0 in lerobot_v1"),
        ("openpi", {"max_period": 8.0}, "it would act differently"),
    ],
    ids=str,
)
def test_what_another_program_would_do_differently_is_refused(runs, tmp_path, capsys, target, changes, message):
    source = with_config(runs, tmp_path, **changes)
    said = refusal(capsys, "--checkpoint", source, "--to", target, "--out", tmp_path / "out")
    assert message in said and said.startswith("error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_statistics_are_needed_where_they_are_stored(runs, tmp_path, capsys):
    source = shutil.copytree(runs.pretrained(), tmp_path / "source")
    (source / "policy_preprocessor.json").unlink()
    for target in ("lerobot_v1", "openpi"):
        said = refusal(capsys, "--checkpoint", source, "--to", target, "--out", tmp_path / "out")
        assert "no policy_preprocessor.json with a normalizer_processor" in said
    exported(source, tmp_path / "out", "lerobot")
    assert "note: the checkpoint has no processors" in capsys.readouterr().out


def test_nothing_is_overwritten(runs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    exported(runs.run("first"), tmp_path / "out", "lerobot")  # an empty folder will do
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    (tmp_path / "file").touch()
    for name in ("out", "file"):
        said = refusal(capsys, "--checkpoint", runs.run("first"), "--to", "openpi", "--out", tmp_path / name)
        assert "exists and is not an empty folder" in said
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "file", ["pretrained_model/model.safetensors", "pretrained_model/config.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_refused(runs, tmp_path, capsys, file):
    checkpoint = shutil.copytree(runs.pretrained().parent, tmp_path / "checkpoint")
    content = bytearray((checkpoint / file).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / file).write_bytes(content if file != "manifest.json" else b"{")
    said = refusal(capsys, "--checkpoint", checkpoint, "--to", "lerobot", "--out", tmp_path / "out")
    assert f"{checkpoint} is damaged: " in said and Path(file).name in said
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_refused_without_the_hub(tmp_path, capsys):
    for reference_, message in (("owner/name", "there is no owner/name"), (tmp_path, "holds no model.safetensors")):
        assert message in refusal(capsys, "--checkpoint", reference_, "--to", "lerobot", "--out", tmp_path / "out")
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    assert "there is no" in refusal(capsys, "--checkpoint", tmp_path, "--to", "lerobot", "--out", tmp_path / "out")


def test_a_full_disk_leaves_nothing_behind(runs, small_disk, capsys):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2_900_000))
    arguments = ["--checkpoint", str(runs.run("first")), "--to", "lerobot", "--out", str(small_disk / "out")]
    assert export.main(arguments) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


# ── the model card ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", FORMATS)
def test_the_card_tells_where_the_weights_come_from_and_how_good_they_are(runs, tmp_path, target):
    out = exported(runs.run("second"), tmp_path / "out", target)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == ("openpi" if target == "openpi" else "lerobot")
    assert (card.data.pipeline_tag, card.data.license) == ("robotics", "apache-2.0")
    assert (card.data.base_model, card.data.datasets) == ("lerobot/pi0_base", ["test/data"])
    assert {"robotics", "pi0"} <= set(card.data.tags)
    text = card.text
    assert "# second" in text and "after 4 updates" in text
    assert (
        "trained from: the local folder `base`, from [lerobot/pi0_base](https://huggingface.co/lerobot/pi0_base)"
        in text
    )
    assert "| test/data | 5 | 60 |" in text  # one of six episodes of twelve frames is held out
    validation = runs.metrics_of_last_validation("second")
    assert f"at update {validation['step']}:" in text
    for key, value in validation.items():
        if key.startswith("val/"):
            assert f"| `{key}` | {value:.4g} |" in text
    assert "  global_batch_size: 8\n" in text.replace("\nglobal", "\n  global")
    assert str(runs.folder) not in text and str(Path.cwd()) not in text and "/tmp/" not in text
    assert "root: data\n" in text and "load_from_checkpoint: base\n" in text


def test_the_card_speaks_of_the_exported_checkpoint_not_of_the_runs_end(runs, tmp_path):
    run = shutil.copytree(runs.run("first"), tmp_path / "first", symlinks=True)
    lines = (run / "metrics.jsonl").read_text().replace('"val/acc_0.05": ', '"val/acc_0.05": null, "val/acc_0": ')
    later = json.dumps({"step": 9, "val/loss": 123.0})
    (run / "metrics.jsonl").write_text(lines + later + '\n{"step": 10, "los')
    text = (exported(run, tmp_path / "out", "lerobot") / "README.md").read_text()
    assert "123" not in text and f"{runs.metrics_of_last_validation('first')['val/loss']:.4g}" in text
    assert "| `val/acc_0.05` | not finite |" in text
    assert "trained from: random weights" in text and "base_model" not in text


def test_averaged_weights_are_called_so(runs, tmp_path):
    run = shutil.copytree(runs.run("first"), tmp_path / "first", symlinks=True)
    last = (run / "checkpoints" / "last").resolve()
    (last / "manifest.json").unlink()
    averaged = (last / "pretrained_model").rename(last / "pretrained_model_ema")
    text = (exported(averaged, tmp_path / "out", "lerobot") / "README.md").read_text()
    assert "averaged weights in float32" in text and "which `val/ema_…` are of" in text
    assert load_policy(str(averaged), device="cpu").name == "first, averaged weights"


def test_weights_alone_have_a_card_too(runs, tmp_path):
    source = shutil.copytree(runs.pretrained(), tmp_path / "weights")
    text = (exported(source, tmp_path / "out", "lerobot") / "README.md").read_text()
    assert "# weights" in text
    assert "The training config was not recorded" in text and "No validation was recorded" in text


# ── the hub ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class UploadHub:
    """A hub that takes uploads: what was asked, the repositories, and their files."""

    url: str = ""
    token: str = "hf_right"
    requests: list[str] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    """Repository → whether it is private."""
    files: dict[str, bytes] = field(default_factory=dict)
    """``owner/name/path`` → contents, once committed."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    broken: str = ""
    """A beginning of paths that answer with status 400."""


def _handler(hub: UploadHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def answer(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def begin(self) -> bytes | None:
            """The body; None if the request was refused."""
            hub.requests.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.broken and hub.broken in self.path:
                self.answer(400, {"error": "no more today"})
            elif self.headers.get("Authorization") != f"Bearer {hub.token}" and not self.path.startswith("/blob/"):
                self.answer(401, {"error": "Invalid username or password."})
            else:
                return body
            return None

        def do_GET(self) -> None:
            if self.begin() is None:
                return
            name = self.path.removeprefix("/api/models/").partition("?")[0]
            if name in hub.private:
                self.answer(200, {"id": name, "private": hub.private[name], "tags": [], "siblings": []})
            else:
                self.answer(404, {"error": "Repository not found"})

        def do_PUT(self) -> None:
            if (body := self.begin()) is not None:
                hub.blobs[hashlib.sha256(body).hexdigest()] = body
                self.answer(200, {})

        def do_POST(self) -> None:
            if (body := self.begin()) is None:
                return
            if self.path == "/api/repos/create":
                self.create(json.loads(body))
            elif self.path == "/api/validate-yaml":
                front = json.loads(body)["content"].split("---\n")
                assert front[0] == "" and len(front) >= 3
                self.answer(200, {"warnings": [], "errors": []})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
                files = [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes.items()]
                self.answer(200, {"files": files})
            elif self.path.endswith("/info/lfs/objects/batch"):
                actions = {"upload": {"href": f"{hub.url}/blob/x"}}
                objects = [{**entry, "actions": actions} for entry in json.loads(body)["objects"]]
                self.answer(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                self.commit(self.path.removeprefix("/api/models/").partition("/commit/")[0], body)

        def create(self, asked: dict) -> None:
            if asked["organization"] != "me":
                self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
                return
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in hub.private else 200
            hub.private.setdefault(name, asked.get("visibility") == "private")
            self.answer(status, {"url": f"{hub.url}/{name}"})

        def commit(self, name: str, body: bytes) -> None:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[f"{name}/{value['path']}"] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[f"{name}/{value['path']}"] = hub.blobs[value["oid"]]
            oid = "a" * 40
            self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    return Handler


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    hub = UploadHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with upload_hub() as running:
        yield running


def pushed(runs: Runs, out: Path, endpoint: str, *options: str, **variables: str) -> tuple[int, str]:
    """A process that exports and uploads: exit code and output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    # Large files go by the older of the hub's two protocols, the one that is plain HTTP.
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(out.parent / "hf"), "HF_HUB_DISABLE_XET": "1", **variables}
    command = [sys.executable, "-m", "agent.export", "--checkpoint", str(runs.run("first")), "--to", "lerobot"]
    done = subprocess.run(
        [*command, "--out", str(out), *options], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def test_the_export_is_uploaded_whole(runs, tmp_path, hub):
    out = tmp_path / "out"
    options = ["--push_to_hub", "me/policy", "--private", "--tokenizer", TOKENIZER]
    code, said = pushed(runs, out, hub.url, *options, HF_TOKEN=hub.token)
    assert code == 0, said
    assert f"{hub.url}/me/policy/commit/" in said
    assert hub.private == {"me/policy": True}
    local = {f"me/policy/{path.relative_to(out)}": path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert hub.files == local and len(local) == 7
    card = ModelCard.load(out / "README.md")
    assert card.text.strip().startswith("# policy") and 'from_pretrained("me/policy")' in card.text
    preprocessor = (out / "policy_preprocessor.json").read_text()
    assert f'"tokenizer_name": "{TOKENIZER}"' in preprocessor
    for name, content in hub.files.items():
        assert str(runs.folder).encode() not in content and str(Path.cwd()).encode() not in content, name


REFUSALS = [
    (["me/policy"], {}, "no token of the hub; run `hf auth login`"),
    (["me/policy"], {"HF_TOKEN": "hf_wrong"}, "the hub refuses to let you write me/policy (401)"),
    (["other/policy"], {"HF_TOKEN": "hf_right"}, "the hub refuses to let you write other/policy (403)"),
    (["policy"], {"HF_TOKEN": "hf_right"}, "'policy' is no model on the hub; write OWNER/NAME"),
    (["me/policy"], {"HF_TOKEN": "hf_right", "HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    (
        ["me/policy"],
        {"HF_TOKEN": "hf_right", "HF_ENDPOINT": "http://127.0.0.1:9"},
        "http://127.0.0.1:9 cannot be reached",
    ),
]


@pytest.mark.parametrize(("name", "variables", "message"), REFUSALS, ids=[message for _, _, message in REFUSALS])
def test_an_upload_that_cannot_work_is_refused_at_once(runs, tmp_path, hub, name, variables, message):
    options = ["--push_to_hub", *name, "--tokenizer", TOKENIZER]
    code, said = pushed(runs, tmp_path / "out", hub.url, *options, **variables)
    assert code == 2 and message in said and "Traceback" not in said, said
    assert not (tmp_path / "out").exists() and not hub.files
    # Once to look for the model and once to make it, each with what the client asks beside: no answer is asked for again.
    assert len(hub.requests) <= 4, hub.requests


def test_a_public_model_is_not_taken_for_a_private_one(runs, tmp_path, hub):
    hub.private["me/policy"] = False
    options = ["--push_to_hub", "me/policy", "--private", "--tokenizer", TOKENIZER]
    code, said = pushed(runs, tmp_path / "out", hub.url, *options, HF_TOKEN=hub.token)
    assert code == 2 and "--private: me/policy exists and is public" in said and not hub.files


@pytest.mark.parametrize("broken", ["/blob/", "/commit/"])
def test_an_upload_that_breaks_off_says_what_is_left(runs, tmp_path, hub, broken):
    hub.broken = broken
    out = tmp_path / "out"
    code, said = pushed(runs, out, hub.url, "--push_to_hub", "me/policy", "--tokenizer", TOKENIZER, HF_TOKEN=hub.token)
    assert code == 2 and "the upload to me/policy failed: " in said and "Traceback" not in said, said
    assert f"The export itself is complete: upload it with `hf upload me/policy {out}`" in said
    assert (out / "model.safetensors").is_file()


def test_a_tokenizer_of_this_machine_is_not_published(runs, tmp_path, hub):
    code, said = pushed(runs, tmp_path / "out", hub.url, "--push_to_hub", "me/policy", HF_TOKEN=hub.token)
    assert code == 2 and "which others do not have" in said and f"--tokenizer {TOKENIZER}" in said
    assert not hub.private and not hub.files


def test_options_that_would_do_nothing_are_refused(runs, tmp_path, capsys):
    arguments = ["--checkpoint", runs.run("first"), "--to", "lerobot", "--out", tmp_path / "out"]
    assert "--private: nothing is uploaded" in refusal(capsys, *arguments, "--private")
    openpi = [*arguments[:2], "--to", "openpi", *arguments[4:]]
    assert "--tokenizer: openpi stores no tokenizer's name" in refusal(capsys, *openpi, "--tokenizer", TOKENIZER)


def test_help_and_mistakes_answer_at_once(tmp_path):
    command = [sys.executable, "-m", "agent.export"]
    for arguments, message in ((["--help"], "openpi"), (["--to", "jax"], "--to"), ([], "--checkpoint")):
        begin = time.monotonic()
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
        assert message in done.stdout + done.stderr and done.returncode == (0 if arguments == ["--help"] else 2)
        assert time.monotonic() - begin < 2
