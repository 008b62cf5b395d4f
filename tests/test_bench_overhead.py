# SPDX-License-Identifier: Apache-2.0
"""``bench overhead``. No test asserts how long anything takes."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from sparsebwd import SparseConv2d
from sparsebwd.bench import overhead, phases, terminal

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)  # as that of the benchmark
app.command()(overhead.command)
SMALL = ["--layers", "3", "--image-size", "4", "--repeats", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Malloc and the number of threads are left as they are."""
    monkeypatch.setattr(terminal, "keep_freed_memory", lambda: "as is")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16", "--layout", "contiguous"]])
def test_command(options, tmp_path):
    files = {name: tmp_path / f"overhead.{name}" for name in ("json", "markdown")}
    result = CliRunner().invoke(
        app, [*SMALL, *options, *(part for name, path in files.items() for part in (f"--{name}", str(path)))]
    )
    assert result.exit_code == 0, result.output
    record = json.loads(files["json"].read_text())
    assert set(record) == {"environment", "setting", "results"}
    assert record["setting"]["command"].startswith("python -m sparsebwd.bench overhead --layers 3 --image-size 4")
    assert list(record["results"]) == [overhead.PLAIN, *overhead.VARIANTS]
    for name, found in record["results"].items():
        assert set(found) == {"forward_us", "backward_us", "over_forward_us", "over_backward_us", "iqr_us"}
        assert found["forward_us"] > 0 and found["backward_us"] > 0
        assert name in result.output and f"| {name} | {found['forward_us']:.1f} |" in files["markdown"].read_text()
    assert record["results"][overhead.PLAIN]["over_forward_us"] == 0
    assert record["setting"]["command"] in files["markdown"].read_text()
    title = "3 layers, batch 1, 4x4 pixels, " + ("bfloat16, contiguous" if options else "float32, channels_last")
    assert f"{title}, threads 1" in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--dtype", "float16"], "dtype: got 'float16'; accepted: float32, bfloat16"),
        (["--layout", "nchw"], "layout: got 'nchw'; accepted: channels_last, contiguous"),
        (["--json", "/dev/null/file"], "json: got '/dev/null/file'; /dev/null is not a folder to write to"),
    ],
)
def test_refused(arguments, words):
    result = CliRunner().invoke(app, [*SMALL, *arguments])
    assert result.exit_code == 2 and words in " ".join(result.output.replace("│", " ").split())


def test_chains():
    plain = overhead.chain(20, {})
    convolutions = [module for module in plain.modules() if isinstance(module, nn.Conv2d)]
    assert len({str(convolution) for convolution in convolutions}) == 20
    assert not any(isinstance(module, SparseConv2d) for module in convolutions)
    for settings in overhead.VARIANTS.values():
        chain = overhead.chain(20, settings)
        layers = [module for module in chain.modules() if isinstance(module, SparseConv2d)]
        assert len(layers) == 20 and all(getattr(layers[0], name) == value for name, value in settings.items())


def test_overhead_is_the_median_difference_of_a_layer():
    own, plain = phases.PhaseTimer(), phases.PhaseTimer()
    for phase in phases.PHASES:
        plain.seconds[phase] = [9.0, 9.0, 1e-6, 2e-6, 6e-6]
        own.seconds[phase] = [9.0, 9.0, 5e-6, 6e-6, 14e-6]
    found = overhead.result(own, plain, layers=2)
    assert found["forward_us"] == pytest.approx(3) and found["over_forward_us"] == pytest.approx(2)
    assert found["iqr_us"]["backward"] == pytest.approx(1)


def test_phases():
    weight = torch.ones(3, requires_grad=True)
    timer, optimizer = phases.PhaseTimer(), torch.optim.SGD([weight], lr=1.0)
    for _ in range(4):
        timer.step(optimizer, lambda: 0.5 * (weight * weight).sum())
    assert torch.equal(weight, torch.zeros(3))
    assert all(len(timer.seconds[phase]) == 4 for phase in phases.PHASES)
    for total, *parts in zip(*(timer.seconds[phase] for phase in phases.PHASES)):
        assert total == pytest.approx(sum(parts))
    timer.seconds["forward"] = [100.0, 100.0, 1.0, 2.0]
    assert timer.times()["forward_ms"] == 1500 and timer.times()["iqr_ms"]["forward"] == 500
