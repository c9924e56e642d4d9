"""Each compiled function against the same in torch, at sizes that fill no vector."""

import stat
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from llm_adapters.fast_paths import layers, lora
from llm_adapters.fast_paths.routing import Route
from llm_adapters.ops import cross_entropy as head
from llm_adapters.ops import dropout, rotary
from llm_adapters.ops import varlen_attention as attention
from llm_adapters.ops.cpu import build as kernels
from llm_adapters.ops.kv_cache import DecodeBatch, ForwardBatch, PagedCache, store
from llm_adapters.ops.packing import Pack, Visible
from llm_adapters.ops.paged_attention import decode_attention

PRECISIONS = [torch.float32, torch.bfloat16]
ROOM = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # relative to the largest: a bfloat16 has 8 bits


@pytest.fixture(autouse=True)
def functions() -> None:
    """Once, and not both ways as the other tests here: these compare the two."""
    if reason := kernels.why_not(torch.float32):
        pytest.skip(reason)


@pytest.fixture(params=PRECISIONS, ids=["float32", "bfloat16"])
def kind(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


def both(monkeypatch: pytest.MonkeyPatch, compute) -> tuple:
    """What `compute` returns with kernels, and what without."""
    found = compute()
    with monkeypatch.context() as without:
        without.setattr(kernels, "off", True)
        return found, compute()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    distance = (found.float() - expected.float()).abs().max()
    assert distance <= ROOM[expected.dtype] * expected.float().abs().max(), distance


def gradients_of(function, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, weights)


@pytest.mark.parametrize("shape", [(1, 3), (3, 7), (2, 5, 33), (130, 576)])
def test_norm(kind: torch.dtype, shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(shape).to(kind), torch.rand(shape[-1]).to(kind)
    for pair in zip(
        *both(monkeypatch, lambda: gradients_of(lambda x: layers._RmsNorm.apply(x, weight, 1e-5), x)), strict=True
    ):
        assert_close(*pair)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (70, 100)])
def test_gated_product(kind: torch.dtype, shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up = 20 * torch.randn(shape).to(kind), torch.randn(shape).to(kind)
    for pair in zip(*both(monkeypatch, lambda: gradients_of(layers._SiluGate.apply, gate, up)), strict=True):
        assert_close(*pair)


def test_a_gate_far_from_zero_overflows_nowhere(kind: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -200.0, 200.0, 1e30]).to(kind)
    out, d_gate, _ = gradients_of(layers._SiluGate.apply, gate, torch.ones_like(gate))
    assert torch.equal(out[2:], gate[2:])
    assert out[:2].abs().max() < 1e-6
    assert d_gate.isfinite().all()


@pytest.mark.parametrize(("heads", "width"), [(1, 2), (3, 10), (9, 64)])
def test_rotation(kind: torch.dtype, heads: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, heads, width).to(kind)
    cos, sin = (torch.randn(2, 1, 5, width).to(kind) for _ in range(2))
    rotate = lambda x: rotary._Rotary.apply(x.transpose(1, 2), cos, sin)  # noqa: E731
    for pair in zip(*both(monkeypatch, lambda: gradients_of(rotate, x)), strict=True):
        assert_close(*pair)


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("prefix", [0, 3])
def test_attention_of_segments(
    kind: torch.dtype, prefix: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, longest, groups, each, width = torch.tensor([11, 4, 1]), 11, 2, 3, 8
    real = (torch.arange(longest) < lengths[:, None])[:, None, None, :, None]
    query = torch.randn(3 * groups, each * longest, width).to(kind)
    key, value = (torch.randn(3 * groups, prefix + longest, width).to(kind) for _ in range(2))
    grad = (torch.randn(3, groups, each, longest, width) * real).to(kind).view_as(query)

    def compute() -> tuple[torch.Tensor, ...]:
        visible = Visible(lengths, prefix, longest, window)
        out, kept = attention.attend(query, key, value, visible)
        out = (out.view(3, groups, each, longest, width) * real).to(kind)
        return out, *attention._backward(grad, query, key, value, visible, kept)

    for pair in zip(*both(monkeypatch, compute), strict=True):
        assert_close(*pair)


# Segments shorter and longer than the rows that are kept at once, more heads than keys and as many, no prefix.
PACKS = [((3, 1, 17), 0, 2, 1, 32), ((50, 14, 28), 21, 6, 2, 64), ((300, 231), 45, 3, 3, 64), ((33,), 64, 3, 1, 96)]


@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize(("lengths", "prefix", "heads", "groups", "width"), PACKS)
def test_attention_of_packs(
    kind: torch.dtype, lengths: tuple, prefix: int, heads: int, groups: int, width: int, window: int | None
) -> None:
    """Against the formula, one segment after the other."""
    pack = Pack.of([[1] * prefix + [2] * length for length in lengths], prefix)
    parts = [torch.randn(pack.tokens, count, width).to(kind) for count in (heads, groups, groups)]
    weights = torch.randn(pack.tokens, heads, width).to(kind)

    def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
        owners = [-1] * prefix + [number for number, length in enumerate(lengths) for _ in range(length)]
        places, owner = pack.position_ids[0, : pack.end], torch.tensor(owners)
        distance = places[:, None] - places
        seen = (distance >= 0) & (distance < (window or 10**9)) & ((owner[:, None] == owner) | (owner == -1))
        scores = torch.einsum("qhw,khw->hqk", query[: pack.end], key[: pack.end]) * 0.3
        chances = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        return torch.cat((torch.einsum("hqk,khw->qhw", chances, value[: pack.end]), query[pack.end :] * 0))

    def gradients(function, *inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [part.clone().requires_grad_() for part in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]

    mine = lambda *rows: attention.PackedAttention.apply(*(r.transpose(0, 1) for r in rows), pack, 0.3, window)  # noqa: E731
    for found, exact in zip(gradients(mine, *parts), gradients(formula, *(p.double() for p in parts)), strict=True):
        assert (found.double() - exact).abs().max() <= 2 * ROOM[kind] * exact.abs().max()


@pytest.mark.parametrize("labels", [1, 16, 37])
def test_output_head(kind: torch.dtype, labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = torch.randn(labels, 8).to(kind), torch.randn(99, 8).to(kind), torch.arange(labels) % 99
    (loss, gradient), (expected, direction) = both(
        monkeypatch, lambda: gradients_of(lambda h: head.head_loss(h, weight, None, targets), hidden)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_close(gradient, direction)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("beside", [1, 3])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("width", [8, 64, 96])
def test_attention_of_answers_in_the_making(
    kind: torch.dtype, width: int, prefix: int, beside: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the formula: every token over what its slot has been given, in order."""
    monkeypatch.setattr("llm_adapters.ops.kv_cache.BLOCK_SIZE", 4)
    monkeypatch.setattr("llm_adapters.ops.paged_attention.BLOCK_SIZE", 4)
    groups, each, sizes = 2, 3, [3, 9, 13]
    keys, values = ([torch.randn(groups, size, width).to(kind) for size in sizes] for _ in range(2))
    shared = [[torch.randn(groups, prefix, width).to(kind) for _ in range(2)] for _ in range(2)]  # of two adapters
    seqs, adapters = (4, 0, 2, -1), (1, 0, 1, 0)
    cache = PagedCache(5, 16, torch.device("cpu"))
    for adapter, pair in enumerate(shared if prefix else ()):
        cache.keep_prefix(0, *pair, adapter)
    for seq, size, *rows in zip(seqs, sizes, keys, values, strict=False):
        cache.reserve(seq, size)
        at = prefix + torch.arange(size)[None]
        held = ForwardBatch(cache, [DecodeBatch((seq,), at, at >= 0, (0,))])
        store(0, *rows, held)
    at = prefix + torch.tensor([[max(size - beside + i, 0) for i in range(beside)] for size in [*sizes, 1]])
    query = torch.randn(groups * each, 4 * beside, width).to(kind)
    valid = (torch.tensor(seqs) >= 0)[:, None].expand_as(at)
    decoded = DecodeBatch(seqs, at, valid, adapters)
    found = decode_attention(0, query, cache, decoded, 0.3, window).view(4, beside, groups, each, width)
    for row, size in enumerate(sizes):
        before = shared[adapters[row]]
        key, value = (torch.cat((s, part[row]), 1).double() for s, part in zip(before, (keys, values), strict=True))
        asked = query.view(groups, each, 4, beside, width)[:, :, row].double()
        scores = torch.einsum("gebw,gtw->gebt", asked, key) * 0.3
        distance = at[row][:, None] - torch.arange(prefix + size)
        hidden = (distance < 0) | (distance >= (window or 10**9))
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        expected = torch.einsum("gebt,gtw->bgew", weights, value)
        assert_close(found[row], expected.to(kind))


@pytest.mark.parametrize(
    ("rows", "width", "out", "ranks"), [(1, 5, 3, (2,)), (9, 64, 40, (8, 33)), (70, 33, 64, (64, 4))]
)
def test_lora_with_an_adapter_for_each_row(kind: torch.dtype, rows: int, width: int, out: int, ranks: tuple) -> None:
    layer = peft_linear(width, out, ranks)
    names = ("__base__", *(f"a{number}" for number in range(len(ranks))))
    route = Route(names)
    which = (1 + torch.arange(rows) // 3) % len(names)
    route.set(which)
    layer.to(kind)
    x = torch.randn(1, rows, width).to(kind)
    base = layer.base_layer(x)[0]
    with torch.inference_mode():
        found = lora.inference_forward(layer, route, prepack=False)(x)[0]
    for row in range(rows):
        name, expected = names[which[row]], base[row].double()
        if name != "__base__":
            middle = (x[0, row].double() @ layer.lora_A[name].weight.double().t()).to(kind).double()
            expected = expected + middle @ (layer.lora_B[name].weight * layer.scaling[name]).double().t()
        assert_close(found[row], expected.to(kind))
    route.set(which[1:])
    with pytest.raises(RuntimeError, match=f"told for {rows - 1} rows, and there are {rows}"):
        lora.inference_forward(layer, route, prepack=False)(x)


@pytest.mark.parametrize(("rows", "width", "out", "rank"), [(70, 32, 64, 2), (211, 96, 32, 33), (5, 40, 33, 2)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_in_training(
    kind: torch.dtype, rows: int, width: int, out: int, rank: int, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the formula, with the entries dropped that the seed says; odd sizes take torch's products."""
    called, call = [], kernels.Kernels.call
    monkeypatch.setattr(kernels.Kernels, "call", lambda *args: [called.append(args[1]), call(*args)])
    x, weight = torch.randn(rows, width).to(kind), torch.randn(out, width).to(kind)
    a, b = torch.randn(width, rank + 1).t()[:rank], torch.randn(out, rank)  # A as PEFT's SVD leaves it
    torch.manual_seed(7)
    keep = dropout.drop(torch.ones(rows, width), dropout.drawn(x, p), p) / (1 - p) if p else torch.ones(rows, width)
    torch.manual_seed(7)
    found = gradients_of(lambda x, a, b: lora.LoraLinear.apply(x, weight, None, a, b, 0.5, p), x, a, b)

    def formula(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x @ weight.double().t() + 0.5 * (keep.double() * x) @ a.t() @ b.t()

    expected = gradients_of(formula, *(part.double() for part in (x, a, b)))
    assert ("product" in called) == (width % 32 == 0 and bool(kernels.of(x).strip))
    for mine, exact in zip(found, expected, strict=True):
        # Two products, and what lies between them, are rounded.
        assert (mine.double() - exact).abs().max() <= 3 * ROOM[kind] * exact.abs().max()


def peft_linear(width: int, out: int, ranks: tuple) -> nn.Module:
    """PEFT's LoRA layer with an adapter of each rank, a0, a1, ..., none at its start."""
    config = LoraConfig(r=ranks[0], lora_alpha=3, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(width, out)), config, adapter_name="a0")
    for number, rank in enumerate(ranks[1:], start=1):
        model.add_adapter(f"a{number}", LoraConfig(r=rank, target_modules=["0"]))
    layer = model.base_model.model[0]
    for b in layer.lora_B.values():
        nn.init.normal_(b.weight)
    return layer.eval()


def test_under_autocast_lora_is_pefts_own() -> None:
    layer, x = peft_linear(32, 32, (4,)), torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = lora.lora_forward(layer, layer.forward, x)
        assert torch.equal(found, layer(x))
    assert found.dtype == torch.bfloat16


def test_tensors_of_another_precision_are_refused(kind: torch.dtype) -> None:
    other = torch.float32 if kind == torch.bfloat16 else torch.bfloat16
    x = torch.ones(4).to(kind)
    kernel = kernels.of(x)
    assert kernel is not None
    with pytest.raises(TypeError, match=f"a tensor of {other}, where {kind} is needed"):
        kernel.call("silu_gate", x, x, torch.ones(4).to(other), 4)
    with pytest.raises(TypeError, match=r"a tensor of torch\.bfloat16, where torch\.float32 is needed"):
        kernel.call("rms_norm", x, x, x, torch.ones(1, dtype=torch.bfloat16), 1, 4, 1e-5)
    with pytest.raises(TypeError, match=r"a tensor of torch\.int32, where torch\.int64 is needed"):
        kernel.call("cross_entropy", x[None], torch.zeros(1, dtype=torch.int32), torch.empty(1), 1, 4)
    with pytest.raises(ValueError, match="not in one piece"):
        kernel.call("silu_gate", torch.ones(4, 2).to(kind)[:, 0], x, x, 4)


# --- dropout


def mask_of(count: int, p: float) -> torch.Tensor:
    ones = torch.ones(count)
    return dropout.drop(ones, dropout.drawn(ones, p), p) == 0


@pytest.mark.parametrize("p", [0.01, 0.05, 0.5])
def test_shares_are_those_of_independent_draws(p: float) -> None:
    torch.manual_seed(0)
    count = 2_000_000
    first, second = mask_of(count, p), mask_of(count, p)
    for seen, expected in (
        (first, p),
        (first[1:] & first[:-1], p * p),
        (first[64:] & first[:-64], p * p),
        (first & second, p * p),  # another draw is another one
        (first[1:] & second[:-1], p * p),
        (first[::4096], p),
    ):
        error = (expected * (1 - expected) / len(seen)) ** 0.5
        assert abs(seen.double().mean().item() - expected) < 5 * error


def test_a_place_is_dropped_in_a_share_of_the_draws() -> None:
    torch.manual_seed(0)
    hits = torch.stack([mask_of(3, 0.3) for _ in range(5000)]).double().mean(0)
    assert (hits - 0.3).abs().max() < 0.035


def test_the_draw_follows_torchs_seed(kind: torch.dtype) -> None:
    x, masks = torch.randn(50, 30).to(kind), []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append(dropout.drop(x, dropout.drawn(x, 0.2), 0.2))
    assert torch.equal(*masks)


def test_what_is_kept_is_scaled_and_added_alike(kind: torch.dtype) -> None:
    x = torch.randn(70, 30).to(kind)
    mask = dropout.drawn(x, 0.2)
    gone = dropout.drop(x, mask, 0.2) == 0
    assert 0.1 < gone.double().mean() < 0.3
    assert torch.equal(dropout.drop(x, mask, 0.2), x.masked_fill(gone, 0))
    assert torch.equal(dropout.drop(x, mask, 0.2, 1.25), (x * 1.25).masked_fill(gone, 0))
    out = x.clone()
    dropout.add(out, x, mask, 0.2)
    assert torch.equal(out, torch.where(gone, x, x + x))


# --- building


def test_compiled_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path))
    path = kernels._compiled(torch.bfloat16)
    assert [path] == list(path.parent.iterdir())  # and nothing half-made beside it
    made = path.stat().st_mtime_ns
    assert kernels._compiled(torch.bfloat16) == path
    assert path.stat().st_mtime_ns == made
    assert kernels._compiled(torch.float32) != path


def test_no_compiler_is_told_and_torch_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernels.why_not(torch.float32) == "there is no C compiler (cc, gcc or clang)"
    x = torch.randn(3, 8)
    assert kernels.of(x) is None
    expected = functional.rms_norm(x, (8,), eps=1e-5)
    torch.testing.assert_close(layers._RmsNorm.apply(x, torch.ones(8), 1e-5), expected)


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(kernels, "_loaded", {})
    monkeypatch.setenv("LLM_ADAPTERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(broken))
    assert kernels.why_not(torch.bfloat16) == "the C compiler failed: no such option"
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_other_precisions_are_torchs() -> None:
    assert kernels.of(torch.zeros(3, dtype=torch.float64)) is None
    assert kernels.why_not(torch.float16) == "there are none for float16"


def test_a_view_with_gaps_is_refused() -> None:
    kernel = kernels.of(torch.zeros(1))
    assert kernel is not None
    with pytest.raises(ValueError, match="in one piece"):
        kernel.call("silu_gate", torch.zeros(4, 4)[:, :2], torch.zeros(8), torch.zeros(8), 8)
