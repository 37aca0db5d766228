"""Bytes that a step keeps alive, counted tensor by tensor; with fake tensors nothing is computed or stored."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Inside this context every storage that an operation makes is counted until nothing refers to it any more.

    `kept` are tensors that exist before (weights, buffers, the batch): they and their views do not count. Gradients
    leave the count once they are accumulated into `.grad`; `peak_with_gradients` has them added. `classes` is the
    width of logits: what has that width is counted in `peak_logits` too. Memory that one operation takes and gives
    back inside (a kernel's workspace) is not seen.
    """

    def __init__(self, kept: Iterable[Tensor], classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.now = self.peak = self.gradients = self.peak_with_gradients = self.logits = self.peak_logits = 0
        # by the storage's address in C++, which stays the same while it lives: bytes, and of them logits
        self._kept = [tensor.untyped_storage() for tensor in kept]  # held, so that no address is given anew
        self._counted = {storage._cdata: (0, 0) for storage in self._kept}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return made

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count what is accumulated into the `.grad` of these parameters as gradients."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._as_gradient)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._counted:
            return
        size = storage.nbytes()
        logits = size if tensor.ndim == 2 and tensor.shape[1] == self.classes else 0
        self._counted[key] = size, logits
        weakref.finalize(storage, self._forget, key)
        self.now, self.logits = self.now + size, self.logits + logits
        self.peak = max(self.peak, self.now)
        self.peak_with_gradients = max(self.peak_with_gradients, self.now + self.gradients)
        self.peak_logits = max(self.peak_logits, self.logits)

    def _forget(self, key: int) -> None:
        size, logits = self._counted.pop(key)
        self.now, self.logits = self.now - size, self.logits - logits

    def _as_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, logits = self._counted.get(key, (0, 0))
        self._counted[key] = 0, 0
        self.now, self.logits, self.gradients = self.now - size, self.logits - logits, self.gradients + size
