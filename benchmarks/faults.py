"""Kill it, damage it, give the same command again: is the result the same, bit for bit, and is nothing left behind?

    python benchmarks/faults.py [--kills 150] [--evaluation-kills 40] [--process-kills 4] [--full-disks 30] [--json]

- Trainings of several methods are killed (SIGKILL) at random moments, often within milliseconds after a file appears
  where saves can be torn, once or several times, until the same command brings the run to its end.
- Evaluations likewise.
- Every file of the latest checkpoint is cut, emptied, deleted and has a bit flipped: the checkpoint is left out, with a
  word, and the one before it leads to the same bits.
- Disks of several sizes become full at some write; once there is room, the same command ends with the same bits.
- Trainings in two processes are killed and go on in one or three: the same up to rounding.

A command runs in a forked child of this process, so that the imports are paid once. `recovered` counts the kills whose
run came to the right end; what did not is in `failures`, and its folder is kept.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "400"}

from common import machine, say, versions

LIMIT = 300  # seconds that a command may take
SECTIONS: dict[str, dict[str, Any]] = {  # method -> what its recipe differs in
    "lora": {"adapter": {"options": {"r": 4}}},
    "series": {"adapter": {"options": {"bottleneck_size": 4}}, "training": {"max_steps": 23}},  # ends within an epoch
    "parallel": {
        "adapter": {"options": {"bottleneck_size": 4}},
        "data": {"validation": 6},
        "training": {"keep_best": True, "evaluate_every": 2, "early_stopping": 3},
    },
    "prefix": {"adapter": {"options": {"num_virtual_tokens": 3}}},
    "mam": {
        "adapter": {"options": {"bottleneck_size": 4, "prefix_length": 3}},
        "training": {"schedule": "cosine", "micro_batch_size": 1},
    },
    "fusion": {"adapter": {"options": {}}},  # of the first series and parallel run
    "p-tuning": {"adapter": {"options": {"num_virtual_tokens": 3}}, "data": {"validation": 6}},
}
SAVES = (  # what appears where a save may be torn
    ".config.yaml.*",
    "config.yaml",
    "checkpoints/begun.json",
    "checkpoints/checkpoint-*",
    "checkpoints/checkpoint-*/trainable.safetensors",
    "checkpoints/checkpoint-*/optimizer.pt",
    "checkpoints/checkpoint-*/trainer_state.json",
    "checkpoints/checkpoint-*/.complete.*",
    "checkpoints/checkpoint-*/complete",
    "log.jsonl",
    ".adapter.*",
    "adapter",
    ".manifest.json.*",
    "manifest.json",
)
EVALUATION_SAVES = (
    "eval/default/.*.partial.jsonl",
    "eval/default/.*.tmp",
    "eval/default/*.jsonl",
    "eval/default/summary.json",
)


# --- commands in forked children


def preload() -> None:
    """Import what every command needs, without starting a thread: a forked child would lack it."""
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import llm_adapters.cli.evaluate
    import llm_adapters.cli.parser
    import llm_adapters.evaluation
    import llm_adapters.fusion
    import llm_adapters.training.run
    import llm_adapters.training.trainer  # noqa: F401


class Command:
    """`llm-adapters WORDS` in a child process.

    Args:
        words: the arguments.
        prepare: called in the child before.
    """

    def __init__(self, words: list[str], prepare: Callable[[], None] | None = None) -> None:
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as this object
        self.code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(words, prepare)

    def _run(self, words: list[str], prepare: Callable[[], None] | None) -> None:
        code = 70
        try:
            os.setsid()
            for stream in (1, 2):
                os.dup2(self.output.fileno(), stream)
            if prepare:
                prepare()
            from llm_adapters.cli import main

            code = main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            for text in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):
                    text.flush()
            os._exit(code)

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        end = time.monotonic() + seconds
        while self.running() and time.monotonic() < end:
            time.sleep(0.002)
        return not self.running()

    def kill(self) -> bool:
        """Kill it; whether it was still running."""
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
            self.wait(30)
        return self.code == -signal.SIGKILL

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace")


@dataclass
class Moment:
    """When to kill: at a time, or so long after the `nth` file of a kind has appeared."""

    seconds: float
    pattern: str = ""
    nth: int = 1

    @classmethod
    def draw(cls, rng: random.Random, duration: float, patterns: tuple[str, ...]) -> "Moment":
        if rng.random() < 0.5:
            return cls(rng.uniform(0, duration))
        delay = rng.choice((0.0, rng.uniform(0, 0.005), rng.uniform(0, 0.03)))
        return cls(delay, rng.choice(patterns), rng.choice((1, 1, 2, 3)))

    def strike(self, command: Command, folder: Path) -> bool:
        """Kill `command`, which writes to `folder`; whether it was still running."""
        if self.pattern:
            seen: set[Path] = set()
            while command.running() and len(seen) < self.nth:
                with contextlib.suppress(OSError):  # what is looked at may vanish
                    seen |= set(folder.glob(self.pattern))
                time.sleep(0.0005)
        command.wait(self.seconds)
        return command.kill()

    def __str__(self) -> str:
        after = f" after {self.pattern} no. {self.nth}" if self.pattern else ""
        return f"{self.seconds:.3f} s{after}"


# --- what is compared


def content(folder: Path) -> dict[str, Any]:
    """Files of a run or of results, with what must be the same in each."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_dir():
            continue
        if name == "log.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            clock = ("seconds", "tokens", "tokens_per_second")
            found[name] = [{k: v for k, v in line.items() if k not in clock} for line in lines]
        elif name == "manifest.json":
            manifest = json.loads(file.read_text())
            keys = ("data", "steps", "epochs", "final_loss", "first_validation_loss", "best_validation_loss")
            found[name] = {key: manifest[key] for key in keys}
        elif name.endswith("summary.json"):
            tasks = json.loads(file.read_text())["tasks"]
            found[name] = {task: (result["correct"], result["total"]) for task, result in tasks.items()}
        else:
            found[name] = file.read_bytes()
    return found


def differences(folder: Path, expected: dict[str, Any]) -> list[str]:
    found = content(folder)
    missing = [f"{name} is missing" for name in expected.keys() - found.keys()]
    left = [f"{name} is left" for name in found.keys() - expected.keys()]
    return (
        missing + left + [f"{name} differs" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    )


# --- the material


@dataclass
class Bench:
    """A tiny model, data, and the counts."""

    work: Path
    rng: random.Random
    failures: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base, self.data, self.task = self.work / "base", self.work / "train.jsonl", self.work / "eggs.yaml"
        if (pid := os.fork()) == 0:  # torch must start no thread in this process
            from tiny import save_tiny

            save_tiny(self.base)
            os._exit(0)
        os.waitpid(pid, 0)
        rng = self.rng
        pairs = [(rng.randrange(50), rng.randrange(50)) for _ in range(36)]
        asked = "Tom has {} apples and buys {} more. How many?"
        self._write(
            self.data, [{"question": asked.format(a, b), "answer": f"The answer is {a + b}."} for a, b in pairs]
        )
        rows = [{"question": f"Anna sells {a} of {a + b} eggs. How many are left?", "answer": str(b)} for a, b in pairs]
        self._write(self.work / "test.jsonl", rows)
        self.task.write_text(f"title: eggs\nkind: number\nfile: {self.work / 'test.jsonl'}\n")

    @staticmethod
    def _write(file: Path, rows: list[dict[str, str]]) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(self, method: str, **training: Any) -> Path:
        document: dict[str, dict[str, Any]] = {
            "model": {"name": str(self.base), "dtype": "float32", "device": "cpu"},
            "adapter": {"method": method},
            "data": {"train": str(self.data), "template": "plain", "max_length": 200},
            "training": {
                "epochs": 4, "batch_size": 4, "learning_rate": 0.01, "warmup": 2, "save_every": 3, "log_every": 1
            },
        }  # fmt: skip
        for section, values in SECTIONS[method].items():
            document[section].update(values)
        if method == "fusion":
            document["adapter"]["options"] = {"adapters": [str(self.reference(m)[0]) for m in ("series", "parallel")]}
        document["training"].update(training)
        file = self.work / f"{method}.yaml"
        file.write_text(json.dumps(document))  # JSON is YAML
        return file

    def reference(self, method: str) -> tuple[Path, float]:
        """The folder of a run that nobody interrupts, and how many seconds it takes."""
        folder = self.work / "reference" / method
        if not folder.exists():
            for _ in range(2):  # the first compiles kernels
                shutil.rmtree(folder, ignore_errors=True)
                started = time.monotonic()
                self.finish(["train", str(self.recipe(method)), "--output", str(folder)])
                self.seconds = time.monotonic() - started
        return folder, self.seconds

    def finish(self, words: list[str], prepare: Callable[[], None] | None = None) -> str:
        """What a command that must succeed prints."""
        command = Command(words, prepare)
        if not command.wait(LIMIT):
            command.kill()
            raise RuntimeError(f"it has not ended within {LIMIT} s: {command.text()[-500:]}")
        if command.code:
            raise RuntimeError(f"exit code {command.code}: {command.text()[-1000:]}")
        return command.text()

    def failed(self, folder: Path, **what: Any) -> None:
        kept = self.work / f"failed-{len(self.failures)}"
        if folder.exists():
            shutil.move(folder, kept)
        self.failures.append({**what, "folder": str(kept)})
        say(f"FAILED: {what}")

    def struck(
        self,
        what: str,
        words: list[str],
        patterns: tuple[str, ...],
        expected: dict[str, Any],
        duration: float,
        kills: int,
    ) -> dict[str, int]:
        """Kill a command until it was killed so often, and see what comes of each run."""
        done = recovered = 0
        while done < kills:
            folder, moments = self.work / "struck", []
            shutil.rmtree(folder, ignore_errors=True)
            for _ in range(self.rng.choice((1, 1, 2, 3))):
                command, moment = Command([*words, str(folder)]), Moment.draw(self.rng, duration, patterns)
                if not moment.strike(command, folder):
                    break
                moments.append(str(moment))
            try:
                self.end([*words, str(folder)])
                trouble = differences(folder, expected)
            except RuntimeError as error:
                trouble = [str(error)]
            done += len(moments)
            if trouble and moments:
                self.failed(folder, what=what, moments=moments, trouble=trouble)
            else:
                recovered += len(moments)
        say(f"{what}: {recovered} of {done} kills recovered")
        return {"kills": done, "recovered": recovered}

    def end(self, words: list[str]) -> None:
        """Bring a run to its end; it may have been there."""
        try:
            self.finish(words)
        except RuntimeError as error:
            if "already holds a finished run" not in str(error):
                raise


# --- the parts


def trainings(bench: Bench, methods: list[str], kills: int) -> dict[str, dict[str, int]]:
    found = {}
    for number, method in enumerate(methods):
        folder, duration = bench.reference(method)
        due = kills // len(methods) + (number < kills % len(methods))
        words = ["train", str(bench.recipe(method)), "--output"]
        found[method] = bench.struck(method, words, SAVES, content(folder), duration, due)
    return found


def evaluations(bench: Bench, kills: int) -> dict[str, int]:
    if not kills:
        return {"kills": 0, "recovered": 0}
    run, folder = bench.reference("series")[0], bench.work / "reference" / "evaluation"
    words = [
        "evaluate",
        str(run),
        "--tasks",
        str(bench.task),
        "--max-new-tokens",
        "24",
        "--batch-size",
        "4",
        "--output",
    ]
    started = time.monotonic()
    bench.finish([*words, str(folder)])
    duration = time.monotonic() - started
    return bench.struck("evaluation", words, EVALUATION_SAVES, content(folder), duration, kills)


def damaged(bench: Bench) -> dict[str, int]:
    """Damage each file of the second checkpoint in each way."""
    stopped, expected = bench.work / "stopped", content(bench.reference("parallel")[0])
    words = ["train", str(bench.recipe("parallel")), "--output"]

    def stop_after_two() -> None:
        from llm_adapters.training import checkpoints

        original = checkpoints.complete

        def complete(run: Any, step: int, *rest: Any, **more: Any) -> None:
            original(run, step, *rest, **more)
            if step == 6:
                os._exit(9)

        checkpoints.complete = complete  # type: ignore[assignment]

    command = Command([*words, str(stopped)], stop_after_two)
    command.wait(LIMIT)
    (stopped / ".lock").unlink(missing_ok=True)
    tried = same = 0
    for file in sorted((stopped / "checkpoints" / "checkpoint-6").iterdir()):
        for damage in ("cut", "emptied", "deleted", "flipped"):
            folder = bench.work / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(stopped, folder)
            target, written = folder / file.relative_to(stopped), bytearray(file.read_bytes())
            if damage == "deleted":
                target.unlink()
            else:
                bit = bench.rng.randrange(8 * len(written))
                written[bit // 8] ^= 1 << bit % 8
                kept = {"cut": written[: len(written) // 2], "emptied": b"", "flipped": written}
                target.write_bytes(kept[damage])
            tried += 1
            try:
                told = "going on from checkpoint-3" in bench.finish([*words, str(folder)])
                trouble = differences(folder, expected) + ([] if told else ["nothing was said"])
            except RuntimeError as error:
                trouble = [str(error)]
            if trouble:
                bench.failed(folder, what=f"{file.name} {damage}", trouble=trouble)
            same += not trouble
    say(f"damaged checkpoints: {same} of {tried} left out, with the same result")
    return {"tried": tried, "same": same}


def full_disks(bench: Bench, count: int) -> dict[str, Any]:
    """Train on disks that are full sooner or later, then make room and give the same command again."""
    reference = bench.reference("parallel")[0]
    words, expected = ["train", str(bench.recipe("parallel")), "--output"], content(reference)
    disk = bench.work / "disk"
    disk.mkdir()
    # Four times what is left in the end: two checkpoints, with optimiser states, lie beside what is being written.
    pages = 4 * sum(-(-file.stat().st_size // 4096) for file in reference.rglob("*") if file.is_file()) + 24
    full = same = 0
    for number in range(count):
        size = 4 * max(1, pages * (number + 1) // count)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return {"tried": 0, "reason": "a disk of a given size needs the right to mount one"}
        try:
            command = Command([*words, str(disk / "run")])
            ended = command.wait(LIMIT)
            trouble = [] if ended else ["it has not ended"]
            if ended and command.code:
                full += 1
                text = command.text()
                trouble += [f"exit code {command.code}"] if command.code != 1 else []
                trouble += [text[-1000:]] if "Traceback" in text or "Make room" not in text else []
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)  # noqa: S607
            bench.end([*words, str(disk / "run")])
            trouble += differences(disk / "run", expected)
        except RuntimeError as error:
            trouble = [str(error)]
        if trouble:
            bench.failed(disk / "run", what=f"disk of {size} KiB", trouble=trouble)
        same += not trouble
        subprocess.run(["umount", str(disk)], check=True)  # noqa: S607
    say(f"full disks: {full} of {count} were full, {same} came to the same result")
    return {"tried": count, "full": full, "same": same}


def other_counts(bench: Bench, kills: int) -> dict[str, Any]:
    """Kill trainings in two processes; they go on in one or three."""
    import psutil
    import torch
    from safetensors.torch import load_file

    def command(processes: int, folder: Path) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = ["-m", "llm_adapters.cli", "train", str(bench.recipe("series")), "--output", str(folder)]
        return [sys.executable, *(launcher if processes > 1 else []), *words]

    expected = load_file(bench.reference("series")[0] / "adapter" / "adapter_model.safetensors")
    done, recovered, furthest = 0, 0, 0.0
    for number in range(kills):
        folder = bench.work / "processes"
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryFile() as output:
            first = subprocess.Popen(command(2, folder), stdout=output, stderr=output)
            patterns = ("checkpoints/checkpoint-*/optimizer.pt", "checkpoints/checkpoint-*/complete")
            pattern, nth = bench.rng.choice(patterns), bench.rng.choice((1, 2, 3))
            seen: set[Path] = set()
            while first.poll() is None and len(seen) < nth:
                seen |= set(folder.glob(pattern))
                time.sleep(0.001)
            for process in [*psutil.Process(first.pid).children(recursive=True), first]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            first.wait()
        done += 1
        processes = (1, 3)[number % 2]
        end = subprocess.run(command(processes, folder), capture_output=True, text=True, timeout=2 * LIMIT, check=False)
        if end.returncode:
            bench.failed(folder, what=f"2 processes, then {processes}", trouble=[end.stderr[-1000:]])
            continue
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        far = max(float((found[name] - weight).abs().max()) for name, weight in expected.items())
        furthest = max(furthest, far)
        torch.testing.assert_close(far, far)
        if far < 1e-4:
            recovered += 1
        else:
            bench.failed(folder, what=f"2 processes, then {processes}", trouble=[f"weights are {far} away"])
    say(f"other numbers of processes: {recovered} of {done} kills recovered, weights at most {furthest:.1e} away")
    return {"kills": done, "recovered": recovered, "furthest_weight": furthest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=150, help="of trainings")
    parser.add_argument("--evaluation-kills", type=int, default=40)
    parser.add_argument("--process-kills", type=int, default=4, help="of trainings in two processes")
    parser.add_argument("--full-disks", type=int, default=30, help="sizes of disks that are too small")
    parser.add_argument("--methods", default="lora,series,parallel,prefix,mam,fusion")
    parser.add_argument("--no-damage", action="store_true", help="without the damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    asked = parser.parse_args()
    preload()
    work = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["LLM_ADAPTERS_CACHE"] = str(work / "cache")
    bench = Bench(work, random.Random(asked.seed))
    by_method = trainings(bench, asked.methods.split(","), asked.kills)
    measured = evaluations(bench, asked.evaluation_kills)
    checkpoints = {"tried": 0, "same": 0} if asked.no_damage else damaged(bench)
    disks = full_disks(bench, asked.full_disks)
    counts = other_counts(bench, asked.process_kills)
    parts = [*by_method.values(), measured, counts]
    result = {
        "kills": sum(part["kills"] for part in parts),
        "recovered": sum(part["recovered"] for part in parts),
        "training": by_method,
        "evaluation": measured,
        "damaged_checkpoints": checkpoints,
        "full_disks": disks,
        "other_process_counts": counts,
        "failures": bench.failures,
        "seed": asked.seed,
        "versions": versions("safetensors"),
        **machine(),
    }
    if not bench.failures:
        shutil.rmtree(work)
    print(json.dumps(result, indent=None if asked.json else 2))
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
