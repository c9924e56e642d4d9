"""Triton functions against the plain references: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is for Linux")

from llm_adapters.ops import backends, cross_entropy, dropout, linear, lora, rms_norm, rotary, swiglu
from llm_adapters.ops.cuda import elementwise
from llm_adapters.ops.cuda import functions as cuda

if not torch.cuda.is_available():
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patched(tensor, scope) -> None:
        """Triton 3.6 reads a loop's bound from an array with one entry, which numpy 2.4 refuses."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bfloat16 off where a GPU rounds it: twice the error, at every rounding.
TIMES = 1.5 if torch.cuda.is_available() else 4.0
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(autouse=True)
def functions() -> None:
    """Both are called by name here."""


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch):
    """Turn the backends off, so that operators compute their references; `on` turns Triton's functions on."""
    monkeypatch.setattr(backends, "disabled", True)

    def on() -> None:
        monkeypatch.setattr(backends, "disabled", False)
        monkeypatch.setattr(backends, "_module", lambda name: cuda)

    return on


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor | None = None) -> None:
    """Equal but for the rounding of one result, or no further from `exact` than `TIMES` what is `expected`."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if exact is not None:
        error, own = ((one.double() - exact).norm() for one in (found, expected))
        assert error <= TIMES * own + 1e-6 * exact.norm()
        return
    tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance)


def compare(reference, compute, *tensors: torch.Tensor) -> None:
    """Compare `compute`'s result and gradients by Triton's functions with the reference's, and both with float64's.

    Args:
        reference: the fixture.
        compute: takes the `tensors`, and a function that converts what it knows besides to their precision.
        tensors: its arguments.
    """
    dtype = tensors[0].dtype
    runs = []
    for kind, backend in (
        (torch.float32 if dtype == torch.bfloat16 else torch.float64, False),
        (dtype, False),
        (dtype, True),
    ):
        if backend:
            reference()
        leaves = [t.detach().to(kind).requires_grad_() for t in tensors]
        out = compute(lambda t, kind=kind: t.to(kind), *leaves)
        out.backward(draw(*out.shape, dtype=dtype, seed=9).to(out.dtype))
        runs.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for exact, expected, found in zip(*runs, strict=True):
        close(found, expected, exact)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 96)])
def test_rms_norm(reference, dtype: torch.dtype, shape: tuple) -> None:
    weight = draw(shape[-1], dtype=dtype, seed=1) * 0.1 + 1
    compare(reference, lambda to, x: rms_norm.rms_norm(x, to(weight), 1e-6), draw(*shape, dtype=dtype))


@DTYPES
def test_swiglu(reference, dtype: torch.dtype) -> None:
    gate, up = draw(3, 700, dtype=dtype), draw(3, 700, dtype=dtype, seed=1)
    compare(reference, lambda to, gate, up: swiglu.swiglu(gate, up), gate, up)
    again = elementwise.swiglu_backward(gate, gate, up, True)[2]
    assert again is not None
    close(again, swiglu.swiglu(gate, up))


@DTYPES
@pytest.mark.parametrize("heads", [1, 5])
def test_rotary(reference, dtype: torch.dtype, heads: int) -> None:
    angles = draw(2, 7, 8, seed=1)
    cos, sin = (f(angles).repeat(1, 1, 2).to(dtype) for f in (torch.cos, torch.sin))

    def compute(to, rows: torch.Tensor) -> torch.Tensor:
        return rotary.apply_rotary_pos_emb(rows.transpose(1, 2), rows.transpose(1, 2), to(cos), to(sin))[0]

    compare(reference, compute, draw(2, 7, heads, 16, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_the_same_entries(reference, dtype: torch.dtype, p: float) -> None:
    x = draw(9, 333, dtype=dtype)
    seed = torch.tensor(2**61 + 12345, device=DEVICE)
    expected = dropout.apply(x, seed, p, 1.25)
    total = x.clone()
    dropout.add_(total, x, seed, p)
    reference()
    assert torch.equal(dropout.apply(x, seed, p, 1.25) == 0, expected == 0)
    close(dropout.apply(x, seed, p, 1.25), expected)
    found = x.clone()
    dropout.add_(found, x, seed, p)
    assert torch.equal(found, total)


@DTYPES
def test_cross_entropy(reference, dtype: torch.dtype) -> None:
    hidden, weight = draw(11, 16, dtype=dtype), draw(5000, 16, dtype=dtype, seed=1)
    targets = torch.arange(11, device=DEVICE) * 401
    targets[3] = targets[10] = -100  # ignored

    def compute(to, hidden: torch.Tensor) -> torch.Tensor:
        return cross_entropy.fused_linear_cross_entropy(hidden, to(weight), None, targets)

    compare(reference, compute, hidden)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize(("rows", "into", "out", "rank"), [(5, 40, 24, 3), (70, 130, 66, 33)])
def test_lora(reference, monkeypatch: pytest.MonkeyPatch, p: float, rows: int, into: int, out: int, rank: int) -> None:
    """Forward and every gradient: no further from float64 than the reference, `TIMES` at most."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no product of bfloat16
    x, weight = draw(rows, into, dtype=dtype), draw(out, into, dtype=dtype, seed=1)
    a, b = draw(rank, into, seed=2) * 0.3, draw(out, rank, seed=3)
    seed = torch.tensor(2**40 + 7, device=DEVICE)
    monkeypatch.setattr(dropout, "sample_mask", lambda x, p: seed)
    if DEVICE == "cpu":  # torch.mm has no `out_dtype` there
        monkeypatch.setattr(torch, "mm", lambda one, other, out_dtype=None: (one @ other).to(out_dtype or one.dtype))
    kept = dropout.keep_mask(x, seed, p) if p else torch.ones_like(x, dtype=torch.bool)

    def formula(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x @ weight.to(x.dtype).t() + 2.0 * ((x * kept / (1 - p)) @ a.t()) @ b.t()

    runs = []
    for kind, compute in (
        (torch.float64, formula),
        (None, lambda *parts: lora.lora_linear(parts[0], weight, None, *parts[1:], 2.0, p)),
        (None, lambda *parts: (reference(), lora.lora_linear(parts[0], weight, None, *parts[1:], 2.0, p))[1]),
    ):
        leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in (x, a, b)]
        result = compute(*leaves)
        result.backward(draw(*result.shape, dtype=dtype, seed=9).to(result.dtype))
        runs.append([result.detach(), *(leaf.grad for leaf in leaves)])
    for exact, expected, found in zip(*runs, strict=True):
        close(found, expected, exact)


def test_the_matrices_of_a_lora_are_rounded_once_and_scaled_by_the_products(reference, monkeypatch) -> None:
    """What is launched besides the products, the rounding of A and B, and one factor of a gradient: nothing."""
    reference()
    if DEVICE == "cpu":
        monkeypatch.setattr(torch, "mm", lambda one, other, out_dtype=None: (one @ other).to(out_dtype or one.dtype))
    x, weight = draw(5, 40, dtype=torch.float16).requires_grad_(), draw(24, 40, dtype=torch.float16, seed=1)
    a, b = (draw(*shape, seed=2).requires_grad_() for shape in ((4, 40), (24, 4)))
    launched: list[str] = []

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            launched.append(str(func).split(".")[1])
            return func(*args, **(kwargs or {}))

    with Launches():
        out = lora.lora_linear(x, weight, None, a, b, 2.0, 0.0)
        forward = len(launched)
        out.backward(torch.ones_like(out))
    assert launched[:forward].count("_to_copy") == 2
    assert not {"mul", "clone", "randint"} & set(launched)
    assert launched.count("mul_") == 1


def test_a_planted_fault_is_seen(reference) -> None:
    """The comparison above is not blind: a scale off by a hundredth."""
    x, weight = draw(70, 130, dtype=torch.bfloat16), draw(66, 130, dtype=torch.bfloat16, seed=1)
    exact = x.double() @ weight.double().t()
    right = linear.linear(x, weight)
    with pytest.raises(AssertionError):
        close((right * 1.01).to(right.dtype), right, exact)


def test_functions_have_the_names_of_the_contract() -> None:
    from llm_adapters.ops.cpu import functions as cpu

    # The attention has its own gradient, in place of varlen_attention and its backward function. On a CPU the weights
    # of a LoRA are rounded when they are packed.
    own = {"packed_attention", "lora_weights"}
    assert set(cuda.__all__) - own <= set(cpu.__all__)
    assert all(callable(getattr(cuda, name)) for name in cuda.__all__)
    assert cuda.unsupported_reason(torch.float64) is not None
