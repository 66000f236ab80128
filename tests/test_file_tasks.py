"""Tasks read from files: GSM8K and general text."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from refusion_jax import evaluate
from refusion_jax.data.pipeline import DataConfig, batch_iterator, load_examples
from refusion_jax.data.tasks import gsm8k
from refusion_jax.data.tasks.registry import make_task
from refusion_jax.data.tasks.task import SPLITS
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def question(number, what="apples"):
    return f"Ann has {number} {what} and eats one. How many are left?"


def write(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def problems(numbers, what="apples"):
    return [
        {"question": question(n, what), "answer": f"She has {n}-1=<<{n}-1={n - 1}>>{n - 1}.\n#### {n - 1:,}"}
        for n in numbers
    ]


@pytest.fixture
def files(tmp_path):
    return {
        "path": write(tmp_path / "train.jsonl.gz", problems(range(2, 402))),
        "test_path": write(tmp_path / "test.jsonl", problems(range(2000, 2030), "pears")),
    }


def everything(task, split):
    return [task.example(i, split) for i in range(task.size(split))]


def test_every_problem_is_in_one_split(files):
    task = make_task("gsm8k", files)
    found = {split: everything(task, split) for split in SPLITS}
    assert sorted(e.query for e in found["train"] + found["validation"]) == sorted(
        question(n) for n in range(2, 402)
    )
    assert 8 <= len(found["validation"]) <= 35
    assert [e.query for e in found["test"]] == [question(n, "pears") for n in range(2000, 2030)]
    validation = [e.query for e in found["validation"]]
    assert validation == sorted(validation, key=lambda text: int(text.split()[2]))  # the file's order
    # The split of a problem does not depend on the rest of the file.
    fewer = make_task("gsm8k", {"path": write(Path(files["path"]).with_name("few"), problems(range(2, 50)))})
    assert {e.query for e in everything(fewer, "validation")} <= set(validation)
    assert not {e.query for e in everything(fewer, "train")} & set(validation)


def test_marks_of_the_calculator_are_left_out(files):
    query, response = make_task("gsm8k", files).example(0, "test")
    assert (query, response) == (question(2000, "pears"), "She has 2000-1=1999.\n#### 1,999")


def test_training_has_a_new_order_each_time_round(files):
    task = make_task("gsm8k", files)
    count = task.size("train")
    rounds = [[task.example(k * count + i) for i in range(count)] for k in range(2)]
    rounds.append([task.example(i, seed=1) for i in range(count)])
    assert len({tuple(r) for r in rounds}) == 3
    assert len({tuple(sorted(r)) for r in rounds}) == 1
    assert task.example(5) == make_task("gsm8k", files).example(5)
    assert task.example(2**40 + 3) in rounds[0]
    assert task.example(30, "test") == task.example(0, "test")


def test_training_never_sees_a_problem_of_the_test_file(tmp_path):
    """Not even with other spelling or spacing, with the files swapped, or with one file for both."""
    tested = problems(range(2, 52))
    respelled = [{**p, "question": f"  {p['question'].upper()}".replace(" ", "\n")} for p in tested]
    paths = {
        "path": write(tmp_path / "all", problems(range(2, 402)) + respelled),
        "test_path": write(tmp_path / "test", tested),
    }
    task = make_task("gsm8k", paths)
    for split in "train", "validation":
        numbers = [int(query.split()[2]) for query, _ in everything(task, split)]
        assert min(numbers) >= 52
    same = make_task("gsm8k", {"path": paths["test_path"], "test_path": paths["test_path"]})
    assert same.size("train") == same.size("validation") == 0
    with pytest.raises(BadInput, match="no example of the train split"):
        same.example(0)


def test_the_published_test_set_is_known(tmp_path, monkeypatch):
    mark = gsm8k._fingerprint(question(300))
    assert mark == gsm8k._fingerprint(question(300).lower().replace(" ", "  "))
    assert mark != gsm8k._fingerprint(question(30))
    monkeypatch.setattr(gsm8k, "_TEST_QUESTIONS", {mark})
    path = write(tmp_path / "a.jsonl", problems(range(2, 402)))
    with pytest.raises(BadInput, match=r"gsm8k.path is .* holds problems of GSM8K's test set"):
        make_task("gsm8k", {"path": path})


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("#### 1999", True),
        ("She has 2000-1=1999.\n#### 1,999", True),
        ("#### 1,999.", True),
        ("#### 1999 apples", True),
        ("#### 1999\n\nQuestion: What else?\n#### 7", True),
        ("1999", False),
        ("####1999", False),
        ("####  1999", False),
        ("#### $1,999.", False),
        ("#### 1999.0", False),
        ("#### 7 #### 1999\n", False),
        ("#### 1998", False),
        ("#### -1999", False),
        ("#### 1999.5", False),
        ("#### 1999..", False),
        ("#### " + "9" * 5000, False),
        ("#### NaN", False),
        ("#### 1e3", False),
        ("####", False),
        ("", False),
        ("\ud800", False),
    ],
)
def test_the_number_after_the_mark_counts_as_in_lm_eval(files, response, right):
    task = make_task("gsm8k", files)
    assert task.check(question(2000, "pears"), response) == right
    assert task.check_all([(question(2000, "pears"), response)]) == [right]
    assert not task.check("What else?", response)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"question": "Why?", "answer": "So."}], "example 1 has no number after ####, found 'So.'"),
        ([{"question": "Why?"}], ":1: has no 'answer'"),
        ([], "holds no examples"),
    ],
)
def test_files_that_are_not_gsm8k(tmp_path, records, message):
    with pytest.raises(BadInput, match=message):
        make_task("gsm8k", {"path": write(tmp_path / "a.jsonl", records)})


def test_no_file():
    with pytest.raises(BadInput, match=r"gsm8k\.path is '', expected a JSON-lines file"):
        make_task("gsm8k", {})
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        make_task("text", {"path": "/nowhere"})


# Text


def text_file(path):
    lines = [{"query": f"Say {n}.", "response": f"{n}."} for n in range(200)]
    lines += [
        {"messages": [{"role": role, "content": f"{role} {n}"} for role in ("system", "user", "assistant")]}
        for n in range(200)
    ]
    return write(path, lines)


def test_text_has_splits_and_no_judge(tmp_path):
    task = make_task("text", {"path": text_file(tmp_path / "a.jsonl")})
    found = {split: everything(task, split) for split in SPLITS}
    assert sum(map(len, found.values())) == 400
    assert all(5 <= len(found[split]) <= 40 for split in ("validation", "test"))
    queries = {split: {str(e.query) for e in found[split]} for split in SPLITS}
    assert not queries["train"] & (queries["validation"] | queries["test"])
    assert (
        [{"role": "system", "content": "system 7"}, {"role": "user", "content": "user 7"}],
        "assistant 7",
    ) in (found["train"] + found["validation"] + found["test"])
    assert task.solution("Say 3.") is None
    assert not task.check("Say 3.", "3.")


def test_text_takes_turns_with_tasks(tmp_path, files):
    tasks = {"text": {"path": text_file(tmp_path / "a.jsonl"), "share": 2}, "arithmetic": {}, "gsm8k": files}
    examples = load_examples(DataConfig(tasks=tasks, max_length=160), TOKENIZER)
    assert list(examples.counts) == ["text", "arithmetic", "gsm8k"]
    batch = next(batch_iterator(examples, 8))
    responses = [
        TOKENIZER.decode(tokens[prompt : total - 1].tolist())
        for tokens, prompt, total in zip(
            batch["tokens"], batch["prompt_len"], batch["total_len"], strict=True
        )
    ]
    assert [response.count("####") for response in responses] == [0, 1, 1, 0] * 2
    np.testing.assert_array_equal(batch["tokens"][:4], next(batch_iterator(examples, 4))["tokens"])


# evaluate


def test_evaluate_refuses_what_has_no_judge(tmp_path, files, capsys):
    settings = json.dumps({"path": text_file(tmp_path / "a.jsonl")})
    assert evaluate.main(["--checkpoint=none", "--task=text", f"--task_settings={settings}"]) == 2
    assert capsys.readouterr().err == "error: --task=text has no verifier; it is there to be trained on\n"
    flags = ["--checkpoint=none", "--task=gsm8k", f"--task_settings={json.dumps(files)}", "--limit=31"]
    assert evaluate.main(flags) == 2
    assert "--limit is 31, but gsm8k has 30 problems in its test split" in capsys.readouterr().err
