"""Results as JSON objects with optional traces."""

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from refusion_jax.decode.samples import Samples
from refusion_jax.serving.requests import Request
from refusion_jax.tokenizer import Tokenizer


def result(request: Request, samples: Samples, tokenizer: Tokenizer, stop: Sequence[str]) -> dict[str, Any]:
    """The JSON object of a request's result.

    Args:
      samples: the request's row, without batch axis.
      stop: texts that end an answer; `text` is cut before the first of them, `ids` is not.
    """
    num_raw, num_ids = int(samples.num_raw), int(samples.num_ids)
    raw_ids = samples.raw_ids[:num_raw].tolist()
    text = tokenizer.decode(raw_ids[:num_ids])
    reason = "eos" if num_ids < num_raw else "length"
    cuts = [text.index(s) for s in stop if s in text]
    if cuts:
        text, reason = text[: min(cuts)], "stop"
    answer = {
        "id": request.id,
        "text": text,
        "ids": raw_ids[:num_ids],
        "raw_ids": raw_ids,
        "finish_reason": reason,
        "num_tokens": num_raw,
        "num_forwards": int(samples.num_forwards),
        "tokens_per_forward": round(num_raw / max(int(samples.num_forwards), 1), 4),
        "num_iterations": int(samples.num_iterations),
    }
    if request.trace:
        answer["trace"] = trace_steps(request, samples)
    return answer


def trace_steps(request: Request, samples: Samples) -> list[dict[str, Any]]:
    """The plans or exact passes of a request as JSON; empty for a method without plans.

    Positions count from the start of the prompt. `start` is the position of the block. `confidences` has the
    score of each undecoded slot, by the position of its first token. `accepted` lists for each planned slot
    the number of tokens accepted by the joint verification and after each refill.
    """
    if samples.trace is None:
        return []
    if request.config.exact:
        return exact_steps(request, samples)
    steps, size = [], request.config.slot_size
    for i in range(int(samples.num_iterations)):
        step = jax.tree.map(lambda x, i=i: x[i], samples.trace)
        start = len(request.prompt) + int(step.block) * request.config.block_len
        pool, planned = np.flatnonzero(step.confidence >= 0), np.flatnonzero(step.planned)
        accepted = [step.accepted[m * size : (m + 1) * size] for m in planned]
        steps.append(
            {
                "block": int(step.block),
                "start": start,
                "planned": (start + size * planned).tolist(),
                "branch": "iterative" if step.iterative else "prefix",
                "rounds": int(step.rounds),
                "committed": (start + np.flatnonzero(step.committed)).tolist(),
                "confidences": {int(start + size * m): round(float(step.confidence[m]), 6) for m in pool},
                "accepted": [a[a > 0].tolist() for a in accepted],
                "forwards": int(step.forwards),
            }
        )
    return steps


def exact_steps(request: Request, samples: Samples) -> list[dict[str, Any]]:
    """The passes of a request that is decoded exactly.

    `start` is the place in the response of the first token that the pass could commit, `drafted` and
    `accepted` count its drafts, `bonus` is the id of the token committed after them (null if an EOS among
    them ended the answer), `ahead` says whether drafts for the next pass rode along, and `committed` lists
    positions.
    """
    steps = []
    for i in range(int(samples.num_forwards)):
        passed = jax.tree.map(lambda x, i=i: x[i].item(), samples.trace.exact)
        end = passed.start + passed.committed
        bonus = int(samples.raw_ids[end - 1]) if passed.committed > passed.accepted else None
        first = len(request.prompt)
        steps.append(
            {
                "branch": "exact",
                "start": passed.start,
                "drafted": passed.drafted,
                "accepted": passed.accepted,
                "bonus": bonus,
                "ahead": passed.ahead,
                "committed": list(range(first + passed.start, first + end)),
            }
        )
    return steps


def to_json(answer: dict[str, Any]) -> str:
    """A result as one line of JSON; non-ASCII characters are escaped only if the id is not valid Unicode."""
    line = json.dumps(answer, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(answer)
    return line
