# SPDX-License-Identifier: Apache-2.0
"""torch.func, forward-mode AD and batched gradients: as nn.Conv2d, or one clear error; never a wrong number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import sparsebwd
from sparsebwd import SparseConv2d, prune_gradient
from sparsebwd.settings import Pruning

GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)


@pytest.fixture(params=[None, 90], ids=["unpruned", "90"])
def layer(request):
    torch.manual_seed(0)
    return SparseConv2d(3, 8, 3, percentile=request.param)


@pytest.fixture
def images():
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def dense(layer, x):
    return F.conv2d(x, layer.weight, layer.bias)


def loss_of(function):
    return lambda *args: function(*args).square().sum()


def test_jvp_is_that_of_a_dense_convolution(layer, images):
    tangent = torch.randn_like(images)
    output, got = jvp(layer, (images,), (tangent,))
    torch.testing.assert_close(got, F.conv2d(tangent, layer.weight))
    torch.testing.assert_close(output, dense(layer, images))
    torch.testing.assert_close(linearize(layer, images)[1](tangent), F.conv2d(tangent, layer.weight))


def test_forward_mode_without_torch_func(layer, images):
    tangent = torch.randn_like(images)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(images, tangent))).tangent
    torch.testing.assert_close(got, F.conv2d(tangent, layer.weight))


def test_tangent_of_the_weight(images):
    weight, tangent = torch.randn(8, 3, 3, 3), torch.randn(8, 3, 3, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        output = sparsebwd.functional.sparse_conv2d(images.requires_grad_(), dual)
        got = forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(got, F.conv2d(images, tangent))


@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian])
def test_derivatives_by_the_input(transform, layer, images):
    x = images[:, :, :4, :4]
    function = loss_of(layer)
    torch.testing.assert_close(transform(function)(x), transform(loss_of(lambda x: dense(layer, x)))(x))


def test_vjp_and_vmap(layer, images):
    cotangent = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(
        vjp(layer, images)[1](cotangent), vjp(lambda x: dense(layer, x), images)[1](cotangent)
    )
    batches = torch.randn(3, 2, 3, 6, 6)
    torch.testing.assert_close(vmap(layer)(batches), torch.stack([dense(layer, batch) for batch in batches]))


def test_gradients_of_single_images(layer, images):
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters, image):
        return functional_call(layer, parameters, image[None]).square().sum()

    def dense_loss(parameters, image):
        return F.conv2d(image[None], parameters["weight"], parameters["bias"]).square().sum()

    got, expected = (vmap(grad(f), in_dims=(None, 0))(parameters, images) for f in (loss, dense_loss))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def test_batched_gradients(layer, images):
    images.requires_grad_()
    cotangents = torch.randn(5, 2, 8, 4, 4)
    inputs = (images, layer.weight, layer.bias)
    got = torch.autograd.grad(layer(images), inputs, cotangents, is_grads_batched=True)
    expected = torch.autograd.grad(dense(layer, images), inputs, cotangents, is_grads_batched=True)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other)


def test_vectorized_jacobian(layer, images):
    x = images[:1, :, :4, :4]
    got = torch.autograd.functional.jacobian(layer, x, vectorize=True)
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(lambda x: dense(layer, x), x))


def test_it_is_logged_once(layer, images, caplog):
    sparsebwd.ops._log_unpruned.cache_clear()
    for _ in range(2):
        jvp(layer, (images,), (images,))
    assert [record.getMessage() for record in caplog.records] == [
        "inside torch.func, forward-mode AD and batched gradients, sparse convolutions prune nothing"
    ]


def _forward_ad(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f, x: grad(loss_of(f))(x),
        lambda f, x: vmap(lambda image: f(image[None]))(x),
        _forward_ad,
    ],
    ids=["jvp", "grad", "vmap", "dual numbers"],
)
def test_compiled_with_the_transform_around_it(transform, images):
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = SparseConv2d(3, 8, 3)
    got = torch.compile(lambda x: transform(layer, x), backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(got, transform(lambda x: dense(layer, x), images))


def _operators(x, weight):
    key = torch.tensor([1, 2])
    gradient = torch.ones(x.shape[0], weight.shape[0], 4, 4)
    operators = torch.ops.sparsebwd
    return {
        "prune": lambda x, w: operators.prune(x, key, Pruning().text)[0],
        "conv2d": lambda x, w: operators.conv2d(x, w, None, *GEOMETRY, key, Pruning().text, 0),
        "conv2d_input": lambda x, w: operators.conv2d_input(x.shape, w, gradient * x.sum(), *GEOMETRY, "auto"),
        "conv2d_weight": lambda x, w: operators.conv2d_weight(x, w.shape, gradient, *GEOMETRY, "auto"),
        "conv2d_backward": lambda x, w: operators.conv2d_backward(
            gradient, x, w, *GEOMETRY, key, Pruning().text, 0, (True, True, False)
        )[0],
    }


@pytest.mark.parametrize("name", ["prune", "conv2d", "conv2d_input", "conv2d_weight", "conv2d_backward"])
def test_operators_refuse_by_name(name, layer, images):
    call = _operators(images, layer.weight)[name]
    weight = layer.weight.detach()
    transforms = (
        lambda: jvp(lambda x: call(x, weight), (images,), (images,)),
        lambda: grad(lambda x: call(x, weight).sum())(images),
        lambda: vmap(lambda x: call(x, weight))(images[None].repeat(2, 1, 1, 1, 1)),
    )
    for transform in transforms:
        with pytest.raises(NotImplementedError, match=f"sparsebwd::{name}: called inside a transform of torch.func"):
            transform()


def test_prune_gradient_refuses_by_name():
    with pytest.raises(NotImplementedError, match="sparsebwd::.*: called inside a transform of torch.func"):
        vmap(lambda g: prune_gradient(g, 90).values, randomness="different")(torch.randn(2, 3, 4, 5, 5))
