from llm_adapters.ops.cpu import build


def unsupported_reason(t, op=None):
    k = build.of(t)
    if k is None:
        return build.why_not(t.dtype) or "there are no kernels"
    return None if op is None or k.strip else "the processor or the precision has none"
