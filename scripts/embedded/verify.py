"""Checks an exported folder against transformers and prints greedy samples, dense and routed."""

import argparse
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from corpus import SEPARATOR
from fingerprint import fingerprint
from model import Gate, Llama, load_exported
from routers import Router

PROMPTS = ["Once upon a time", "One day, a little girl named Lily", "Tom and his dog", "The cat was sad because",
           "There was a big tree in the park."]
TOLERANCE = 1e-3


def load_routers(folder: Path) -> dict[int, Router]:
    routers: dict[int, Router] = {}
    with safe_open(folder / "routers.safetensors", "pt") as file:
        metadata = file.metadata()
        assert metadata["fingerprint"] == fingerprint(folder / "model.safetensors"), "tuned on other weights"
        for layer in map(int, metadata["layers"].split(",")):
            weight = file.get_tensor(f"model.layers.{layer}.router.weight")
            routers[layer] = Router(weight.shape[1])
            routers[layer].load_state_dict({"weight": weight})
    print(f"routers: {metadata}")
    return routers


@torch.inference_mode()
def greedy(model: Llama, tokenizer: Tokenizer, prompt: str, gates: dict[int, Gate], count: int = 100) -> str:
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        chosen = model(torch.tensor([ids]), gates)[0, -1].argmax().item()
        if chosen == tokenizer.token_to_id(SEPARATOR):
            break
        ids.append(chosen)
    return tokenizer.decode(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    model = load_exported(args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    reference = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    text = "Once upon a time, there was a little girl. " * 40
    ids = AutoTokenizer.from_pretrained(args.out)(text, return_tensors="pt").input_ids[:, : model.shape.positions]
    assert ids[0].tolist() == tokenizer.encode(text).ids[: model.shape.positions]
    with torch.inference_mode():
        difference = (reference(ids).logits - model(ids)).abs().max().item()
    print(f"largest difference from transformers' logits over {ids.shape[1]} tokens: {difference:.2e}")
    assert difference < TOLERANCE

    routers = load_routers(args.out)
    for prompt in PROMPTS:
        print(f"\n[dense]  {greedy(model, tokenizer, prompt, {})}\n[routed] {greedy(model, tokenizer, prompt, routers)}")


if __name__ == "__main__":
    main()
