"""The sampled corpus on disk, and as token ids."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
HELD_OUT_BYTES = 200_000  # the last stories; they come in random order, so these are as good as any


def read_stories(work: Path) -> list[str]:
    """All distinct stories of every sampler, in a fixed order."""
    stories: dict[str, None] = {}
    for path in sorted(work.glob("corpus-*.txt")):
        # What follows the last separator is empty, or a story cut off by an interrupted sampler.
        stories.update(dict.fromkeys(path.read_text(encoding="utf-8").split(SEPARATOR)[:-1]))
    return list(stories)


def split_held_out(stories: list[str]) -> tuple[list[str], list[str]]:
    """Returns (training, held-out) stories."""
    size, first = 0, len(stories)
    while size < HELD_OUT_BYTES:
        first -= 1
        size += len(stories[first].encode())
    return stories[:first], stories[first:]


def encode(tokenizer: Tokenizer, stories: list[str]) -> torch.Tensor:
    """One stream: separator, story, separator, story, ..., separator."""
    separator = [tokenizer.token_to_id(SEPARATOR)]
    encodings = tokenizer.encode_batch(stories, add_special_tokens=False)
    parts = [piece for encoding in encodings for piece in (separator, encoding.ids)] + [separator]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


class Windows:
    """Draws training windows. Half begin anywhere; half begin a story, with or without the separator before it, because
    that is how prompts begin."""

    def __init__(self, stream: torch.Tensor, separator: int, seed: int):
        self.stream = stream
        self.starts = (stream == separator).nonzero().squeeze(1)
        self.random = torch.Generator().manual_seed(seed)

    def _below(self, limit: int, count: int) -> torch.Tensor:
        return torch.randint(limit, (count,), generator=self.random)

    def draw(self, count: int, length: int) -> torch.Tensor:
        """Returns [count, length + 1] ids: inputs and the targets shifted by one."""
        last = len(self.stream) - length - 1
        anywhere = self._below(last, count // 2)
        chosen = self.starts[self._below(len(self.starts), count - count // 2)]
        begins = (chosen + self._below(2, len(chosen))).clamp(max=last)
        first = torch.cat([anywhere, begins])
        return self.stream[first[:, None] + torch.arange(length + 1)]
