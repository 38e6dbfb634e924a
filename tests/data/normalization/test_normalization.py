"""Statistics and invertible normalisation. Run: pytest tests/data/normalization/test_normalization.py"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.forked import ForkServer
from support.launching import Workplace

from agent.data.normalization.normalizer import (
    MODES,
    Normalizer,
    compute_statistics,
    merge_statistics,
    to_lerobot_stats,
)
from agent.data.normalization.relative import Chunks, chunk_statistics


@pytest.fixture
def columns():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(500, 4)) * [1, 10, 0.01, 100] + [0, 5, -3, 1000]
    return values.astype(np.float32)


def test_statistics_are_exact(columns):
    statistics = compute_statistics(columns)
    wide = columns.astype(np.float64)
    np.testing.assert_allclose(statistics.mean, wide.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics.std, wide.std(0), rtol=1e-6)
    np.testing.assert_array_equal(statistics.min, columns.min(0))
    np.testing.assert_array_equal(statistics.q99, np.sort(columns, axis=0)[494])  # 495 of 500 are not above it
    np.testing.assert_array_equal(statistics.q10, np.sort(columns, axis=0)[49])
    assert statistics.clamped == ()
    assert statistics.mean.dtype == np.float32


@pytest.mark.parametrize("mode", MODES)
def test_inverse(columns, mode):
    import torch

    normalizer = Normalizer(mode, compute_statistics(columns))
    there = normalizer.normalize(columns)
    assert there.dtype == np.float32
    np.testing.assert_allclose(normalizer.unnormalize(there), columns, rtol=1e-5, atol=1e-5)
    tensor = torch.from_numpy(columns).reshape(50, 10, 4)
    np.testing.assert_allclose(normalizer.normalize(tensor).reshape(500, 4), there, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(normalizer.unnormalize(normalizer.normalize(tensor)), tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_lerobot_normalizes_identically(columns, mode):
    import torch
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep
    from lerobot.processor.converters import create_transition

    columns[:, 2] = 0.25  # near-constant: the clamped statistics must serve LeRobot as well
    statistics = compute_statistics(columns)
    arguments = {
        "features": {"action": PolicyFeature(FeatureType.ACTION, (4,))},
        "norm_map": {FeatureType.ACTION: NormalizationMode(mode)},
        "stats": to_lerobot_stats(statistics, statistics),
    }
    action = torch.from_numpy(columns)
    theirs = NormalizerProcessorStep(**arguments)(create_transition(action=action))["action"]
    normalizer = Normalizer(mode, statistics)
    torch.testing.assert_close(normalizer.normalize(action), theirs, rtol=0, atol=0)
    back = UnnormalizerProcessorStep(**arguments)(create_transition(action=theirs))["action"]
    torch.testing.assert_close(normalizer.unnormalize(theirs), back, rtol=0, atol=0)


def test_near_constant_dimensions_are_clamped(columns):
    columns[:, 0] = 3.0
    columns[:, 1] = 0.0
    columns[-2:, 1] = 1.0  # moves in two frames of 500: the quantiles coincide, the standard deviation is fine
    statistics = compute_statistics(columns)
    assert statistics.clamped == (0, 1)
    assert (statistics.std[0], statistics.min[0], statistics.max[0]) == (1, 2, 4)
    assert (statistics.q01[0], statistics.q99[0], statistics.q10[0], statistics.q90[0]) == (2, 4, 2, 4)
    assert statistics.std[1] == pytest.approx(np.std(columns[:, 1].astype(np.float64)))
    assert (statistics.q01[1], statistics.q99[1]) == (0, 1)
    for mode in MODES[1:]:
        normalized = Normalizer(mode, statistics).normalize(columns)
        assert np.abs(normalized[:, :2]).max() < 20
        np.testing.assert_allclose(normalized[:, 0], 0)


@pytest.mark.parametrize("scale", [1e-5, 3e-5, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("mode", MODES[1:])
def test_what_is_narrow_does_not_depend_on_the_unit(columns, mode, scale):
    columns[:, 3] = 0.25  # and this one is constant in any
    columns[:, 2] = -3 + 1e-5 * columns[:, 0]  # a held joint and the noise of its sensor
    scaled = (columns * np.float32(scale)).astype(np.float32)
    statistics = compute_statistics(scaled)
    assert statistics.constant == statistics.clamped == (2, 3)
    one, other = (Normalizer(mode, compute_statistics(values)).normalize(values) for values in (columns, scaled))
    np.testing.assert_allclose(one[:, :2], other[:, :2], rtol=2e-2, atol=1e-2)
    np.testing.assert_allclose(Normalizer("MEAN_STD", statistics).normalize(scaled)[:, :2].std(0), 1, rtol=2e-3)


def test_what_varies_by_the_steps_of_its_type_is_constant():
    generator = np.random.default_rng(0)
    steps = generator.integers(0, 3, size=(500, 1))
    high = (60000 + steps * 2**-8).astype(np.float32)  # neighbours as float32
    assert compute_statistics(high).constant == (0,)
    coarse = (np.float16(1) + steps * np.finfo(np.float16).eps).astype(np.float16)
    assert compute_statistics(coarse).constant == (0,) and compute_statistics(coarse.astype(np.float32)).constant == ()
    assert compute_statistics(1e-12 * generator.normal(size=(500, 1))).constant == (0,)  # LeRobot's epsilon is 1e-8
    numbers = generator.integers(0, 2, size=(500, 1))
    assert compute_statistics(numbers).constant == () and compute_statistics(0 * numbers + 7).constant == (0,)
    # relative actions: a difference is as coarse as the two that it is of
    part = Chunks([high + 10], [high], np.asarray([500]), 4, np.asarray([True]))
    assert chunk_statistics([part], [1.0]).constant == (0,)
    fine = Chunks([high - 60000], [(high - 60000) * np.float32(1.5)], np.asarray([500]), 4, np.asarray([True]))
    assert chunk_statistics([fine], [1.0]).constant == ()


def test_quantiles_are_narrow_beside_the_range(columns):
    """A joint that trembles by 1e-5 and moves in two frames of 500 has the range for its scale."""
    columns[:, 1] = 1e-5 * columns[:, 0]
    columns[-2:, 1] = 1.0
    statistics = compute_statistics(columns)
    assert statistics.clamped == (1,) and statistics.constant == ()
    assert np.abs(Normalizer("QUANTILES", statistics).normalize(columns)[:, 1]).max() <= 1


def test_the_rule_of_before_is_kept(columns):
    """To the bit, for the runs that were begun with it."""
    columns[:, 0] *= np.float32(1e-5)
    columns[:, 1] = 0.0
    columns[-2:, 1] = 1.0
    statistics = compute_statistics(columns, rule=1)
    assert statistics.clamped == (0, 1) and statistics.constant == (0,)
    mean = columns[:, 0].astype(np.float64).mean()
    assert (statistics.std[0], statistics.max[0], statistics.q10[0]) == (1, np.float32(mean + 1), np.float32(mean - 1))
    now = compute_statistics(columns)
    assert now.clamped == (1,) and now.std[0] == pytest.approx(1e-5, rel=0.1)
    for name in statistics.known:
        np.testing.assert_array_equal(statistics.to_dict()[name][1:], now.to_dict()[name][1:])


def test_a_run_keeps_the_rule_that_it_began_with(server: ForkServer, place: Workplace, tmp_path: Path):
    from safetensors.numpy import load_file

    def scaled(root: Path) -> tuple[str, ...]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        (path,) = root.glob("data/*/*.parquet")
        table = pq.read_table(path)
        at = table.schema.get_field_index("action")
        values = pa.array((3e-5 * np.stack(table["action"].to_numpy())).tolist(), table.schema.field("action").type)
        pq.write_table(table.set_column(at, "action", values), path)
        return ("--data.train.datasets.0.root", str(root), "--eval_freq", "0")

    def found(name: str) -> tuple[int, np.ndarray]:
        last = place.checkpoint(name)
        (file,) = last.glob("pretrained_model/policy_preprocessor_*.safetensors")
        return json.loads((last / "training_state/state.json").read_text())["narrow_rule"], load_file(file)[
            "action.std"
        ]

    arguments = scaled(shutil.copytree(place.folder / "data", tmp_path / "data"))
    server.start(place, "begun", *arguments, "--n_updates", "2", hook="first_narrow_rule").wait()
    rule, deviation = found("begun")
    assert rule == 1 and (deviation == 1).all()
    longer = ("--n_updates", "3", "--resume_changes", "true")
    output = server.start(place, "begun", *arguments, *longer).wait()
    assert place.status("begun")["state"] == "finished" and place.checkpoint("begun").name == "step_00000003", output
    assert found("begun")[0] == 1 and (found("begun")[1] == 1).all()
    assert (
        "action dimensions [0, 1, 2, 3, 4, 5, 6] vary by less than 1e-4 in their unit, which this run was begun"
        in output
    )
    output = server.start(place, "new", *arguments, "--n_updates", "1").wait()
    rule, deviation = found("new")
    assert rule == 2 and (deviation < 1e-5).all() and "hardly vary" not in output and "was begun" not in output


def test_checkpoints_that_name_no_rule_are_of_the_first(tmp_path):
    from agent.training.resuming import narrow_rule

    for number, content in enumerate(["{}", "damaged", '{"narrow_rule": 2}', '{"narrow_rule": 9}']):
        (tmp_path / str(number) / "training_state").mkdir(parents=True)
        (tmp_path / str(number) / "training_state" / "state.json").write_text(content)
    rules = [narrow_rule([tmp_path / str(number) for number in some]) for some in ([], [0], [1, 0], [1, 2, 0], [1])]
    assert rules == [2, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="has narrow_rule 9, and this program knows rules 1 to 2"):
        narrow_rule([tmp_path / "3"])


def test_merge_without_weights_is_the_pool(columns):
    merged = merge_statistics([[columns[:30], columns[30:100]], [columns[100:]]], [0.2, 0.8])
    for name, value in compute_statistics(columns).to_dict().items():
        np.testing.assert_array_equal(merged.to_dict()[name], value)


def test_merge_with_weights_counts_frames_by_share(columns):
    few, many = columns[:100], columns[100:] + 7
    merged = merge_statistics([[few], [many[:1], many[1:]]], [0.5, 0.5])
    repeated = compute_statistics(np.concatenate([np.repeat(few, 4, axis=0), many]))
    for name, value in repeated.to_dict().items():
        np.testing.assert_allclose(merged.to_dict()[name], value, rtol=1e-5)


def test_bad_values(columns):
    columns[17, 2] = np.nan
    with pytest.raises(ValueError, match="dimension 2 is nan at row 17"):
        compute_statistics(columns)
    with pytest.raises(ValueError, match="frames, dims"):
        compute_statistics(columns[:0])
    with pytest.raises(ValueError, match="'MEAN' is unknown, choose one of IDENTITY, MEAN_STD"):
        Normalizer("MEAN", compute_statistics(columns[:10]))
