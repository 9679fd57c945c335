"""Trains the student's tokenizer: byte-level BPE over the sampled stories, as a Hugging Face tokenizer.json."""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from corpus import SEPARATOR, read_stories

VOCABULARY = 1536


def train(stories: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # All 256 byte symbols are in the vocabulary, so that any UTF-8 text survives the round trip.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[SEPARATOR], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(stories, trainer)
    # A prompt begins where a story begins in the training text: after a separator.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A",
        pair=f"{SEPARATOR} $A {SEPARATOR} $B",
        special_tokens=[(SEPARATOR, tokenizer.token_to_id(SEPARATOR))],
    )
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    stories = read_stories(args.work)
    tokenizer = train(stories)
    probe = "Tom's naïve 🐶 said:\n\t\"Größe — 日本\" \x00"
    assert tokenizer.decode(tokenizer.encode(probe).ids) == probe
    tokenizer.save(str(args.work / "tokenizer.json"))
    sample = stories[:1000]
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(sample, add_special_tokens=False))
    print(f"{tokenizer.get_vocab_size()} tokens, {sum(map(len, sample)) / tokens:.3f} characters per token")


if __name__ == "__main__":
    main()
