"""Compares cuDNN's attention with the dense reference on an NVIDIA GPU. Not a test: CI has no GPU.

    make gpu

bfloat16, forward and gradients, with grouped queries: causal or not, with and without segments, and under a
mask. Exit code 1 if any row is beyond its limit.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax.model.attention import attend_fed

LIMIT = 0.07  # of numbers up to about 4: bfloat16 has 8 bits
B, T = 3, 512
BORDERS = ([0, 100, 300, T], [0, 5, T], [0, 1, 2, 511, T])  # one token, many, and fewer segments than places
PLACES = 6


def largest_differences(num_kv_heads: int, head_dim: int, **seen) -> list[float]:
    """Of the output and of the gradients of q, k and v."""
    arrays = [
        jax.random.normal(jax.random.key(i), (B, T, n, head_dim), jnp.bfloat16)
        for i, n in enumerate((8, num_kv_heads, num_kv_heads, 8))
    ]

    def results(kernel: str, q, k, v, cotangent):
        def attended(q, k, v):
            return attend_fed(q, (k, v), kernel=kernel, max_segments=PLACES, **seen)

        y, back = jax.vjp(attended, q, k, v)
        return y, *back(cotangent)

    compiled = jax.jit(results, static_argnums=0)
    pairs = zip(compiled("cudnn", *arrays), compiled("dense", *arrays), strict=True)
    return [float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)))) for a, b in pairs]


def main() -> int:
    if jax.default_backend() != "gpu":
        print("no GPU found", file=sys.stderr)
        return 2
    segments = np.stack([np.repeat(np.arange(len(b) - 1), np.diff(b)) for b in BORDERS]).astype(np.int32)
    mask = jax.random.bernoulli(jax.random.key(9), 0.3, (B, T, T)) | jnp.eye(T, dtype=bool)
    ways = {
        "causal": {"segments": None},
        "causal, segments": {"segments": segments},
        "bidirectional": {"segments": None, "causal": False},
        "bidirectional, segments": {"segments": segments, "causal": False},
        "a mask": {"segments": None, "mask": mask},
    }
    failures = 0
    print("largest difference of the output and the gradients of q, k and v")
    for num_kv_heads in (8, 4):
        for head_dim in (64, 128):
            for name, seen in ways.items():
                found = largest_differences(num_kv_heads, head_dim, **seen)
                failures += not max(found) < LIMIT
                figures = "  ".join(f"{x:.4f}" for x in found)
                print(f"8 over {num_kv_heads} heads of {head_dim:3}, {name:24}  {figures}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
