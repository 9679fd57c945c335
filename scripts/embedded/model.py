"""The student: a Llama exactly as Hugging Face defines it (parameter names included), with optional attention gates."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

# A gate reads a layer's input_layernorm output [batch, tokens, hidden] and returns the factor [batch, tokens, 1] of its
# attention output. Keys and values are always written, by every token (`keys = all`).
Gate = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    vocab: int = 1536
    hidden: int = 128
    layers: int = 8
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 64
    ffn: int = 352
    positions: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, h: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q, k, v = (p(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rope), rotate(k, rope)
        k, v = k.expand_as(q), v.expand_as(q)  # one key/value head serves all query heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE on the two halves of a head."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], gate: Gate | None) -> torch.Tensor:
        h = self.input_layernorm(x)
        attention = self.self_attn(h, rope)
        x = x + (attention if gate is None else gate(h) * attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Exists so that parameter names carry Hugging Face's `model.` prefix."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, shape.norm_eps)


class Llama(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        assert shape.kv_heads == 1
        self.shape = shape
        self.model = Trunk(shape)
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.positions), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # The matrices that write into the residual stream start smaller, so that its variance does not grow with depth.
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.shape.layers) ** 0.5 if writes else 0.02)

    def forward(self, tokens: torch.Tensor, gates: Mapping[int, Gate] = {}) -> torch.Tensor:
        """Returns logits. Layers named in `gates` have their attention gated."""
        length = tokens.shape[1]
        rope = (self.cos[:length], self.sin[:length])
        x = self.model.embed_tokens(tokens)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, rope, gates.get(index))
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def load_exported(folder: Path) -> Llama:
    """The model as it was exported: bf16 weights, computed with in f32."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    model = Llama(Shape())
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


@torch.inference_mode()
def per_token_loss(model: nn.Module, stream: torch.Tensor, gates: Mapping[int, Gate] = {}, window: int = 512) -> float:
    """Mean cross-entropy over consecutive windows of a held-out stream."""
    count = (len(stream) - 1) // window
    inputs = stream[: count * window].view(count, window)
    targets = stream[1 : count * window + 1].view(count, window)
    total = 0.0
    for x, y in zip(inputs.split(16), targets.split(16)):
        total += F.cross_entropy(model(x, gates).flatten(0, 1).float(), y.flatten(), reduction="sum").item()
    return total / (count * window)
