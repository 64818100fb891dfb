"""Calibration, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hfbench.results.calibration import calibration_error, reliability

# Four images; the second is classified wrongly.
CONFIDENCE = np.array([0.9, 0.8, 0.6, 1.0])
RIGHT = np.array([True, False, True, True])


def test_calibration_error_is_the_mean_gap_of_the_bins() -> None:
    # Two bins: all four confidences are above 0.5. Mean 0.825, accuracy 0.75.
    assert calibration_error(CONFIDENCE, RIGHT, bins=2) == pytest.approx(0.075)
    # Five bins: (0.4, 0.6]: 0.6, right: gap 0.4. (0.6, 0.8]: 0.8, wrong: gap 0.8.
    # (0.8, 1]: 0.9 and 1.0, both right: gap 0.05, twice.
    expected = (0.4 + 0.8 + 2 * 0.05) / 4
    assert calibration_error(CONFIDENCE, RIGHT, bins=5) == pytest.approx(expected)


def test_bins_are_closed_above_and_hold_every_image() -> None:
    found = reliability(CONFIDENCE, RIGHT, bins=5)
    assert [item.count for item in found] == [0, 0, 1, 1, 2]
    assert found[4].confidence == pytest.approx(0.95)
    assert found[4].accuracy == 1.0
    assert found[0].accuracy is None


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not() -> None:
    sure = np.ones(3)
    assert calibration_error(sure, np.full(3, True)) == 0.0
    assert calibration_error(sure, np.full(3, False)) == 1.0
