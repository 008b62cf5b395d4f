# SPDX-License-Identifier: Apache-2.0
"""The package as a type checker sees it: `make lint` checks this file and examples/ by mypy --strict."""

from __future__ import annotations

import importlib.util
import inspect
from importlib.resources import files
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import sparsebwd


def test_types_of_what_users_call() -> None:
    """When it runs, assert_type does nothing, and the calls have to work."""
    layer = sparsebwd.SparseConv2d(3, 4, 3, percentile=90)
    assert_type(layer.percentile, float | None)
    assert_type(layer.placement, str)
    assert_type(layer.where, str)
    assert_type(layer.pruning, sparsebwd.Pruning)
    layer.percentile = None
    layer.percentile = 95

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    assert_type(sparsebwd.convert(model, where="everywhere", exclude=["1"]), nn.Sequential)
    report = sparsebwd.conversion_report(model)
    assert_type(report, sparsebwd.ConversionReport)
    assert_type(report.layers, tuple[sparsebwd.LayerReport, ...])
    with sparsebwd.DensityMonitor(model) as monitor:
        model(torch.randn(1, 3, 5, 5)).sum().backward()
    assert_type(monitor, sparsebwd.DensityMonitor)
    assert_type(monitor.as_dict(), dict[str, Any])
    schedule = sparsebwd.PercentileSchedule(model, warmup=2)
    assert_type(schedule.percentiles(), dict[str, float])
    assert_type(schedule.state_dict(), dict[str, Any])
    found = sparsebwd.profile(model, torch.randn(1, 3, 5, 5), loss=lambda output, _: output.sum(), steps=2, alternatives=False)
    assert_type(found, sparsebwd.Profile)
    assert_type(found.speedup, float)
    assert_type(sparsebwd.revert(model), nn.Sequential)
    assert_type(sparsebwd.revert(layer), nn.Conv2d)

    pruned = sparsebwd.prune_gradient(torch.randn(2, 3, 4, 4))
    assert_type(pruned, sparsebwd.PrunedGradient)
    assert_type(pruned.values, Tensor)
    weight = torch.randn(2, 3, 3, 3)
    assert_type(sparsebwd.functional.sparse_conv2d(pruned.values, weight, percentile=None), Tensor)
    assert_type(sparsebwd.grad.conv2d_input((1, 3, 5, 5), weight, torch.randn(1, 2, 3, 3)), Tensor)
    assert_type(sparsebwd.info(), sparsebwd.Info)


def test_public_signatures_say_all_types() -> None:
    """mypy takes what has no annotation as Any, and strict callers are refused such functions."""
    public = [getattr(sparsebwd, name) for name in sparsebwd.__all__]
    public += [getattr(module, name) for module in (sparsebwd.functional, sparsebwd.grad) for name in module.__all__]
    classes = [thing for thing in public if inspect.isclass(thing)]
    functions = [thing for thing in public if inspect.isfunction(thing)]
    for cls in classes:
        for name, member in vars(cls).items():
            member = getattr(member, "__func__", member)  # of a class or static method
            if inspect.isfunction(member) and (not name.startswith("_") or name == "__init__"):
                functions.append(member)
    for function in functions:
        names = list(inspect.signature(function).parameters)
        if function.__qualname__ != function.__name__ and names[:1] in (["self"], ["cls"]):
            del names[0]
        missing = {*names, "return"} - function.__annotations__.keys()
        assert not missing, f"{function.__qualname__}: {missing}"


def test_it_says_that_it_has_types() -> None:
    assert files("sparsebwd").joinpath("py.typed").is_file()


def test_no_function_hides_a_module() -> None:
    """`import sparsebwd.x` would import the module, and `sparsebwd.x` be the function. But info: `python -m sparsebwd.info`."""
    things = [name for name in sparsebwd.__all__ if not inspect.ismodule(getattr(sparsebwd, name))]
    assert [name for name in things if importlib.util.find_spec(f"sparsebwd.{name}")] == ["info"]
    importlib.import_module("sparsebwd.info")
    assert callable(sparsebwd.info)
