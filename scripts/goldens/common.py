"""What the golden makers share: where the files go, how they are written, how stable a greedy string is."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save

GOLDENS = Path(__file__).resolve().parents[2] / "tests" / "goldens"

# A greedy token is worth comparing only where f32 rounding cannot swap it for the runner-up.
MIN_MARGIN = 1e-3


def fresh_folder(path: Path) -> Path:
    """An empty folder, so that nothing of an older run survives."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def margin(logits: torch.Tensor) -> float:
    """The distance between the best two logits, relative to the largest magnitude."""
    best, second = logits.topk(2).values.tolist()
    return (best - second) / logits.abs().max().item()


def write_tensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    # The library writes metadata in random order; sorted, the same run gives the same bytes.
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(encoded) == size
    path.write_bytes(raw[:8] + encoded + raw[8 + size :])


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def fingerprint(folder: Path) -> str:
    """Identifies a base model by every tensor's name, dtype, shape, first and last 4096 bytes (all shards together)."""
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        raw = file.read_bytes()
        header_size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + header_size])
        header.pop("__metadata__", None)
        for name, info in header.items():
            start, end = (8 + header_size + offset for offset in info["data_offsets"])
            tensors[name] = (info["dtype"], info["shape"], raw[start:end])
    digest = hashlib.sha256()
    for name, (dtype, shape, data) in sorted(tensors.items()):
        digest.update(f"{name}\n{dtype}\n{','.join(map(str, shape))}\n".encode())
        digest.update(data[:4096] + data[-4096:])
    return digest.hexdigest()[:32]
