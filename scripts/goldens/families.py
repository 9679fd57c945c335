"""Tiny random models of every supported family, with the logits and greedy tokens that transformers gives for them.

Writes tests/goldens/families/<case>/: a Hugging Face model folder plus golden.safetensors
(ids I32 [T], logits F32 [T, vocab], greedy I32 [64]). See README.md beside this file.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging

from common import GOLDENS, MIN_MARGIN, folder_size, fresh_folder, margin, write_json, write_tensors

OUT = GOLDENS / "families"
GREEDY_TOKENS = 64
# A continuation that falls into a short loop would test very few positions.
MIN_DISTINCT = 12
MAX_SEEDS = 200


@dataclass
class Case:
    name: str
    config: object
    dtype: torch.dtype
    prompt: int
    # config.json as transformers 4 wrote it: rope_theta, rope_scaling and torch_dtype at the top level.
    classic: bool = False
    shard_size: str | None = None
    # Settings that switch the case's oddity off; the logits must then change, or the case tests nothing.
    without: dict = field(default_factory=dict)


def llama3_rope(theta: float, original: int) -> dict:
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def default_rope(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


def cases() -> list[Case]:
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    return [
        Case(
            "llama-mha-f32-classic",
            LlamaConfig(
                vocab_size=160, hidden_size=64, intermediate_size=72, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
                rope_parameters=default_rope(10000.0), rms_norm_eps=1e-5, tie_word_embeddings=False,
            ),
            f32, 20, classic=True,
        ),
        Case(
            # Wavelengths of 6 to 3e5 positions around a limit of 64: kept, blended and stretched frequencies all occur.
            "llama3-rope-bf16-classic",
            LlamaConfig(
                vocab_size=161, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=512,
                rope_parameters=llama3_rope(500000.0, 64), rms_norm_eps=1e-5, tie_word_embeddings=True,
            ),
            bf16, 32, classic=True,
            without={"rope_parameters": default_rope(500000.0)},
        ),
        Case(
            "llama3-rope-bf16",
            LlamaConfig(
                vocab_size=176, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=512,
                rope_parameters=llama3_rope(10000.0, 32), rms_norm_eps=1e-5, tie_word_embeddings=True,
            ),
            bf16, 36,
            without={"rope_parameters": default_rope(10000.0)},
        ),
        Case(
            "llama-linear-rope-bf16-classic",
            LlamaConfig(
                vocab_size=163, hidden_size=56, intermediate_size=80, num_hidden_layers=2, head_dim=16,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
                rms_norm_eps=1e-5, tie_word_embeddings=False,
            ),
            bf16, 24, classic=True,
            without={"rope_parameters": default_rope(10000.0)},
        ),
        Case(
            "llama-f16",
            LlamaConfig(
                vocab_size=192, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                rope_parameters=default_rope(10000.0), rms_norm_eps=1e-6, tie_word_embeddings=False,
            ),
            f16, 17,
        ),
        Case(
            "llama-biases-bf16",
            LlamaConfig(
                vocab_size=165, hidden_size=64, intermediate_size=88, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                rope_parameters=default_rope(10000.0), rms_norm_eps=1e-5, tie_word_embeddings=True,
                attention_bias=True, mlp_bias=True,
            ),
            bf16, 19,
            without={"attention_bias": False, "mlp_bias": False},
        ),
        Case(
            "llama-sharded-bf16",
            LlamaConfig(
                vocab_size=200, hidden_size=64, intermediate_size=80, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                rope_parameters=default_rope(10000.0), rms_norm_eps=1e-5, tie_word_embeddings=False,
            ),
            bf16, 18, shard_size="60KB",
        ),
        Case(
            "smollm2-bf16-classic",
            LlamaConfig(
                vocab_size=162, hidden_size=96, intermediate_size=72, num_hidden_layers=2,
                num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
                rope_parameters=default_rope(100000.0), rms_norm_eps=1e-5, tie_word_embeddings=True,
            ),
            bf16, 26, classic=True,
        ),
        Case(
            "mistral-window-f32-classic",
            MistralConfig(
                vocab_size=160, hidden_size=56, intermediate_size=64, num_hidden_layers=2, head_dim=16,
                num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=512, sliding_window=16,
                rope_parameters=default_rope(10000.0), rms_norm_eps=1e-5, tie_word_embeddings=False,
            ),
            f32, 56, classic=True,
            without={"sliding_window": None},
        ),
        Case(
            "qwen2-bf16-classic",
            Qwen2Config(
                vocab_size=165, hidden_size=112, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=7, num_key_value_heads=1, max_position_embeddings=512,
                rope_parameters=default_rope(1000000.0), rms_norm_eps=1e-6, tie_word_embeddings=True,
            ),
            bf16, 23, classic=True,
        ),
        Case(
            # Layers 0 and 1 see everything, layer 2 slides.
            "qwen2-window-bf16",
            Qwen2Config(
                vocab_size=168, hidden_size=64, intermediate_size=80, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                use_sliding_window=True, sliding_window=12, max_window_layers=2,
                rope_parameters=default_rope(10000.0), rms_norm_eps=1e-6, tie_word_embeddings=True,
            ),
            bf16, 45,
            without={"layer_types": ["full_attention"] * 3},
        ),
        Case(
            # As above in the older spelling, which has no layer_types: they follow from max_window_layers.
            "qwen2-window-bf16-classic",
            Qwen2Config(
                vocab_size=160, hidden_size=64, intermediate_size=72, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                use_sliding_window=True, sliding_window=9, max_window_layers=1,
                rope_parameters=default_rope(10000.0), rms_norm_eps=1e-6, tie_word_embeddings=True,
            ),
            bf16, 30, classic=True,
            without={"layer_types": ["full_attention"] * 3},
        ),
        Case(
            "qwen3-bf16",
            Qwen3Config(
                vocab_size=181, hidden_size=64, intermediate_size=80, num_hidden_layers=2, head_dim=32,
                num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=512,
                rope_parameters=default_rope(1000000.0), rms_norm_eps=1e-6, tie_word_embeddings=True,
            ),
            bf16, 22,
        ),
        Case(
            "qwen3-untied-f32-classic",
            Qwen3Config(
                vocab_size=160, hidden_size=56, intermediate_size=64, num_hidden_layers=2, head_dim=16,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                rope_parameters=default_rope(1000000.0), rms_norm_eps=1e-6, tie_word_embeddings=False,
            ),
            f32, 21, classic=True,
        ),
    ]


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights wide enough that attention is far from uniform and logits spread over several units."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0.0, 0.3, generator=generator)
            elif weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0.0, 0.15, generator=generator)


def make_classic(path: Path) -> None:
    """Rewrites config.json to the spelling of transformers 4."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "linear":
        # The oldest files say "type" where later ones say "rope_type".
        rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    config["transformers_version"] = "4.45.0"
    # Llama 2 and Qwen2 files have no head_dim; where it is hidden_size / heads it says nothing.
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]
    write_json(path, dict(sorted(config.items())))


def load(folder: Path, **overrides) -> torch.nn.Module:
    """The reference always comes from the saved files, so that it checks them too."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **overrides
    ).eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    # No cache: every step is a whole forward pass, the plainest reference there is.
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def greedy(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], float]:
    """The continuation and the smallest margin met on the way."""
    ids, smallest = list(prompt), 1.0
    for _ in range(GREEDY_TOKENS):
        last = logits_of(model, ids)[-1]
        smallest = min(smallest, margin(last))
        ids.append(last.argmax().item())
    return ids[len(prompt):], smallest


def make(case: Case) -> None:
    for seed in range(MAX_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        model = AutoModelForCausalLM.from_config(case.config)
        randomise(model, generator)
        folder = fresh_folder(OUT / case.name)
        shards = {"max_shard_size": case.shard_size} if case.shard_size else {}
        model.to(case.dtype).save_pretrained(folder, **shards)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if case.classic:
            make_classic(folder / "config.json")

        reference = load(folder)
        prompt = torch.randint(case.config.vocab_size, (case.prompt,), generator=generator).tolist()
        tokens, smallest = greedy(reference, prompt)
        if smallest > MIN_MARGIN and len(set(tokens)) >= MIN_DISTINCT:
            break
    else:
        raise SystemExit(f"{case.name}: no seed below {MAX_SEEDS} gives stable greedy tokens")

    logits = logits_of(reference, prompt)
    if case.without:
        change = (logits_of(load(folder, **case.without), prompt) - logits).abs().max().item()
        assert change > 0.05, f"{case.name}: its oddity changes the logits by {change} only"
    write_tensors(
        folder / "golden.safetensors",
        {
            "ids": torch.tensor(prompt, dtype=torch.int32),
            "logits": logits,
            "greedy": torch.tensor(tokens, dtype=torch.int32),
        },
        {"min_margin": f"{smallest:.2e}", "seed": str(seed)},
    )
    size = folder_size(folder)
    assert size < 400_000, f"{case.name}: {size} bytes"
    print(
        f"{case.name:32} seed {seed:3}  margin {smallest:.1e}  distinct {len(set(tokens)):2}  "
        f"logit std {logits.std():.2f}  {size // 1000} kB"
    )


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    fresh_folder(OUT)
    for case in cases():
        make(case)
    print(f"{folder_size(OUT) / 1e6:.2f} MB in {OUT.relative_to(GOLDENS.parents[1])}")


if __name__ == "__main__":
    main()
