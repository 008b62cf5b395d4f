# SPDX-License-Identifier: Apache-2.0
"""``bench capture`` and ``bench step`` on a tiny model. No test asserts how long anything takes."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from sparsebwd import models, revert
from sparsebwd.bench import capture, gradients, memory, phases, sides, step, terminal, training
from sparsebwd.problem import ConvProblem
from sparsebwd.train.measure import KINDS

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)  # as that of the benchmark
app.command("capture")(capture.command)
app.command("step")(step.command)

SMALL = {"model": "tiny", "image_size": 8, "batch": 4, "threads": 1}
NAMES = ["0", "3", "6"]
GPU = torch.device("cuda")


def tiny(num_classes: int, form: str = "cifar") -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32, num_classes),
    )


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """The tiny model; malloc and the number of threads are left as they are."""
    monkeypatch.setitem(models._BUILDERS, "tiny", tiny)
    monkeypatch.setattr(terminal, "keep_freed_memory", lambda: "as is")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(name: str, *arguments: object):
    small = [part for option, value in SMALL.items() for part in (f"--{option.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(app, [name, *small, *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def trainer(**options):
    given = SMALL | {"data": "digits", "percentile": "90", "layout": "channels_last"}
    return training.prepare(given | options)


def gradients_by_autograd(run) -> list[torch.Tensor]:
    """Of the outputs of the dense model's convolutions, in the first step."""
    model = revert(training.model_of(run))
    outputs = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
    inputs, labels = run.batch(0)
    return list(torch.autograd.grad(cross_entropy(run.forward(model, inputs), labels), outputs))


# ---- capture


@pytest.mark.parametrize("percentile", ["none", "90"])
def test_captured_is_what_autograd_gives(percentile, tmp_path, monkeypatch):
    monkeypatch.setitem(models._BUILDERS, "tiny", lambda *sizes, **form: without_dropout(tiny(*sizes, **form)))
    run = trainer(percentile=percentile)
    path = tmp_path / "gradients.pt"
    gradients.save(path, capture.capture(run, [0], NAMES))
    loaded = gradients.load(path)
    assert [found.layer for found in loaded.gradients] == NAMES
    expected = gradients_by_autograd(trainer(percentile=percentile))
    for found, gradient in list(zip(loaded.gradients, expected))[-1 if percentile == "90" else 0 :]:
        # Those of earlier layers come out of pruned ones, or of another order of summation.
        torch.testing.assert_close(found.grad_output, gradient)
    last = loaded.gradients[-1].grad_output
    assert torch.equal(last, expected[-1]) and 0 < last.count_nonzero() < 0.5 * last.numel()  # a rectifier, a maximum
    assert all(found.grad_output.count_nonzero() == found.grad_output.numel() for found in loaded.gradients[:-1])


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_capture_does_not_change_the_training():
    states = []
    for watched in (True, False):
        run = trainer()
        capture.capture(run, [0, 1], NAMES) if watched else training.train_to(run, 2)
        assert run.steps_done == 2
        states.append(training.model_of(run).state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states)))


def test_capture_command(tmp_path):
    path = tmp_path / "gradients.pt"
    result = bench("capture", "--output", path, "--steps", "2,0", "--layers", "0,[36]", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    found = gradients.load(path)
    assert (found.model, found.data, found.percentile, found.placement) == ("tiny", "digits", 90.0, "input+output")
    assert [(gradient.step, gradient.layer) for gradient in found.gradients] == [(s, n) for s in (0, 2) for n in NAMES]
    assert [gradient.needs_grad_input for gradient in found.gradients] == [False, True, True] * 2
    assert str(found.gradients[1].problem) == "n4c16h8w8k16r3s3u2p1d1g1"
    assert {gradient.grad_output.dtype for gradient in found.gradients} == {torch.bfloat16}
    assert found.gradients[0].grad_output.is_contiguous(memory_format=torch.channels_last)
    assert f"{path}: 6 gradients of 3 layers" in result.output
    for moment in ("step 0", "step 2"):
        assert f"{moment}: gradients of 3 layers" in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--max-size", "0.04"], "max_size: got 0.04 MB, but 3 layers at 3 steps take 1 MB; choose some with --layers"),
        (["--layers", "0,7"], "layers: got '7'; accepted: 0, 3, 6, or patterns of these"),
        (["--steps", "1,x"], "steps: got '1,x'; accepted: integers from 0"),
        (["--percentile", "most"], "percentile: got 'most'; accepted: numbers in [50, 100), and none"),
        (["--percentile", "49"], "percentile: got 49.0; accepted: 50 <= percentile < 100"),
        (["--layout", "nchw"], "layout: got 'nchw'; accepted: channels_last, contiguous"),
        (["--model", "vgg"], "model: got 'vgg', accepted are"),
        (["--data", "cifar10"], "data_dir: got none, but cifar10 is read from files"),
        (["--data", "cifar10", "--data-dir", "/nowhere"], "data_dir: got '/nowhere', which does not exist"),
        (["--batch", "100000"], "batch_size: got 100000"),
        (["--backend", "abacus"], "backend: got 'abacus'"),
        (["--output", "/dev/null/gradients.pt"], "output: got '/dev/null/gradients.pt'; /dev/null is not a folder"),
    ],
)
def test_capture_refuses(arguments, words, tmp_path):
    result = bench("capture", "--output", tmp_path / "gradients.pt", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["capture", "step"])
@pytest.mark.parametrize(
    "raised, status, words", [(None, 1, "the loss of the sparse model became"), (KeyboardInterrupt, 130, "interrupted")]
)
def test_a_run_that_fails_leaves_no_file(name, raised, status, words, tmp_path, monkeypatch):
    if raised:

        def train_to(*args):
            raise raised

        monkeypatch.setattr(training, "train_to", train_to)
    option = "--output" if name == "capture" else "--json"
    result = bench(name, option, tmp_path / "file", "--steps", "5", "--learning-rate", "1e30")
    assert result.exit_code == status and words in result.output
    assert not list(tmp_path.iterdir())


# ---- step


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(output, JSON, Markdown) of one run."""
    folder = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models._BUILDERS, "tiny", tiny)
        patch.setattr(terminal, "keep_freed_memory", lambda: "as is")
        threads = torch.get_num_threads()
        files = folder / "step.json", folder / "step.md"
        result = bench("step", "--steps", "1,0", "--repeats", 3, "--json", files[0], "--markdown", files[1])
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return result.output, json.loads(files[0].read_text()), files[1].read_text()


@pytest.mark.slow
def test_step_contract(measured):
    _, record, _ = measured
    assert set(record) == {"environment", "setting", "points"}
    assert record["setting"]["threads"] == 1 and record["setting"]["placement"] == "input+output"
    assert record["environment"]["allocator"] == "as is" and "other_cpus" in record["environment"]
    assert [point["step"] for point in record["points"]] == [0, 1]
    phases = {"total_ms", "forward_ms", "backward_ms", "optimizer_ms"}
    for point in record["points"]:
        assert set(point) == {"step", "density", "dense", "sparse", "speedup", "bound", "memory", "layers"}
        for side in ("dense", "sparse"):
            assert set(point[side]) == phases | {"iqr_ms", "kinds_ms"}
            assert set(point[side]["kinds_ms"]) == set(KINDS)
            assert all(point[side][phase] > 0 for phase in phases)
            assert all(point[side]["kinds_ms"][kind] > 0 for kind in KINDS)  # the tiny model has them all
        assert [layer["layer"] for layer in point["layers"]] == NAMES
        assert set(point["memory"]) == {"dense", "sparse", "gradients"}


def test_step_numbers_follow_from_each_other(measured):
    for point in measured[1]["points"]:
        dense, sparse = point["dense"], point["sparse"]
        assert point["speedup"]["total"] == pytest.approx(dense["total_ms"] / sparse["total_ms"])
        assert point["speedup"]["relu"] == pytest.approx(dense["kinds_ms"]["relu"] / sparse["kinds_ms"]["relu"])
        layers = point["layers"]
        sizes = [ConvProblem.parse(layer["problem"]).output_size for layer in layers]
        elements = [torch.Size(size).numel() for size in sizes]
        assert all(0 < layer["density"] < 1 for layer in layers)
        by_elements = sum(n * layer["density"] for n, layer in zip(elements, layers)) / sum(elements)
        assert point["density"]["elements"] == pytest.approx(by_elements)
        # The first layer has no AGB.
        macs = [ConvProblem.parse(layer["problem"]).macs * times for layer, times in zip(layers, (1, 2, 2))]
        assert [layer["macs"] for layer in layers] == macs
        by_macs = sum(n * layer["density"] for n, layer in zip(macs, layers)) / sum(macs)
        assert point["density"]["macs"] == pytest.approx(by_macs)
        assert point["bound"]["ideal"] == pytest.approx(3 / (1 + 2 * by_macs))
        left = dense["total_ms"] - (1 - by_macs) * dense["kinds_ms"]["convolution"]
        assert point["bound"]["measured"] == pytest.approx(dense["total_ms"] / left)
        assert [layer["dense_bytes"] for layer in layers] == [4 * n for n in elements]
        for layer, n in zip(layers, elements):
            assert layer["compressed_bytes"] == pytest.approx(6 * layer["density"] * n, abs=1)
        saved = point["memory"]["gradients"]
        assert saved["dense_bytes"] == {"sum": 4 * sum(elements), "largest": 4 * max(elements)}


def test_step_tables(measured):
    output, record, markdown = measured
    for text in (output, markdown):
        for words in ("tiny, digits, batch 4, percentile 90, float32, channels_last, threads 1", "After step 1"):
            assert words in text
        assert "Backward convolutions by layer, after step 0" in text
        assert f"3/(1+2 density) {record['points'][0]['bound']['ideal']:.2f}x" in text
    assert f"`{record['setting']['command']}`" in markdown
    assert "| n4c16h8w8k16r3s3u2p1d1g1 |" in markdown
    assert "measuring after step 1" in output


def test_step_command_can_be_repeated(measured):
    arguments = measured[1]["setting"]["command"].split()
    assert arguments[:5] == ["python", "-m", "sparsebwd.bench", "step", "--model"]
    context = typer.main.get_command(app).commands["step"].make_context("step", arguments[4:])
    assert context.params["steps"] == "1,0" and context.params["threads"] == 1 and context.params["json"] is None


def test_both_sides_stay_at_the_trained_weights():
    run = trainer()
    training.train_to(run, 2)
    before = {name: value.clone() for name, value in training.model_of(run).state_dict().items()}
    momentum = [state["momentum_buffer"].clone() for state in run.twins[0].optimizer.state.values()]
    both = {name: step.side_of(run, name) for name in step.SIDES}
    for side in both.values():
        for turn in range(2):
            side.step(run.batch(turn))
            side.backward_in_parts(run.batch(turn))
        for name, parameter in side.model.named_parameters():
            assert torch.equal(parameter, before[name])
        assert [*side.layers] == NAMES[::-1]
        layers = [sum(times) for times in zip(*side.layers.values())]
        assert side.kinds["convolution"] == pytest.approx(layers)
        assert len(side.phases.seconds["total"]) == 2
    kinds = {name: {type(module).__name__ for module in side.model.modules()} for name, side in both.items()}
    assert "SparseConv2d" in kinds["sparse"] - kinds["dense"] and "Conv2d" in kinds["dense"] - kinds["sparse"]
    after = training.model_of(run).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(
        map(torch.equal, momentum, (state["momentum_buffer"] for state in run.twins[0].optimizer.state.values()))
    )


def test_both_sides_get_the_same_batches_and_random_numbers():
    run = trainer()
    batches = [run.batch(turn) for turn in range(3)]
    drawn = []
    for _ in step.SIDES:
        next_batch = sides.next_batch(batches, seed=1)
        drawn.append([(next_batch(), torch.rand(1).item()) for _ in batches])
    assert [number for _, number in drawn[0]] == [number for _, number in drawn[1]]
    assert all(ours is theirs for (ours, _), theirs in zip(drawn[0], batches))


def test_bounds():
    assert step.bounds(0.3, 100.0, 60.0) == pytest.approx({"ideal": 1.875, "measured": 100 / 58})
    assert step.bounds(1.0, 100.0, 60.0) == {"ideal": 1.0, "measured": 1.0}


# ---- memory


@pytest.mark.slow
def test_peaks_of_a_known_backward_pass():
    """One linear layer on a large batch: its backward pass makes the gradients of the logits and of the parameters."""
    rows, columns = 20_000, 50
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, columns, bias=False))
    inputs, labels = torch.randn(rows, 3, 2, 2), torch.zeros(rows, dtype=torch.int64)
    peaks = memory.backward_peaks({"dense": model}, inputs, labels, torch.float32)["dense"]
    logits = 4 * rows * columns
    # Those of the logits and of their logarithms of softmax are alive at once, while the latter goes.
    assert logits < peaks["allocated_bytes"] < 2.5 * logits
    if peaks["resident_bytes"] is not None:
        assert 0.8 * logits < peaks["resident_bytes"] < 4 * logits


@pytest.mark.slow
def test_a_failure_to_measure_memory_is_said():
    inputs, labels = torch.randn(2, 3, 2, 2), torch.tensor([0, 9])
    with pytest.raises(
        RuntimeError, match="the process that measures memory failed: IndexError: Target 9 is out of bounds"
    ):
        memory.backward_peaks({"dense": nn.Sequential(nn.Flatten(), nn.Linear(12, 2))}, inputs, labels, torch.float32)


# ---- on a GPU


def test_phases_begin_and_end_with_nothing_left_to_do():
    """What a device is given in a phase is done in it: the clock is read only after waiting."""
    events = []
    timer = phases.PhaseTimer(lambda: events.append("wait"))
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: events.append("optimizer"))

    def loss():
        events.append("forward")
        weight.register_hook(lambda _: events.append("backward"))
        return weight.sum()

    timer.step(optimizer, loss)
    assert events == ["wait", "wait", "forward", "wait", "backward", "wait", "optimizer", "wait"]


def test_sides_on_a_gpu_wait_for_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    run = trainer()
    loss = step.side_of(run, "sparse").loss.func
    side = sides.Side("sparse", training.model_of(run), run.twins[0].optimizer, loss, GPU)
    side.step(run.batch(0))
    assert waited == [GPU] * 5
    waited.clear()
    side.backward_in_parts(run.batch(0))
    assert len(waited) > 10 and set(waited) == {GPU}


def test_peak_on_a_gpu(monkeypatch):
    """The highest point of the second backward pass, above where that begins."""
    calls = []
    allocated = iter([1000])
    for name, value in {
        "synchronize": None, "memory_allocated": lambda: next(allocated), "max_memory_allocated": lambda: 1700,
        "reset_peak_memory_stats": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(
            torch.cuda, name, lambda *_, name=name, value=value: calls.append(name) or (value and value())
        )

    def loss(batch):
        calls.append("forward")
        leaf = torch.ones(1, requires_grad=True)
        leaf.register_hook(lambda _: calls.append("backward"))
        return leaf.sum()

    assert memory.peak_on_cuda(loss, ()) == {"allocated_bytes": 700, "resident_bytes": None}
    assert calls[:4] == ["forward", "backward", "forward", "synchronize"]
    order = [calls.index(name) for name in ("memory_allocated", "reset_peak_memory_stats", "max_memory_allocated")]
    assert order == sorted(order) and calls.index("max_memory_allocated") > len(calls) - 1 - calls[::-1].index(
        "backward"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    result = bench("step", "--device", "cuda")
    assert result.exit_code == 2 and "PyTorch finds no CUDA device here" in " ".join(result.output.split())


@pytest.mark.parametrize("option, value", [("--device", "tpu"), ("--math", "fast")])
def test_unknown_devices_and_maths_are_refused(option, value):
    result = bench("step", option, value)
    assert result.exit_code == 2 and f"{option[2:]}: got '{value}'; accepted: " in " ".join(result.output.split())


def test_table_says_where_it_ran():
    setting = {"threads": 2, "device": "cuda", "math": "tf32", "dtype": "float32"}
    assert step._where(setting) == "on cuda, dense in tf32"
    assert step._where(setting | {"dtype": "bfloat16"}) == "on cuda"
    assert step._where(setting | {"device": "cpu"}) == "threads 2"
