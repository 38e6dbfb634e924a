"""Pictures, vectors and instructions as the model gets them, against LeRobot's own.

Run: uv run pytest tests/data/samples/test_transforms.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from support.datasets import DEFAULT_TASKS
from support.launching import with_support
from support.samples import prompt_of

from agent.data.resizing import resize_with_pad
from agent.data.samples.task_tokens import cached_task_tokens, load_tokenizer, make_task_tokens
from agent.data.samples.transforms import load_paraphrases, pad_vector, paraphrase
from agent.models.pi.configuration import PI0Config
from agent.models.pi.family import PI0Family


@pytest.mark.parametrize("size", [(64, 80), (80, 64), (48, 48), (31, 97), (10, 10)])
def test_resize_equals_lerobots(size):
    import torch
    from lerobot.policies.common.vla_utils import resize_with_pad_torch

    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    resized = resize_with_pad(image, 48, 48)
    assert resized.dtype == torch.uint8 and resized.shape == (3, 48, 48)
    theirs = resize_with_pad_torch(image[None].float() / 255, 48, 48)[0] * 255
    assert (resized.float() - theirs).abs().max() <= 0.501


def test_pad_vector():
    assert pad_vector(np.ones((2, 3)), 5).tolist() == [[1, 1, 1, 0, 0]] * 2
    with pytest.raises(ValueError, match="3 dimensions do not fit into 2"):
        pad_vector(np.ones(3), 2)


def test_tokens_equal_lerobots(tokenizer):
    from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
    from lerobot.processor import TokenizerProcessorStep
    from lerobot.processor.converters import create_transition

    tasks = [DEFAULT_TASKS[0], "open the drawer\n", "open " * 30]
    tokens = make_task_tokens(prompt_of(tokenizer), tasks)
    step = TokenizerProcessorStep(tokenizer_name=tokenizer, max_length=16)
    for task in tasks:
        transition = create_transition(observation={}, complementary_data={"task": task})
        theirs = step(Pi0NewLineProcessor()(transition))["observation"]
        mask = theirs["observation.language.attention_mask"][0].numpy()
        assert tokens(task).tolist() == theirs["observation.language.tokens"][0].numpy()[mask].tolist()
    assert tokens.too_long == {tasks[2]: 32}  # bos, 30 words, newline
    assert "32 tokens and is cut at 16" in tokens.warnings()[0]
    with pytest.raises(ValueError, match="an instruction is empty"):
        make_task_tokens(prompt_of(tokenizer), ["\n"])


def test_tokens_are_kept_until_the_tokenizer_or_the_instructions_change(tokenizer, tmp_path):
    """Each time against fresh ones, which differ: a stale file would be seen."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer, folder)
    tasks = ["open the drawer", "open " * 30]

    def check(length: int, texts: list[str], files: int) -> None:
        for _ in range(2):
            kept = cached_task_tokens(prompt_of(folder, length), texts, tmp_path)
            fresh = make_task_tokens(prompt_of(folder, length), texts)
            assert [kept(t).tolist() for t in texts] == [fresh(t).tolist() for t in texts]
            assert (kept.too_long, kept.pad_token_id) == (fresh.too_long, fresh.pad_token_id)
            assert kept.warnings() == fresh.warnings()
        assert len(list((tmp_path / "agent_cache").glob("tokens-*.json"))) == files

    check(16, tasks, 1)
    check(8, tasks, 2)
    check(16, tasks[:1], 3)
    file = folder / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    words = vocabulary["model"]["vocab"]
    words["open"], words["drawer"] = words["drawer"], words["open"]
    file.write_text(json.dumps(vocabulary))
    check(16, tasks, 4)


def test_a_start_that_knows_the_tokens_needs_no_transformers(tokenizer, tmp_path):
    code = (
        "import sys; from agent.data.samples.task_tokens import cached_task_tokens as f; from pathlib import Path; "
        "from support.samples import prompt_of as p; "
        f"f(p({tokenizer!r}), ['open the drawer'], Path({str(tmp_path)!r})); print('transformers' in sys.modules)"
    )
    settings: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "env": with_support()}
    runs = [subprocess.run([sys.executable, "-c", code], **settings) for _ in range(2)]
    assert [run.stdout.strip() for run in runs] == ["True", "False"]


def test_missing_tokenizer(tmp_path, monkeypatch):
    import huggingface_hub.constants

    with pytest.raises(ValueError, match=r"model_cfg.tokenizer_path\).*no such folder.*gated.*hf auth login"):
        load_tokenizer(str(tmp_path / "nowhere"), PI0Family().prompt(PI0Config()).advice)
    with pytest.raises(ValueError, match="the folder holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="not in the local cache and the hub cannot be reached"):
        load_tokenizer("nobody/nothing")
    assert time.monotonic() - begin < 15


def test_paraphrases(tmp_path):
    path = tmp_path / "paraphrases.json"
    path.write_text(json.dumps({"a": ["b", "c"]}))
    paraphrases, missing = load_paraphrases(str(path), ["a", "x"])
    assert missing == ["x"]
    texts = [paraphrase("a", paraphrases, 0, k) for k in range(2000)]
    assert texts == [paraphrase("a", paraphrases, 0, k) for k in range(2000)]
    assert 900 < texts.count("a") < 1100 and 400 < texts.count("b") < 600
    assert paraphrase("x", paraphrases, 0, 1) == "x"
    with pytest.raises(ValueError, match="an entry for none of the tasks, such as 'y'"):
        load_paraphrases(str(path), ["y"])
    for content in ("{", "[]", '{"a": []}', '{"a": "b"}', '{"a": [""]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="task_paraphrase is a JSON file of the form"):
            load_paraphrases(str(path), ["a"])
    with pytest.raises(ValueError, match="cannot be read"):
        load_paraphrases(str(tmp_path / "nowhere.json"), ["a"])
