# SPDX-License-Identifier: Apache-2.0
"""The models: sizes, shapes, and that they convert and train."""

from __future__ import annotations

import pytest
import torch

import sparsebwd
from sparsebwd import models

# With 10 and with 100 classes. The ResNets' and MobileNet's are those of the usual CIFAR implementations; AlexNet's
# follow from the layers that the paper names.
PARAMETERS = {
    "resnet18": (11_173_962, 11_220_132),
    "resnet34": (21_282_122, 21_328_292),
    "resnet50": (23_520_842, 23_705_252),
    "resnet101": (42_512_970, 42_697_380),
    "resnet152": (58_156_618, 58_341_028),
    "alexnet": (14_859_082, 15_043_492),
    "mobilenet": (3_217_226, 3_309_476),
}
# With 1000 classes. Those of the papers' networks as everybody counts them.
IMAGENET_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "alexnet": 61_100_840,
    "mobilenet": 4_231_976,
}
CONVOLUTIONS = {
    "resnet18": 20,
    "resnet34": 36,
    "resnet50": 53,
    "resnet101": 104,
    "resnet152": 155,
    "alexnet": 5,
    "mobilenet": 27,
}


def test_names():
    assert set(models.names()) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_shapes_and_placement(name):
    with torch.device("meta"):
        for num_classes, expected in zip((10, 100), PARAMETERS[name], strict=True):
            model = models.create(name, num_classes)
            assert sum(parameter.numel() for parameter in model.parameters()) == expected
            assert model(torch.empty(2, 3, 32, 32)).shape == (2, num_classes)
        convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
        assert len(convolutions) == CONVOLUTIONS[name]
        sparsebwd.convert(model, percentile=None, where="everywhere")
    layers = [module for module in model.modules() if isinstance(module, sparsebwd.SparseConv2d)]
    assert len(layers) == CONVOLUTIONS[name]
    expected_placement = "input" if name == "alexnet" else "output"
    assert {layer.placement for layer in layers} == {expected_placement}


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET_PARAMETERS)
def test_imagenet_form(name):
    with torch.device("meta"):
        model = models.create(name, 1000, form="imagenet")
        assert sum(parameter.numel() for parameter in model.parameters()) == IMAGENET_PARAMETERS[name]
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
        assert model(torch.empty(1, 3, 227, 227)).shape == (1, 1000)
        assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == CONVOLUTIONS[name]
        assert model.state_dict().keys() == models.create(name, 10).state_dict().keys()


@pytest.mark.parametrize(
    ("name", "form", "size"),
    [
        ("resnet18", "cifar", 4),
        ("resnet50", "cifar", 4),
        ("alexnet", "cifar", 4),
        ("mobilenet", "cifar", 2),
        ("resnet18", "imagenet", 7),
        ("resnet50", "imagenet", 7),
        ("alexnet", "imagenet", 6),
        ("mobilenet", "imagenet", 7),
    ],
)
def test_the_last_maps_have_the_size_that_the_papers_name(name, form, size):
    with torch.device("meta"):
        model = models.create(name, 10, form)
        seen = []
        model.pool.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-2:]))
        model(torch.empty(1, 3, models.IMAGE_SIZE[form], models.IMAGE_SIZE[form]))
    assert seen == [(size, size)]


def test_alexnet_for_imagenet_begins_with_large_filters():
    with torch.device("meta"):
        model = models.create("alexnet", 1000, "imagenet")
    first, second = [module for module in model.features if isinstance(module, torch.nn.Conv2d)][:2]
    assert (first.kernel_size, first.stride, second.kernel_size) == ((11, 11), (4, 4), (5, 5))


def test_alexnet_has_the_layers_that_the_paper_names():
    with torch.device("meta"):
        model = models.create("alexnet", 10)
    first, second = [module for module in model.features if isinstance(module, torch.nn.Conv2d)][:2]
    for convolution in (first, second):
        assert (convolution.kernel_size, convolution.padding, convolution.stride) == ((3, 3), (2, 2), (1, 1))
    shapes = [tuple(module.weight.shape) for module in model.classifier if isinstance(module, torch.nn.Linear)]
    assert shapes == [(2048, 4096), (2048, 2048), (10, 2048)]


@pytest.mark.slow
def test_other_image_sizes():
    with torch.device("meta"):
        for name in models.names():
            assert models.create(name, 7)(torch.empty(1, 3, 64, 64)).shape == (1, 7)


def test_a_seed_reproduces_the_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(models.create("mobilenet", 10).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_resnet18_trains_sparsely():
    torch.manual_seed(0)
    model = sparsebwd.convert(models.create("resnet18", 10), percentile=90, where="everywhere")
    logits = model(torch.randn(4, 3, 32, 32))
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_bad_arguments():
    with pytest.raises(ValueError, match="name: got 'vgg16'; accepted: 'resnet18',"):
        models.create("vgg16", 10)
    with pytest.raises(ValueError, match="num_classes: got 0"):
        models.create("resnet18", 0)
    with pytest.raises(ValueError, match="form: got 'imagenette'; accepted: 'cifar', 'imagenet'"):
        models.create("resnet18", 10, "imagenette")


@pytest.mark.slow
@pytest.mark.parametrize("form", models.IMAGE_SIZE)
@pytest.mark.parametrize("name", PARAMETERS)
def test_width_scales_all_layers(name, form):
    """Twice the channels of the first layer are twice those of each, but for images and classes."""
    size = models.IMAGE_SIZE[form]
    with torch.device("meta"):
        published, narrow = models.create(name, 10, form), models.create(name, 10, form, width=8)
        assert narrow(torch.empty(2, 3, size, size)).shape == (2, 10)
    ratio = 4 if name == "mobilenet" else 8
    for key, module in published.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            outputs = 10 if module.weight.shape[0] == 10 else module.weight.shape[0] // ratio
            assert narrow.get_submodule(key).weight.shape[0] == outputs


def test_width_is_refused_below_1():
    with pytest.raises(ValueError, match="width: got 0"):
        models.create("resnet18", 10, width=0)
