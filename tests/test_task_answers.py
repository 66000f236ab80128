"""Verifiers of tasks with several right answers, or with answers of several parts."""

import itertools
import json

import pytest

from refusion_jax.data.tasks.registry import make_task

COUNTDOWN = "Use 3, 7, 25, 50, 3 to make 82."
EDGES = "Edges: A>B, A>C, B>D, C>D, D>E, E>A, B>A. Shortest path from A to E?"
TOLD = "Eve plays for red. Bob wears xl. The team of Bob is tan. Bob has code q1. Eve signs as b2. "
SCHEMA = TOLD + "Eve wears m9. Give JSON with info(team, size), name, code:"
RECORDS = '[{"info":{"team":"red","size":"m9"},"name":"Eve","code":"b2"},'
RECORDS += '{"info":{"team":"tan","size":"xl"},"name":"Bob","code":"q1"}]'


@pytest.mark.parametrize(
    "steps",
    [
        "25+7=32, 50+32=82",
        "3+3=6, 50+25=75, 75+7=82",  # an unused step is allowed
        "7+25=32,32 + 50 = 82",
        "3*25=75, 75+7=82",
        "3/3=1, 50+25=75, 75+7=82, 82*1=82",
        "50-25=25, 25*3=75, 75+7=82",
    ],
)
def test_any_way_to_the_target_is_right(steps):
    task = make_task("countdown", {})
    assert task.check(COUNTDOWN, f"{steps} #### 82")


@pytest.mark.parametrize(
    "response",
    [
        "25+7=32, 50+32=82",  # no answer
        "25+7=32, 50+32=82 #### 83",
        "25+7=32, 50+32=82 #### 82.",
        "#### 82",
        "50+32=82 #### 82",  # 32 was never made
        "82 #### 82",
        "25+7=32, 50+32=82, 3+3=6 #### 82",  # goes on after the target
        "25+7=33, 50+33=82 #### 82",  # two wrong sums
        "50+25=75, 75+7=82, #### 82",
        "25+25=50, 50+7=57, 57+25=82 #### 82",  # 25 twice
        "3*3=9, 9*3=27, 27+25=52, 52+30=82 #### 82",
        "50+25=75, 75+7=82+0 #### 82",
        "25-50=-25, 82+0=82 #### 82",
        "25/3=8, 50+32=82 #### 82",
        "7/0=0, 50+32=82 #### 82",
        "82=82 #### 82",
        "(50+25)+7=82 #### 82",
        "50+25=75; 75+7=82 #### 82",
        "50**2=82 #### 82",
        "\u0665\u0660+32=82 #### 82",
    ],
)
def test_false_ways_to_the_target(response):
    assert not make_task("countdown", {}).check(COUNTDOWN, response)


def test_countdown_solves_what_it_is_asked():
    task = make_task("countdown", {})
    assert task.solution("Make 24 from 2, 3, 4.").endswith("#### 24")
    assert task.solution("Make 5 from 2, 2.") is None  # 4, 0 and 1 are all there is
    assert task.parse("Make 3 from 3, 2.") is None  # there already
    assert task.parse("Make 3 from 1, 1, 1, 1, 1, 1.") is None  # too many to search
    for numbers in itertools.combinations(range(2, 9), 3):
        query = f"Make 20 from {', '.join(map(str, numbers))}."
        solution = task.solution(query)
        assert solution is None or task.check(query, solution)
        assert (solution is not None) == reachable(numbers, 20)


def reachable(numbers, target):
    """Whether some of the numbers give the target, by exhaustive search."""
    if target in numbers:
        return True
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        made = [a + b, a * b] + [a - b] * (a >= b) + ([a // b] if b and a % b == 0 else [])
        if any(reachable([*rest, value], target) for value in made):
            return True
    return False


def test_countdown_keeps_to_its_limits():
    task = make_task("countdown", {"numbers": 3, "largest": 10, "largest_target": 40})
    for i in range(300):
        query, response = task.example(i)
        problem = task.parse(query)
        assert len(problem.numbers) == 3
        assert all(2 <= n <= 10 for n in problem.numbers)
        assert all(int(step.split("=")[1]) <= 40 for step in response.split(" #### ")[0].split(", "))
        assert response.count("=") in (1, 2)


def test_any_shortest_route_is_right():
    task = make_task("paths", {})
    assert task.solution(EDGES) == "A: B C, B: D, C: -, D: E #### A B D E"
    for response in ("#### A B D E", "what? #### A C D E\n", "#### A  C D E"):
        assert task.check(EDGES, response)
    for response in (
        "A B D E",
        "#### A D E",  # no such edge
        "#### A B D",
        "#### B D E",
        "#### A B A C D E",  # a detour
        "#### ABDE",
        "#### A B C E",
        "#### A B D E E",
        "#### A>B>D>E",
        "#### E D B A",
    ):
        assert not task.check(EDGES, response)
    for query in (
        EDGES.replace("D>E", "E>D"),  # out of reach
        EDGES.replace("to E", "to A"),
        EDGES.replace("to E", "to Z"),
        EDGES.replace("B>A", "A>B"),  # told twice
    ):
        assert task.parse(query) is None


def test_paths_have_one_shortest_route_of_the_length_asked_for():
    task = make_task("paths", {"nodes": 9, "min_steps": 2, "max_steps": 3, "extra": 12})
    lengths = set()
    for i in range(300):
        query, response = task.example(i)
        problem = task.parse(query)
        route = response.split("#### ")[1].split()
        routes = [[problem.start]]
        while not any(r[-1] == problem.goal for r in routes):
            routes = [[*r, b] for r in routes for a, b in problem.edges if a == r[-1]]
        assert [r for r in routes if r[-1] == problem.goal] == [route]
        assert len(set("".join(problem.edges))) == 9
        lengths.add(len(route) - 1)
    assert lengths == {2, 3}


def test_json_keeps_to_the_schema():
    task = make_task("json_records", {})
    assert task.solution(SCHEMA) == RECORDS
    assert task.check(SCHEMA, json.dumps(json.loads(RECORDS), indent=1))
    eve, bob = RECORDS[1:-1].split("},{")
    for wrong in (
        f"[{{{bob},{eve}}}]",
        f"[{eve}}}]",
        f"{eve}}}",
        RECORDS.replace('"name":"Eve","code":"b2"', '"code":"b2","name":"Eve"'),  # order of keys
        RECORDS.replace('"team":"red","size":"m9"', '"size":"m9","team":"red"'),
        RECORDS.replace('"name":"Eve"', '"name":"Eve","name":"Eve"'),
        RECORDS.replace('"info":{"team":"red","size":"m9"}', '"team":"red","size":"m9"'),
        RECORDS.replace('"info":{"team":"red","size":"m9"}', '"info":[["team","red"],["size","m9"]]'),
        RECORDS.replace("red", "Red"),
        RECORDS + "]",
        "```json\n" + RECORDS + "\n```",
    ):
        assert wrong != RECORDS
        assert not task.check(SCHEMA, wrong), wrong
    for query in (
        SCHEMA.replace("name, ", ""),
        SCHEMA.replace("name, ", "code, "),
        SCHEMA.replace("info(", "team("),
        SCHEMA.replace("size)", "boat)"),  # not told
        SCHEMA.replace("size)", "team)"),
        SCHEMA.replace("Eve wears m9. ", ""),
        SCHEMA.replace("m9. ", "m9. Eve wears m8. "),
    ):
        assert query != SCHEMA
        assert task.parse(query) is None, query


def test_products_are_worked_out_digit_by_digit():
    task = make_task("multiplication", {})
    known = {
        "347 x 26 = ?": "347*6=2082, 347*20=6940, 2082+6940=9022 #### 9022",
        "Multiply 12 by 305.": "12*5=60, 12*0=0, 12*300=3600, 60+0=60, 60+3600=3660 #### 3660",
        "What is 7 times 8?": "7*8=56 #### 56",
    }
    for query, response in known.items():
        assert task.solution(query) == response
    assert not task.check("347 x 26 = ?", "347*26=9022 #### 9,022")
    for i in range(100):
        left, right = task.parse(task.example(i)[0])
        assert 100 <= left <= 999
        assert 10 <= right <= 99
