"""Reads mutated files and counts what came of them.

A case is numbered: reader, seed and number give the same files again. A worker process reads them, so that a
crash or a hang ends the worker alone; the next one goes on with the next case.
"""

import dataclasses
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fuzzing.readers import READERS, Reader, mutate
from refusion_jax.errors import BadInput

SLOW = 1.0  # seconds of CPU time of one case
LARGE = 500 * 2**20  # bytes by which one case may make the process grow
SPACE = 8 * 2**30  # bytes of address space beyond what the process has: more is a MemoryError
PATIENCE = 30.0  # seconds without a new case after which a worker hangs; the machine may be busy

_installed: list = []  # audit hooks stay for the life of a process
_watched: list[Path] = []  # the folder that is being read
_outside: list[str] = []  # files opened outside it


def _audit(event: str, arguments: tuple) -> None:
    if event == "open" and _watched and isinstance(arguments[0], str | bytes):
        path = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode("utf-8", "replace")
        inside = Path(path).resolve().is_relative_to(_watched[0])
        # Python looks for the source of a syntax error under the name of what it compiles, "<template>".
        if not inside and not path.startswith(("/proc/", "<", sys.prefix, sys.base_prefix)):
            _outside.append(path)


@dataclasses.dataclass
class Tally:
    """What came of the cases of a reader.

    Attributes:
      outcomes: "refused" and "accepted" -> number of cases.
      faults: (number of the case, what happened).
    """

    outcomes: Counter = dataclasses.field(default_factory=Counter)
    faults: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def add(self, number: int, outcome: str) -> None:
        if outcome in ("refused", "accepted"):
            self.outcomes[outcome] += 1
        else:
            self.faults.append((number, outcome))

    @property
    def tried(self) -> int:
        return self.outcomes.total() + len(self.faults)


def files_of_case(reader: Reader, valid: list[dict[str, bytes]], number: int, seed: int) -> dict[str, bytes]:
    rng = random.Random(f"{reader.name} {seed} {number}")
    return mutate(rng, rng.choice(valid))


def outcomes(reader: Reader, first: int, end: int, seed: int = 0) -> Iterator[str]:
    """Yields "refused", "accepted" or a fault for each case of a range."""
    if _audit not in _installed:
        sys.addaudithook(_audit)
        _installed.append(_audit)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        root = Path(temporary).resolve()
        (root / "valid").mkdir()
        valid = reader.files(root / "valid")
        for files in valid:
            _write(root / "case", files)
            reader.read(root / "case")  # imports what it needs, and is accepted
        for number in range(first, end):
            _write(root / "case", files_of_case(reader, valid, number, seed))
            yield outcome(reader, root / "case")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def outcome(reader: Reader, folder: Path) -> str:
    """Reads one folder."""
    before, start = _peak(), time.process_time()
    _outside.clear()
    _watched.append(folder)
    try:
        reader.read(folder)
        found = "accepted"
    except BadInput as error:
        found = "refused" if str(error) else "an empty message"
    except Exception as error:
        _watched.clear()  # the traceback reads source files
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__}: {str(error)[:150]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        _watched.clear()
    seconds, grown = time.process_time() - start, _peak() - before
    if _outside:
        return f"opened {_outside[0]} outside its folder, then {found}"
    if seconds > SLOW:
        return f"took {seconds:.1f} s, then {found}"
    if grown > LARGE:
        return f"grew by {grown / 2**20:,.0f} MiB, then {found}"
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(name: str, cases: int, seed: int, log=print) -> Tally:
    """Reads `cases` mutated inputs of a reader in worker processes."""
    tally, number = Tally(), 0
    context = multiprocessing.get_context("spawn")
    while number < cases:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(name, number, cases, seed, sender), daemon=True)
        worker.start()
        sender.close()
        fault = None
        try:
            while number < cases and fault is None:
                if receiver.poll(PATIENCE):
                    for found in receiver.recv():
                        tally.add(number, found)
                        number += 1
                else:
                    fault = f"no answer for {PATIENCE:.0f} s"
        except EOFError:
            worker.join()
            fault = f"the process ended with {worker.exitcode}"
        if fault is not None:
            tally.add(number, fault)
            number += 1
        worker.kill()
        worker.join()
    for case, what in tally.faults[:20]:
        log(f"{name} case {case} (seed {seed}): {what}")
    return tally


def _work(name: str, first: int, end: int, seed: int, sender) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPACE, size + SPACE))
    for found in outcomes(READERS[name], first, end, seed):
        sender.send([found])
    sender.close()
