# SPDX-License-Identifier: Apache-2.0
"""Training with pruned activation gradients: `python -m sparsebwd.train --help`.

Data flows one way: TrainConfig -> ImageData -> twins (a model and its optimiser) -> Trainer -> RunLog.
"""

from .checkpoint import CheckpointError
from .config import TrainConfig
from .trainer import Trainer, TrainingError

__all__ = ["CheckpointError", "TrainConfig", "Trainer", "TrainingError"]
