"""Loading weights is accounting: what fits is loaded whole, everything else is refused by its message.

Run: pytest tests/checkpoints/test_weights.py   (some seconds)
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_model import reference

from agent.batch import ActionChunk, Batch, Observation
from agent.checkpoints import tensor_file
from agent.checkpoints.finding import find_weights
from agent.checkpoints.weights import Coverage, account, load_into
from agent.models.common.sizes import GemmaVariant, VisionVariant
from agent.models.flow_matching import FlowDraws
from agent.models.lerobot_config import FeatureSpec
from agent.models.pi import adapter
from agent.models.pi.configuration import PI0Config
from agent.models.pi.model import PI0

KEY = "load_from_checkpoint"
TINY = {"depth": 2, "mlp_dim": 24, "heads": 2, "kv_heads": 1, "head_dim": 8, "vocab_size": 20}
CONFIG = PI0Config(
    paligemma_variant=GemmaVariant(width=16, **TINY),
    action_expert_variant=GemmaVariant(width=12, **TINY),
    vision_variant=VisionVariant(width=8, depth=2, mlp_dim=12, heads=2),
    image_resolution=(28, 28),
    chunk_size=6,
    input_features={"observation.images.a": FeatureSpec("VISUAL", [3, 28, 28])},
)
PREFIX = "model.paligemma_with_expert."
STATE_PROJ = "model.state_proj.weight"
EMBEDDING = f"{PREFIX}paligemma.model.language_model.embed_tokens.weight"


def model(seed: int) -> PI0:
    policy = PI0(CONFIG)
    policy.init_weights(torch.Generator().manual_seed(seed))
    return policy


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """A policy under LeRobot's names, its two heads among them."""
    shared = adapter.to_lerobot(model(1).state_dict(), CONFIG)
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in shared.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


FROM_PALIGEMMA = partial(adapter.from_base, "paligemma_pretrained_path")


def load(policy: PI0, reference: Path | str, match=adapter.from_policy) -> Coverage:
    """As the trainer does it."""
    files = find_weights(str(reference), KEY)
    return load_into(policy.state_dict(), files, partial(match, config=CONFIG), adapter.fit)


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(model(2), folder)
    return str(caught.value)


def table_rows(text: str) -> dict[str, list[int]]:
    """Module → expected, loaded, waived, missing, extra, wrong shape."""
    lines = [line.split() for line in text.splitlines()]
    return {words[0]: [int(n) for n in words[1:]] for words in lines if len(words) == 7 and words[1].isdigit()}


def counts() -> dict[str, int]:
    modules = [name.split(".")[0] for name in model(0).state_dict()]
    return {module: modules.count(module) for module in modules}


def assert_same(policy: PI0, other: PI0) -> None:
    for name, value in policy.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# ── what fits ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lerobot_file_is_loaded_whole_and_tabled(tmp_path, published):
    policy = model(2)
    for parameter in policy.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    coverage = load(policy, write(tmp_path, published))
    assert_same(policy, model(1))
    assert sorted(coverage.loaded) == sorted(policy.state_dict()) and not coverage.fresh
    text = coverage.table()
    assert (
        text.splitlines()[0]
        == f"weights from {tmp_path / 'model.safetensors'} (LeRobot 0.4 to 0.6, and this project's own):"
    )
    assert text.splitlines()[1].split() == [
        "module",
        "expected",
        "loaded",
        "waived",
        "missing",
        "extra",
        "wrong",
        "shape",
    ]
    assert table_rows(text) == {module: [n, n, 0, 0, 0, 0] for module, n in counts().items()}
    assert "  1 left: the expert's language head is never used" in text
    assert "  1 left: the language head is tied to the token embedding" in text


def test_where_weights_are_looked_for(tmp_path, published):
    for place in ("weights", "with/pretrained_model", "checkpoints_of/last/pretrained_model"):
        write(tmp_path / place, published)
    write(tmp_path / "run/checkpoints/step_00000010/pretrained_model", published)
    (tmp_path / "run/checkpoints/last").symlink_to("step_00000010")
    for given in ("weights", "weights/model.safetensors", "with", "checkpoints_of", "run", "run/checkpoints"):
        (found,) = find_weights(str(tmp_path / given), KEY)
        assert found.name == "model.safetensors" and found.is_file(), given


def test_a_home_folder_is_expanded(tmp_path, published, monkeypatch):
    write(tmp_path / "weights", published)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_weights("~/weights", KEY) == [tmp_path / "weights/model.safetensors"]


def test_openpis_names(tmp_path, published):
    renamed = {name.removeprefix("model."): tensor for name, tensor in published.items()}
    policy = model(2)
    coverage = load(policy, write(tmp_path, renamed))
    assert coverage.source.endswith("(openpi's PyTorch export)")
    assert_same(policy, model(1))


def test_other_number_types_become_the_models(tmp_path, published):
    policy = model(2)
    load(policy, write(tmp_path, {name: tensor.to(torch.bfloat16) for name, tensor in published.items()}))
    expected = model(1).state_dict()
    for name, value in policy.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].bfloat16().float()), name


def shards(folder: Path, published: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names, where = sorted(published), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: published[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_shards_are_loaded_together(tmp_path, published):
    policy = model(2)
    coverage = load(policy, shards(tmp_path, published))
    assert_same(policy, model(1))
    assert coverage.source == f"{tmp_path} (LeRobot 0.4 to 0.6, and this project's own)"


def paligemma(layout: adapter.Layout, vocabulary: int = 20) -> dict[str, torch.Tensor]:
    named = {layout.theirs(name): tensor.clone() for name, tensor in model(1).state_dict().items()}
    named.pop(None)
    embedding = layout.theirs(adapter.EMBEDDING)
    assert embedding is not None
    extra = torch.zeros(vocabulary - 20, 16)
    named[embedding] = torch.cat([named[embedding], extra])
    return {name: tensor for name, tensor in named.items() if name is not None}


@pytest.mark.parametrize("layout", adapter.PALIGEMMAS, ids=lambda layout: layout.title)
def test_paligemma_leaves_the_expert_fresh_and_counts_it(tmp_path, layout):
    policy, untouched = model(2), model(2)
    coverage = load(
        policy,
        write(tmp_path, paligemma(layout, vocabulary=24)),
        FROM_PALIGEMMA,
    )
    from_file = {"vision", "projector", "language"}
    for name, value in policy.state_dict().items():
        source = model(1) if name.split(".")[0] in from_file else untouched
        assert torch.equal(value, source.state_dict()[name]), name
    rows = {module: [n, n, 0, 0, 0, 0] if module in from_file else [n, 0, n, 0, 0, 0] for module, n in counts().items()}
    assert table_rows(coverage.table()) == rows
    fresh = sum(n for module, n in counts().items() if module not in from_file)
    assert f"  {fresh} fresh: PaliGemma has no action expert" in coverage.table()


def test_paligemma_asked_for_as_a_policy_is_refused(tmp_path):
    text = refusal(write(tmp_path, paligemma(adapter.PALIGEMMAS[0])))
    assert "do not fit this model" in text
    rows = table_rows(text)
    assert rows.pop("(unknown)")[4] > 0
    assert rows == {module: [n, 0, 0, n, 0, 0] for module, n in counts().items()}


# ── what does not fit ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_tensor(tmp_path, published):
    text = refusal(write(tmp_path, {name: t for name, t in published.items() if name != STATE_PROJ}))
    assert f"missing in the file: {STATE_PROJ}" in text and text.count("missing in the file:") == 1
    assert "model JSON" in text and str(tmp_path) in text
    assert table_rows(text)["state_proj"] == [2, 1, 0, 1, 0, 0]


def test_a_missing_expert_is_not_waived_for_a_policy(tmp_path, published):
    text = refusal(write(tmp_path, {name: t for name, t in published.items() if "gemma_expert" not in name}))
    assert "missing in the file: model.paligemma_with_expert.gemma_expert.model.layers" in text
    assert table_rows(text)["expert"] == [counts()["expert"], 0, 0, counts()["expert"], 0, 0]
    hidden = counts()["expert"] - 12
    assert f"… and {hidden} more" in text and text.count("missing in the file:") == 12


def test_an_extra_tensor(tmp_path, published):
    text = refusal(write(tmp_path, published | {"model.adapter.lora_A": torch.zeros(3)}))
    assert "unknown to the model: model.adapter.lora_A" in text and "missing in the file" not in text
    assert table_rows(text)["(unknown)"] == [0, 0, 0, 0, 1, 0]


def test_a_wrong_shape(tmp_path, published):
    text = refusal(write(tmp_path, published | {STATE_PROJ: torch.zeros(13, 32)}))
    assert f"other shape: {STATE_PROJ}: [13, 32] in the file, [12, 32] in the model" in text
    assert table_rows(text)["state_proj"] == [2, 1, 0, 0, 0, 1]


def test_a_shape_that_would_broadcast_is_no_fit(tmp_path, published):
    text = refusal(write(tmp_path, published | {"model.state_proj.bias": torch.zeros(1)}))
    assert "other shape: model.state_proj.bias: [1] in the file, [12] in the model" in text


def test_a_vocabulary_that_is_too_small(tmp_path, published):
    name = f"{PREFIX}paligemma.model.language_model.embed_tokens.weight"
    text = refusal(write(tmp_path, published | {name: torch.zeros(18, 16)}))
    assert "[18, 16] in the file, [20, 16] in the model" in text


@pytest.mark.parametrize("part", [0.99, 0.5, 0.0], ids=["end", "half", "empty"])
def test_a_truncated_file(tmp_path, published, part):
    file = write(tmp_path, published) / "model.safetensors"
    os.truncate(file, int(file.stat().st_size * part))
    text = refusal(tmp_path)
    assert f"{file} cannot be read as safetensors, it is truncated or damaged" in text


def test_a_text_file_instead_of_weights(tmp_path):
    # What a clone without Git LFS leaves behind.
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 7000000000\n")
    assert "cannot be read as safetensors" in refusal(tmp_path)


def test_a_missing_shard(tmp_path, published):
    (shards(tmp_path, published) / "model-00002-of-00002.safetensors").unlink()
    text = refusal(tmp_path)
    assert f"{KEY}: {tmp_path / 'model.safetensors.index.json'} names model-00002-of-00002.safetensors" in text
    assert text.endswith("which is not there")


def test_a_tensor_in_two_shards(tmp_path, published):
    first, second = sorted(shards(tmp_path, published).glob("*.safetensors"))
    twice = load_file(first)
    name = min(twice)
    save_file(load_file(second) | {name: twice[name] + 1}, second)
    assert f"{first} and {second} both hold {name}, and nobody knows which" in refusal(tmp_path)


@pytest.mark.parametrize("index", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index(tmp_path, published, index):
    (shards(tmp_path, published) / "model.safetensors.index.json").write_text(index)
    text = refusal(tmp_path)
    assert text.startswith(f"{KEY}: {tmp_path / 'model.safetensors.index.json'} cannot be read as an index")


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == (
        f"{KEY}: the folder {tmp_path} holds no model.safetensors and no model.safetensors.index.json"
    )


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.write_text, (self.target, "opened")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt", "weights.pkl"])
def test_a_pickle_is_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    assert "is a pickle file, which can run code when opened; convert it to safetensors first" in refusal(
        tmp_path / name
    )
    assert not (tmp_path / "mark").exists()


def test_a_folder_of_pickles_says_so(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    text = refusal(tmp_path)
    assert "holds no model.safetensors" in text and "pytorch_model.bin is a pickle file; convert" in text


def test_the_command_that_converts_a_pickle(tmp_path, published):
    folder = tmp_path / "my weights"
    folder.mkdir()
    tied = published | {"model.paligemma_with_expert.paligemma.lm_head.weight": published[EMBEDDING]}
    torch.save(tied, folder / "pytorch_model.bin")
    command = refusal(folder).splitlines()[-1]
    assert command.startswith("uv run python -c ")
    subprocess.run([sys.executable, *shlex.split(command)[3:]], check=True)
    policy = model(2)
    load(policy, folder)
    assert_same(policy, model(1))


@pytest.mark.parametrize("reference", ["/no/such/folder", "./weights", "~/no_such_weights", "weights", "a/b/c/d"])
def test_a_path_that_does_not_exist(reference):
    with pytest.raises(ValueError, match="does not look like a hub id") as caught:
        find_weights(reference, KEY)
    assert f"{KEY}: there is no file or folder {reference}" in str(caught.value)


def on_hub(reference: str, home: Path) -> str:
    """What a process without network says."""
    program = (
        "import sys; from agent.checkpoints.finding import find_weights\n"
        "try: print('found', *find_weights(sys.argv[1], 'load_from_checkpoint'))\n"
        "except ValueError as error: print('refused', error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", program, reference], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_id_without_network(tmp_path):
    text = on_hub("someone/some_policy@v2", tmp_path)
    assert text.startswith(f"refused {KEY}: cannot get 'someone/some_policy@v2' from the hub: ")
    assert "`hf download someone/some_policy --revision v2`" in text and "`hf auth login`" in text
    assert "Traceback" not in text


def cached(home: Path) -> Path:
    """An entry of the hub's cache, as ``hf download`` leaves it."""
    entry, commit = home / "hub/models--someone--some_policy", "a" * 40
    (entry / "refs").mkdir(parents=True)
    (entry / "refs/main").write_text(commit)
    (entry / "snapshots" / commit).mkdir(parents=True)
    return entry / "snapshots" / commit


def test_a_hub_id_in_the_cache_needs_no_network(tmp_path, published):
    write(cached(tmp_path), published)
    assert on_hub("someone/some_policy", tmp_path).startswith("found /")


def test_a_cache_that_holds_only_other_files_does_not_blame_the_hub(tmp_path):
    folder = cached(tmp_path)
    (folder / "config.json").write_text("{}")
    text = on_hub("someone/some_policy", tmp_path)
    assert text.startswith(f"refused {KEY}: ") and str(folder) in text
    assert "holds no model.safetensors" in text and "hf download someone/some_policy" in text


# ── the vintages ────────────────────────────────────────────────────────────────────────────────────────────────

OLD = next(layout for layout in adapter.POLICIES if "v1" in layout.title)
BUFFERS = {
    "normalize_inputs.buffer_observation_state.mean": torch.zeros(5),
    "normalize_inputs.buffer_observation_state.std": torch.ones(5),
    "normalize_targets.buffer_action.mean": torch.zeros(4),
    "unnormalize_outputs.buffer_action.mean": torch.zeros(4),
}


def vintages(published: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The same weights as every kind of file names them."""
    old = {OLD.theirs(name): tensor for name, tensor in model(1).state_dict().items()}
    heads = {name: tensor for name, tensor in published.items() if "lm_head" in name}
    old |= {name.replace("paligemma.lm_head", "paligemma.language_model.lm_head"): t for name, t in heads.items()}
    return {
        "LeRobot v1, of 2025": {name: tensor.contiguous() for name, tensor in (old | BUFFERS).items() if name},
        "LeRobot 0.4 to 0.6, and this project's own": published,
        "openpi's PyTorch export": {name.removeprefix("model."): tensor for name, tensor in published.items()},
    }


def batch() -> Batch:
    """Two samples of a robot with five states and four actions."""
    g = torch.Generator().manual_seed(5)
    real = (torch.arange(32) < 4).expand(2, 32)
    return Batch(
        observation=Observation(
            images={"observation.images.a": torch.rand(2, 3, 28, 28, generator=g)},
            image_masks={"observation.images.a": torch.ones(2, dtype=torch.bool)},
            state=torch.randn(2, 32, generator=g) * (torch.arange(32) < 5),
            tokens=torch.randint(0, 20, (2, 8), generator=g),
            token_mask=torch.ones(2, 8, dtype=torch.bool),
        ),
        actions=ActionChunk(
            values=torch.randn(2, 6, 32, generator=g) * real[:, None],
            is_pad=torch.zeros(2, 6, dtype=torch.bool),
            dim_mask=real,
        ),
        draws=FlowDraws(torch.randn(2, 6, 32, generator=g), torch.tensor([0.2, 0.9])),
        sample_index=torch.arange(2),
        provenance=torch.zeros(2, 3, dtype=torch.int64),
    )


@pytest.mark.parametrize("number_type", [torch.float32, torch.bfloat16], ids=str)
def test_every_vintage_with_the_same_values_gives_the_same_loss(tmp_path, published, number_type):
    losses = {}
    for title, tensors in vintages(published).items():
        folder = write(tmp_path / title.replace(" ", ""), {name: t.to(number_type) for name, t in tensors.items()})
        policy = model(2)
        coverage = load(policy, folder)
        assert coverage.source.endswith(f"({title})") and not coverage.fresh and not coverage.adapted
        losses[title] = policy(batch())["flow"]
    first, *others = losses.values()
    assert torch.isfinite(first).all() and all(torch.equal(first, other) for other in others)


def test_the_statistics_among_v1_weights_are_left_by_name(tmp_path, published):
    text = load(model(2), write(tmp_path, vintages(published)["LeRobot v1, of 2025"])).table()
    assert f"  {len(BUFFERS)} left: statistics of the data it was made with" in text


@pytest.mark.parametrize("missing", ["both heads", "the embedding"])
def test_tied_heads_may_be_stored_once(tmp_path, published, missing):
    embedding = f"{PREFIX}paligemma.model.language_model.embed_tokens.weight"
    gone = embedding.__eq__ if missing == "the embedding" else lambda name: "lm_head" in name
    policy = model(2)
    load(policy, write(tmp_path, {name: tensor for name, tensor in published.items() if not gone(name)}))
    assert_same(policy, model(1))


def other_sizes(published: dict[str, torch.Tensor], state: int, action: int) -> dict[str, torch.Tensor]:
    cut = dict(published)
    cut["model.state_proj.weight"] = published["model.state_proj.weight"][:, :state].contiguous()
    cut["model.action_in_proj.weight"] = published["model.action_in_proj.weight"][:, :action].contiguous()
    cut["model.action_out_proj.weight"] = published["model.action_out_proj.weight"][:action].contiguous()
    cut["model.action_out_proj.bias"] = published["model.action_out_proj.bias"][:action].contiguous()
    return cut


def test_weights_of_fewer_dimensions_are_widened_by_zeros(tmp_path, published):
    policy = model(2)
    coverage = load(policy, write(tmp_path, other_sizes(published, 7, 6)))
    assert {name: text.split(":")[0] for name, text in coverage.adapted.items()} == {
        "state_proj.weight": "max_state_dim is 7 in the file",
        "action_in_proj.weight": "max_action_dim is 6 in the file",
        "action_out_proj.weight": "max_action_dim is 6 in the file",
        "action_out_proj.bias": "max_action_dim is 6 in the file",
    }
    assert "  3 reshaped: max_action_dim is 6 in the file" in coverage.table()
    weights, source = policy.state_dict(), model(1).state_dict()
    assert torch.equal(weights["state_proj.weight"][:, :7], source["state_proj.weight"][:, :7])
    assert torch.equal(weights["action_out_proj.weight"][:6], source["action_out_proj.weight"][:6])
    for name, beyond in (
        ("state_proj.weight", (slice(None), slice(7, None))),
        ("action_out_proj.bias", slice(6, None)),
    ):
        assert weights[name][beyond].numel() and not weights[name][beyond].any()
    # The added dimensions change nothing: what the model predicts for the others does not depend on them.
    one, other = batch(), batch()
    other.observation.state[:, 7:] += 1
    assert torch.equal(policy(one)["flow"], policy(other)["flow"])


def test_weights_of_more_dimensions_say_what_to_write(tmp_path, published):
    wide = published | {STATE_PROJ: torch.zeros(12, 40)}
    text = refusal(write(tmp_path, wide))
    assert f"{STATE_PROJ}: [12, 40] in the file, [12, 32] in the model; write max_state_dim: 40" in text


def test_a_longer_vocabulary_is_named(tmp_path, published):
    name = f"{PREFIX}paligemma.model.language_model.embed_tokens.weight"
    longer = torch.cat([published[name], torch.full((2, 16), 9.0)])
    policy = model(2)
    coverage = load(policy, write(tmp_path, published | {name: longer}))
    assert_same(policy, model(1))
    assert list(coverage.adapted) == [adapter.EMBEDDING] and "appended to the vocabulary" in coverage.table()


# Every tensor of the published π0, each a few numbers long.
SMALL = {"depth": 18, "mlp_dim": 6, "heads": 2, "kv_heads": 1, "head_dim": 4, "vocab_size": 20}
ALL_TENSORS = replace(
    CONFIG,
    paligemma_variant=GemmaVariant(width=8, **SMALL),
    action_expert_variant=GemmaVariant(width=4, **SMALL),
    vision_variant=VisionVariant(width=4, depth=27, mlp_dim=6, heads=2),
)


@pytest.mark.parametrize("file", ["pi0_tensors_lerobot_v1.json", "pi0_tensors_lerobot_0.6.json", "openpi"])
def test_every_tensor_of_the_published_lists(tmp_path, file):
    policies = [PI0(ALL_TENSORS), PI0(ALL_TENSORS)]
    for seed, policy in enumerate(policies):
        policy.init_weights(torch.Generator().manual_seed(seed))
    names = reference("pi0_tensors_lerobot_0.6.json" if file == "openpi" else file)
    own = adapter.to_lerobot(policies[0].state_dict(), ALL_TENSORS)
    found = adapter.match(names, adapter.POLICIES, ALL_TENSORS)
    values = {theirs: policies[0].state_dict()[ours] for ours, theirs in found.sources.items()}
    values |= {name: own[next(head for head in own if head.endswith(name.split(".")[2] + ".lm_head.weight"))]
               if "gemma_expert" in name else policies[0].state_dict()[adapter.EMBEDDING]
               for name in found.waived}  # fmt: skip
    assert values.keys() == names.keys() and len(values) > 770
    prefix = "model." if file == "openpi" else ""
    write(tmp_path, {name.removeprefix(prefix): tensor.clone().contiguous() for name, tensor in values.items()})
    match = partial(adapter.from_policy, config=ALL_TENSORS)
    coverage = load_into(policies[1].state_dict(), find_weights(str(tmp_path), KEY), match, adapter.fit)
    assert sorted(coverage.loaded) == sorted(policies[1].state_dict())
    assert_same(policies[1], policies[0])
    assert torch.equal(policies[0](batch())["flow"], policies[1](batch())["flow"])


def header_only(path: Path, shapes: dict[str, tuple[int, ...]], number_type: torch.dtype) -> Path:
    """A file of real size that takes no space: its numbers are a hole."""
    with torch.device("meta"):
        tensors = {name: torch.empty(shape, dtype=number_type) for name, shape in shapes.items()}
    path.write_bytes(tensor_file.header(tensors))
    os.truncate(path, tensor_file.file_size(tensors))
    return path


@pytest.mark.parametrize("file", ["pi0_tensors_lerobot_v1.json", "pi0_tensors_lerobot_0.6.json", "openpi", "PaliGemma"])
def test_every_vintage_at_real_size_by_its_headers(tmp_path, file):
    config = PI0Config()
    named = reference("pi0_tensors_lerobot_0.6.json" if file in ("openpi", "PaliGemma") else file)
    match = adapter.from_policy
    if file == "openpi":
        named = {name.removeprefix("model."): shape for name, shape in named.items()}
    if file == "PaliGemma":
        start = "model.paligemma_with_expert.paligemma."
        named = {name.removeprefix(start): shape for name, shape in named.items() if name.startswith(start)}
        named["model.language_model.embed_tokens.weight"] = (257216, 2048)
        match = FROM_PALIGEMMA
    files = [header_only(tmp_path / "model.safetensors", named, torch.bfloat16)]
    assert files[0].stat().st_size > 5e9
    shapes = adapter.shapes(config)
    coverage, places = account(shapes, files, partial(match, config=config), adapter.fit)
    assert len(coverage.loaded) + len(coverage.fresh) == len(shapes)
    assert bool(coverage.fresh) == bool(coverage.adapted) == (file == "PaliGemma")
    assert sum(map(len, places.values())) == len(coverage.loaded)
    # And what a run does with it in front of no memory at all.
    with torch.device("meta"):
        policy = PI0(config)
    assert policy.state_dict().keys() == shapes.keys()
