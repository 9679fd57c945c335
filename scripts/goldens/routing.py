"""Dynamic depth by the book: a masked reference of every granularity, computed token by token rule by rule.

The forward pass below follows section 1 of the design and nothing else: every sub-layer is computed for every token and
then multiplied by the mask, in f64 and without a cache, so that it shares no shortcut with what it checks.
Writes tests/goldens/routing/; README.md beside this file tells the layout.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig
from transformers.utils import logging

from common import (
    GOLDENS, MIN_MARGIN, fingerprint, folder_size, fresh_folder, margin, write_json, write_tensors,
)

OUT = GOLDENS / "routing"
DECODE_STEPS = 12
# No decision may hang on rounding: scores keep this distance from the threshold and from the runner-up of a top-k.
MIN_SCORE_GAP = 1e-3
MAX_SEEDS = 500

MODELS = {
    "model": LlamaConfig(
        vocab_size=192, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "model-window": MistralConfig(
        vocab_size=192, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, sliding_window=6,
    ),
}


@dataclass
class Case:
    name: str
    granularity: str
    keys: str = "all"
    select: str = "threshold"
    capacity: float | None = None
    threshold: float = 0.5
    layers: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    routers: str = "routers/bare.safetensors"
    model: str = "model"
    lengths: tuple[int, ...] = (1, 7, 23)
    # Prompts of few distinct tokens: equal tokens score equally in layer 0, so that top-k meets ties.
    ties: bool = False
    # What the thresholds at the ends of the scale must give; None: some pairs active and some skipped.
    expect: str | None = None

    @property
    def target(self) -> str:
        return self.granularity.split("_")[0]

    @property
    def level(self) -> str:
        return self.granularity.split("_")[1]


def cases() -> list[Case]:
    found = []
    for target in ("attn", "mlp", "block"):
        for keys in ("all", "active") if target != "mlp" else ("all",):
            token = f"{target}_token"
            found.append(Case(f"{token}-{keys}-threshold", token, keys))
            for capacity in (0.5, 0.3):
                found.append(Case(f"{token}-{keys}-topk{capacity}", token, keys, "topk", capacity))
        found.append(Case(f"{target}_sequence-threshold", f"{target}_sequence"))
    found[0].routers = "routers/tagged.safetensors"
    window = {"model": "model-window", "routers": "routers/window.safetensors", "layers": [0, 1]}
    return found + [
        Case("attn_token-all-threshold0.4", "attn_token", threshold=0.4),
        Case("block_token-active-threshold0.4", "block_token", "active", threshold=0.4),
        Case("attn_sequence-threshold0.4", "attn_sequence", threshold=0.4),
        Case("attn_token-all-every", "attn_token", threshold=0.001, expect="every"),
        Case("attn_token-active-none", "attn_token", "active", threshold=0.999, expect="none"),
        Case("block_token-active-none", "block_token", "active", threshold=0.999, expect="none"),
        Case("block_sequence-none", "block_sequence", threshold=0.999, expect="none"),
        Case("attn_token-active-window", "attn_token", "active", **window),
        Case("attn_token-all-window", "attn_token", "all", **window),
        Case("block_token-active-window", "block_token", "active", **window),
        Case(
            "attn_token-all-topk0.5-ties", "attn_token", "all", "topk", 0.5,
            layers=[0, 2], routers="routers/layer0.safetensors", lengths=(2, 8, 21), ties=True,
        ),
        # The paper's own files, see README.md: its settings come from a config.json.
        Case("published-is_mod", "attn_sequence", routers="routers/published-is_mod"),
        Case("published-is_mindskip", "attn_sequence", routers="routers/published-is_mindskip"),
    ]


class Reference:
    """A Llama forward pass with hard masks; weights by their published names, everything in f64."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}

    def norm(self, x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[f"{name}.weight"]

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T

    def rope(self, x):
        """Rotates pairs (i, i + d/2) of x [tokens, heads, d] by the row's original position."""
        tokens, _, dim = x.shape
        theta = self.config["rope_parameters"]["rope_theta"]
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(tokens, dtype=torch.float64)[:, None, None] * frequency
        first, second = x[..., : dim // 2], x[..., dim // 2 :]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
        )

    def attention(self, h, layer, visible):
        """visible [tokens]: whose keys and values exist at all."""
        tokens = h.shape[0]
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        name = f"model.layers.{layer}.self_attn"
        query = self.rope(self.linear(h, f"{name}.q_proj").view(tokens, heads, -1))
        key = self.rope(self.linear(h, f"{name}.k_proj").view(tokens, kv_heads, -1))
        value = self.linear(h, f"{name}.v_proj").view(tokens, kv_heads, -1)
        key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))

        position = torch.arange(tokens)
        distance = position[:, None] - position[None, :]
        seen = (distance >= 0) & visible[None, :]
        if window := self.config.get("sliding_window"):
            seen &= distance < window
        # A skipped token's own row is thrown away by the mask; its key here only keeps the softmax defined.
        seen |= distance == 0
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, value).reshape(tokens, -1)
        return self.linear(mixed, f"{name}.o_proj")

    def mlp(self, x, layer):
        name = f"model.layers.{layer}"
        h = self.norm(x, f"{name}.post_attention_layernorm")
        gate = torch.nn.functional.silu(self.linear(h, f"{name}.mlp.gate_proj"))
        return self.linear(gate * self.linear(h, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")

    def forward(self, ids: list[int], prompt: int, case: Case | None, routers: dict):
        """Logits [tokens, vocab], and per routed layer the scores and the active flags (one per sequence, or per token).

        The first `prompt` ids are the prefill; the others were generated one at a time.
        """
        x = self.weights["model.embed_tokens.weight"][ids]
        every = torch.ones(len(ids), dtype=torch.bool)
        all_scores, all_active = [], []
        for layer in range(self.config["num_hidden_layers"]):
            h = self.norm(x, f"model.layers.{layer}.input_layernorm")
            attn_mask = mlp_mask = visible = every
            target = None
            if case and layer in case.layers:
                router = routers[f"model.layers.{layer}.router.weight"].double()[0]
                scores, active = decide(h @ router, prompt, case)
                all_scores.append(scores)
                all_active.append(active)
                target, mask = case.target, active.expand(len(ids))
                if target == "mlp":
                    mlp_mask = mask
                else:
                    attn_mask = mask
                    # A skipped sequence holds nothing in this layer; it has no query either, so hiding changes no output.
                    if case.level == "sequence" or case.keys == "active":
                        visible = mask
            start = x
            x = x + attn_mask[:, None] * self.attention(h, layer, visible)
            x = x + mlp_mask[:, None] * self.mlp(x, layer)
            if target == "block":
                x = start + mask[:, None] * (x - start)
        x = self.norm(x, "model.norm")
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return x @ head.T, all_scores, all_active


def decide(dots: torch.Tensor, prompt: int, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and active flags from h·r of all tokens: [tokens], or [1] at sequence level."""
    if case.level == "sequence":
        scores = dots[:prompt].mean(0, keepdim=True).sigmoid()
        return scores, scores >= case.threshold
    scores = dots.sigmoid()
    active = scores >= case.threshold
    if case.select == "topk":
        active[:prompt] = False
        active[best(scores[:prompt].tolist(), case.capacity)] = True
    return scores, active


def ranking(scores: list[float]) -> list[int]:
    """Best first, ties by the lower index. Rounded, as equal rows may differ in the last bit of a matrix product."""
    return sorted(range(len(scores)), key=lambda token: (-round(scores[token], 9), token))


def best(scores: list[float], capacity: float) -> list[int]:
    return ranking(scores)[: math.ceil(capacity * len(scores))]


def decisive(scores: torch.Tensor, prompt: int, case: Case, layer: int) -> bool:
    """Whether no decision of one layer is closer than f32 rounding could settle otherwise.

    A tie is settled only in layer 0, where equal tokens are equal rows; further up it would hang on the last bit.
    """
    by_threshold = scores
    if case.select == "topk":
        by_threshold = scores[prompt:]
        in_prompt = scores[:prompt].tolist()
        order, kept = ranking(in_prompt), math.ceil(case.capacity * prompt)
        if kept < prompt:
            gap = in_prompt[order[kept - 1]] - in_prompt[order[kept]]
            if gap < MIN_SCORE_GAP and not (case.ties and layer == 0 and gap < 1e-9):
                return False
    return bool(((by_threshold - case.threshold).abs() > MIN_SCORE_GAP).all())


def run(reference: Reference, case: Case, routers: dict, prompt: list[int]) -> dict | None:
    """One prompt's golden tensors, or None where a decision or a greedy token would not survive rounding."""
    length, ids = len(prompt), list(prompt)
    for _ in range(DECODE_STEPS):
        logits, _, _ = reference.forward(ids, length, case, routers)
        if margin(logits[-1]) < MIN_MARGIN:
            return None
        ids.append(logits[-1].argmax().item())
    logits, scores, active = reference.forward(ids, length, case, routers)
    if not all(decisive(row, length, case, layer) for layer, row in zip(case.layers, scores)):
        return None
    tensors = {
        "ids": torch.tensor(prompt, dtype=torch.int32),
        "logits": logits[:length].float(),
        "scores": torch.stack(scores)[:, :length].float(),
        "active": torch.stack(active)[:, :length].to(torch.uint8),
        "greedy": torch.tensor(ids[length:], dtype=torch.int32),
        "decode_logits": logits[length:].float(),
    }
    if case.level == "token":
        tensors["decode_scores"] = torch.stack(scores)[:, length:].float()
        tensors["decode_active"] = torch.stack(active)[:, length:].to(torch.uint8)
    return tensors


def telling(case: Case, reference: Reference, results: list[dict]) -> bool:
    """Whether the prompts exercise what the case is for."""
    flags = torch.cat([result["active"].flatten() for result in results])
    if case.expect == "none":
        return not flags.any()
    if case.expect == "every":
        dense = reference.forward(results[-1]["ids"].tolist(), case.lengths[-1], None, {})[0]
        return bool(flags.all()) and torch.allclose(dense.float(), results[-1]["logits"], atol=1e-5)
    if case.ties:
        scores = results[-1]["scores"][0].tolist()
        kept = math.ceil(case.capacity * len(scores))
        order = ranking(scores)
        if abs(scores[order[kept - 1]] - scores[order[kept]]) > 1e-6:
            return False
    if case.level == "token" and case.select == "threshold":
        scores = torch.cat([result["scores"].flatten() for result in results])
        wide = scores.min() < 0.1 and scores.max() > 0.9
        return bool(wide) and len(set(results[-1]["decode_active"].flatten().tolist())) == 2
    return bool(flags.any()) and not bool(flags.all())


def make(case: Case, reference: Reference, routers: dict) -> dict:
    vocab = reference.config["vocab_size"]
    for seed in range(MAX_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        results = []
        for length in case.lengths:
            pool = torch.randperm(vocab, generator=generator)[: 4 if case.ties else vocab]
            prompt = pool[torch.randint(len(pool), (length,), generator=generator)].tolist()
            result = run(reference, case, routers, prompt)
            if result is None:
                break
            results.append(result)
        else:
            if telling(case, reference, results):
                break
    else:
        raise SystemExit(f"{case.name}: no seed below {MAX_SEEDS} gives decisive prompts")
    tensors = {f"{index}.{name}": value for index, result in enumerate(results) for name, value in result.items()}
    write_tensors(OUT / "cases" / f"{case.name}.safetensors", tensors, {"seed": str(seed)})
    active = torch.cat([result["active"].flatten() for result in results]).float().mean().item()
    print(f"{case.name:34} seed {seed:3}  active {active:.2f}")
    return {
        "name": case.name,
        "file": f"cases/{case.name}.safetensors",
        "model": case.model,
        "routers": case.routers,
        "granularity": case.granularity,
        "keys": case.keys,
        "select": case.select,
        "capacity": case.capacity,
        "threshold": case.threshold,
        "layers": case.layers,
        "prompts": len(case.lengths),
    }


def make_model(name: str, config) -> Reference:
    """Saves a random model and checks the reference against transformers without any routing."""
    generator = torch.Generator().manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0.0, 0.15, generator=generator)
    model.save_pretrained(OUT / name)
    (OUT / name / "generation_config.json").unlink(missing_ok=True)

    reference = Reference(OUT / name)
    ids = torch.randint(config.vocab_size, (31,), generator=generator)
    with torch.no_grad():
        expected = model(ids[None], use_cache=False).logits[0]
    error = (reference.forward(ids.tolist(), len(ids), None, {})[0].float() - expected).abs().max().item()
    assert error < 2e-5, f"{name}: dense logits differ from transformers by {error}"
    print(f"{name}: dense logits within {error:.1e} of transformers")
    return reference


def random_routers(layers: list[int], seed: int) -> dict:
    """Wide enough that scores cover most of (0, 1): h has unit scale and 64 entries."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.router.weight": torch.randn((1, 64), generator=generator) * 0.2 for layer in layers
    }


def write_routers() -> None:
    """The router files, in our form with and without settings and in the two forms that the paper's code saved."""
    routers = random_routers([1, 2, 3, 4], seed=1)
    settings = {
        "format": "mindskip-routers-1",
        "granularity": "attn_token",
        "keys": "all",
        "select": "threshold",
        "threshold": "0.5",
        "layers": "1,2,3,4",
        "fingerprint": fingerprint(OUT / "model"),
    }
    folder = fresh_folder(OUT / "routers")
    write_tensors(folder / "tagged.safetensors", routers, settings)
    write_tensors(folder / "bare.safetensors", routers)
    write_tensors(folder / "window.safetensors", random_routers([0, 1], seed=2))
    write_tensors(folder / "layer0.safetensors", random_routers([0, 2], seed=3))

    base = json.loads((OUT / "model" / "config.json").read_text())
    is_routed = [layer in (1, 2, 3, 4) for layer in range(base["num_hidden_layers"])]
    common = {"granularity": "attn_sequence", "gradient_scale": 0.0, "use_cache": False}

    # The present code patches a plain model: the routers stay f32, threshold may be absent, and mod_capacity is the
    # training target of the capacity penalty.
    folder = fresh_folder(OUT / "routers" / "published-is_mod")
    write_json(folder / "config.json", base | common | {"is_mod": is_routed, "mod_capacity": 0.5})
    write_tensors(folder / "model.safetensors", routers, {"format": "pt"})

    # The first release had model classes of its own and saved their dtype.
    folder = fresh_folder(OUT / "routers" / "published-is_mindskip")
    own = {"is_mindskip": is_routed, "threshold": 0.5, "model_type": "llama_mindskip"}
    own["architectures"] = ["LlamaMindSkipForCausalLM"]
    write_json(folder / "config.json", base | common | own)
    halved = {name: tensor.bfloat16() for name, tensor in routers.items()}
    write_tensors(folder / "model.safetensors", halved, {"format": "pt"})


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    fresh_folder(OUT)
    references = {name: make_model(name, config) for name, config in MODELS.items()}
    write_routers()

    fresh_folder(OUT / "cases")
    index = []
    for case in cases():
        path = OUT / case.routers
        routers = load_file(path / "model.safetensors" if path.is_dir() else path)
        index.append(make(case, references[case.model], routers))
    write_json(OUT / "cases.json", index)

    folders = sorted((GOLDENS / "families").iterdir()) + [OUT / name for name in MODELS]
    write_json(OUT / "fingerprints.json", {str(f.relative_to(GOLDENS)): fingerprint(f) for f in folders})
    print(f"{folder_size(OUT) / 1e6:.2f} MB in {OUT.relative_to(GOLDENS.parents[1])}")


if __name__ == "__main__":
    main()
