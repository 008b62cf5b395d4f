# SPDX-License-Identifier: Apache-2.0
"""The Markdown of a record: the questions of the bars, one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import geometric_mean
from typing import Any

from .counters import COUNTERS
from .units import BOTH, CONVOLUTIONS, DENSITIES, MODES, PASSES, ROW_DENSITIES, STAGES

BARS = {
    # (operation, math): by density, (parity with the best that is known, world class), as a ratio to cuDNN
    ("agb", "strict"): ((1.6, 1.9), (1.6, 2.1), (1.7, 2.6), (2.5, 3.6), (4.5, 6.0), (12.0, 15.0)),
    ("wgc", "strict"): ((1.6, 1.9), (1.6, 2.2), (1.8, 2.8), (2.8, 4.2), (5.0, 7.0), (12.0, 17.0)),
    **{
        (op, math): ((0.97, 0.97),) * 4 + ((1.0, 1.1), (2.3, 3.0))
        for op in ("agb", "wgc")
        for math in ("tf32", "bfloat16")
    },
}
BAR_SUITE = "resnet18-imagenet"
AUTO_BAR = 0.97
PRUNE_BARS = {"exact, on chip": 0.85, "exact, beyond": 0.66, "predicted": 0.93}
"""Of the bandwidth of a copy of the same tensor."""

ERROR_BAR = 2.0
"""Error against float64, as a multiple of that of strict cuDNN."""


def ratio_in_total(rows: Sequence[dict[str, Any]]) -> float:
    """Dense time / sparse time, summed over the network's layers."""
    dense, sparse = (sum(row["multiplicity"] * row[name] for row in rows) for name in ("dense_ms", "sparse_ms"))
    return dense / sparse


def mode_of(row: dict[str, Any]) -> str:
    return row["math"] or row["dtype"]


def timed(record: dict[str, Any], **wanted: object) -> list[dict[str, Any]]:
    """Rows that were timed and have these entries."""
    return [
        row for row in record["rows"]
        if row["error"] is None and all(row[name] == value for name, value in wanted.items())
    ]  # fmt: skip


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def against(value: float, parity: float, world: float | None = None) -> str:
    """A number beside its bars."""
    if value < parity:
        mark = "below"
    else:
        mark = "world class" if world is not None and value >= world else "ok"
    return f"{value:.2f} ({mark})"


def report(record: dict[str, Any]) -> str:
    """The Markdown: the questions of the bars, one after the other."""
    lines = [f"# GPU check: {record['environment']['gpu']['name']}, {record['date']}", "", *_parts(record)]
    for title, section in (
        ("Environment", _environment), ("Pruning", _pruning), ("AGB and WGC", _convolutions), ("Rows on tensor cores", _rows),
        ("Backward pass", _passes),
        ("Whole steps", _steps),
        ("Dispatch", _dispatch), ("Accuracy", _accuracy), ("Counters", _counters),
    ):  # fmt: skip
        found = section(record)
        if found:
            lines += [f"## {title}", "", *found]
    return "\n".join(lines).rstrip() + "\n"


def _parts(record: dict[str, Any]) -> list[str]:
    lines = table(["part", "result"], record["results"].items())
    notes = []
    for name, found in record["parts"].items():
        notes += [f"- left out of the {name}: {text}" for text in found.get("left_out", [])]
        notes += [f"- {test}: {message}" for test, message in found.get("messages", {}).items()]
        notes += [f"- {count} tests skipped ({name}): {reason}" for reason, count in found.get("skipped", {}).items()]
    return lines + notes + ([""] if notes else [])


def _environment(record: dict[str, Any]) -> list[str]:
    environment, gpu = record["environment"], record["environment"]["gpu"]
    lines = table(
        ["", ""],
        [
            (name, value)
            for name, value in (
                ("GPU", f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"),
                ("clocks, temperature and power as read", ", ".join(f"{k} {v}" for k, v in record["clocks"].items())),
                ("torch, CUDA, cuDNN", f"{gpu['torch']}, {gpu['cuda']}, {gpu['cudnn']}"),
                ("nvcc", environment.get("nvcc")),
            )
            if value
        ],
    )
    rates = [
        (f"{dtype}, {mode}", f"{gflops / 1e3:.1f} TFLOP/s")
        for dtype, modes in environment.get("peak_gflops", {}).items()
        for mode, gflops in modes.items()
    ]
    copies = list(environment.get("copy_gbs", {}).values())
    if copies:
        rates.append(("copy of 1 GiB", f"{max(copies) / 1e3:.2f} TB/s read and written"))
    return lines + (table(["ceiling, in the same run", ""], rates) if rates else [])


def _pruning(record: dict[str, Any]) -> list[str]:
    exact = timed(record, op="prune", backend="cuda")
    predicted = {_of_tensor(row): row for row in timed(record, op="prune-predicted", backend="cuda")}
    several = {_of_tensor(row): row for row in timed(record, op="prune-launches", backend="cuda")}
    if not exact:
        return []
    room = record["environment"]["gpu"].get("shared_bytes") or 0
    groups: dict[str, list[float]] = {name: [] for name in PRUNE_BARS}
    rows = []
    for row in exact:
        nbytes = row["bytes"] // 3
        place = "exact, on chip" if nbytes <= room else "exact, beyond"
        groups[place].append(row["speedup"])
        others = [found.get(_of_tensor(row)) for found in (predicted, several)]
        if others[0]:
            groups["predicted"].append(others[0]["speedup"])
        rows.append(
            (row["suite"], row["layer"], row["dtype"], f"{nbytes / 1e6:.1f}", place.partition(", ")[2], f"{row['dense_ms'] * 1e3:.1f}")
            + (f"{row['speedup']:.0%}", *(f"{other['speedup']:.0%}" if other else "-" for other in others))
        )
    bars = [
        (name, f"{bar:.0%}", f"{min(groups[name]):.0%}", f"{geometric_mean(groups[name]):.0%}", f"{max(groups[name]):.0%}")
        + (f"{sum(value >= bar for value in groups[name])} of {len(groups[name])}",)
        for name, bar in PRUNE_BARS.items()
        if groups[name]
    ]
    return [
        f"Sigma, threshold and pruning in one launch, as a share of the bandwidth that a copy of the same tensor reaches: time "
        f"of the copy / time of pruning, operands out of cache. On chip: at most the {room / 1e6:.1f} MB of shared memory. "
        "In launches: for the sum and for pruning, as beside the communication of other processes.",
        "",
        *table(["threshold", "bar", "worst", "geometric mean", "best", "reach the bar"], bars),
        *table(["suite", "layer", "dtype", "MB", "tensor", "copy us", "exact", "predicted", "exact, in launches"], rows),
    ]  # fmt: skip


def _of_tensor(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in ("suite", "problem", "dtype", "math", "layout"))


def _convolutions(record: dict[str, Any]) -> list[str]:
    rows = [row for op in CONVOLUTIONS for row in timed(record, op=op, pattern="iid")]
    lines = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        cells = []
        for mode in MODES:
            for backend in BOTH:
                for op in CONVOLUTIONS:
                    here = [
                        row for row in rows
                        if (row["suite"], mode_of(row), row["backend"], row["op"]) == (suite, mode, backend, op)
                        and row["layer"] in STAGES
                    ]  # fmt: skip
                    if not here:
                        continue
                    alone = without_search(record, here)
                    judged = suite == BAR_SUITE and backend == ("cuda" if mode == "strict" else "auto")
                    bars = BARS[op, mode] if judged else None
                    cells.append((mode, backend, op.upper(), *_by_density(here, None if alone else bars)))
                    if alone:
                        cells.append((mode, f"{backend}, non-zeros known", op.upper(), *_by_density(alone, bars)))
        batch = re.match(r"n(\d+)", next(row["problem"] for row in rows if row["suite"] == suite))[1]
        lines += [
            f"{suite}, batch {batch}: time of cuDNN at its fastest (both layouts, algorithms searched) / time of ours, summed "
            "over the network's layers without the first, each as often as it occurs. Finding the non-zeros is in ours, "
            "pruning is not. Where pruning has just found them, the kernels take as long as the rows 'non-zeros known' say: "
            "from the times of AGB, of WGC, and of both in one call, which looks for the non-zeros once, that of looking "
            "follows.",
            "",
            *table(["cuDNN in", "backend", "", *map(str, DENSITIES)], cells),
        ]
    lines += _skewed(record)
    if rows:
        bars = [
            (mode, op.upper(), *(f"{parity:g} / {world:g}" for parity, world in BARS[op, mode]))
            for mode in MODES
            for op in CONVOLUTIONS
        ]
        lines += [
            "The bars, over the ImageNet layers at batch 256, parity / world class:", "",
            *table(["cuDNN in", "", *map(str, DENSITIES)], bars),
        ]  # fmt: skip
    return lines


def _skewed(record: dict[str, Any]) -> list[str]:
    """Images of unlike densities beside such of one: what is lost where work is not shared evenly."""
    cells = []
    for op in CONVOLUTIONS:
        for density in DENSITIES:
            even, skewed = (
                timed(record, op=op, backend="cuda", math="strict", suite=BAR_SUITE, nominal_density=density, pattern=pattern)
                for pattern in ("iid", "skewed")
            )
            if even and len(even) == len(skewed):
                loss = 1 - ratio_in_total(skewed) / ratio_in_total(even)
                cells.append((op.upper(), density, f"{ratio_in_total(even):.2f}", f"{ratio_in_total(skewed):.2f}", f"{loss:.0%}"))
    if not cells:
        return []
    return [
        "Strict float32, images of one density, and of densities as unlike as in training, of the same mean:", "",
        *table(["", "density", "even", "skewed", "lost"], cells),
    ]  # fmt: skip


def _rows(record: dict[str, Any]) -> list[str]:
    cells = []
    for mode in MODES:
        for op in CONVOLUTIONS:
            for density in ROW_DENSITIES:
                here = [
                    row for row in timed(record, op=op, backend="triton", pattern="rows", nominal_density=density) if mode_of(row) == mode
                ]  # fmt: skip
                if here:
                    speedups = [f"{row['layer']} {row['speedup']:.2f}" for row in here]
                    errors = max(row["rel_error"] / row["dense_rel_error"] for row in here)
                    cells.append((mode, op.upper(), density, f"{ratio_in_total(here):.2f}", ", ".join(speedups), f"{errors:.2f}"))
    if not cells:
        return []
    return [
        "Kernels in Triton on gradients of which this fraction of the pixels is kept, against dense cuDNN: finding the pixels is in "
        "ours, pruning is not. In total each layer counts as often as it occurs in the network. Last, the largest error, as a "
        "multiple of that of cuDNN in the same precision.",
        "",
        *table(["cuDNN in", "", "kept", "in total", "each", "error"], cells),
    ]


def without_search(record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of AGB or WGC less the time in which the non-zeros are found, as far as there are rows of both in one call."""
    same = ("suite", "problem", "nominal_density", "pattern", "dtype", "math", "layout", "backend")
    times = {
        op: {tuple(row[name] for name in same): row["sparse_ms"] for row in timed(record, op=op)}
        for op in ("agb", "wgc", "agb+wgc")
    }
    found = []
    for row in rows:
        agb, wgc, both = (times[op].get(tuple(row[name] for name in same)) for op in ("agb", "wgc", "agb+wgc"))
        if agb is not None and wgc is not None and both is not None:
            search = min(max(0.0, agb + wgc - both), 0.9 * row["sparse_ms"])
            found.append(row | {"sparse_ms": row["sparse_ms"] - search})
    return found


def _by_density(rows: Sequence[dict[str, Any]], bars: Sequence[tuple[float, float]] | None) -> list[str]:
    """A cell for each density, judged by its bars if there are any."""
    cells = []
    for place, density in enumerate(DENSITIES):
        here = [row for row in rows if row["nominal_density"] == density]
        if not here:
            cells.append("-")
            continue
        value = ratio_in_total(here)
        cell = against(value, *bars[place]) if bars else f"{value:.2f}"
        cells.append(cell + ("" if len(here) == len(STAGES) else f", {len(here)} of {len(STAGES)} layers"))
    return cells


def _passes(record: dict[str, Any]) -> list[str]:
    rows = [row for op in PASSES for row in timed(record, op=op)]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["suite"], mode_of(row), row["backend"], row["op"]), []).append(row)
    if not groups:
        return []
    return [
        "Pruning at percentile 90, AGB and WGC in one call, against AGB and WGC of cuDNN, summed over the network's layers "
        "without the first.",
        "",
        *table(
            ["suite", "cuDNN in", "backend", "operation", "layers", "density", "speed-up", "worst"],
            [
                (*key, len(group), f"{sum(row['density'] for row in group) / len(group):.2f}", f"{ratio_in_total(group):.2f}")
                + (f"{min(row['speedup'] for row in group):.2f}",)
                for key, group in groups.items()
            ],
        ),
    ]  # fmt: skip


def _steps(record: dict[str, Any]) -> list[str]:
    steps = record["steps"]
    if not steps:
        return []
    cells = [
        (step["name"], f"{step['density']:.2f}")
        + tuple(f"{step[side][part]:.2f}" for part in ("total", "backward") for side in ("dense", "sparse"))
        + (f"{step['speedup']:.2f}",)
        for step in steps
    ]
    headings = ["", "density", "step, dense ms", "sparse ms", "backward, dense ms", "sparse ms", "speed-up"]
    return ["Training steps in turns, after 20 steps at percentile 90, backend auto.", "", *table(headings, cells)]


def _dispatch(record: dict[str, Any]) -> list[str]:
    rows = [row for op in CONVOLUTIONS for row in timed(record, op=op, backend="auto", pattern="iid")]
    if not rows:
        return []
    cells = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        for mode in MODES:
            here = [row for row in rows if row["suite"] == suite and mode_of(row) == mode]
            if here:
                worst = min(here, key=lambda row: row["speedup"])
                below = sum(row["speedup"] < AUTO_BAR for row in here)
                name = f"{worst['layer']}, {worst['op']} at {worst['nominal_density']:g}"
                cells.append((suite, mode, len(here), below, f"{worst['speedup']:.2f}", name, f"{worst['dense_ms'] * 1e3:.0f}"))
    return [
        f"The backend auto is never to be below {AUTO_BAR}:", "",
        *table(["suite", "cuDNN in", "rows", "below", "worst", "which", "cuDNN us"], cells),
    ]  # fmt: skip


def _accuracy(record: dict[str, Any]) -> list[str]:
    cells = []
    for dtype, math in (("float32", "strict"), ("float32", "tf32"), ("bfloat16", None)):
        for op in CONVOLUTIONS:
            here = [row for row in timed(record, op=op, dtype=dtype, math=math, backend="cuda") if row["dense_rel_error"]]
            if here:
                ratios = [row["rel_error"] / row["dense_rel_error"] for row in here]
                cells.append(
                    (math or dtype, op.upper(), f"{max(row['rel_error'] for row in here):.1e}")
                    + (f"{max(row['dense_rel_error'] for row in here):.1e}", f"{max(ratios):.2f}")
                )
    wrong = [row for row in record["rows"] if row["error"] is not None]
    notes = [f"- WRONG: {row['command']}: {row['error']}" for row in wrong]
    if not cells and not notes:
        return []
    return [
        f"Error against float64, of the sparse kernels and of cuDNN (the bar: at most {ERROR_BAR:g} times that of strict cuDNN):",
        "",
        *table(["cuDNN in", "", "largest error of ours", "of cuDNN", "largest ratio"], cells),
        *notes,
        "",
    ]  # fmt: skip


def _counters(record: dict[str, Any]) -> list[str]:
    kernels = record["parts"].get("counters", {}).get("kernels", [])
    if not kernels:
        return []
    rows = [
        (_short(kernel["kernel"]), *("-" if kernel[name] is None else f"{kernel[name]:.4g}" for name in COUNTERS))
        + (", ".join(f"{name} {value:.2f}" for name, value in kernel["stalls"].items()),)
        for kernel in kernels
    ]
    return [
        "One launch of each kernel on the 3x3 layer of 128 channels on 28x28, batch 256, float32, density 0.1 (pruning: "
        "percentile 90). Stalls are in cycles for each instruction issued.",
        "",
        *table(["kernel", *COUNTERS, "stalls"], rows),
    ]  # fmt: skip


def _short(name: str) -> str:
    """A kernel's name without parameters and our namespaces; | would end a cell."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|sparsebwd::cuda::|sparsebwd::|\bvoid ", "", name)
    return name.partition("(")[0].replace("|", "/")
