# SPDX-License-Identifier: Apache-2.0
"""The models of a run: the sparse one, its dense twin, or both."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import models
from ..backends.dense import corrupts_memory
from ..conversion import convert
from ..nn import SparseConv2d
from ..noise import NoiseController
from ..settings import parse_granularity
from .config import TrainConfig
from .measure import EpochTally
from .sync import synchronize_norms
from .world import World


@dataclass
class Twin:
    """A model in training. `parallel` is the model as it trains: compiled, wrapped where there are several processes."""

    name: str  # sparse or dense
    model: nn.Module
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    tally: EpochTally
    controller: NoiseController | None = None  # of the thresholds, with noise=

    @property
    def sparse_layers(self) -> bool:
        """Whether it has any."""
        return any(isinstance(module, SparseConv2d) for module in self.model.modules())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        state = self.optimizer.state
        momenta = {
            name: state[value].get("momentum_buffer") for name, value in self.model.named_parameters() if value in state
        }
        histories = {name: value for name, value in self.model.named_buffers() if name.endswith("sigma_history")}
        noise = {} if self.controller is None else {"noise": self.controller.state_dict()}
        return noise | {
            "model": self.model.state_dict(),
            "sigma_histories": histories,
            "momenta": {name: value for name, value in momenta.items() if value is not None},
            "tally": asdict(self.tally),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state that fits."""
        self.model.load_state_dict(state["model"])
        for name, history in state["sigma_histories"].items():
            self.model.get_buffer(name).copy_(history)
        for name, value in self.model.named_parameters():
            if name in state["momenta"]:
                momentum = torch.empty_like(value, requires_grad=False).copy_(state["momenta"][name])
                self.optimizer.state[value]["momentum_buffer"] = momentum
        if self.controller is not None:
            self.controller.load_state_dict(state["noise"])
        self.tally = EpochTally(**state["tally"])


def build_twins(config: TrainConfig, num_classes: int, world: World, warn: Callable[[str], None]) -> list[Twin]:
    """The sparse model, the dense one, or both from the same weights; `warn` gets what conversion warns of."""
    torch.manual_seed(config.seed)
    dense = models.create(config.model, num_classes, config.network_form, config.width).to(world.device)
    if config.channels_last and world.device.type == "cpu" and (config.dense or config.compare or config.noise is not None):
        for name, module in dense.named_modules():
            if isinstance(module, nn.Conv2d) and corrupts_memory(module.kernel_size, module.stride, module.in_channels):
                raise ValueError(
                    f"width: got {config.width}, with which PyTorch's own gradients of the convolution {name!r} corrupt memory in "
                    "channels_last; accepted: 8 and more, or --no-channels-last"
                )
    if config.channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    twins = []
    if not config.dense:
        sparse = copy.deepcopy(dense) if config.compare else dense
        _convert(sparse, config, warn)
        twins.append(_twin("sparse", sparse, config, world))
    if config.dense or config.compare:
        twins.append(_twin("dense", dense, config, world))
    return twins


def _convert(model: nn.Module, config: TrainConfig, warn: Callable[[str], None]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(
            model,
            percentile=config.percentile,
            density=config.density,
            variance=config.variance,
            noise=config.noise,
            granularity=parse_granularity(config.granularity),
            importance=config.importance,
            placement=config.placement,
            backend=config.backend,
            sigma_estimator=config.sigma_estimator,
            threshold=config.threshold,
            where=config.where,
            exclude=config.excluded_layers(),
        )
    _set_layer_percentiles(model, config)
    for warning in caught:
        warn(str(warning.message))


def _set_layer_percentiles(model: nn.Module, config: TrainConfig) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseConv2d)}
    for pattern, percentile in config.layer_percentiles():
        chosen = [module for name, module in layers.items() if fnmatch.fnmatchcase(name, pattern)]
        if not chosen:
            known = ", ".join(layers) or "none"
            raise ValueError(
                f"layer_percentile: got {pattern!r}, accepted are names of sparse layers of the model, or patterns of them: "
                f"{known}"
            )
        for module in chosen:
            module.pruning = module.pruning.replace(percentile=percentile)


def _twin(name: str, model: nn.Module, config: TrainConfig, world: World) -> Twin:
    if config.sync_bn and world.size > 1:
        synchronize_norms(model)
    parallel = torch.compile(model) if config.compile else model
    parallel = DistributedDataParallel(parallel) if world.size > 1 else parallel
    # The rate of each step is set before it.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)
    return Twin(name, model, parallel, optimizer, EpochTally())
