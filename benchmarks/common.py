"""What the benchmarks share: contestants in processes of their own, medians, the machine and its matrix-product rate.

Only the standard library is imported at the top: a contestant imports what it measures, and nothing else of ours.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parent / ".cache"  # git-ignored
THREADS = int(os.environ.get("LLM_ADAPTERS_BENCHMARK_THREADS", 2))  # the published figures are for 2


def say(text: str) -> None:
    """Progress goes to stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


# --- contestants


def worker_main(contestants: dict[str, Callable[[dict], dict]], argv: list[str]) -> bool:
    """Run one contestant if this process was started for that, and print its result as the last line of stdout.

    Returns:
        Whether it was: then the caller has nothing left to do.
    """
    if argv[:1] != ["worker"]:
        return False
    out = os.fdopen(os.dup(1), "w")  # libraries print where they like: keep stdout for the result alone
    os.dup2(2, 1)
    spec = json.loads(argv[1])
    import torch

    torch.set_num_threads(THREADS)
    print(json.dumps(contestants[spec["contestant"]](spec)), file=out, flush=True)
    return True


def run_worker(
    script: str, spec: dict, *, python: str | None = None, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """The result of a contestant in a process of its own; `{"reason": ...}` where it failed.

    `disturbance` in it is the share of the machine that others took meanwhile: figures with more than a few per cent of
    it are not to be trusted.

    Args:
        script: the benchmark's own file.
        spec: what the contestant is given; `spec["contestant"]` says which one.
        python: another environment's interpreter, for peers that are not installed beside this project.
        env: further environment variables.
    """
    threads = {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [python or sys.executable, script, "worker", json.dumps(spec)]
    started, before = time.monotonic(), _cpu_seconds()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads, **(env or {})})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"reason": lines[-1] if lines else f"exit code {done.returncode}", "stderr": "\n".join(lines[-30:])}
    result = json.loads(done.stdout.splitlines()[-1])
    if before is not None and (after := _cpu_seconds()) is not None:
        took = (time.monotonic() - started) * (os.cpu_count() or 1)
        result["disturbance"] = max(0.0, after[0] - before[0] - (after[1] - before[1])) / took
    return result


def _cpu_seconds() -> tuple[float, float] | None:
    """CPU time that the whole machine, and this process's finished children, have used; None where that is not told."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError):
        return None
    busy = sum(ticks) - ticks[3] - ticks[4]  # all but idle and waiting for the disk; steal counts
    children = os.times()
    return busy / os.sysconf("SC_CLK_TCK"), children.children_user + children.children_system


def alternate(names: Iterable[str], repeats: int, run: Callable[[str], dict[str, Any]]) -> dict[str, list[dict]]:
    """Run every contestant in turn, `repeats` times, so that a machine that slows down slows all of them.

    A contestant that fails once is not run again; its results are then that one failure.
    """
    results: dict[str, list[dict]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name, done in results.items():
            if done and "reason" in done[-1]:
                continue
            started = time.monotonic()
            result = run(name)
            if "reason" in result:
                say(f"{name}: could not run: {result['reason']}\n{result.pop('stderr', '')}")
                done[:] = [result]
                continue
            done.append(result)
            shown = ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, int | float))
            say(f"[{repeat + 1}/{repeats}] {name}: {shown} ({time.monotonic() - started:.0f} s in all)")
            if result.get("disturbance", 0) > 0.05:
                say(f"  other processes took {result['disturbance']:.0%} of the machine: not a figure to trust")
    return results


# --- numbers


def median(results: list[dict], key: str) -> float | None:
    """The median of `key` over the repeats; None for a contestant that could not run."""
    values = [r[key] for r in results if r.get(key) is not None]
    return statistics.median(values) if values else None


def each(results: list[dict], key: str, digits: int = 4) -> list[float]:
    """`key` of every repeat."""
    return [rounded(r[key], digits) for r in results if r.get(key) is not None]


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, None where one of them is not known."""
    return rounded(a / b, 3) if a is not None and b else None


def rounded(value: float | None, digits: int = 4) -> float | None:
    """`value` to so many significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")


def reason(results: list[dict]) -> str | None:
    """Why a contestant could not run; None if it did."""
    return next((r["reason"] for r in results if "reason" in r), None)


# --- the process and the machine


def peak_memory() -> int:
    """The most resident memory that this process ever had, in bytes (VmHWM; elsewhere what getrusage says)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def matmul_rate(spec: dict | None = None) -> dict[str, float]:
    """FLOP/s of large bfloat16 matrix products with `THREADS` threads: the best of several shapes and tries."""
    import torch

    best = 0.0
    for rows, inner, columns in ((2048, 2048, 2048), (4096, 1024, 2048), (2048, 1024, 4096), (3072, 3072, 3072)):
        a, b = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
        for _ in range(8):
            started = time.perf_counter()
            torch.nn.functional.linear(a, b)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
    return {"flops_per_second": best}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        pass
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = None
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "memory_bytes": memory,
        "bfloat16": sorted(flags & {"avx512_bf16", "amx_bf16"}),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(*more: str) -> dict[str, str | None]:
    """Releases of what takes part; None for what is not installed here."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("llm-adapter-family", "torch", "transformers", "peft", "accelerate", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def versions_of(python: str | None, *names: str) -> dict[str, str | None]:
    """Releases of packages in another environment."""
    if not python:
        return dict.fromkeys(names)
    code = (
        "import json, sys; from importlib.metadata import distributions as d; w = set(sys.argv[1:]);"
        "print(json.dumps({x.name.lower(): x.version for x in d() if x.name and x.name.lower() in w}))"
    )
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True)
    found = json.loads(done.stdout) if done.returncode == 0 else {}
    return {name: found.get(name) for name in names}


# --- data


def shuffled(items: Iterable[Any], seed: int) -> list[Any]:
    """A copy in an order that the seed decides."""
    items = list(items)
    random.Random(seed).shuffle(items)
    return items


def table(rows: list[list[str]]) -> str:
    """Rows as aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
