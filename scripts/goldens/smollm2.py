"""Reference logits, greedy tokens and tokenizer cases of the real SmolLM2-135M-Instruct (see scripts/get-smollm2).

Writes tests/goldens/smollm2/golden.safetensors and tokenizer-cases.json.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import GOLDENS, MIN_MARGIN, fresh_folder, margin, write_json, write_tensors

OUT = GOLDENS / "smollm2"
DEFAULT_MODEL = GOLDENS.parents[1] / "models" / "SmolLM2-135M-Instruct"
GREEDY_TOKENS = 64
LAST_POSITIONS = 4

# Real logits cannot be re-seeded, but the prompt can be chosen: the first whose continuation is stable under rounding.
PROMPTS = [
    "The lighthouse stood at the end of a long stone pier. Every evening the keeper climbed the stairs, trimmed the "
    "wick and lit the lamp, and the ships far out at sea turned their bows toward the harbour. One night",
    "Water boils at 100 degrees Celsius at sea level. At the top of a high mountain the air pressure is lower, so "
    "water boils at a lower temperature there, and food takes longer to cook. For this reason, many people",
    "In 1831 a young naturalist joined a voyage around the world. During the next five years he collected plants, "
    "birds and fossils, filled many notebooks, and began to wonder how the species of the islands were related. He",
    "To bake a simple loaf of bread, mix flour, water, salt and yeast in a large bowl. Knead the dough for ten "
    "minutes, cover it with a cloth and let it rise until it has doubled in size. Then",
    "A computer program is a list of instructions. The processor reads them one after the other, and each of them "
    "does something very small, such as adding two numbers. It is only because there are so many of them that",
]

TEXTS = [
    "",
    " ",
    "    four spaces, then two  and one ",
    "\n",
    "\n\n\n",
    "line one\nline two\r\nline three\n",
    "\ttab\tseparated\t\tvalues",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "0",
    "1234567890",
    "In 1999, 3.14159 and 1,000,000 were 42% of 7e-10.",
    "a1b22c333",
    "²³ ½ Ⅷ ٣٤ ५६ １２",
    "don't I'll we've HE'S they'd 'quoted' \"double\"",
    "snake_case camelCase SCREAMING-KEBAB x=y+1; // comment",
    "def f(x):\n    if x > 0:\n        return x ** 2\n",
    "naïve café façade Zürich Ærøskøbing",
    "e\u0301 is not \u00e9",
    "你好，世界。漢字かなカナ 한국어",
    "Привет, мир! Γειά σου",
    "مرحبا بالعالم שלום",
    "🙂👍🏽👩‍👩‍👧‍👦🇳🇴",
    "a\u00a0b\u200bc\u2003d\ufeffe",
    "… — – “curly” ‘quotes’ €£¥ ™©",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_end|> <|im_start|>x<repo_name>y<file_sep>",
    "<|im_start|> no role, < |im_end|>, <|unknown|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "ThisIsOneVeryLongWordWithoutAnySpaces_antidisestablishmentarianism",
    "\x00\x01\x7f control",
    "https://example.org/a?b=c&d=%20#e <tag attr='v'/> {{ jinja }} {\"json\": [1, null]}",
]


@torch.no_grad()
def continue_greedily(model, prompt: list[int]) -> tuple[list[int], list[float]]:
    tokens, margins = [], []
    inputs, cache = torch.tensor([prompt]), None
    for _ in range(GREEDY_TOKENS):
        output = model(inputs, past_key_values=cache, use_cache=True)
        cache, last = output.past_key_values, output.logits[0, -1]
        tokens.append(last.argmax().item())
        margins.append(margin(last))
        inputs = torch.tensor([[tokens[-1]]])
    return tokens, margins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    folder = parser.parse_args().model
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()

    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        greedy, margins = continue_greedily(model, ids)
        print(f"{len(ids)} tokens, smallest margin {min(margins):.1e}: {tokenizer.decode(greedy)!r}")
        if min(margins) > MIN_MARGIN:
            break
    else:
        raise SystemExit("no prompt has a stable continuation")

    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -LAST_POSITIONS:]
    fresh_folder(OUT)
    write_tensors(
        OUT / "golden.safetensors",
        {
            "ids": torch.tensor(ids, dtype=torch.int32),
            "logits": logits,
            "greedy": torch.tensor(greedy, dtype=torch.int32),
            "margins": torch.tensor(margins),
        },
        {"prompt": prompt},
    )
    cases = []
    for text in TEXTS:
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(token_ids) == text, f"{text!r} does not survive the round trip"
        cases.append({"text": text, "ids": token_ids})
    write_json(OUT / "tokenizer-cases.json", cases)
    print(f"{len(cases)} tokenizer cases")


if __name__ == "__main__":
    main()
