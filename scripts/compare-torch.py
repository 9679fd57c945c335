#!/usr/bin/env python3
"""What PyTorch reaches on this machine, to stand beside `mindskip bench`: JSON, an object a line.

    compare-torch.py [--device cuda|cpu] [--shape NAME[,NAME]] [--quick]

A large copy and a large product in bf16; the products of a layer of each shape; scaled_dot_product_attention, causal, at
heads of 64 and 128; with transformers installed, prefill and decode of each shape with random weights. On a CPU the sizes
are small: it shows that the script runs, and little else. Needs Python 3.9 and torch.
"""

import argparse
import json
import sys
import time

SHAPES = {  # hidden, intermediate, layers, heads, K/V heads, head_dim, vocabulary, tied
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "mistral-7b": (4096, 14336, 32, 32, 8, 128, 32000, False),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--device", default=None, help="cuda or cpu; cuda where there is one")
parser.add_argument("--shape", help="of " + ", ".join(SHAPES))
parser.add_argument("--quick", action="store_true", help="fewer sizes")
args = parser.parse_args()
shapes = args.shape.split(",") if args.shape else []
if wrong := [name for name in shapes if name not in SHAPES]:
    sys.exit(f"compare-torch.py: no shape is called {wrong[0]}; give some of {', '.join(SHAPES)}")

try:
    import torch
except ImportError:
    sys.exit("compare-torch.py: torch is not installed; pip install torch")
import torch.nn.functional as F

device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
gpu = device.startswith("cuda")
torch.manual_seed(0)
torch.set_grad_enabled(False)
name = torch.cuda.get_device_name(device) if gpu else "cpu"
shapes = shapes or (["llama-3-8b", "smollm2-135m"] if gpu and not args.quick else ["smollm2-135m"])


def wait():
    if gpu:
        torch.cuda.synchronize(device)


def seconds(run, least=0.2 if gpu else 0.05):
    """The median of 5 samples of a call, each of as many calls as last for `least / 5`."""
    run()
    wait()
    calls = 1
    while True:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        took = time.perf_counter() - start
        if took * 5 >= least:
            break
        calls *= 2
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        samples.append((time.perf_counter() - start) / calls)
    return sorted(samples)[2]


def tell(what, took, flops=0, moved=0, **more):
    line = {"torch": torch.__version__, "device": name, "what": what, "ms": took * 1e3, **more}
    if flops:
        line["flops_per_s"] = flops / took
    if moved:
        line["bytes_per_s"] = moved / took
    print(json.dumps(line), flush=True)


def random(*shape):
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def copy_and_product():
    source = torch.ones((1 << 30) if gpu else (1 << 24), dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    tell("copy", seconds(lambda: to.copy_(source)), moved=2 * source.numel())
    n = 8192 if gpu else 256
    a, b = random(n, n), random(n, n)
    tell("product", seconds(lambda: a @ b.T), flops=2 * n**3, m=n, n=n, k=n)


def layer_products(shape):
    hidden, inter, _, heads, kv_heads, d, _, _ = SHAPES[shape]
    for rows in [2048] if gpu else [16]:
        for part, n, k in [("qkv", (heads + 2 * kv_heads) * d, hidden), ("up", inter, hidden), ("down", hidden, inter)]:
            src, weight = random(rows, k), random(n, k)
            took = seconds(lambda: F.linear(src, weight))
            tell(f"product {part}", took, flops=2 * rows * n * k, shape=shape, m=rows, n=n, k=k)


def attention():
    for d, heads, kv_heads in [(64, 32, 8), (128, 32, 8)]:
        for n in ([2048] if args.quick else [2048, 8192]) if gpu else [128]:
            q, k, v = random(1, heads, n, d), random(1, kv_heads, n, d), random(1, kv_heads, n, d)
            took = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
            # Query i sees i + 1 keys.
            tell("attention", took, flops=4 * heads * d * n * (n + 1) // 2, head_dim=d, tokens=n, heads=heads, kv_heads=kv_heads)


def whole_model(shape):
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        print("compare-torch.py: without transformers no whole model is measured", file=sys.stderr)
        return
    hidden, inter, layers, heads, kv_heads, d, vocab, tied = SHAPES[shape]
    prompt, generated = (2048, 32) if gpu else (16, 4)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers if gpu else 2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=d, vocab_size=vocab if gpu else 1000, tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(before)
    ids = torch.randint(config.vocab_size, (1, prompt + generated), device=device)
    more = {"shape": shape, "layers": config.num_hidden_layers}
    took = seconds(lambda: model(ids[:, :prompt], use_cache=True, logits_to_keep=1))
    tell("prefill", took, tokens=prompt, tokens_per_s=prompt / took, **more)

    samples = []
    for _ in range(3):
        cache = model(ids[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
        wait()
        start = time.perf_counter()
        for i in range(prompt, prompt + generated):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        wait()
        samples.append(time.perf_counter() - start)
    took = sorted(samples)[1]
    tell("decode", took / generated, tokens=generated, tokens_per_s=generated / took, **more)


copy_and_product()
attention()
for shape in shapes:
    layer_products(shape)
    whole_model(shape)
