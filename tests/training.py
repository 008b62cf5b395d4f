# SPDX-License-Identifier: Apache-2.0
"""What tests of the training command share: a tiny model, short runs of it, and when two runs are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from sparsebwd import models
from sparsebwd.train import checkpoint, cli, measure

TINY = """
from torch import nn
from sparsebwd import models

def tiny(num_classes, form="cifar", width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(2 * width, num_classes),
    )

models._BUILDERS["tiny"] = tiny
"""
DRIVER = f"{TINY}\nimport sys\nfrom sparsebwd.train.cli import main\nif __name__ == '__main__': sys.exit(main())\n"

# 96 digits of 8x8 pixels: 6 steps an epoch.
SMALL = ["--model", "tiny", "--data", "digits", "--image-size", "8", "--train-subset", "96", "--test-subset", "40"]
SMALL += ["--batch-size", "16", "--measure-every", "3", "--epochs", "2"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Makes the model "tiny" known, and forgets it afterwards."""
    monkeypatch.setattr(models, "_BUILDERS", dict(models._BUILDERS))
    exec(TINY, {})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def signals():
    """Signals do what they do in a terminal, also where the tests themselves ignore some, as in the background."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(folder, *arguments):
    assert cli.main([*SMALL, "--output", str(folder), *arguments]) == 0


def refused(capsys, *arguments):
    """What the command says when it refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def train_by_two(folder, runs, definitions=TINY) -> str:
    """The command, once for each list of arguments in `runs`, by two processes under torchrun. Returns what they print."""
    lines = [
        definitions,
        "import torch.distributed",
        "from sparsebwd.train.cli import main",
        "torch.distributed.init_process_group('gloo')",
        f"statuses = [main([*{SMALL!r}, '--device', 'cpu', *run]) for run in {runs!r}]",
        "torch.distributed.destroy_process_group()",
        "assert not any(statuses), statuses",
    ]
    (folder / "driver.py").write_text("\n".join(lines))
    # The name of this machine need not have an address.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--nproc-per-node", "2", str(folder / "driver.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        process.terminate()  # torchrun then ends its own processes, where they hang
    assert process.returncode == 0, errors
    return output


def interrupt(*_):
    raise KeyboardInterrupt


def saved_state(folder):
    return torch.load(folder / checkpoint.FILE, weights_only=True)["state"]


def without_times(value):
    """The same without what no two runs have in common."""
    if isinstance(value, dict):
        times = (*measure.TIMES, "speedup", "step", "forward", "backward", "conv_backward", "environment")
        return {key: without_times(item) for key, item in value.items() if key not in times}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def assert_same_run(first, second):
    """Bit for bit: weights, statistics, momenta, and everything in the logs but times."""
    first, second = saved_state(first), saved_state(second)
    assert first["step"] == second["step"]
    assert without_times(first["history"]) == without_times(second["history"])
    assert first["twins"].keys() == second["twins"].keys()
    for name, twin in first["twins"].items():
        other = second["twins"][name]
        assert without_times(twin["tally"]) == without_times(other["tally"])
        for key, tensor in twin["model"].items():
            assert torch.equal(tensor, other["model"][key]), (name, key)
        momenta, others = twin["momenta"], other["momenta"]
        assert momenta.keys() == others.keys() and momenta
        for key in momenta:
            assert torch.equal(momenta[key], others[key]), (name, key)
