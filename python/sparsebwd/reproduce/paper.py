# SPDX-License-Identifier: Apache-2.0
"""What Ye et al. (2019) print in Tables 1 to 3."""

from __future__ import annotations

from dataclasses import dataclass

DENSE = "dense"
PERCENTILES = ("85", "90", "95", "99.5")


@dataclass(frozen=True)
class Table:
    """One table: for each model, accuracy in % and density, of the baseline and of each of `PERCENTILES`.

    data: the data set. recipe: the name of the settings that the paper gives.
    """

    title: str
    data: str
    recipe: str
    rows: dict[str, tuple[tuple[float, float], ...]]

    def figures(self, model: str, kind: str) -> tuple[float, float] | None:
        """Accuracy in % and density that the paper has for a percentile, as text, or for `DENSE`."""
        columns = (DENSE, *PERCENTILES)
        if model not in self.rows or kind not in columns:
            return None
        return self.rows[model][columns.index(kind)]


TABLES = {
    "table1": Table(
        "Table 1: CIFAR-10",
        "cifar10",
        "paper-cifar",
        {
            "alexnet": ((90.50, 0.09), (90.34, 0.01), (90.55, 0.01), (90.31, 0.01), (89.66, 0.01)),
            "resnet18": ((95.04, 1), (95.23, 0.36), (95.04, 0.35), (94.91, 0.34), (94.86, 0.31)),
            "resnet34": ((94.90, 1), (95.13, 0.34), (95.09, 0.32), (95.16, 0.31), (95.02, 0.28)),
            "resnet50": ((94.94, 1), (95.36, 0.22), (95.13, 0.20), (95.01, 0.17), (95.28, 0.14)),
            "resnet101": ((95.60, 1), (95.61, 0.24), (95.48, 0.22), (95.60, 0.19), (94.77, 0.12)),
            "resnet152": ((95.70, 1), (95.13, 0.18), (95.58, 0.18), (95.45, 0.16), (93.84, 0.08)),
            "mobilenet": ((92.28, 1), (92.12, 0.26), (92.10, 0.23), (28.71, 0.04), (67.95, 0.13)),
        },
    ),
    "table2": Table(
        "Table 2: CIFAR-100",
        "cifar100",
        "paper-cifar",
        {
            "alexnet": ((67.61, 0.10), (67.49, 0.03), (68.13, 0.03), (67.99, 0.03), (67.93, 0.02)),
            "resnet18": ((76.47, 1), (76.89, 0.40), (77.16, 0.39), (76.44, 0.37), (76.66, 0.34)),
            "resnet34": ((77.51, 1), (77.72, 0.36), (78.04, 0.35), (77.84, 0.33), (77.40, 0.31)),
            "resnet50": ((77.74, 1), (78.83, 0.25), (78.27, 0.22), (78.92, 0.20), (78.52, 0.16)),
            "resnet101": ((79.70, 1), (78.22, 0.23), (79.10, 0.21), (79.08, 0.19), (77.13, 0.13)),
            "resnet152": ((79.25, 1), (80.51, 0.22), (79.42, 0.19), (79.76, 0.18), (76.40, 0.10)),
            "mobilenet": ((68.21, 1), (8.68, 0.02), (68.55, 0.25), (53.45, 0.16), (9.82, 0.03)),
        },
    ),
    "table3": Table(
        "Table 3: ImageNet",
        "imagenet",
        "paper-imagenet",
        {
            "alexnet": ((56.38, 0.07), (57.10, 0.05), (56.84, 0.04), (55.38, 0.04), (39.58, 0.02)),
            "resnet18": ((68.73, 1), (69.02, 0.41), (68.85, 0.40), (68.66, 0.38), (68.74, 0.36)),
            "resnet34": ((72.93, 1), (72.92, 0.39), (72.86, 0.38), (72.74, 0.37), (72.42, 0.34)),
            "mobilenet": ((70.76, 1), (70.94, 0.32), (70.09, 0.28), (70.23, 0.27), (0.84, 0.01)),
        },
    ),
}
