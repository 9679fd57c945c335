"""Router-Tuning of the exported model: the weights are frozen, only the routers learn.

A router reads a layer's input_layernorm output h and scores each token by sigmoid(h . r). Tokens below the threshold skip the
layer's attention, but still write their key and value. Forward uses the hard mask, backward passes straight through it.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from corpus import SEPARATOR, Windows, encode, read_stories, split_held_out
from export import replace
from fingerprint import fingerprint
from model import Llama, load_exported, per_token_loss

THRESHOLD = 0.5
WARM_UP = 0.03  # of the time
SPREAD = 2.0  # root mean square of h . r after tuning,
SPREAD_TOKENS = 8193  # on so many tokens
MARGIN = 1e-3  # scores this close to the threshold might be decided differently by other arithmetic


class Router(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden))
        self.capacity = torch.ones(())  # of the last call, differentiable straight through
        self.scores: list[torch.Tensor] | None = None  # a list to record into, during evaluation

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            score = F.linear(h.float(), self.weight).sigmoid()
        if self.scores is not None:
            self.scores.append(score.flatten())
        active = (score >= THRESHOLD).float() + (score - score.detach())
        self.capacity = active.mean()
        return active


def skip_costs(model: Llama, stream: torch.Tensor) -> tuple[float, list[float]]:
    """The dense loss, and what skipping each layer's attention alone adds to it."""
    dense = per_token_loss(model, stream)

    def never(h: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 1, 1)

    return dense, [per_token_loss(model, stream, {layer: never}) - dense for layer in range(model.shape.layers)]


def tune(model: Llama, windows: Windows, layers: list[int], args: argparse.Namespace, report) -> dict[int, Router]:
    routers = {layer: Router(model.shape.hidden) for layer in layers}
    optimizer = torch.optim.AdamW([r.weight for r in routers.values()], lr=args.rate, weight_decay=0.0)
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        warm = min(1.0, progress / WARM_UP)
        optimizer.param_groups[0]["lr"] = args.rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
        batch = windows.draw(args.batch, model.shape.positions)
        inputs, targets = batch[:, :-1], batch[:, 1:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs, routers).float().flatten(0, 1)
            if args.loss == "lm":
                loss = F.cross_entropy(logits, targets.flatten())
            else:
                with torch.no_grad():
                    dense = model(inputs).float().flatten(0, 1).log_softmax(-1)
                loss = F.kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="batchmean")
        excess = sum((router.capacity - args.target).relu() for router in routers.values())
        optimizer.zero_grad()
        (loss + args.penalty * excess).backward()
        optimizer.step()
        step += 1
        if step % 25 == 0:
            capacities = " ".join(f"{layer}:{router.capacity.item():.3f}" for layer, router in routers.items())
            report(f"router step {step:4d}  {time.time() - start:4.0f} s  {args.loss} {loss.item():.4f}  capacity {capacities}")
    return routers


def evaluate(model: Llama, stream: torch.Tensor, routers: dict[int, Router]) -> tuple[float, dict[int, torch.Tensor]]:
    """Held-out loss with the routers at work, and every score by layer."""
    for router in routers.values():
        router.scores = []
    loss = per_token_loss(model, stream, routers)
    return loss, {layer: torch.cat(router.scores) for layer, router in routers.items()}


@torch.no_grad()
def spread_scores(model: Llama, stream: torch.Tensor, routers: dict[int, Router]) -> None:
    """Lengthens the routers. A threshold of 0.5 is h . r = 0, so their length decides nothing, but tuning leaves them short,
    with scores crowded around the threshold."""
    _, scores = evaluate(model, stream, routers)
    for layer, router in routers.items():
        router.weight.mul_(SPREAD / scores[layer].logit().square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the exported folder; receives routers.safetensors")
    parser.add_argument("--count", type=int, default=5, help="how many layers to route: those cheapest to skip")
    parser.add_argument("--loss", choices=["kl", "lm"], default="kl", help="kl: stay close to the dense model's distribution")
    parser.add_argument("--target", type=float, default=0.55, help="capacity of each routed layer")
    parser.add_argument("--penalty", type=float, default=0.3)
    parser.add_argument("--rate", type=float, default=1e-1)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    lines: list[str] = []

    def report(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    model = load_exported(args.out).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    training, held_out = (encode(tokenizer, stories) for stories in split_held_out(read_stories(args.work)))
    windows = Windows(training, tokenizer.token_to_id(SEPARATOR), args.seed)

    dense, costs = skip_costs(model, held_out)
    report(f"bf16 export, f32 arithmetic: dense held-out loss {dense:.4f} per token")
    report("cost of skipping one layer's attention: " + " ".join(f"{i}:{cost:+.4f}" for i, cost in enumerate(costs)))
    layers = sorted(sorted(range(len(costs)), key=costs.__getitem__)[: args.count])
    report(f"routed layers {layers}; {args.loss} loss, target {args.target}, penalty {args.penalty}, rate {args.rate}")
    routers = tune(model, windows, layers, args, report)

    spread_scores(model, training[:SPREAD_TOKENS], routers)
    routed, scores = evaluate(model, held_out, routers)
    for layer, score in scores.items():
        low, middle, high = score.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        near = ((score - THRESHOLD).abs() < MARGIN).float().mean()
        report(f"layer {layer}: capacity {(score >= THRESHOLD).float().mean():.4f}  scores 5% {low:.3f}, median {middle:.3f}, "
               f"95% {high:.3f}; {near:.3%} within {MARGIN} of the threshold")
    capacity = (torch.cat(list(scores.values())) >= THRESHOLD).float().mean().item()
    report(f"held-out loss per token: dense {dense:.4f}, routed {routed:.4f} ({routed - dense:+.4f}) at capacity {capacity:.4f}")

    metadata = {
        "format": "mindskip-routers-1",
        "granularity": "attn_token",
        "keys": "all",
        "select": "threshold",
        "threshold": str(THRESHOLD),
        "layers": ",".join(map(str, layers)),
        "fingerprint": fingerprint(args.out / "model.safetensors"),
        "heldout_loss_dense": f"{dense:.4f}",
        "heldout_loss_routed": f"{routed:.4f}",
        "capacity": f"{capacity:.4f}",
    }
    tensors = {f"model.layers.{layer}.router.weight": router.weight.detach() for layer, router in routers.items()}
    replace(args.out, "routers.safetensors", lambda path: save_file(tensors, path, metadata))
    with open(args.out / "train.log", "a", encoding="utf-8") as log:
        log.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
