"""The CUDA backend: Triton functions for what goes through memory once, torch's own variable-length attention."""
