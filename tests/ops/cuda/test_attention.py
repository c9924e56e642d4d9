"""Packs by torch's variable-length attention, in whose place a stand-in of its signature computes."""

import inspect

import pytest
import torch
import varlen_stand_in

from llm_adapters.ops import backends
from llm_adapters.ops.cuda import attention
from llm_adapters.ops.packing import Pack
from llm_adapters.ops.padded_attention import Scores
from llm_adapters.ops.varlen_attention import varlen_attention

SLOPES = 0.71 ** torch.arange(1, 5).float()  # numbers that half precision does not hold


@pytest.fixture(autouse=True)
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references are what is compared with."""
    monkeypatch.setattr(backends, "disabled", True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The calls of the stand-in, each with its options; it computes in float64."""
    made: list[dict] = []

    def varlen_attn(*args: object, **options: object) -> torch.Tensor:
        query, key, value = args[:3]
        made.append(options | {"head_dim": query.shape[-1]})
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert query.shape[-1] % 8 == 0
        assert {t.is_contiguous() for t in (query, key, value)} == {True}
        assert {t.dtype for t in (query, key, value)} == {query.dtype} < {torch.float16, torch.bfloat16}
        assert options.get("enable_gqa", False) == (query.shape[1] != key.shape[1])
        exact = varlen_stand_in.varlen_attn(query.double(), key.double(), value.double(), *args[3:], **options)
        return exact.to(query.dtype)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_PARAMETERS", frozenset(inspect.signature(varlen_stand_in.varlen_attn).parameters))
    return made


def test_the_stand_in_has_the_arguments_of_torch() -> None:
    """Those that are given by place, by their place, and the others by name."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch has it from 2.10 on")
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= {*names}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scores", [Scores(0.25), Scores(0.25, 9), Scores(0.25, None, SLOPES), Scores(0.25, 9, SLOPES)])
@pytest.mark.parametrize("prefix", [0, 300])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packs_are_the_reference(
    calls: list[dict], kv_heads: int, prefix: int, scores: Scores, dtype: torch.dtype
) -> None:
    """With their gradients, to half precision; positions go beyond what it holds exactly."""
    torch.manual_seed(0)
    pack = Pack.of([[1] * prefix + [2] * length for length in (40, 3, 90, 17)], prefix)
    shapes = [(heads, pack.tokens, 16) for heads in (4, kv_heads, kv_heads)]
    drawn = [torch.randn(shape).to(dtype) for shape in shapes]
    direction = torch.randn(pack.tokens, 4, 16).to(dtype)
    direction[pack.end :] = 0

    def run(function, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [part.detach().to(dtype).requires_grad_() for part in drawn]
        out = function(*leaves)
        out.backward(direction.to(dtype))
        return [out[: pack.end].detach(), *(leaf.grad[:, : pack.end] for leaf in leaves)]

    assert attention.supports_packed_attention(drawn[0], drawn[2], scores)
    found = run(lambda *rows: attention.packed_attention(*rows, pack, scores), dtype)
    more = {"alibi_slopes": scores.alibi_slopes}
    exact = run(lambda *rows: varlen_attention(*rows, pack, 0.25, scores.window, **more), torch.float64)
    for one, truth in zip(found, exact, strict=True):
        assert one.shape == truth.shape
        assert (one.double() - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm()
    (call,) = calls
    assert call["scale"] == 0.25
    assert call["window_size"] == (-1 if scores.window is None else 8, 0)
    assert call["head_dim"] == (16 if scores.alibi_slopes is None else 24)


def test_what_flash_attention_has_not_is_left_to_the_reference(calls: list[dict]) -> None:
    fits = lambda head_dim, scores, dtype=torch.bfloat16: attention.supports_packed_attention(  # noqa: E731
        *[torch.zeros(2, 3, head_dim, dtype=dtype)] * 2, scores
    )
    assert fits(256, Scores(1.0))
    assert fits(248, Scores(1.0, None, SLOPES))
    assert not fits(256, Scores(1.0, None, SLOPES))  # no room for the slopes
    assert not fits(64, Scores(1.0, None, None, 30.0))
    assert not fits(20, Scores(1.0))
    assert not fits(64, Scores(1.0), torch.float32)
