"""Samples the training corpus: stories from stories15M, separated by <|endoftext|>.

One thread a process: run one process for each core, with different seeds. Two threads that wait for each other at every
product lose most of a core when the machine is shared.
"""

import argparse
import time
from pathlib import Path

import torch

from corpus import SEPARATOR
from teacher import BOS, Teacher, fetch

CANDIDATES = 64  # a nucleus of 0.9 at temperature 0.8 hardly ever holds more tokens
OPENING = 10  # the first tokens decide what a story is about: sampled hotter, for variety
COMPACT_EVERY = 16


def choose(logits: torch.Tensor, temperature: float, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Nucleus sampling. Returns each row's choice, and every candidate that was inside some row's nucleus."""
    values, candidates = logits.topk(CANDIDATES, dim=-1)
    probabilities = (values / temperature).softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    pick = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1)
    return candidates.gather(1, pick).squeeze(1), candidates[~outside].unique()


@torch.inference_mode()
def sample_batch(teacher: Teacher, batch: int, temperature: float, top_p: float) -> tuple[list[list[int]], torch.Tensor]:
    """Finished stories of one batch, and the tokens that any nucleus held."""
    cache = teacher.new_cache(batch)
    history = torch.full((batch, 1), BOS)
    stories: list[list[int]] = []
    seen = torch.zeros(len(teacher.allowed), dtype=torch.bool)
    for position in range(teacher.context):
        logits = teacher.step(history[:, -1], position, cache)
        opening = position < OPENING
        chosen, nuclei = choose(logits, 1.0 if opening else temperature, 0.97 if opening else top_p)
        seen[nuclei] = True
        history = torch.cat([history, teacher.allowed[chosen, None]], dim=1)
        # A finished row keeps decoding rubbish until the next compaction, which is cheaper than moving the cache often.
        if position % COMPACT_EVERY == COMPACT_EVERY - 1 or position == teacher.context - 1:
            ended = (history[:, 1:] == BOS).any(dim=1)
            for row in history[ended, 1:].tolist():
                stories.append(row[: row.index(BOS)])
            if ended.all():
                break
            if ended.any():
                history, cache = history[~ended], cache[:, :, ~ended]
    return stories, teacher.allowed[seen]  # rows that never ended are dropped


def is_sound(story: str) -> bool:
    """Keeps whole, plain stories: enough of them, printable ASCII, ended by a sentence, and not caught in a loop."""
    words = story.split()
    if len(words) < 40 or not (story.isascii() and story.replace("\n", "").isprintable()):
        return False
    if not (story[0].isupper() or story[0] == '"') or story[-1] not in '.!?"':
        return False
    fours = list(zip(words, words[1:], words[2:], words[3:]))
    return len(set(fours)) > 0.85 * len(fours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory for downloads and intermediates")
    parser.add_argument("--minutes", type=float, default=16)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.time()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    teacher = Teacher(fetch(args.work))
    known: set[str] = set()
    batches = tokens = characters = 0
    with open(args.work / f"corpus-{args.seed}.txt", "w", encoding="utf-8") as corpus:
        while time.time() - start < 60 * args.minutes:
            sampled, seen = sample_batch(teacher, args.batch, args.temperature, args.top_p)
            if batches == 0:
                teacher.restrict(seen)
                print(f"vocabulary restricted to the {len(seen)} tokens in the first batch's nuclei", flush=True)
            for story in map(teacher.text, sampled):
                if story and is_sound(story) and story not in known:
                    known.add(story)
                    characters += len(story)
                    corpus.write(story + SEPARATOR)
            corpus.flush()
            batches += 1
            tokens += sum(map(len, sampled))
            seconds = time.time() - start
            print(f"{seconds:6.0f} s  batch {batches}  finished {len(sampled)}/{args.batch}  kept {len(known)} stories, "
                  f"{characters / 1e6:.2f} MB  {tokens / seconds:.0f} finished tokens/s", flush=True)


if __name__ == "__main__":
    main()
