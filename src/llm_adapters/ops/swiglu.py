from llm_adapters.fast_paths.layers import _SiluGate, _SiluGateLora


def swiglu(g, u):
    return _SiluGate.apply(g, u)


def swiglu_lora(*a):
    return _SiluGateLora.apply(*a)
