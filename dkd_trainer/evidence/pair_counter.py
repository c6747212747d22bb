"""How much attention a model really computes."""

from torch.overrides import TorchFunctionMode

ATTENTIONS = ("scaled_dot_product_attention", "attend_by_products")  # by name: the pack's own is another object


class PairCounter(TorchFunctionMode):
    """Counts the pairs of query and key in PyTorch's and our attention while it is entered; heads are not counted."""

    def __init__(self):
        super().__init__()
        self.pairs = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ATTENTIONS:
            q, k = args[:2]
            self.pairs += q.shape[0] * q.shape[-2] * k.shape[-2]
        return func(*args, **(kwargs or {}))
