"""What `compat.bitsandbytes` uses, in the installed release."""

import logging

import pytest
import torch

from llm_adapters.compat.bitsandbytes import CAST_LOGGER, LAYOUT_SWITCH, keep_layout, silence_casts

bitsandbytes = pytest.importorskip("bitsandbytes")


def test_an_evaluation_before_training_takes_no_gradient_away() -> None:
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    assert hasattr(layer, LAYOUT_SWITCH)
    keep_layout(torch.nn.Sequential(layer))
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
    x = torch.randn(3, 64, requires_grad=True)
    layer.train()(x).sum().backward()
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64), atol=1e-5, rtol=1e-5)


def test_casts_of_inputs_are_not_told_in_every_call() -> None:
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False).to("cpu").eval()
    logger, told = logging.getLogger(CAST_LOGGER), []
    level, handler = logger.level, logging.Handler()
    handler.emit = told.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.WARNING)
        layer(torch.randn(3, 64))
        assert len(told) == 1
        silence_casts()
        layer(torch.randn(3, 64))
        assert len(told) == 1
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
