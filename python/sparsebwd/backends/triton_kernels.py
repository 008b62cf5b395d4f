# SPDX-License-Identifier: Apache-2.0
"""Kernels in Triton for gradients of which whole rows are kept or dropped: tensor cores on what is kept.

Tensors are NHWC, g of shape (N, P, Q, K), x of (N, H, W, C). A pixel is a number (n P + p) Q + q, or (n H + h) W + w of an input
pixel; a row is ``WIDTH`` neighbouring channels of a pixel of g, a multiple of the depth of a tile, or all of them. Of the matrix
products below, sides are tiles of BLOCK_M times BLOCK_N, the contraction goes in steps of BLOCK_K.

Nothing else imports this module, or triton, before the first call. Helper functions of triton's are not used (zeros, sum,
cdiv): then the interpreter runs these kernels whenever triton was imported.
"""

import triton
import triton.language as tl


# Each kept row times its factor, rounded to its dtype. Dropped rows are not written, or with ZEROS are 0.
#
#     for pixel in pixels:                   a program: BLOCK_M of them
#         for k in channels:                 a program: BLOCK_K of them, within one row
#             scaled[pixel, k] = g[pixel, k] * factors[k // WIDTH, pixel]
@triton.jit
def scale_rows(
    grad, factors, scaled, pixels, channels, WIDTH,
    ZEROS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    factors += (tl.program_id(1) * BLOCK_K // WIDTH).to(tl.int64) * pixels
    factor = tl.load(factors + pixel, mask=pixel < pixels, other=0.0)
    place = pixel.to(tl.int64)[:, None] * channels + k[None, :]
    inside = (pixel < pixels)[:, None] & (k < channels)[None, :]
    kept = inside & (factor != 0.0)[:, None]
    value = tl.load(grad + place, mask=kept, other=0.0).to(tl.float32) * factor[:, None]
    tl.store(scaled + place, value.to(scaled.dtype.element_ty), mask=inside if ZEROS else kept)


# WGC: dW[k, (r, s, c)] = sum over pixels of g[pixel, k] * x[(n, p u - pad + r dil, q u - pad + s dil), c]
#
#     for k in output channels:              program_id 0: BLOCK_M of them, within one row
#         for (r, s, c) in columns:          program_id 1: BLOCK_N of them
#             for split in range(SPLITS):    program_id 2: an equal part of the list, so much for split-K
#                 for pixel in part:         BLOCK_K of them at a time, kept ones only
#                     partial[split, k, (r, s, c)] += g[pixel, k] * x[...]
#
# A matrix product over the list of pixels that have the row: no multiplication with a row that was dropped, for all tiles are as
# full as the list is long. The caller adds the partial sums in their order. ONE_TAP: the columns of a tile are of one (r, s).
@triton.jit
def wgc(
    grad, input, lists, counts, partial,
    list_size, K, WIDTH, C, H, W, P, Q, S, COLUMNS,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    SPLITS, ONE_TAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_k = tl.program_id(0) * BLOCK_M
    split = tl.program_id(2)
    k = first_k + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = column % C
    if ONE_TAP:
        tap = tl.program_id(1) * BLOCK_N // C
    else:
        tap = (column // C)[None, :]
    shift_h = tap // S * dilation_h - padding_h
    shift_w = tap % S * dilation_w - padding_w

    row = first_k // WIDTH
    lists += row.to(tl.int64) * list_size
    count = tl.load(counts + row)
    part = (count + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    first = split * part
    last = tl.where(first + part < count, first + part, count)
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for begin in range(first, last, BLOCK_K):
        entry = begin + tl.arange(0, BLOCK_K)
        listed = entry < last
        pixel = tl.load(lists + entry, mask=listed, other=0)
        g = tl.load(
            grad + pixel.to(tl.int64)[:, None] * K + k[None, :], mask=listed[:, None] & (k < K)[None, :], other=0.0
        )
        n = pixel // (P * Q)
        h = (pixel // Q % P * stride_h)[:, None] + shift_h
        w = (pixel % Q * stride_w)[:, None] + shift_w
        inside = listed[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        place = ((n * H)[:, None] + h) * W + w
        x = tl.load(input + place.to(tl.int64) * C + c[None, :], mask=inside & (column < COLUMNS)[None, :], other=0.0)
        sums = tl.dot(tl.trans(g), x, sums, input_precision=PRECISION)

    partial += (split * K).to(tl.int64) * COLUMNS
    place = k.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(partial + place, sums, mask=(k < K)[:, None] & (column < COLUMNS)[None, :])


# For each input pixel the steps of its sum in AGB that are not 0: bit (r, s, group) where g has a row of that group, a group being
# one row or several, at the pixel that (r, s) leads to, if any does.
#
#     for pixel in input pixels:             a program: BLOCK_M of them
#         for (r, s, group) in STEPS:
#             masks[pixel] |= kept[group, (n, (h + pad - r dil) / u, (w + pad - s dil) / u)] << step
@triton.jit
def agb_masks(
    kept, masks, input_pixels, pixels, H, W, P, Q, S, GROUPS, STEPS,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, BLOCK_M: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pixel // (H * W)
    h = pixel // W % H
    w = pixel % W
    mask = tl.full((BLOCK_M,), 0, tl.int64)
    for step in range(STEPS):
        tap = step // GROUPS
        y = h + padding_h - tap // S * dilation_h
        x = w + padding_w - tap % S * dilation_w
        p = y // stride_h
        q = x // stride_w
        hit = (y >= 0) & (x >= 0) & (p * stride_h == y) & (q * stride_w == x) & (p < P) & (q < Q) & (pixel < input_pixels)
        live = tl.load(kept + (step % GROUPS) * pixels + ((n * P + p) * Q + q), mask=hit, other=0)
        mask |= live.to(tl.int64) << step
    tl.store(masks + pixel, mask, mask=pixel < input_pixels)


@triton.jit
def _or(a, b):
    return a | b


# For each tile of AGB the list of the steps that any of its pixels needs.
#
#     for tile in tiles:                     a program: one, BLOCK_M pixels in the order that is given
#         for step in STEPS:
#             if any pixel of the tile has the bit: append step to steps[tile]
@triton.jit
def agb_steps(order, masks, steps, counts, input_pixels, STEPS, BLOCK_M: tl.constexpr):
    tile = tl.program_id(0)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = tl.load(order + place, mask=place < input_pixels, other=0)
    mask = tl.load(masks + pixel, mask=place < input_pixels, other=0)
    union = tl.reduce(mask, 0, _or)
    steps += tile * STEPS
    found = 0
    for step in range(STEPS):
        live = (union >> step) & 1
        tl.store(steps + found, step, mask=live != 0)
        found += live.to(tl.int32)
    tl.store(counts + tile, found)


# AGB: dX[pixel, c] = sum over (r, s, k) of g[(n, (h + pad - r dil) / u, (w + pad - s dil) / u), k] * W[k, c, r, s]
#
#     for tile in tiles:                     program_id 0: BLOCK_M pixels in the order that is given, alike in what they need
#         for c in input channels:           program_id 1: BLOCK_N of them
#             for (r, s, group) in steps[tile]:      one loop together with the next, as unrolled taps need too much memory
#                 for k in group:            BLOCK_K of them at a time
#                     dX[pixel, c] += g[..., k] * W[r, s, c, k]
#
# Only rows that are kept are loaded, 0 stands for others; what all pixels of a tile lack is not computed. The program owns
# what it writes, all of it. weight: (R, S, C, K).
@triton.jit
def agb(
    grad, weight, output, order, masks, steps, counts, input_pixels,
    K, WIDTH, C, H, W, P, Q, S, GROUPS, STEPS,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = tl.load(order + place, mask=place < input_pixels, other=0)
    mask = tl.load(masks + pixel, mask=place < input_pixels, other=0)
    n = pixel // (H * W)
    h = pixel // W % H + padding_h
    w = pixel % W + padding_w
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = (WIDTH + BLOCK_K - 1) // BLOCK_K
    steps += tile * STEPS
    sums = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for i in range(tl.load(counts + tile) * depth):
        step = tl.load(steps + i // depth)
        tap = step // GROUPS
        k = step % GROUPS * WIDTH + i % depth * BLOCK_K + tl.arange(0, BLOCK_K)
        p = (h - tap // S * dilation_h) // stride_h
        q = (w - tap % S * dilation_w) // stride_w
        row = ((n * P + p) * Q + q).to(tl.int64)
        live = ((mask >> step) & 1) != 0
        g = tl.load(grad + row[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        filters = tl.load(
            weight + (tap * C + c)[None, :] * K + k[:, None], mask=(c < C)[None, :] & (k < K)[:, None], other=0.0
        )
        sums = tl.dot(g, filters, sums, input_precision=PRECISION)
    place_out = pixel.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(output + place_out, sums.to(output.dtype.element_ty), mask=(place < input_pixels)[:, None] & (c < C)[None, :])
