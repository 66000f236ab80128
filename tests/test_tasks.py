"""Tasks: right solutions, exact verifiers, disjoint splits, determinism."""

import dataclasses
import hashlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from refusion_jax.data.tasks.registry import TASKS, make_task
from refusion_jax.data.tasks.task import SPLITS, Dice, final_answer
from refusion_jax.errors import BadInput

SETTINGS = [
    ("arithmetic", {}),
    ("arithmetic", {"digits": 2, "operations": "+-*"}),
    ("arithmetic", {"digits": 12, "operations": "*"}),
    ("extraction", {}),
    ("extraction", {"fields": 2, "distractors": 4, "value_length": 2}),
    ("extraction", {"fields": 3, "records": 4, "distractors": 1}),
    ("word_problems", {}),
    ("word_problems", {"min_steps": 5, "max_steps": 5, "largest": 1000}),
    ("word_problems", {"max_steps": 6}),
    ("multiplication", {}),
    ("multiplication", {"left_digits": 2, "right_digits": 4}),
    ("countdown", {}),
    ("countdown", {"numbers": 3, "largest": 10, "largest_target": 30}),
    ("paths", {}),
    ("paths", {"nodes": 6, "min_steps": 3, "max_steps": 3, "extra": 8}),
    ("json_records", {}),
    ("json_records", {"records": 1, "fields": 2, "nested": 0, "distractors": 3}),
    ("functions", {}),
    ("functions", {"min_steps": 2, "max_steps": 8}),
]
GENERATED = sorted({name for name, _ in SETTINGS})
# Responses of these tasks are verified by their effect, not by their text.
MANY_ANSWERS = ("countdown", "functions")
EQUATIONS = ("arithmetic", "multiplication", "countdown", "word_problems")
NONSENSE = ["", " ", "####", "#### ", "{", "null", "[" * 5000, "\ud800", "#### " + "9" * 5000]
NONSENSE += ["9" * 5000 + " + 1 = ?", ". . . .", "Anna has 9 eggs. Then? How many?"]


def settings_name(settings):
    return settings[0] + "".join(f"-{key}{value}" for key, value in settings[1].items())


@pytest.fixture(params=SETTINGS, ids=settings_name)
def task(request):
    return make_task(*request.param)


def examples(task, count=300, split="train"):
    return [task.example(index, split) for index in range(count)]


# Verifiers


def test_the_true_response_is_accepted(task):
    pairs = examples(task)
    assert all(task.check_all(pairs))
    assert all(task.check_all([(query, response + "\n") for query, response in pairs]))
    for query, response in pairs[:50]:
        solution = task.solution(query)
        assert task.check(query, solution) if task.name == "countdown" else solution == response


def test_many_answers_are_judged_as_one_is(task):
    pairs = examples(task, 6)
    mixed = [(pairs[0][0], response) for _, response in pairs] + [("What?", "#### 1")]
    verdicts = task.check_all(mixed)
    assert verdicts == [task.check(*pair) for pair in mixed]
    assert verdicts[0]
    assert not verdicts[-1]


@pytest.mark.parametrize("task", [s for s in SETTINGS if s[0] != "functions"], indirect=True)
def test_a_corrupted_answer_is_rejected(task):
    """Responses with one character of the answer changed, dropped or doubled."""
    dice = Dice("corrupt")
    for query, response in examples(task, 100):
        answer = re.search(r"(?<=#### ).+$", response)
        places = range(*answer.span()) if answer else range(len(response))
        places = [place for place in places if response[place] != " "]
        place = dice.pick(places)
        # A letter or digit replaces another, so that the value of the JSON changes.
        for other in "7", "":
            wrong = response[:place] + other + response[place + 1 :]
            if wrong != response:
                assert not task.check(query, wrong), (query, wrong)
        if answer:
            assert not task.check(query, response + response[place])
            assert not task.check(query, response[: answer.start()])
            assert not task.check(query, answer[0])


@pytest.mark.parametrize("task", [s for s in SETTINGS if s[0] not in MANY_ANSWERS], indirect=True)
def test_answers_to_other_queries_are_rejected(task):
    """Unless they happen to be the same."""
    pairs = examples(task)
    for (query, response), (_, other) in itertools.pairwise(pairs):
        same = final_answer(other) == final_answer(response) if "####" in other else other == response
        assert task.check(query, other) == same


def test_verifiers_take_any_text(task):
    query, response = task.example(0)
    for text in NONSENSE:
        assert not task.check(query, text)
        assert not task.check(text, response)
        assert task.solution(text) is None


def test_queries_of_other_tasks_are_not_understood(task):
    for name in set(GENERATED) - {task.name}:
        query, _ = make_task(name, {}).example(0)
        assert task.parse(query) is None


# Solutions, recomputed independently


def test_arithmetic_agrees_with_python():
    for query, response in examples(make_task("arithmetic", {"operations": "+-*"})):
        expression = re.search(r"\d+ [-+*] \d+", query)[0]
        left, sign, right = expression.split()
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[sign](int(left), int(right))
        assert final_answer(response) == str(value)
        assert value >= 0


@pytest.mark.parametrize("task", [s for s in SETTINGS if s[0] in EQUATIONS], indirect=True)
def test_written_steps_are_true(task):
    """Every equation of a solution holds, and the answer follows from them."""
    for _, response in examples(task):
        steps, answer = response.split(" #### ")
        for step in steps.split(", "):
            left, right = step.split("=")
            numbers = [int(n) for n in re.split(r"[-+*/]", left)]
            signs = re.findall(r"[-+*/]", left)
            value = numbers[0]
            for sign, n in zip(signs, numbers[1:], strict=True):
                assert sign != "/" or value % n == 0
                operations = {"+": value + n, "-": value - n, "*": value * n, "/": value // max(n, 1)}
                value = operations[sign]
            assert value == int(right), step
        by_column = task.name == "arithmetic" and "*" not in steps
        assert int(answer) == (read_columns(steps) if by_column else int(right))


def read_columns(steps):
    """The number given by column sums or differences, lowest digit first."""
    *totals, last = [int(step.split("=")[1]) for step in steps.split(", ")]
    digits = [str(total % 10) for total in totals]
    return int("".join([str(last), *reversed(digits)]))


def test_arithmetic_known_solutions():
    task = make_task("arithmetic", {})
    known = {
        "248 + 375 = ?": "8+5+0=13, 4+7+1=12, 2+3+1=6 #### 623",
        "What is 402 - 37?": "12-7-0=5, 10-3-1=6, 4-0-1=3 #### 365",
        "Compute 47 * 36.": "47*6=282, 47*30=1410, 282+1410=1692 #### 1692",
    }
    for query, response in known.items():
        assert task.solution(query) == response


def test_word_problem_known_solutions():
    task = make_task("word_problems", {})
    opening = "Anna has 12 eggs. "
    known = {
        "Anna buys 4 more. A trade turns each one into 3. How many eggs are left for Anna?": "48",
        "Anna makes 4 equal piles and keeps one pile. How many eggs does Anna have now?": "3",
        "Then 5 of the eggs break. Anna finds another 2. How many eggs does Anna have now?": "9",
        "Ben has 3 more eggs than Anna. How many eggs does Ben have?": "15",
        "Anna has 3 more eggs than Ben. How many eggs does Ben have?": "9",
        "Ben has 2 times as many eggs as Anna. How many eggs is that in all?": "36",
    }
    for rest, answer in known.items():
        assert final_answer(task.solution(opening + rest)) == answer
    for rest in (  # a division with remainder or by zero, an unknown person, a repeated person, ...
        "Anna makes 5 equal piles and keeps one pile. How many eggs does Anna have now?",
        "Anna makes 0 equal piles and keeps one pile. How many eggs does Anna have now?",
        "Ben has 3 more eggs than Emma. How many eggs does Ben have?",
        "Ben has 3 more eggs than Anna. Anna has 2 more eggs than Ben. How many eggs is that in all?",
        "Ben has 3 more eggs than Anna. How many eggs does Anna have?",
        "Anna buys 4 more. How many pens does Anna have now?",
    ):
        assert task.solution(opening + rest) is None, rest


def test_word_problems_keep_to_their_limits():
    task = make_task("word_problems", {"min_steps": 3, "max_steps": 4, "largest": 50})
    lengths = set()
    for query, response in examples(task):
        problem = task.parse(query)
        lengths.add(response.count("="))
        numbers = [problem.start, *(n for _, n in problem.steps)]
        assert max(numbers) <= 50
        if problem.story != "total":
            assert max(map(int, re.findall(r"=(\d+)", response))) <= 50
    assert lengths == {3, 4}
    longest = make_task("word_problems", {"min_steps": 6, "max_steps": 6})
    assert {response.count("=") for _, response in examples(longest)} == {6}


def test_extraction_known_solutions():
    text = "x1 is the city of Eve. Eve signs as a2. The code of Bob is b3. Bob has city c4. "
    table = make_task("extraction", {"fields": 2, "records": 2})
    assert table.solution(text + "Table:") == "name,code,city\nEve,a2,x1\nBob,b3,c4"
    one = make_task("extraction", {"fields": 2})
    query = "x1 is the city of Eve. Eve wears zz. Eve signs as a2. Give JSON:"
    assert one.solution(query) == '{"code":"a2","city":"x1"}'
    # Order of keys and white space do not matter; a repeated or further key does.
    assert one.check(query, ' {"city": "x1",\n"code": "a2"}')
    assert not one.check(query, '{"code":"a2","city":"x1","city":"x1"}')
    assert not one.check(query, '{"code":"a2","city":"x1","size":"zz"}')
    assert not one.check(query, '[["code","a2"],["city","x1"]]')
    assert one.solution("Eve signs as a2. Give JSON:") is None  # the city is missing
    assert one.solution(query.replace("Give", "Eve has code a3. Give")) is None  # two codes


def test_extraction_defaults_are_small():
    for query, response in examples(make_task("extraction", {})):
        assert 50 <= len(query) <= 90
        assert 30 <= len(response) <= 45
        assert list(json.loads(response)) == ["code", "city", "size"]


# Variety


def test_facts_and_wordings_vary():
    queries = [query for query, _ in examples(make_task("extraction", {}))]
    wordings = ["signs as", "has code", "The code of", "is the code of"]
    for wording in wordings:
        assert 40 < sum(wording in query for query in queries) < 120
    marks = ("code|signs", "city|lives", "size|wears")
    orders = {tuple(re.search(mark, query).start() for mark in marks) for query in queries}
    assert len({tuple(sorted(range(3), key=order.__getitem__)) for order in orders}) == 6
    shapes_of = {"arithmetic": 8, "word_problems": 250, "multiplication": 4, "countdown": 4}
    for name, shapes in shapes_of.items():
        queries = [query for query, _ in examples(make_task(name, {}))]
        assert len({re.sub(r"\d+", "_", query) for query in queries}) >= shapes


# Splits and determinism


def test_splits_never_meet(task):
    """The problem of every example belongs to the split for which it was drawn."""
    keys = {}
    for split, count in ("train", 1000), ("validation", 200), ("test", 200):
        problems = [task.parse(query) for query, _ in examples(task, count, split)]
        assert {task.split_of(problem) for problem in problems} == {split}
        keys[split] = {task._key(problem) for problem in problems}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


def test_split_does_not_depend_on_wording_or_difficulty():
    task = make_task("arithmetic", {"digits": 2})
    harder = make_task("arithmetic", {"digits": 5, "operations": "*+"})
    splits = set()
    for a in range(30):
        for b in range(30):
            split = task.split_of(task.parse(f"{a} + {b} = ?"))
            splits.add(split)
            assert split == harder.split_of(harder.parse(f"What is {b} + {a}?"))
    assert splits == set(SPLITS)
    words = make_task("word_problems", {})
    told = "{} has 9 {}. {} buys 4 more. {} buys 3 more. How many {} does {} have now?"
    one = told.format("Anna", "eggs", "Anna", "Anna", "eggs", "Anna")
    other = "Ben owns 9 pens. Hugo has 4 more pens than Ben. Iris has as many as Hugo and 3 more. "
    other += "How many pens does Iris have?"
    assert words.split_of(words.parse(one)) == words.split_of(words.parse(other))
    assert words._key(words.parse(one)) == words._key(words.parse(other))


def test_held_out_splits_take_their_share():
    task = make_task("extraction", {"fields": 1})
    problems = [task.parse(f"Eve has code {number}. JSON:") for number in range(4000)]
    splits = [task.split_of(problem) for problem in problems]
    for split in "validation", "test":
        assert 0.04 < splits.count(split) / len(splits) < 0.06


def test_examples_are_a_function_of_their_number(task):
    assert task.example(7, "test", 3) == make_task(task.name, vars(task)).example(7, "test", 3)
    different = {
        task.example(7, "test", 3),
        task.example(8, "test", 3),
        task.example(7, "train", 3),
        task.example(7, "test", 4),
    }
    assert len(different) == 4
    assert len(set(examples(task))) > 290


def test_examples_are_the_same_in_another_process():
    code = "from refusion_jax.data.tasks.registry import make_task; import json; print(json.dumps("
    code += f"[make_task(n, {{}}).example(5, 'test', 1) for n in {GENERATED}]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [list(make_task(name, {}).example(5, "test", 1)) for name in GENERATED]
    assert json.loads(found.stdout) == here


def test_every_task_is_tested():
    assert set(GENERATED) == TASKS.keys() - {"gsm8k", "text"}  # these are in test_file_tasks


def test_dice_are_fair_and_in_range():
    dice = Dice("fair")
    counts = [0] * 6
    for _ in range(6000):
        counts[dice.between(1, 6) - 1] += 1
    assert all(850 < count < 1150 for count in counts), counts
    assert sorted(dice.sample(range(5), 5)) == [0, 1, 2, 3, 4]
    assert len({tuple(dice.sample(range(4), 4)) for _ in range(500)}) == 24


# Bad input


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("chess", {}, "task is 'chess', expected one of arithmetic"),
        ("arithmetic", {"digit": 3}, "arithmetic.digit is no setting .* digits, operations"),
        ("arithmetic", 3, "arithmetic is set to 3"),
        ("arithmetic", {"digits": 0}, "arithmetic.digits is 0, expected 1 to 12"),
        ("arithmetic", {"digits": 2.0}, "arithmetic.digits is 2.0"),
        ("arithmetic", {"operations": "+^"}, r"arithmetic.operations is '\+\^'"),
        ("arithmetic", {"operations": ""}, "arithmetic.operations is ''"),
        ("extraction", {"fields": 7}, "extraction.fields is 7, expected 1 to 6"),
        ("extraction", {"distractors": 4}, "extraction.distractors is 4, expected 0 to 3"),
        ("extraction", {"records": "2"}, "extraction.records is '2'"),
        ("extraction", {"value_length": 0}, "extraction.value_length is 0"),
        ("word_problems", {"min_steps": 1}, "word_problems.min_steps is 1, expected 2 to 5"),
        ("word_problems", {"min_steps": 4, "max_steps": 3}, "word_problems.min_steps is 4, .* 2 to 3"),
        ("word_problems", {"largest": 5}, "word_problems.largest is 5"),
        ("word_problems", {"max_steps": 7}, "word_problems.max_steps is 7, expected 2 to 6"),
        ("multiplication", {"left_digits": 0}, "multiplication.left_digits is 0, expected 1 to 12"),
        ("countdown", {"numbers": 6}, "countdown.numbers is 6, expected 2 to 5"),
        ("countdown", {"largest_target": 49}, "countdown.largest_target is 49, expected 50 to"),
        ("paths", {"nodes": 27}, "paths.nodes is 27, expected 3 to 26"),
        ("paths", {"max_steps": 10}, "paths.max_steps is 10, expected 1 to 9"),
        ("json_records", {"nested": 4}, "json_records.nested is 4, expected 0 to 3"),
        ("json_records", {"distractors": 4}, "json_records.distractors is 4, expected 0 to 3"),
        ("functions", {"max_steps": 9}, "functions.max_steps is 9, expected 1 to 8"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(BadInput, match=message):
        make_task(name, settings)


def test_bad_splits():
    with pytest.raises(BadInput, match="split is 'dev', expected one of train, validation, test"):
        make_task("arithmetic", {}).example(0, "dev")
    task = make_task("extraction", {"fields": 1, "value_length": 1})  # 36 problems
    empty = [split for split in SPLITS if not has_examples(task, split)]
    assert empty == [s for s in SPLITS if s not in {task.split_of(p) for p in all_problems(task)}]


def has_examples(task, split):
    try:
        return bool(task.example(0, split))
    except BadInput as error:
        assert f"no problem of the {split} split" in str(error)
        return False


def all_problems(task):
    values = "abcdefghijklmnopqrstuvwxyz0123456789"
    return [task.parse(f"Eve has code {value}. JSON:") for value in values]


# docs/tasks.md


DOCS = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")


def held_out_digest(task):
    """sha256 of the first 500 test and 200 validation examples, one line of JSON each."""
    held_out = examples(task, 500, "test") + examples(task, 200, "validation")
    return hashlib.sha256("".join(json.dumps(list(pair)) + "\n" for pair in held_out).encode()).hexdigest()


def test_held_out_sets_are_those_published():
    rows = re.findall(r"^\| `(\w+)` \| `(\{.*\})` \| `(\w{64})` \|$", DOCS, flags=re.MULTILINE)
    assert {name for name, settings, _ in rows if settings == "{}"} == set(GENERATED)
    for name, settings, digest in rows:
        assert held_out_digest(make_task(name, json.loads(settings))) == digest, (name, settings)


def test_documented_examples_are_the_first_of_the_test_split():
    for name in GENERATED:
        section = DOCS.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
        assert tuple(re.findall(r"```\w*\n(.*?)\n```", section, flags=re.DOTALL)) == make_task(
            name, {}
        ).example(0, "test")
        for field in dataclasses.fields(TASKS[name]):
            assert f"`{field.name}`" in section
