# SPDX-License-Identifier: Apache-2.0
"""Files of captured gradients."""

from __future__ import annotations

import pytest
import torch

from sparsebwd.bench import gradients
from sparsebwd.bench.gradients import Captured, GradientFile
from sparsebwd.data.records import load_record, save_record
from sparsebwd.problem import ConvProblem

PROBLEM = ConvProblem.parse("n2c4h6w5k8r3s3u2x1p1d1g1")


def captured(**changes) -> Captured:
    fields = {
        "layer": "stages.0.0.conv1",
        "problem": PROBLEM,
        "step": 50,
        "needs_grad_input": True,
        "grad_output": torch.randn(PROBLEM.output_size).contiguous(memory_format=torch.channels_last),
    }
    return Captured(**fields | changes)


def a_file(*found: Captured) -> GradientFile:
    return GradientFile("resnet18", "digits", 90.0, "output", found)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "folder" / "gradients.pt"
    saved = a_file(captured(), captured(layer="stem.0", step=300, needs_grad_input=False))
    gradients.save(path, saved)
    loaded = gradients.load(path)
    assert (loaded.model, loaded.data, loaded.percentile, loaded.placement) == ("resnet18", "digits", 90.0, "output")
    assert len(loaded.gradients) == 2
    for before, after in zip(saved.gradients, loaded.gradients):
        assert (before.layer, before.problem, before.step) == (after.layer, after.problem, after.step)
        assert before.needs_grad_input is after.needs_grad_input
        assert torch.equal(before.grad_output, after.grad_output)
        assert after.grad_output.is_contiguous(memory_format=torch.channels_last)
    assert [file.name for file in path.parent.iterdir()] == ["gradients.pt"]


def test_the_file_is_a_plain_record(tmp_path):
    path = tmp_path / "gradients.pt"
    gradients.save(path, a_file(captured()))
    record = torch.load(path, weights_only=True)
    assert set(record) == {"format", "model", "data", "percentile", "placement", "gradients"}
    assert record["format"] == "sparsebwd-gradients-1"
    (found,) = record["gradients"]
    assert set(found) == {"layer", "problem", "step", "needs_grad_input", "grad_output"}
    assert found["problem"] == str(PROBLEM)


def test_a_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"grad_output: got shape \(1, 2\); accepted: \(2, 8, 3, 5\)"):
        captured(grad_output=torch.zeros(1, 2))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _edit(**changes):
    def edit(path):
        save_record(path, load_record(path) | changes)

    return edit


def _flip_a_bit(path):
    """Of a number: the file is as well-formed as before."""
    content = bytearray(path.read_bytes())
    number = captured(grad_output=torch.full(PROBLEM.output_size, 3.0)).grad_output.numpy().tobytes()
    content[content.index(number)] ^= 1
    path.write_bytes(content)


def test_every_bit_counts(tmp_path):
    path = tmp_path / "gradients.pt"
    gradients.save(path, a_file(captured(grad_output=torch.full(PROBLEM.output_size, 3.0))))
    gradients.load(path)
    _flip_a_bit(path)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        gradients.load(path)


def test_a_file_of_an_earlier_version_is_named_so(tmp_path):
    path = tmp_path / "gradients.pt"
    gradients.save(path, a_file(captured()))
    torch.save(load_record(path), path)
    with pytest.raises(ValueError, match="written by an earlier version"):
        gradients.load(path)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text("percentile 90"), "was not written by"),
        (lambda path: torch.save([1, 2], path), "was not written by"),
        (_truncate, "truncated"),
        (_edit(format="other"), "its format is not sparsebwd-gradients-1"),
        (_edit(gradients=[{"problem": "n2"}]), "was not written by"),
        (_edit(more=1), "was not written by"),
    ],
)
def test_anything_else_is_refused(spoil, reason, tmp_path):
    path = tmp_path / "gradients.pt"
    gradients.save(path, a_file(captured()))
    spoil(path)
    with pytest.raises(ValueError, match=reason) as refused:
        gradients.load(path)
    assert str(path) in str(refused.value)
