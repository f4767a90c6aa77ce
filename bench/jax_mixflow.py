"""MixFlow-MG (Kemaev et al., 2025, arXiv:2505.00793) of a Llama in JAX: the strongest exact peer on a CPU.

    python -m bench.jax_mixflow INPUT.npz --loop scan        # in an environment with jax; torch is not needed

The inner gradient has a transpose of its own: its vector-Jacobian product is a Hessian-vector product, taken forward
over reverse (``jvp`` of ``grad``), and the inner gradients themselves are never computed again. Every block is
rematerialised, and so is every inner step; everything is one compiled program. Buffers are not donated: the only ones
of the size of the result are the parameters, which whoever asks for their meta-gradient still needs.

The input holds the weights under Hugging Face's names, ``support`` [K, B, T] and ``query`` [B, T] token ids,
``inv_freq``, and the numbers ``heads``, ``eps``, ``lr``; the dtype is that of the weights. Once the program is
compiled and has run, the process prints a line of JSON and then answers each line of its standard input with one:

    go           run one meta-gradient                  -> {"seconds", "cpu_seconds"}
    peak         run one and watch resident memory      -> {"peak_bytes"} above what was there before
    write PATH   run one and write it as .npz           -> {"written"}
"""

import argparse
import ctypes
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

LINEAR = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORM = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
OUTSIDE = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
LOOPS = ("scan", "unrolled")
M_MMAP_THRESHOLD, LARGE = -3, 128 * 1024  # as bench.peak has them, which needs torch


def _block_name(layer, key):
    return f"model.layers.{layer}.{(LINEAR | NORM)[key]}.weight"


def from_hugging_face(weights: dict[str, np.ndarray], loop: str) -> dict:
    """The parameters as a tree: matrices [in, out], blocks stacked for "scan" and a list of them for "unrolled"."""
    layers = sum(name.endswith("input_layernorm.weight") for name in weights)
    blocks = [{key: weights[_block_name(i, key)].T for key in (*LINEAR, *NORM)} for i in range(layers)]
    if loop == "scan":
        blocks = {key: np.stack([block[key] for block in blocks]) for key in blocks[0]}
    outside = {key: weights[name] for key, name in OUTSIDE.items() if name in weights}
    if "head" in outside:
        outside["head"] = outside["head"].T
    return outside | {"blocks": blocks}


def to_hugging_face(tree: dict) -> dict[str, np.ndarray]:
    """The inverse of ``from_hugging_face``."""
    blocks = tree["blocks"]
    if isinstance(blocks, dict):
        blocks = [{key: a[i] for key, a in blocks.items()} for i in range(len(blocks["norm1"]))]
    found = {_block_name(i, key): np.asarray(a).T for i, block in enumerate(blocks) for key, a in block.items()}
    outside = {name: np.asarray(tree[key]) for key, name in OUTSIDE.items() if key in tree}
    if "head" in tree:
        outside[OUTSIDE["head"]] = outside[OUTSIDE["head"]].T
    return found | outside


def loss_function(heads: int, eps: float, inv_freq: np.ndarray, loop: str):
    """``loss(params, ids)``, the mean next-token loss of a Llama whose blocks are rematerialised."""
    import jax  # pyright: ignore[reportMissingImports]
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    def rms_norm(x, w):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * w

    def rotate(x, cos, sin):
        a, b = jnp.split(x, 2, -1)
        return x * cos + jnp.concatenate([-b, a], -1) * sin

    # prevent_cse is needed where the block is not the body of a loop: XLA would undo the recomputation.
    @partial(jax.checkpoint, prevent_cse=loop == "unrolled")
    def block(x, p):
        B, T, d = x.shape
        angle = jnp.tile(jnp.outer(jnp.arange(T), inv_freq), 2)[None, :, None].astype(x.dtype)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        h = rms_norm(x, p["norm1"])
        q, k, v = ((h @ p[n]).reshape(B, T, heads, -1) for n in "qkv")
        s = jnp.einsum("bqhd,bkhd->bhqk", rotate(q, cos, sin), rotate(k, cos, sin)) * q.shape[-1] ** -0.5
        s = jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, -1e30)
        a = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s, -1), v).reshape(B, T, d)
        x = x + a @ p["o"]
        h = rms_norm(x, p["norm2"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    def blocks(x, stack):
        if loop == "scan":
            return jax.lax.scan(lambda x, p: (block(x, p), None), x, stack)[0]
        for p in stack:
            x = block(x, p)
        return x

    def loss(params, ids):
        x = rms_norm(blocks(params["embed"][ids], params["blocks"]), params["norm"])
        logits = x[:, :-1] @ (params["head"] if "head" in params else params["embed"].T)
        picked = jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - picked).mean()

    return loss


def meta_loss_function(loss, lr: float):
    """``meta_loss(params, support, query)``: the query loss after one SGD step on each support batch."""
    import jax  # pyright: ignore[reportMissingImports]

    @jax.custom_vjp
    def inner_grad(params, ids):
        return jax.grad(loss)(params, ids)

    def forward(params, ids):
        return inner_grad(params, ids), (params, ids)

    def backward(saved, v):
        params, ids = saved
        return jax.jvp(lambda p: jax.grad(loss)(p, ids), (params,), (v,))[1], None

    inner_grad.defvjp(forward, backward)

    @jax.checkpoint
    def step(params, ids):
        return jax.tree.map(lambda p, g: p - lr * g, params, inner_grad(params, ids)), None

    def meta_loss(params, support, query):
        return loss(jax.lax.scan(step, params, support)[0], query)

    return meta_loss


def compiled(file: str, loop: str):
    """Return ``run``, which computes the meta-gradient of what the input file holds, compiled and run once."""
    import jax  # pyright: ignore[reportMissingImports]

    with np.load(file) as given:
        arrays = dict(given)
    numbers = {name: arrays.pop(name).item() for name in ("heads", "eps", "lr")}
    support, query, inv_freq = (arrays.pop(name) for name in ("support", "query", "inv_freq"))
    if next(iter(arrays.values())).dtype == np.float64:
        jax.config.update("jax_enable_x64", True)
    meta_loss = meta_loss_function(loss_function(numbers["heads"], numbers["eps"], inv_freq, loop), numbers["lr"])
    inputs = jax.device_put((from_hugging_face(arrays, loop), support.astype(np.int32), query.astype(np.int32)))
    program = jax.jit(jax.grad(meta_loss)).lower(*inputs).compile()

    def run():
        return jax.block_until_ready(program(*inputs))

    run()
    return run


def above(run) -> int:
    """By how many bytes resident memory rises while ``run`` runs, at its highest; its result counts (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    result = run()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) * 1024


def timed(run) -> dict[str, float]:
    """Wall-clock and processor seconds of one run."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    result = run()
    seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - begin_cpu}
    del result
    return seconds


def answer(run, line: str) -> dict:
    """What one line of the input asks for. Raises ValueError for another than those of the module's docstring."""
    command, *rest = line.split(maxsplit=1)
    if command == "go":
        return timed(run)
    if command == "peak":
        return {"peak_bytes": above(run)}
    if command == "write":
        path = rest[0].strip()
        np.savez(path, **to_hugging_face(run()))
        return {"written": path}
    raise ValueError(f"a command must be go, peak or write PATH; got {line!r}")


def main() -> None:
    """Compile, then answer until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m bench.jax_mixflow", description="MixFlow-MG in JAX.")
    parser.add_argument("input")
    parser.add_argument("--loop", choices=LOOPS, default="scan", help="over the layers of the model")
    given = parser.parse_args()
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
    begin = time.perf_counter()
    run = compiled(given.input, given.loop)
    import jax  # pyright: ignore[reportMissingImports]

    ready = {"jax": jax.__version__, "compile_seconds": time.perf_counter() - begin, "pid": os.getpid()}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(run, line)), flush=True)


if __name__ == "__main__":
    main()
