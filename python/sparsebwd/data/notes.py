# SPDX-License-Identifier: Apache-2.0
"""What the user should be told about a data set: files that are left out."""

from __future__ import annotations

_NAMED = 10


class Notes:
    """Sentences, and images that cannot be read, until somebody takes them.

    corrupt: the reason for each image that could not be read so far, by its path.
    """

    def __init__(self) -> None:
        self.corrupt: dict[str, str] = {}
        self._sentences: list[str] = []
        self._told = 0

    def add(self, sentence: str) -> None:
        self._sentences.append(sentence)

    def add_corrupt(self, found: dict[str, str]) -> None:
        self.corrupt.update(found)

    def take(self) -> list[str]:
        """What has been added since the last call. Corrupt images are one sentence, which names the first of them."""
        sentences, self._sentences = self._sentences, []
        new = list(self.corrupt.items())[self._told :]
        if new:
            named = "; ".join(f"{name}: {reason}" for name, reason in new[:_NAMED])
            more = f"; and {len(new) - _NAMED} more" if len(new) > _NAMED else ""
            before = f" ({len(self.corrupt)} so far)" if self._told else ""
            images = "image cannot be read and is" if len(new) == 1 else "images cannot be read and are"
            sentences.append(f"{len(new)} {images} left out{before}: {named}{more}")
            self._told = len(self.corrupt)
        return sentences
