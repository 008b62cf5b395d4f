#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Random convolutions through the native kernels of this machine's CPU, against the reference (`make fuzz`); with
--dense through PyTorch's, as this package calls them, in bfloat16 and float16, forward and backward.

Each problem is a function of the seed and of its number. What fails prints the command that runs it alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass, replace

import torch

from sparsebwd import reference
from sparsebwd.backends import dense, depthwise, get_backend
from sparsebwd.problem import ConvProblem
from sparsebwd.settings import Pruning
from sparsebwd.testing import assert_bit_equal, fenced, poisoned_memory, random_tensor

MOST_MACS = 2**21  # that the reference computes in milliseconds
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One problem with all that its kernels are given."""

    problem: ConvProblem
    dtype: torch.dtype
    formats: tuple[str, str, str]  # of input, weight and gradient
    density: float
    percentile: float | None
    threads: int
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.problem} {self.dtype} {'/'.join(self.formats)} density {self.density} percentile {self.percentile} "
            f"threads {self.threads}"
        )


def draw(seed: int, number: int) -> Case:
    """Case ``number`` of a seed."""
    rng = random.Random(f"{seed} {number}")

    def size(most: int) -> int:
        return rng.randint(1, rng.choice([2, 8, most]))

    while True:
        separable = rng.randrange(6) == 0
        groups = size(80) if separable else rng.choice([1, 1, 1, 1, 2, 3, 8])
        c, k = groups * (1 if separable else size(80 // groups)), groups * size(140 // groups)
        try:
            problem = ConvProblem(
                n=rng.randint(0, 5), c=c, h=size(40), w=size(40), k=k,
                r=size(7), s=size(7), stride=(size(4), size(4)), padding=(size(7) - 1, size(7) - 1),
                dilation=(size(3), size(3)), groups=groups,
            )  # fmt: skip
        except ValueError:
            continue
        if problem.macs <= MOST_MACS:
            break
    return Case(
        problem,
        rng.choice([torch.float32, torch.bfloat16]),
        tuple(rng.choice(list(FORMATS)) for _ in range(3)),
        rng.choice([0.0, 0.01, 0.1, 0.3, 0.6, 1.0]),
        rng.choice([None, 80.0, 95.0]),
        rng.choice([1, 2, 3, 8]),
        rng.randrange(2**31),
    )


def operands(case: Case) -> list[torch.Tensor]:
    """Input, weight and gradient: small integers, so that sums are exact in any order."""
    problem, generator = case.problem, torch.Generator().manual_seed(case.seed)
    return [
        fenced(
            random_tensor(
                shape, generator=generator, dtype=case.dtype, density=density, integer=True, memory_format=FORMATS[name]
            )
        )
        for shape, density, name in zip(
            (problem.input_size, problem.weight_size, problem.output_size), (1.0, 1.0, case.density), case.formats
        )
    ]


def check_dense(case: Case) -> None:
    """Raise AssertionError unless the dense forward pass, AGB and WGC in 16 bits are right to the bit."""
    problem, dtype = case.problem, case.dtype
    input, weight, gradient = operands(case)
    with poisoned_memory():
        output = dense.conv2d(input, weight, None, problem.stride, problem.padding, problem.dilation, problem.groups)
        grad_input, grad_weight = dense.gradients(problem, gradient, input, weight, (True, True))
    exact = torch.nn.functional.conv2d(
        input.double(), weight.double(), None, problem.stride, problem.padding, problem.dilation, problem.groups
    )
    for name, actual, expected in (
        ("forward", output, exact),
        ("AGB", grad_input, reference.conv2d_input(problem, weight, gradient)),
        ("WGC", grad_weight, reference.conv2d_weight(problem, input, gradient)),
    ):
        assert_bit_equal(actual + 0, expected.to(dtype) + 0, name)


def check(case: Case) -> None:
    """Raise AssertionError unless pruning, AGB and WGC are right to the bit, and those of the depthwise kernels where they
    take the problem.

    To keep sums exact the reference convolves what the backend pruned, and that is compared by itself: it is the same
    whatever computes sigma.
    """
    problem, dtype = case.problem, case.dtype
    input, weight, gradient = operands(case)
    generator = torch.Generator().manual_seed(case.seed)
    key = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator)
    backend = get_backend("cpu")
    pruned = gradient
    pruning = Pruning(percentile=case.percentile, backend="cpu")
    if case.percentile is not None:
        result = backend.prune(gradient, key, pruning)
        pruned = reference.prune_at(gradient, key, result.tau.to(dtype))
        assert_bit_equal(result.values, pruned, "pruned gradient")
    grad_input = None
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(case.threads)
        with poisoned_memory():
            result = backend.conv2d_backward(problem, gradient, input, weight, key, pruning, (True, True))
            if depthwise.refusal(problem) is None:
                grad_input, grad_weight = depthwise.gradients(problem, gradient, input, weight, (True, True))
    finally:
        torch.set_num_threads(threads)
    if grad_input is not None:
        for name, actual, expected in (
            ("AGB, depthwise", grad_input, reference.conv2d_input(problem, weight, gradient)),
            ("WGC, depthwise", grad_weight, reference.conv2d_weight(problem, input, gradient)),
        ):
            assert_bit_equal(actual + 0, expected.to(dtype) + 0, name)
    for name, actual, expected in (
        ("AGB", result.grad_input, reference.conv2d_input(problem, weight, pruned)),
        ("WGC", result.grad_weight, reference.conv2d_weight(problem, input, pruned)),
    ):
        if case.percentile is None:
            # The sign of a zero depends on the order of sums.
            assert_bit_equal(actual + 0, expected.to(dtype) + 0, name)
        else:
            # tau is no integer: the error of sums of products in float32, at most.
            bound = torch.finfo(dtype).eps + 2**-15
            assert actual.shape == expected.shape, name
            scale = max(float(expected.abs().max()), 1.0) if expected.numel() else 1.0
            error = float((actual.double() - expected).abs().max()) if expected.numel() else 0.0
            assert error <= bound * scale, f"{name}: error {error:.3g} where results are up to {scale:.3g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=20_000, help="number of problems (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first problem (%(default)s)")
    parser.add_argument("--dense", action="store_true", help="PyTorch's kernels, in bfloat16 and float16")
    args = parser.parse_args()
    failed = refused = 0
    for number in range(args.first, args.first + args.n):
        case = draw(args.seed, number)
        if args.dense and case.dtype == torch.float32:
            case = replace(case, dtype=torch.float16)
        if not args.dense and get_backend("cpu").can_run(case.problem, "cpu", case.dtype) is not None:
            refused += 1
            continue
        try:
            (check_dense if args.dense else check)(case)
        except (AssertionError, RuntimeError, ValueError) as error:
            failed += 1
            print(
                f"{case}: {error}\n  {sys.executable} tools/fuzz.py --seed {args.seed} --first {number} -n 1{' --dense' * args.dense}",
                flush=True,
            )
        if sys.stderr.isatty() and number % 100 == 99:
            print(f"\r{number + 1 - args.first} of {args.n}", end="", file=sys.stderr, flush=True)
    print(f"{args.n} problems, seed {args.seed}: {failed} failed, {refused} refused")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
