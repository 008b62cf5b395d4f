# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel of two processes, which are started once for all tests: that takes longer than what they do."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsebwd import SparseConv2d
from sparsebwd.testing import assert_bit_equal

pytestmark = pytest.mark.slow


def _model() -> nn.Module:
    return nn.Sequential(SparseConv2d(4, 8, 3, padding=1), nn.ReLU(), SparseConv2d(8, 4, 3, percentile=None))


def _one_step(rank: int) -> dict:
    torch.manual_seed(0)
    model = _model()
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(100 + rank)  # each process prunes with numbers of its own
    x = torch.randn(3, 4, 7, 6)
    wrapped(x).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return {"x": x, "state": model.state_dict(), "gradients": gradients}


def _histories(rank: int) -> list[torch.Tensor]:
    """Of a layer with predicted thresholds, after each of three steps."""
    module = SparseConv2d(4, 6, 3, padding=1, threshold="predicted")
    wrapped = DistributedDataParallel(module)
    torch.manual_seed(rank)
    histories = []
    for _ in range(3):
        y = wrapped(torch.randn(2, 4, 8, 7))
        y.backward((1 + rank) * torch.randn_like(y))
        histories.append(module.sigma_history.clone())
    return histories


def _worker(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.save((_one_step(rank), _histories(rank)), f"{path}/{rank}")
    # A wrapped model that is freed after its group may wait for a thread that waits for the interpreter's lock.
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What `_one_step` and `_histories` return in either process."""
    path = tmp_path_factory.mktemp("distributed")
    mp.spawn(_worker, (str(path),), nprocs=2)
    return [torch.load(path / str(rank)) for rank in range(2)]


def test_gradients_are_the_mean_of_those_of_the_processes(results):
    """Two processes end with the mean of the gradients that each would have alone."""
    first, second = (step for step, _ in results)
    alone = []
    for rank, result in enumerate((first, second)):
        model = _model()
        model.load_state_dict(result["state"])
        torch.manual_seed(100 + rank)
        assert torch.equal(torch.randn(3, 4, 7, 6), result["x"])
        model(result["x"]).square().sum().backward()
        alone.append([parameter.grad for parameter in model.parameters()])
    for one, two, *single in zip(first["gradients"], second["gradients"], *alone):
        assert_bit_equal(one, two)
        torch.testing.assert_close(one, (single[0] + single[1]) / 2, rtol=1e-5, atol=1e-5)


def test_thresholds_are_predicted_from_the_history_of_the_first_process(results):
    """To which each adds its own for a step."""
    first, second = (histories for _, histories in results)
    for i in range(3):
        assert first[i][0] == second[i][0] == i + 1
        assert torch.equal(first[i][1 : i + 1], second[i][1 : i + 1])
        assert first[i][i + 1] != second[i][i + 1]
