"""The sample command with prompts given by flags or typed on a terminal."""

import io
import json
import os
import shutil
import sys

from sampling import FIELDS, FLAGS, SUM, assert_passes_add_up, assert_refused, command, of


def test_prompts_as_flags(checkpoint, served):
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, "--prompt=26+0+10", "--prompt=23+3+28")
    assert ran.code == 0
    first, second = ran.out.splitlines()
    assert first == of(served, "templated")["text"] and second.startswith("23+3=")
    about = ran.err.splitlines()
    assert len(about) == 2
    tokens, forwards = (of(served, "templated")[name] for name in ("num_tokens", "num_forwards"))
    assert about[0].startswith(
        f"[{tokens} tokens in {forwards} forwards, {tokens / forwards:.2f} tokens per forward"
    )


def test_a_trace_file(checkpoint, opened, served, tmp_path):
    """It holds the prompt, its settings, and the result, which equals that of a traced request."""
    path = tmp_path / "trace.json"
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, "--prompt=26+0+10", f"--trace={path}")
    assert ran.code == 0 and os.listdir(tmp_path) == ["trace.json"]
    trace, answer = json.loads(path.read_text(encoding="utf-8")), of(served, "templated")
    assert {name: trace[name] for name in FIELDS - {"id"}} == {name: answer[name] for name in FIELDS - {"id"}}
    assert (trace["prompt"], trace["prompt_ids"]) == ("26+0+10", SUM)
    assert_passes_add_up(trace)
    assert "".join(trace["token_texts"]) == opened[2].decode(answer["raw_ids"])


def test_raw_prompts_are_fed_as_they_are(checkpoint, served):
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, "--raw", "--prompt=<bos>26+0+10=", "--prompt=26+0+10")
    rendered, bare = ran.out.splitlines()
    assert ran.code == 0 and rendered == of(served, "templated")["text"] != bare


def test_thinking_is_told_to_the_template(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    template = (
        "<bos>{{ messages[0].content }}={% if enable_thinking is not defined %}1"
        "{% elif enable_thinking %}2{% else %}3{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    for flags, told in ([], "1"), (["--enable_thinking=true"], "2"), (["--enable_thinking=false"], "3"):
        trace = tmp_path / f"{told}.json"
        command(f"--checkpoint={folder}", "--prompt=26+0+10", f"--trace={trace}", *FLAGS, *flags)
        assert json.loads(trace.read_text())["prompt_ids"] == [*SUM, int(told) + 4]
    assert_refused(command(f"--checkpoint={folder}", "--enable_thinking=no"), "--enable_thinking")


def test_a_terminal(checkpoint, served, monkeypatch):
    """Answers line by line until end of input; a line that cannot be served does not end the session."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("26+0+10\n\ud800\n23+3+28\n"))
    ran = command(f"--checkpoint={checkpoint}", *FLAGS)
    assert ran.code == 0
    answers = ran.out.replace("> ", "").split()
    assert (
        answers[0] == of(served, "templated")["text"] and answers[1].startswith("23+3=") and len(answers) == 2
    )
    assert "error: text has a lone surrogate" in ran.err and "Traceback" not in ran.err


def test_a_closed_terminal(checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    ran = command(f"--checkpoint={checkpoint}")
    assert ran.code == 0 and ran.out == "> "
