"""What is captured for one micro-batch is right for all others of its size; on a CPU by a recorder with a CUDA graph's
semantics (`tests/support/graph_recorder.py`)."""

import functools
import itertools
import os
import random
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fast_path_helpers import OPTIONS, adapted, assert_same, examples
from graph_helpers import compute, steps
from graph_recorder import GraphRecorder
from safetensors.torch import load_file
from tiny import save_tiny
from varlen_stand_in import packed_attention_as_on_cuda

from llm_adapters.fast_paths import FastPaths
from llm_adapters.ops import varlen_attention
from llm_adapters.ops.static_pack import StaticSizes
from llm_adapters.tasks.templates import Encoded
from llm_adapters.training import Interrupted, Run, train
from llm_adapters.training import graphs as graphs_module
from llm_adapters.training.collator import Collator, MicroBatch
from llm_adapters.training.graphs import LIMIT, CudaCapture, MicroBatchGraphs
from llm_adapters.training.trainer import Recorder


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with packed_attention_as_on_cuda():
        yield


def size(micro: MicroBatch) -> StaticSizes:
    return StaticSizes.of(micro.pack, len(micro.targets))


def micro_batches(shared: int = 6) -> list[MicroBatch]:
    """Five of one size, of other numbers and lengths of segments, shared prefixes and numbers of labels."""
    chosen = [examples(7 + seed % 3, shared and shared + seed % 4, seed)[seed % 5 :] for seed in range(60)]
    made = [micro for rows in chosen for micro in Collator(0).make_micro_batches(rows)]
    ((usual, count),) = Counter(size(micro) for micro in made).most_common(1)
    found = [micro for micro in made if size(micro) == usual][:5]
    assert count >= 5
    for value in (lambda m: m.pack.lengths, lambda m: len(m.targets)):
        assert len({value(micro) for micro in found}) > 2
    return found


@pytest.mark.parametrize("shared", [6, 0])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *itertools.product(["llama", "qwen3", "gemma3_text", "opt", "gptj"], OPTIONS),
        ("bloom", "lora"),  # its parallel adapters reach the block's input by a hook
        ("bloom", "series"),
    ],
)
def test_replays_are_the_plain_loop(family: str, method: str, shared: int) -> None:
    """Two micro-batches of each step; the third step is of other micro-batches than what was captured."""
    model = adapted(family, method).train()
    made = micro_batches(shared)
    batches = [made[:2], made[2:4], made[4:] + made[:1], made[1:3]]
    recorder = GraphRecorder()
    with FastPaths(model) as fast:
        expected = steps(model, None, batches)
        graphs = MicroBatchGraphs(model, fast, recorder)
        found = steps(model, graphs, batches)
    assert recorder.replays == [6], graphs.report
    for (losses, directions), (own_losses, own) in zip(expected, found, strict=True):
        assert own_losses == pytest.approx(losses, rel=1e-5)
        assert_same(own, directions)


@pytest.mark.parametrize("method", ["lora", "series", "parallel"])
def test_replays_are_to_the_bit_what_is_computed_without_graphs(method: str) -> None:
    """With dropout, whose seeds come from the generator as it is at the time of a replay."""
    option = {"lora": "lora_dropout"}.get(method, "bottleneck_dropout")
    model = adapted("llama", method, **{option: 0.3}).train()
    made = micro_batches()
    batches = [made[:3], made[3:], made[1:4]]
    with FastPaths(model) as fast:
        recorder = GraphRecorder()
        replayed = steps(model, MicroBatchGraphs(model, fast, recorder), batches)
        without = MicroBatchGraphs(model, fast, _Failing())
        computed = steps(model, without, batches)
    assert recorder.replays == [6]
    assert "no luck" in without.report
    for (losses, directions), (own_losses, own) in zip(computed, replayed, strict=True):
        assert own_losses == losses
        assert all(torch.equal(own[name], direction) for name, direction in directions.items())
    assert len({loss for losses, _ in replayed for loss in losses}) == 8  # no two drop the same


class _Failing(GraphRecorder):
    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        super().capture(function)  # has no effect
        raise RuntimeError("no luck")


def test_each_size_has_its_graph_and_the_first_of_each_is_computed() -> None:
    model = adapted("llama", "lora").train()
    short = micro_batches()
    long = [m for seed in (0, 1) for m in Collator(0).make_micro_batches(examples(20, 6, seed))]
    recorder = GraphRecorder()
    with FastPaths(model) as fast:
        graphs = MicroBatchGraphs(model, fast, recorder)
        found = steps(model, graphs, [[short[0], long[0]], [short[1], long[1]], [long[0], short[2]]])
        expected = steps(model, None, [[short[0], long[0]], [short[1], long[1]], [long[0], short[2]]])
    assert recorder.replays == [2, 2]
    assert graphs.report.startswith("on, 2 sizes captured in ")
    for (_, directions), (_, own) in zip(expected, found, strict=True):
        assert_same(own, directions)


def test_a_number_of_one_pack_on_the_host_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder does tell: scores that are scaled by what the host knows of the first pack differ in the second."""
    attend = varlen_attention.varlen_attention

    def planted(query: torch.Tensor, *rest: Any) -> Any:
        return attend(query * known[0], *rest)

    monkeypatch.setattr(varlen_attention, "varlen_attention", planted)
    model, made, known = adapted("llama", "lora").train(), micro_batches(), [1.0]
    with FastPaths(model) as fast:
        graphs = MicroBatchGraphs(model, fast, GraphRecorder())
        steps(model, graphs, [made[:3]])
        known[0] = 1.5
        (found,), (expected,) = steps(model, graphs, [made[:1]]), steps(model, None, [made[:1]])
    assert graphs.report.startswith("on, 1 sizes")
    assert found[0] != pytest.approx(expected[0], rel=1e-4)


def test_what_waits_for_the_device_is_computed_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = varlen_attention.varlen_attention

    def reading(query: torch.Tensor, *rest: Any) -> Any:
        return attend(query * (1.0 if bool(query.abs().max() < 1e9) else 0.0), *rest)

    monkeypatch.setattr(varlen_attention, "varlen_attention", reading)
    model, made = adapted("llama", "series").train(), micro_batches()
    with FastPaths(model) as fast:
        graphs = MicroBatchGraphs(model, fast, GraphRecorder())
        found, expected = (steps(model, way, [made]) for way in (graphs, None))
    assert "capturing failed (RuntimeError: operation not permitted" in graphs.report
    assert graphs.rounds
    assert_same(found[0][1], expected[0][1])


def test_reasons_against_graphs() -> None:
    def reason(model: Any, **options: Any) -> str:
        with FastPaths(model, options.pop("fast", True)) as fast:
            graphs = MicroBatchGraphs(model, fast, **options)
            graphs.begin_step()
            assert graphs.run(micro_batches()[0], 1, functools.partial(compute, model)) is None
            return graphs.report

    recorder = GraphRecorder()
    assert reason(adapted("llama", "lora")) == "there are none on cpu"
    assert reason(adapted("llama", "lora"), on=False) == "not asked for"
    assert "only packs" in reason(adapted("llama", "lora"), capture=recorder, fast=False)
    assert "only packs" in reason(adapted("llama", "prefix"), capture=recorder)
    assert "router" in reason(adapted("mixtral", "series"), capture=recorder)
    hooked, checkpointing = adapted("llama", "lora"), adapted("llama", "lora")
    hooked.get_base_model().lm_head.register_forward_hook(lambda *_: None)
    assert "hooks" in reason(hooked, capture=recorder)
    checkpointing.train().get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert "again in the backward pass" in reason(checkpointing, capture=recorder)


def test_an_attention_that_reads_lengths_on_the_host_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the device's function, attention pads segments of like length, which is another shape for every pack."""
    from llm_adapters.ops import backends

    monkeypatch.setattr(backends, "disabled", True)
    model = adapted("llama", "lora").train()
    with FastPaths(model) as fast:
        graphs = MicroBatchGraphs(model, fast, GraphRecorder())
        graphs.begin_step()
    assert "a pack of round sizes has no" in graphs.report
    assert not graphs.rounds


def test_there_are_no_more_graphs_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_adapters.training.graphs.LIMIT", 1)
    assert LIMIT > 1
    model, recorder = adapted("llama", "lora").train(), GraphRecorder()
    batches = [[m for n in (4, 20) for m in Collator(0).make_micro_batches(examples(n, 6))]] * 3
    with FastPaths(model) as fast:
        found, expected = (steps(model, way, batches) for way in (MicroBatchGraphs(model, fast, recorder), None))
    assert len(recorder.replays) == 1
    assert_same(found[-1][1], expected[-1][1])


def test_graphs_that_are_given_up_change_nothing() -> None:
    model, made = adapted("llama", "lora", lora_dropout=0.2).train(), micro_batches()
    with FastPaths(model) as fast:
        graphs = MicroBatchGraphs(model, fast, GraphRecorder())
        assert not graphs.release()  # there are none yet, and there will be
        steps(model, graphs, [made])
        expected = steps(model, graphs, [made[:2]])
        assert graphs.release()
        found = steps(model, graphs, [made[:2]])
        assert not graphs.release()
    assert "memory" in graphs.report
    assert found[0][0] == expected[0][0]
    assert all(torch.equal(found[0][1][name], direction) for name, direction in expected[0][1].items())


def test_rows_are_computed_as_they_are() -> None:
    model = adapted("llama", "lora").train()
    rows: list[Encoded] = examples(4)
    with FastPaths(model) as fast:
        graphs = MicroBatchGraphs(model, fast, GraphRecorder())
        graphs.begin_step()
        (micro,) = Collator(0, packed=False).make_micro_batches(rows)
        assert graphs.run(micro, 1, functools.partial(compute, model)) is None
        (plain,) = Collator(0).make_micro_batches(rows)
        assert graphs.run(plain, 1, functools.partial(compute, model)) is not None


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


def recipe(model: Path, **training: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(model)},
        "adapter": {"method": "series", "options": {"bottleneck_size": 8, "bottleneck_dropout": 0.2}},
        "data": {"train": "wordproblems-train", "template": "plain", "limit": 32, "max_length": 256},
        "training": {"epochs": 2, "batch_size": 8, "micro_batch_size": 4, "log_every": 1, "learning_rate": 1e-2}
        | training,
    }


def trained(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


def test_an_interrupted_run_resumes_to_the_same_adapter(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one without captures ends with the very same weights."""
    recorders: list[GraphRecorder] = []

    def recorded(kind: type[GraphRecorder], *args: Any, **options: Any) -> MicroBatchGraphs:
        recorders.append(kind())
        return MicroBatchGraphs(*args, capture=recorders[-1], **options)

    monkeypatch.setattr(graphs_module, "MicroBatchGraphs", functools.partial(recorded, GraphRecorder))
    whole = train(recipe(llama), tmp_path / "whole", progress=False)
    assert sum(recorders[0].replays) >= 8
    assert whole.manifest["fast_paths"]["CUDA graphs"].startswith("on, ")
    on_log = Recorder.on_log

    def interrupt(self: Recorder, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        on_log(self, args, state, *rest, **kwargs)
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_log", interrupt)
        with pytest.raises(Interrupted):
            train(recipe(llama), tmp_path / "cut", progress=False)
    resumed = train(recipe(llama), tmp_path / "cut", progress=False)
    monkeypatch.setattr(graphs_module, "MicroBatchGraphs", functools.partial(recorded, _Failing))
    without = train(recipe(llama), tmp_path / "without", progress=False)
    assert "no luck" in without.manifest["fast_paths"]["CUDA graphs"]
    for run in (resumed, without):
        assert all(torch.equal(trained(whole)[name], weight) for name, weight in trained(run).items())


def test_a_run_without_a_gpu_says_so(llama: Path, tmp_path: Path) -> None:
    for on, told in ((True, "there are none on cpu"), (False, "not asked for")):
        run = train(recipe(llama, cuda_graphs=on, max_steps=1), tmp_path / str(on), progress=False)
        assert run.manifest["fast_paths"]["CUDA graphs"] == told


def test_graphs_give_their_memory_back_before_micro_batches_get_smaller(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(GraphRecorder):
        """There is no memory for what is captured."""

        def capture(self, function: Callable[[], None]) -> Callable[[], None]:
            replay = super().capture(function)

            def replay_and_fail() -> None:
                replay()
                raise torch.OutOfMemoryError("CUDA out of memory")

            return replay_and_fail

    monkeypatch.setattr(graphs_module, "MicroBatchGraphs", functools.partial(MicroBatchGraphs, capture=Full()))
    full = train(recipe(llama), tmp_path / "full", progress=False)
    monkeypatch.setattr(graphs_module, "MicroBatchGraphs", functools.partial(MicroBatchGraphs, capture=GraphRecorder()))
    whole = train(recipe(llama), tmp_path / "whole", progress=False)
    assert "memory" in full.manifest["fast_paths"]["CUDA graphs"]
    assert not full.manifest["micro_batch_tokens"]["halvings"]
    assert all(torch.equal(trained(whole)[name], weight) for name, weight in trained(full).items())


class FakeCuda:
    """As much of torch.cuda as `CudaCapture` calls; what happens on which stream is written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.did, self.sync_mode = FakeStream("main", self), list[str](), 0
        replaced = {
            "Stream": lambda device: FakeStream("side", self),
            "current_stream": lambda device: self.now,
            "set_stream": lambda stream: setattr(self, "now", stream),
            "stream": self.stream,
            "graph": self.graph,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.did.append(f"replay on {self.now.name}")),
            "graph_pool_handle": lambda: (0, 1),
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_mode", mode),
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def graph(self, graph: Any, *, pool: Any, stream: "FakeStream", capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        before, self.now = self.now, stream
        yield
        self.now = before  # not where a capture fails, as in torch


class FakeStream:
    def __init__(self, name: str, cuda: FakeCuda) -> None:
        self.name, self.cuda, self.device = name, cuda, "cuda:0"

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.did.append(f"{self.name} waits for {other.name}")


def failing(message: str) -> Callable[[], None]:
    def function() -> None:
        raise RuntimeError(message)

    return function


def test_the_stream_is_as_before_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    capture = CudaCapture(torch.device("cuda"))
    capture.compute(lambda: cuda.did.append(f"computed on {cuda.now.name}"))
    order = ["side waits for main", "computed on side", "main waits for side"]
    assert cuda.did == order
    with pytest.raises(RuntimeError, match="memory"):
        capture.compute(failing("out of memory"))
    assert cuda.did[len(order) :] == ["side waits for main", "main waits for side"]
    with pytest.raises(RuntimeError, match="invalidated"):
        capture.capture(failing("capture was invalidated"))
    assert cuda.now.name == "main"
    capture.capture(lambda: None)()
    assert cuda.did[-1] == "replay on main"


def test_what_cannot_be_captured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    capture = CudaCapture(torch.device("cuda"))

    def waiting() -> None:
        assert cuda.sync_mode == "warn"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    told = capture.obstacle(waiting)
    assert told is not None
    assert "test_graphs.py" in told
    assert capture.obstacle(lambda: warnings.warn("deprecated", stacklevel=1)) is None
    for draw in (random.random, lambda: torch.rand(1)):
        assert capture.obstacle(draw) == "the host draws random numbers"
    with pytest.raises(RuntimeError):
        capture.obstacle(failing("out of memory"))
    assert cuda.sync_mode == 0
