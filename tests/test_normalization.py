"""Statistics and invertible normalisation. Run: pytest tests/test_normalization.py"""

import numpy as np
import pytest

from agent.data.normalization import MODES, Normalizer, compute_statistics, merge_statistics, to_lerobot_stats


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
