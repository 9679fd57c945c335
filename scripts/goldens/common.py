"""What the golden makers share: where the files go, how they are written, how stable a greedy string is."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

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
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
