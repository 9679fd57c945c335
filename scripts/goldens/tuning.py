"""The gradients of Router-Tuning by PyTorch's autograd, through a straight-through mask.

The model is that of routing.py, its masked reference in f64: every sub-layer is computed for every token and multiplied by
m = hard + score - score.detach(). Writes tests/goldens/tuning.safetensors; README.md beside this file tells the layout.
"""

import itertools

import torch
from transformers.utils import logging

from common import GOLDENS, write_tensors
from routing import MIN_SCORE_GAP, OUT, Reference, best

LAYERS = [1, 2, 4]
LENGTHS = [9, 2, 14, 5]
CAPACITY, THRESHOLD = 0.5, 0.5
SCALE, LAMBDA, TARGET = 0.125, 0.75, 0.25


def cases():
    for target, level in itertools.product(("attn", "mlp", "block"), ("token", "sequence")):
        token = level == "token"
        for keys in ("all", "active") if token and target != "mlp" else ("all",):
            for select in ("threshold", "topk") if token else ("threshold",):
                for ste, goal in itertools.product(("full", "active"), ("lm", "kl")):
                    yield target, level, keys, select, ste, goal


def decide(scores, level, select):
    """Which tokens are active, and how far the nearest decision is from the other one."""
    if select == "topk":
        values = scores.tolist()
        hard = torch.zeros(len(values), dtype=torch.bool)
        hard[best(values, CAPACITY)] = True
        inside, outside = scores[hard], scores[~hard]
        return hard, (inside.min() - outside.max()).item() if len(outside) else 1.0
    return scores >= THRESHOLD, (scores - THRESHOLD).abs().min().item()


def forward(reference, ids, case, routers):
    """Log-probabilities [tokens, vocab]; by routed layer the sum of its masks, its active tokens, the narrowest gap."""
    target, level, keys, select, ste, _ = case
    every = torch.ones(len(ids), dtype=torch.bool)
    x = reference.weights["model.embed_tokens.weight"][ids]
    masks, active, gap = [], [], 1.0
    for layer in range(reference.config["num_hidden_layers"]):
        h = reference.norm(x, f"model.layers.{layer}.input_layernorm")
        attention = mlp = torch.ones(len(ids), dtype=torch.float64)
        visible = every
        if routers and layer in LAYERS:
            dots = h @ routers[LAYERS.index(layer)]
            scores = (dots if level == "token" else dots.mean().expand(len(ids))).sigmoid()
            hard, near = decide(scores.detach(), level, select)
            gap = min(gap, near)
            mask = hard.double() + scores - scores.detach()
            masks.append(mask.sum())
            active.append(int(hard.sum()))
            if ste == "active":
                mask = torch.where(hard, mask, 0.0)
            if target != "mlp":
                attention = mask
                visible = hard if level == "token" and keys == "active" else every
            if target != "attn":
                mlp = mask
        # A block that is skipped for a token is x itself, so both of its parts start from the unmasked sum.
        added = reference.attention(h, layer, visible)
        inner = x + (added if target == "block" else attention[:, None] * added)
        x = x + attention[:, None] * added + mlp[:, None] * reference.mlp(inner, layer)
    x = reference.norm(x, "model.norm")
    return (x @ reference.weights["model.embed_tokens.weight"].T).log_softmax(-1), masks, active, gap


def step(reference, samples, case, routers):
    """The loss of each sample, the active tokens by routed layer, the gradients of the routers, the narrowest gap."""
    rows = sum(len(ids) - 1 for ids, _ in samples)
    losses, totals, active, gap = [], [0.0] * len(LAYERS), [0] * len(LAYERS), 1.0
    for ids, counts in samples:
        log_p, masks, count, near = forward(reference, ids[:-1], case, routers)
        at = torch.tensor([i for i in range(len(ids) - 1) if counts[i + 1]], dtype=torch.long)
        if case[-1] == "kl":
            log_q = forward(reference, ids[:-1], case, None)[0][at]
            losses.append((log_q.exp() * (log_q - log_p[at])).sum())
        else:
            losses.append(-log_p[at, torch.tensor(ids)[at + 1]].sum())
        totals = [a + b for a, b in zip(totals, masks)]
        active = [a + b for a, b in zip(active, count)]
        gap = min(gap, near)
    penalty = sum((total / rows - TARGET).clamp(min=0.0) for total in totals)
    (SCALE * sum(losses) + LAMBDA * penalty).backward()
    return losses, active, [router.grad for router in routers], gap


def make(reference, case):
    for seed in range(500):
        generator = torch.Generator().manual_seed(seed)
        vocab = reference.config["vocab_size"]
        ids = [torch.randint(vocab, (n,), generator=generator).tolist() for n in LENGTHS]
        # The answers: the second halves, with gaps.
        samples = [(s, [t >= len(s) // 2 and t % 3 != 1 for t in range(len(s))]) for s in ids]
        # As f32 values, as that is what a router is stored in.
        values = [(torch.randn(64, generator=generator) * 0.2).double().requires_grad_() for _ in LAYERS]
        losses, active, gradients, gap = step(reference, samples, case, values)
        share = sum(active) / (len(LAYERS) * sum(n - 1 for n in LENGTHS))
        if gap > MIN_SCORE_GAP and 0.3 < share < 0.8:
            break
    else:
        raise SystemExit(f"{case}: no seed gives decisive routers")
    name = "-".join(case)
    print(f"{name:40} seed {seed:3}  active {share:.2f}")
    return {
        f"{name}.ids": torch.tensor(sum(ids, []), dtype=torch.int32),
        f"{name}.routers": torch.stack([v.detach() for v in values]).float(),
        f"{name}.losses": torch.stack(losses).detach().float(),
        f"{name}.active": torch.tensor(active, dtype=torch.int32),
        f"{name}.gradients": torch.stack(gradients).float(),
    }


def main():
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    reference = Reference(OUT / "model")
    tensors = {}
    for case in cases():
        tensors |= make(reference, case)
    write_tensors(GOLDENS / "tuning.safetensors", tensors)


if __name__ == "__main__":
    main()
