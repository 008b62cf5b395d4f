# SPDX-License-Identifier: Apache-2.0
"""The settings object: validation, immutability, and the text that operators take."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsebwd import Pruning, SparseConv2d
from sparsebwd.settings import PLACEMENTS, THRESHOLDS

SETTINGS = st.builds(
    Pruning,
    percentile=st.none() | st.floats(50, 100, exclude_max=True),
    placement=st.sampled_from(PLACEMENTS),
    sigma_estimator=st.sampled_from(["corrected", "as_printed"]),
    threshold=st.sampled_from(THRESHOLDS),
    backend=st.sampled_from(["auto", "reference", "dense"]),
)


@given(SETTINGS)
def test_text_is_read_back(pruning):
    assert Pruning.parse(pruning.text) == pruning
    assert hash(Pruning.parse(pruning.text)) == hash(pruning)


def test_text_of_the_default_is_empty():
    assert Pruning().text == ""
    assert Pruning(95, "input").text == "percentile=95.0,placement=input"


def test_is_immutable_and_replaced_whole():
    pruning = Pruning(95)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pruning.percentile = 90
    other = pruning.replace(placement="input")
    assert (other.percentile, other.placement, pruning.placement) == (95.0, "input", "output")
    assert other.text == "percentile=95.0,placement=input" and other.active
    assert not Pruning(50).active and not Pruning(None).active


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"percentile": 100}, ValueError, "percentile: got 100; accepted: 50 <= percentile < 100"),
        ({"percentile": "90"}, TypeError, "percentile: got '90'"),
        ({"placement": b"input"}, TypeError, "placement: got b'input'; accepted: 'output', 'input'"),
        ({"placement": "both"}, ValueError, "placement: got 'both'; accepted: 'output', 'input'"),
        ({"sigma_estimator": None}, TypeError, "sigma_estimator: got None"),
        ({"threshold": "fixed"}, ValueError, "threshold: got 'fixed'; accepted: 'exact', 'predicted'"),
        ({"backend": 1}, TypeError, "backend: got 1"),
        ({"backend": "gpu"}, ValueError, "backend: got 'gpu'; accepted: 'auto', 'reference'"),
    ],
)
def test_refusals_name_the_setting(settings, error, message):
    with pytest.raises(error, match=message):
        Pruning(**settings)
    with pytest.raises(error, match=message):
        Pruning().replace(**settings)


@pytest.mark.parametrize("text", ["percentile", "colour=red", "percentile=90,percentile=95", "percentile=much", "=90"])
def test_text_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="pruning: got|percentile: got"):
        Pruning.parse(text)


def test_a_layer_has_its_settings_as_one():
    layer = SparseConv2d(4, 8, 3, percentile=95, placement="input")
    assert layer.pruning == Pruning(95, "input")
    layer.pruning = layer.pruning.replace(percentile=None, threshold="predicted")
    assert layer.percentile is None and layer.sigma_history.tolist() == [0] * 5
    layer.sigma_history[0] = 1
    layer.percentile = 90  # sigma does not depend on it
    assert layer.sigma_history[0] == 1
    layer.placement = "output"
    assert layer.sigma_history[0] == 0
    with pytest.raises(TypeError, match="pruning: got str; accepted: a sparsebwd.Pruning"):
        layer.pruning = "percentile=90"
    assert layer.pruning == Pruning(90, threshold="predicted")
