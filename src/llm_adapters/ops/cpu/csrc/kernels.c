// What would be several passes over memory in torch, in one. Compiled once per machine and precision by kernels.py,
// with BFLOAT16 defined or not; all arithmetic is float32, only what lies in memory is T. Tensors are dense, rows of the
// last dimension; each function's arguments are described by its caller.

#include "elements.c"

#include "decode.c"

#include "lora.c"

#if defined(PAIRS) && !defined(__AMX_BF16__) // a matrix unit is torch's to use
#include "segments.c"
#endif
