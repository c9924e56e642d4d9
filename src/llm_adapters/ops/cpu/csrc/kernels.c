// What would be several passes over memory in torch, in one. Compiled once per machine and precision by build.py, with
// BFLOAT16 defined or not. All tensors are contiguous; a comment above each exported function has their shapes, and
// functions.py checks them. Nothing here allocates memory: callers pass outputs and workspace.

#include "elementwise.c"

#include "paged_attention.c"

#include "lora.c"

#if defined(VNNI) && !defined(__AMX_BF16__) // torch's own products use a matrix unit, where there is one
#include "gemm.c"

#include "varlen_attention.c"
#endif
