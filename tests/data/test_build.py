"""From data sets to batches: what is built, and that the stream of samples does not depend on how it is split.

Run: uv run pytest tests/data/test_build.py
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from support.samples import FRONT, SPEC, WRIST, built, by_number, dataset_config, micro_batches, opened

from agent.batch import SampleSpec
from agent.data.configuration import ValDataConfig
from agent.data.loading.loader import ValidationBatches
from agent.data.recorded.episodes import hold_out


def test_non_finite_actions(video, tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(video, tmp_path / "copy")
    (path,) = (tmp_path / "copy").glob("data/*/*.parquet")
    table = pq.read_table(path)
    actions = table["action"].to_pylist()
    actions[13][5] = float("nan")
    column = pa.array(actions, type=table.schema.field("action").type)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    with pytest.raises(ValueError, match="action is nan in dimension 5 at episode 1, frame 1"):
        built(dataset_config(tmp_path / "copy"), tokenizer=tokenizer)


def test_mismatches_with_the_model(video, pictures, tokenizer):
    other = SampleSpec(4, 16, 10, (48, 48), 16, (FRONT, "observation.images.top"), state_dim=8, action_dim=7)
    with pytest.raises(ValueError) as error:
        built(dataset_config(pictures), tokenizer=tokenizer, spec=other)
    text = str(error.value)
    assert "the model expects" in text and "the data set has" in text
    assert "  observation.images.top | -\n" in text
    assert "| observation.images.wrist\n" in text
    assert "state: 8" in text and "observation.state: 7" in text
    assert "cameras: {<camera of the model>: <key in the data set>}" in text

    def mapped(cameras, spec=SPEC, **settings):
        return built(dataset_config(video, cameras=cameras, **settings), tokenizer=tokenizer, spec=spec)

    with pytest.raises(ValueError, match="`cameras` says observation.image, the cameras are observation.images.front"):
        mapped({FRONT: "observation.image"})
    with pytest.raises(ValueError, match="maps other, which the model does not have"):
        mapped({FRONT: FRONT, "other": None})
    with pytest.raises(ValueError, match=r"not in `cameras`"):
        mapped({FRONT: FRONT}, spec=SampleSpec(4, 16, 10, (48, 48), 16, (FRONT, WRIST), 7, 7))
    with pytest.raises(ValueError, match="every camera to null"):
        mapped({FRONT: None})
    with pytest.raises(ValueError, match="no observation.joints, it has observation.state, action"):
        mapped(None, state="observation.joints")
    with pytest.raises(ValueError, match="at most max_action_dim = 6"):
        mapped(None, spec=SampleSpec(4, 16, 6, (48, 48), 16, (FRONT,), 7, 7))
    with pytest.raises(ValueError, match="normalization_mapping.VISUAL must be IDENTITY"):
        built(dataset_config(video), tokenizer=tokenizer, modes={"VISUAL": "MEAN_STD"})
    with pytest.raises(ValueError, match="data.train.datasets is empty"):
        built(tokenizer=tokenizer)


def test_build_reports_and_infers(video, pictures, tokenizer, data):
    assert data.mixture.shares == [0.25, 0.75]
    assert len(data.reader.sources[0].episodes) == 3 and len(data.validation.sources[0].episodes) == 1
    assert any("leaves out observation.images.wrist" in line for line in data.report)
    inferred = built(
        dataset_config(pictures),
        tokenizer=tokenizer,
        spec=SampleSpec(4, 16, 10, (48, 48), 16),
        val=ValDataConfig([], 0),
    )
    assert inferred.spec.camera_slots == (FRONT, WRIST)
    assert (inferred.spec.state_dim, inferred.spec.action_dim, inferred.validation) == (7, 7, None)
    both = built(dataset_config(video), tokenizer=tokenizer, val=ValDataConfig([dataset_config(video, episodes=[1])]))
    assert any("WARNING" in line and "episodes 1 are trained on" in line for line in both.report)


def test_statistics_are_those_of_the_training_frames(video, tokenizer):
    data = built(dataset_config(video), tokenizer=tokenizer)
    train, held = hold_out(np.arange(4), 0.05)
    actions = opened(video).columns("action").reshape(4, 12, 7)
    np.testing.assert_allclose(data.robots[0].action_statistics.mean, actions[train].mean((0, 1)), atol=1e-6)
    assert data.validation.sources[0].episodes.tolist() == held.tolist()


def test_the_stream_does_not_depend_on_the_split(data):
    whole = by_number(micro_batches(data, 3, batch=16))
    assert sorted(whole) == list(range(48))
    assert {sample[0][0] for sample in whole.values()} == {0, 1}
    assert by_number(micro_batches(data, 12, batch=4)) == whole  # accumulation over four
    ranks = [micro_batches(data, 6, batch=4, rank=rank, world=2) for rank in (0, 1)]
    assert by_number(ranks[0] + ranks[1]) == whole
    assert ranks[1][1].sample_index.tolist() == [12, 13, 14, 15]
    assert by_number(micro_batches(data, 12, batch=4, workers=2)) == whole
    resumed = micro_batches(data, 2, batch=16, first_sample=16)
    assert by_number(resumed) == {k: sample for k, sample in whole.items() if k >= 16}
    far = micro_batches(data, 1, batch=16, first_sample=16 * 10**9)
    assert far[0].sample_index[0] == 16 * 10**9


def test_shapes_and_masks(video, tokenizer):
    slots = (FRONT, WRIST, "observation.images.empty_camera_0")
    spec = SampleSpec(4, 16, 10, (48, 48), 16, slots, 7, 7)
    config = dataset_config(video, cameras={FRONT: FRONT, WRIST: None})
    batch = micro_batches(built(config, tokenizer=tokenizer, spec=spec), 1, batch=8)[0]
    assert len(batch) == 8
    assert {slot: image.shape for slot, image in batch.observation.images.items()} == {FRONT: (8, 3, 48, 48)}
    assert batch.observation.image_masks[FRONT].all()
    assert batch.observation.state.shape == (8, 16) and not batch.observation.state[:, 7:].any()
    assert batch.observation.tokens.shape == batch.observation.token_mask.shape == (8, 8)  # not 16
    assert batch.actions.values.shape == batch.draws.noise.shape == (8, 4, 10)
    assert batch.actions.dim_mask.tolist() == [[True] * 7 + [False] * 3] * 8
    assert (batch.actions.values[..., 7:] == 0).all()
    assert str(batch.actions.values.dtype) == str(batch.draws.noise.dtype) == "torch.float32"


def test_a_camera_that_some_robots_lack(video, pictures, tokenizer):
    spec = SampleSpec(4, 16, 10, (48, 48), 16, (FRONT, WRIST), 7, 7)
    configs = [dataset_config(video, cameras={FRONT: FRONT, WRIST: None}), dataset_config(pictures)]
    batch = micro_batches(built(*configs, tokenizer=tokenizer, spec=spec), 1, batch=16)[0]
    has_wrist = batch.provenance[:, 0] == 1
    assert 0 < has_wrist.sum() < 16
    assert batch.observation.image_masks[WRIST].equal(has_wrist)
    assert not batch.observation.images[WRIST][~has_wrist].any()


def test_validation_is_a_fixed_set(data):
    def collected(size, batch, world):
        found = {}
        for rank in range(world):
            for item in ValidationBatches(data.validation, size, batch, rank, world):
                samples = by_number([item.batch])
                for row, index in enumerate(item.index.tolist()):
                    if index < 0:  # of a rank that is left with nothing
                        continue
                    found[index] = (samples[index], item.previous_action[row].tolist(), item.has_previous[row])
                    assert item.actions.shape[1:] == (4, 7)
        return found

    one = collected(9, 4, 1)
    assert sorted(one) == list(range(9))
    assert collected(9, 2, 2) == one
    together = [
        {tuple(item.index) for rank in range(world) for item in ValidationBatches(data.validation, 9, 2, rank, world)}
        - {(-1,)}
        for world in (1, 3)
    ]
    counts = {len(list(ValidationBatches(data.validation, 9, 2, rank, 4))) for rank in range(4)}
    assert counts == {2}  # five batches over four ranks, whose passes may be collectives
    assert together[0] == together[1] == {(0, 1), (2, 3), (4, 5), (6, 7), (8,)}  # whatever the number of ranks
    assert {sample[0][0][0] for sample in one.values()} == {0, 1}
    frames = sum(len(source) for source in data.validation.sources)
    assert len(collected(10**6, 8, 1)) == len(collected(0, 8, 1)) == frames
    held = [source.episodes.tolist() for source in data.validation.sources]
    assert all(sample[0][1] in held[sample[0][0]] for sample, _, _ in one.values())
