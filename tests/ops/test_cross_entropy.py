import pytest
import torch
from op_helpers import assert_close, with_gradients
from torch.nn import functional

from llm_adapters.ops import cross_entropy
from llm_adapters.ops.cross_entropy import fused_linear_cross_entropy


@pytest.mark.parametrize("chunk", [1, 31 * 2**20])
@pytest.mark.parametrize("labels", [1, 16, 37])
def test_it_is_torchs_in_float64(dtype: torch.dtype, labels: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk of rows and in several. The logits, and in bfloat16 their gradient, are rounded."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk)
    hidden, weight, bias = (torch.randn(shape).to(dtype) for shape in ((labels, 8), (99, 8), (99,)))
    targets = torch.arange(labels) * 7 % 99
    loss, gradient = with_gradients(lambda h: fused_linear_cross_entropy(h, weight, bias, targets), hidden)

    def formula(hidden: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, weight.double(), bias.double())
        return functional.cross_entropy(logits, targets, reduction="sum")

    exact, direction = with_gradients(formula, hidden.double())
    rtol = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(loss.double(), exact, rtol=rtol, atol=0)
    assert_close(gradient, direction, 3)


@pytest.mark.parametrize("label", [99, -1])
def test_a_label_outside_the_vocabulary_is_refused(dtype: torch.dtype, label: int) -> None:
    hidden, weight = torch.randn(3, 8).to(dtype), torch.randn(99, 8).to(dtype)
    with pytest.raises((IndexError, RuntimeError), match=r"label|out of bounds"):
        fused_linear_cross_entropy(hidden, weight, None, torch.tensor([1, label, 2]))


@pytest.mark.parametrize("chunk", [1, 31 * 2**20])
def test_ignored_labels_have_no_loss_and_no_gradient(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk)
    hidden, weight = torch.randn(40, 8).to(dtype), torch.randn(99, 8).to(dtype)
    targets = torch.arange(40)
    ignored = targets % 3 == 1
    loss, gradient = with_gradients(
        lambda h: fused_linear_cross_entropy(h, weight, None, targets.masked_fill(ignored, -100)), hidden
    )
    expected, direction = with_gradients(
        lambda h: fused_linear_cross_entropy(h[~ignored], weight, None, targets[~ignored]), hidden
    )
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert not gradient[ignored].any()
    torch.testing.assert_close(gradient, direction)
