"""The task of functions, verified by running them, and the sandbox in which they run."""

import json
import time

import pytest

from refusion_jax.data.tasks.function_steps import NOUNS, STEPS, VARIABLES
from refusion_jax.data.tasks.functions import _draw_input, _hidden_inputs, _run
from refusion_jax.data.tasks.registry import make_task
from refusion_jax.data.tasks.sandbox import Job, Limits, run_all
from refusion_jax.data.tasks.task import Dice

QUICK = Limits(seconds=2)
GOOD = Job("def f(x):\n    return [x, 'é', None, True]", "f", [1, 2])
GOOD_RESULT = r'[[1, "\u00e9", null, true], [2, "\u00e9", null, true]]'

# Mistakes that fail their own answer and no other.
BAD = {
    "no code": "",
    "prose": "The function is f.",
    "another name": "def g(x): return x",
    "not a function": "f = 3",
    "raises": "def f(x): return x / 0",
    "endless recursion": "def f(x): return f(x)",
    "memory at once": "def f(x): return len(bytearray(10**10))",
    "memory by and by": "def f(x):\n    kept = []\n    while True: kept.append('x' * 10**6)",
    "a file": "def f(x):\n    open('found', 'w').write('x')\n    return x",
    "a file elsewhere": "import os\ndef f(x): return os.open('/tmp/found', os.O_CREAT)",
    "reads a file": "def f(x): return open('/etc/passwd').read()",
    "a socket": "import _socket\ndef f(x):\n    _socket.socket()\n    return x",
    "a process": "import os\ndef f(x): return os.fork()",
    "a program": "import os\ndef f(x): return os.posix_spawn('/bin/true', ['true'], {})",
    "huge output": "def f(x): return 'a' * 10**6",
    "exit": "exit(0)",
    "sys.exit": "import sys\ndef f(x): sys.exit(0)",
    "os._exit": "import os\ndef f(x): os._exit(0)",
    "dies": "import os\nos.abort()",
    "kills its group": "import os\nos.killpg(0, 9)",
    "kills its parent": "import os\nos.kill(os.getppid(), 9)\nraise SystemExit",
    "takes back a limit": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9, 9))",
    "a tuple": "def f(x): return (x,)",
    "a subclass": "class Int(int): pass\ndef f(x): return Int(x)",
    "a generator": "def f(x): yield x",
    "a huge number": "def f(x): return 10**100000",
    "a surrogate": "\ud800",
    "a null": "\0",
    "deep": "(" * 50_000,
}


@pytest.mark.parametrize("code", BAD.values(), ids=BAD)
def test_bad_code_costs_its_own_answer_alone(code):
    results = run_all([GOOD, Job(code, "f", [1]), GOOD], QUICK)
    assert results == [GOOD_RESULT, None, GOOD_RESULT]


@pytest.mark.parametrize(
    ("code", "at_most"),
    [
        ("def f(x):\n    while True: pass", 2),  # seconds of CPU
        ("while True: pass", 2),
        ("import time\ndef f(x): time.sleep(100)", 4),
        ("import signal, time\nsignal.signal(14, signal.SIG_IGN)\ndef f(x): time.sleep(100)", 4),
        ("def f(x):\n    while True:\n        try:\n            f(x)\n        except BaseException: pass", 2),
    ],
    ids=["loop", "loop outside", "sleep", "sleep without an alarm", "catches all"],
)
def test_time_is_limited(code, at_most):
    start = time.monotonic()
    assert run_all([Job(code, "f", [1]), GOOD], QUICK) == [None, GOOD_RESULT]
    assert time.monotonic() - start < at_most + 6  # this machine may be slow


def test_what_is_printed_is_no_result():
    printed = "print('[1, 2]', flush=True)\nimport os\nos.write(1, b'[1, 2]')\n"
    jobs = [Job(printed + "def f(x): print(x)", "f", [1, 2]), Job(printed + "os._exit(0)", "f", [1, 2])]
    assert run_all(jobs, QUICK) == ["[null, null]", None]
    # Nor to the pipe of results: a line that it writes there is not taken as another job's result.
    forged = r"import os" + "\n" + r"os.write(3, b'[1]\n\"[1, 2]\"\n')" + "\nos._exit(0)"
    forged, good = run_all([Job(forged, "f", [1, 2]), GOOD], QUICK)
    assert forged != "[1, 2]"
    assert good == GOOD_RESULT


def test_answers_do_not_see_each_other_or_us():
    jobs = [
        Job("import math\nmath.pi = 3\ndef f(x): return math.pi == 3", "f", [1]),
        Job("import math\ndef f(x): return math.pi == 3", "f", [1]),
        Job("import os\ndef f(x): return [list(os.environ), os.getcwd().startswith('/tmp')]", "f", [1]),
        Job(
            "import sys\ndef f(x): return any('refusion' in m or 'numpy' in m for m in sys.modules)", "f", [1]
        ),
        Job("def f(x):\n    x.append(1)\n    return x", "f", [[], []]),
        Job("seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)", "f", [1, 1]),
    ]
    first, second, environment, modules, changed, counted = run_all(jobs, QUICK)
    assert (first, second) == ("[true]", "[false]")
    assert environment.startswith(("[[[], ", '[[["LC_CTYPE"]'))  # which Python itself sets
    assert modules == "[false]"
    assert (changed, counted) == ("[[1], [1]]", "[1, 2]")


def test_usual_modules_can_be_imported():
    code = "import math, re\nfrom collections import Counter\nfrom typing import List\n"
    code += "def f(xs: List[int]) -> int:\n    return math.prod(Counter(xs).values())"
    assert run_all([Job(code, "f", [[1, 1, 2]])]) == ["[2]"]


def test_no_jobs():
    assert run_all([]) == []


def test_a_sandbox_that_cannot_run_is_no_wrong_answer():
    with pytest.raises(RuntimeError, match="sandbox does not run"):
        run_all([GOOD], Limits(output=3))


def test_steps_compute_what_their_code_does():
    """The reference and the code of each step agree on the inputs of queries and on hidden inputs."""
    jobs, expected = [], []
    for name, step in STEPS.items():
        variable = VARIABLES[step.takes]
        for k in step.choices:
            dice = Dice(name, k)
            problem = make_task("functions", {}).parse(query(step.takes, [(name, k)]))
            assert problem == (step.takes, ((name, k),))
            inputs = [*(_draw_input(step.takes, dice) for _ in range(20)), *_hidden_inputs(problem)]
            code = f"def f({variable}):\n    return {step.code.format(k=k)}"
            jobs.append(Job(code, "f", inputs))
            expected.append([_run(problem, given) for given in inputs])
    results = run_all(jobs)
    assert results == [json.dumps(outputs) for outputs in expected]


def query(kind, steps):
    told = "; ".join(STEPS[name].wordings[0].format(k=k) for name, k in steps)
    return f"Python: f takes {NOUNS[kind]}. Steps: {told}. Example: f(0) == 0"


def test_wordings_tell_one_step_each():
    for kind in VARIABLES:
        steps = [(step, k) for step in STEPS.values() if step.takes == kind for k in step.choices]
        told = [wording.format(k=k) for step, k in steps for wording in step.wordings]
        assert len(set(told)) == len(told)
        assert not [text for text in told if "; " in text or ", then " in text or ". " in text]
    assert {step.gives for step in STEPS.values()} == VARIABLES.keys()


QUERY = "Write a Python function f of a list xs of whole numbers: keep the even numbers, then square each, "
QUERY += "then add them up. Example: f([1, 2, 4]) == 20"


def test_a_function_is_right_by_what_it_does():
    task = make_task("functions", {})
    backwards = "Write a Python function f of a list xs of whole numbers. Lastly, add them up. "
    backwards += "Before that, square each. Before that, keep the even numbers. Example: f([1, 2, 4]) == 20"
    assert task.parse(backwards) == task.parse(QUERY)
    solution = "def f(xs):\n    xs = [x for x in xs if x % 2 == 0]\n    xs = [x * x for x in xs]\n"
    solution += "    return sum(xs)"
    assert task.solution(QUERY) == solution
    right = [
        solution,
        "def f(a): return sum(x**2 for x in a if not x & 1)",
        "f = lambda xs: sum([x * x for x in xs if x % 2 == 0])",
        "import math\n\ndef square(x):\n    return x * x\n\ndef f(xs):\n    total = 0\n    for x in xs:\n"
        "        if x % 2:\n            continue\n        total += square(x)\n    return total\n",
    ]
    wrong = [
        "def f(xs): return 20",
        "def f(xs): return sum(x * x for x in xs)",
        "def f(xs): return sum(x * x for x in xs if x % 2 == 0 and x > 0)",  # but for negative numbers
        "def f(xs): return sum(x * x for x in xs if x % 2 == 0) or None",  # but for none
        "def f(xs): return sum(x * x for x in set(xs) if x % 2 == 0)",  # but for repeats
        "def f(xs): return sum(x * x for x in xs if x % 2 == 0) * 1.0",
        "def f(xs): return [sum(x * x for x in xs if x % 2 == 0)]",
        "def f(xs): return str(sum(x * x for x in xs if x % 2 == 0))",
        "def g(xs): return sum(x * x for x in xs if x % 2 == 0)",
        "```python\n" + solution + "\n```",
        solution + "\nexit()",
        solution + " " * 10_000,
        "def f(xs): print(sum(x * x for x in xs if x % 2 == 0))",
    ]
    assert task.check_all([(QUERY, response) for response in right]) == [True] * len(right)
    assert task.check_all([(QUERY, response) for response in wrong]) == [False] * len(wrong)


def test_a_function_without_one_of_its_steps_is_wrong():
    task = make_task("functions", {})
    pairs = []
    for i in range(60):
        asked, response = task.example(i)
        head, *steps = response.split("\n")
        dropped = Dice("drop", i).below(len(steps) - 1)
        pairs.append((asked, "\n".join([head, *steps[:dropped], *steps[dropped + 1 :]])))
    assert not any(task.check_all(pairs))


def test_example_outputs_are_those_of_the_function():
    task = make_task("functions", {})
    jobs, expected = [], []
    for i in range(100):
        asked, response = task.example(i)
        given, output = asked.split("Example: f(")[1].split(") == ")
        jobs.append(Job(response, "f", [json.loads(given)]))
        expected.append(f"[{output}]")
    assert run_all(jobs) == expected
