"""Training examples from a model's own answers.

    python docs/own_answers.py requests.jsonl answers.jsonl > own.jsonl

reads requests and the results of `sample --input` for them. Answers without an EOS, which were cut at their
length, are left out, and so are requests that could not be served.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    requests, answers = (Path(path).read_text(encoding="utf-8").splitlines() for path in sys.argv[1:])
    for request, answer in zip(map(json.loads, requests), map(json.loads, answers), strict=True):
        if answer.get("finish_reason") == "eos":
            print(json.dumps({"query": request["prompt"], "response": answer["text"]}))


if __name__ == "__main__":
    main()
