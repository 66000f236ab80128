"""The public surface: the cost of imports and of --help, public names, `generate`, and the live view."""

import importlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sampling import FLAGS, command

import refusion_jax
from refusion_jax import __main__ as listing
from refusion_jax import generate
from refusion_jax.errors import BadInput

ROOT = Path(__file__).parents[1]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import refusion_jax; refusion_jax.__version__",
        "import refusion_jax.sample",
        "import refusion_jax.train",
        "import refusion_jax.__main__",
        "import refusion_jax.decode, refusion_jax.model, refusion_jax.diffusion",
    ],
)
def test_what_starts_nothing_heavy(code):
    heavy = "{'jax', 'flax', 'optax', 'orbax', 'tensorstore', 'grain', 'sentencepiece', 'tokenizers'}"
    assert run_python(f"{code}\nimport sys\nprint(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.long
def test_a_cpu_loads_no_gpu_kernels(checkpoint):
    """Neither our kernels nor Pallas' public modules; JAX itself loads some of its private ones."""
    code = f"""
import refusion_jax, sys
refusion_jax.generate("1+2+3", {str(checkpoint)!r}, gen_length=8)
kernels = ("refusion_jax.model.kernels.triton", "jax.experimental.pallas")
print([name for name in sys.modules if name.startswith(kernels)])
"""
    assert run_python(code) == "[]"


def processor_seconds(code: str) -> float:
    """CPU seconds of `code`: the best of three processes, minus the time of starting Python."""

    def measured(code: str) -> float:
        return min(float(run_python(f"import time\n{code}\nprint(time.process_time())")) for _ in range(3))

    return measured(code) - measured("pass")


def test_importing_and_help_are_fast():
    """Limits relative to importing JAX: a tenth for the package, 1.3 times for `sample --help`."""
    of_jax = processor_seconds("import jax")
    assert processor_seconds("import refusion_jax") <= 0.1 * of_jax
    shown = """
import contextlib, io
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    from refusion_jax import sample
    sample.main(["--help"])
"""
    assert processor_seconds(shown) <= 1.3 * of_jax


def test_the_commands_are_listed(capsys):
    assert listing.main([]) == 0
    out = capsys.readouterr().out
    modules = {path.stem for path in (ROOT / "refusion_jax").glob("*.py")}
    for name in listing.COMMANDS:
        assert f"python -m refusion_jax.{name} " in out and name in modules
        with pytest.raises(SystemExit) as stopped:
            importlib.import_module(f"refusion_jax.{name}").main(["--version"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out == f"refusion_jax {refusion_jax.__version__}\n"
    assert listing.main(["train"]) == 2
    error = (
        r"error: commands are modules: python -m refusion_jax\.NAME, NAME one of train, .* found 'train'\n"
    )
    assert re.fullmatch(error, capsys.readouterr().err)


def test_public_names():
    assert set(refusion_jax.__all__) == {"__version__", "diffusion", "generate", "load"}
    for name in refusion_jax.__all__:
        assert getattr(refusion_jax, name)
    with pytest.raises(AttributeError, match="has no attribute 'train_all'"):
        _ = refusion_jax.train_all
    assert re.fullmatch(r"\d+\.\d+\.\d+", refusion_jax.__version__)


def test_generate_gives_what_sample_prints(checkpoint):
    asked = {"gen_length": 32, "slot_size": 4, "slot_threshold": 0.6, "token_threshold": 0.1}
    prompts = ["26+0+10", "1+2+3", "26+0+10"]
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, *(f"--prompt={p}" for p in prompts))
    answers = generate(prompts, checkpoint, batch_size=1, **asked)
    assert answers == ran.out.splitlines()
    assert generate(prompts[0], checkpoint, batch_size=1, **asked) == answers[0]
    assert generate([], checkpoint) == []
    stop = answers[0][1:3]
    stopped = generate(prompts[0], checkpoint, batch_size=1, stop=[stop], **asked)
    assert stopped == answers[0].split(stop)[0]
    with pytest.raises(BadInput, match="unknown field 'gen_len'"):
        generate("1", checkpoint, gen_len=3)
    with pytest.raises(BadInput, match="first_token must be one of"):
        generate("1", checkpoint, method="ar", first_token="last")
    with pytest.raises(BadInput, match=r"checkpoint: .*nowhere"):
        generate("1", "nowhere")


def compiled(log: str) -> list[str]:
    """The jitted functions that a log of compilations names, in order; small unnamed programs left out."""
    return re.findall(r"Finished XLA compilation of jit\((\w+)\)", log)


@pytest.mark.long
def test_on_a_terminal_the_same_is_compiled_as_in_a_pipe(checkpoint):
    """Each program is compiled once, and the printed rate does not include compilation."""
    line = [sys.executable, "-m", "refusion_jax.sample", f"--checkpoint={checkpoint}", "--gen_length=32"]
    line += ["--slot_size=4", "--prompt=26+0+10"]
    environment = os.environ | {"JAX_LOG_COMPILES": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    piped = subprocess.run(line, capture_output=True, text=True, env=environment, check=True, timeout=300)
    ours, theirs = pty.openpty()
    with subprocess.Popen(line, stdout=theirs, stderr=subprocess.PIPE, text=True, env=environment) as process:
        os.close(theirs)
        shown = b""
        with os.fdopen(ours, "rb", buffering=0) as screen:
            while True:
                try:
                    shown += screen.read(4096)
                except OSError:  # the other end of the terminal is closed
                    break
        log = process.stderr.read()
    assert process.returncode == 0, log[-2000:]
    assert b"\x1b[" in shown, "nothing was drawn"
    programs = compiled(log)
    assert sorted(programs) == sorted(compiled(piped.stderr))
    assert programs.count("resume") == programs.count("_inserted") == programs.count("_answers") == 1
    assert shown.decode().split("\r\n")[-2].endswith(piped.stdout.splitlines()[-1])
    for text in (log, piped.stderr):
        found = re.search(r"\[(\d+) tokens .* (\d+) tokens/s; compiled in ([\d.]+) s\]", text)
        tokens, rate, seconds = map(float, found.groups())
        assert rate > 5 * tokens / seconds
