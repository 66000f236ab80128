"""Which requests of a file decode together, and which are too large for the memory there is."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from refusion_jax.baselines.decoders.config import ARConfig
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.errors import BadInput
from refusion_jax.model.config import ModelConfig
from refusion_jax.serving.requests import Request

SHORTEST, STEP = 512, 8  # tokens of the shortest class, and the ratio of one class to the one before
COPIES = 3  # of the scores, as XLA computes a softmax on a CPU; measured
MEMINFO = Path("/proc/meminfo")


def by_length(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of requests that share a padded length, the shortest first.

    All rows of a batch are as long as the longest request in it, so one long request would cost all others.
    Classes are wide because each is compiled for itself.
    """
    classes: dict[int, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        longest = SHORTEST
        while longest < tokens(request):
            longest *= STEP
        classes[longest].append(index)
    return [classes[longest] for longest in sorted(classes)]


def tokens(request: Request) -> int:
    """The tokens of prompt and response."""
    return len(request.prompt) + request.config.gen_length


def check_fits(request: Request, config: ModelConfig, dtype: jnp.dtype) -> None:
    """Raises BadInput if a request alone needs more memory than is free."""
    free, needed = free_bytes(), bytes_needed(request, config, dtype)
    if free is not None and needed > free:
        raise BadInput(
            f"a prompt of {len(request.prompt):,} tokens and gen_length {request.config.gen_length:,} need "
            f"about {needed / 2**30:,.1f} GiB, {free / 2**30:,.1f} GiB are free"
        )


def rows_that_fit(requests: Sequence[Request], most: int, config: ModelConfig, dtype: jnp.dtype) -> int:
    """The rows that decode together, at most `most`: the KV cache of every row is as long as the longest."""
    free = free_bytes()
    if free is None:
        return most
    left = free - max(bytes_needed(request, config, dtype) for request in requests)
    more = left // (max(map(tokens, requests)) * bytes_cached(config, dtype))
    return max(1, min(most, 1 + int(more)))


def bytes_needed(request: Request, config: ModelConfig, dtype: jnp.dtype) -> int:
    """Of the KV cache, and of the attention scores of one layer in float32 while the prompt is fed."""
    in_chunks = isinstance(request.config, (DecodeConfig, ARConfig))
    fed = min(len(request.prompt), Shape.chunk) if in_chunks else len(request.prompt)
    return tokens(request) * (bytes_cached(config, dtype) + 4 * COPIES * config.num_heads * fed)


def bytes_cached(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Of the keys and values of a token."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def free_bytes() -> int | None:
    """Free memory of a device, or of the machine if its devices are CPUs; None if it is unknown."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if jax.default_backend() == "cpu" and MEMINFO.exists():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None
