from torch.nn import functional

from llm_adapters.fast_paths.lora_old import LoraLinear
from llm_adapters.ops.cpu import build as kernels
from llm_adapters.ops.linear import paired, whole


def lora_linear(*a):
    return LoraLinear.apply(*a)


class LoraStack:
    def __init__(self, adapters, n, weight):
        self.pairs = {i: (a.t(), b.t()) for i, (a, b) in adapters.items()}
        self.out_width, self.width = weight.shape
        self.kernel = kernels.of(weight)
        if self.kernel:
            rank = whole(max(u.shape[0] for _, u in self.pairs.values()))
            self.downs = weight.new_zeros(n, whole(self.width), rank)
            self.ups = weight.new_zeros(n, rank, whole(self.out_width))
            for i, (d, u) in self.pairs.items():
                paired(d.float(), 1.0, self.downs[i])
                paired(u.float(), 1.0, self.ups[i])
        else:
            self.pairs = {i: (d.to(weight.dtype), u.to(weight.dtype)) for i, (d, u) in self.pairs.items()}

    def add_(self, out, x, route):
        if not self.kernel:
            flat, rows = x.reshape(-1, self.width), out.view(-1, self.out_width)
            for i, span in [(0, slice(None))] if route is None else route.runs(len(rows)):
                if i in self.pairs:
                    rows[span].addmm_(flat[span] @ self.pairs[i][0], self.pairs[i][1])
            return
        count = x.numel() // self.width
        more = self.downs.shape[1] - self.width
        which = None if route is None else route.get(count)
        filled = (functional.pad(x, (0, more)) if more else x).contiguous()
        self.kernel.call("lora", filled, which, self.downs, self.ups, out, count, *self.downs.shape[1:], self.out_width)
