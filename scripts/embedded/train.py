"""Trains the student on the sampled stories.

Run with `torchrun --nproc-per-node 2`: processes of one thread each meet once a step, which holds its speed on a shared
machine far better than two threads meeting at every operation. The schedule follows the clock, so that the learning rate
reaches zero when the time is up, however fast the machine turns out to be. Rerun after a crash, it goes on from the last
checkpoint.
"""

import argparse
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer

from corpus import SEPARATOR, Windows, encode, read_stories, split_held_out
from model import Gate, Llama, Shape, per_token_loss

TOKENS_PER_PROCESS = 2048  # in one step
LONG_SHARE = 0.18  # of the time, at the end, in windows as long as the model's context
WARM_UP_STEPS = 100  # in steps, not time: most of the first minute or two goes into compiling
SKIPPABLE = range(3, Shape.layers)


class Clock:
    """Training time in seconds, across restarts."""

    def __init__(self, already: float):
        self.start = time.time() - already

    def elapsed(self) -> float:
        return time.time() - self.start


def learning_rate(step: int, progress: float) -> float:
    """Factor of the peak rate: short warm-up, then linear to zero."""
    return min((step + 1) / WARM_UP_STEPS, 1 - progress)


def random_skips(most: float) -> dict[int, Gate]:
    """Gates under which every token skips a layer's attention with a probability drawn for each sequence from 0 to `most`.
    The routers come later and find the model frozen; this teaches it to bear being skipped, and being dense."""

    def gate(h: torch.Tensor) -> torch.Tensor:
        probability = most * torch.rand(h.shape[0], 1, 1)
        return (torch.rand(*h.shape[:2], 1) >= probability).to(h.dtype)

    return {layer: gate for layer in SKIPPABLE} if most > 0 else {}


def optimizers(model: Llama, rate: float, decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices; AdamW for the embedding, which is looked up row by row, and the norms."""
    inner = [p for p in model.model.layers.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([model.model.embed_tokens.weight, *norms], lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def average_gradients(model: Llama) -> None:
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(part.view_as(gradient))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--skip", type=float, default=0.6, help="highest probability of a random skip")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    training, held_out = split_held_out(read_stories(args.work))
    stream, held_out_stream = encode(tokenizer, training), encode(tokenizer, held_out)
    held_out_bytes = len("".join(held_out).encode())

    torch.manual_seed(args.seed)
    model = Llama(Shape(vocab=tokenizer.get_vocab_size()))
    optimizer_list = optimizers(model, args.rate, args.decay)
    checkpoint = args.work / "checkpoint.pt"
    step = tokens = 0
    already = 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        step, tokens, already = state["step"], state["tokens"], state["elapsed"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizer_list, state["optimizers"]):
            optimizer.load_state_dict(saved)
    torch.manual_seed(args.seed + 1000 * step + rank)  # for the random skips
    windows = Windows(stream, tokenizer.token_to_id(SEPARATOR), args.seed + 1000 * step + rank)
    compiled = torch.compile(model, dynamic=False)
    gates = random_skips(args.skip)
    clock = Clock(already)
    log_file = open(args.work / "train.log", "a", encoding="utf-8") if rank == 0 else None

    def log(line: str) -> None:
        if log_file:
            print(f"{clock.elapsed():6.0f} s  step {step:5d}  {tokens / 1e6:6.2f} M tokens  {line}", file=log_file, flush=True)

    def save() -> None:
        state = {"step": step, "tokens": tokens, "elapsed": clock.elapsed(), "model": model.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in optimizer_list]}
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").rename(checkpoint)

    log(f"{sum(p.numel() for p in model.parameters())} parameters; {len(training)} stories, {len(stream)} tokens to train on; "
        f"{len(held_out)} stories, {len(held_out_stream)} tokens, {held_out_bytes} bytes held out; "
        f"{args.minutes} minutes, rate {args.rate}, decay {args.decay}, skip {args.skip}, seed {args.seed}")
    last_report = last_save = clock.elapsed()
    losses: list[float] = []
    while True:
        agreed = torch.tensor(clock.elapsed() / (60 * args.minutes))
        dist.broadcast(agreed, src=0)  # all processes act on the same time
        progress = agreed.item()
        if progress >= 1:
            break
        length = Shape.positions if progress > 1 - LONG_SHARE else Shape.positions // 2
        batch = windows.draw(TOKENS_PER_PROCESS // length, length)
        with torch.autocast("cpu", torch.bfloat16):
            logits = compiled(batch[:, :-1], gates)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * learning_rate(step, progress)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        tokens += TOKENS_PER_PROCESS * processes
        losses.append(loss.item())
        assert math.isfinite(losses[-1])

        if rank == 0 and clock.elapsed() - last_report > 30:
            last_report = clock.elapsed()
            log(f"{progress:6.1%}  window {length}  train loss {sum(losses) / len(losses):.4f}")
            losses.clear()
        if rank == 0 and clock.elapsed() - last_save > 180:
            last_save = clock.elapsed()
            save()
            log(f"checkpoint  held-out loss {per_token_loss(model, held_out_stream[:16385]):.4f} (first 16k tokens)")

    if rank == 0:
        save()
        loss = per_token_loss(model, held_out_stream)
        log(f"finished  held-out loss {loss:.4f} per token, {loss * (len(held_out_stream) - 1) / held_out_bytes:.4f} per byte")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
