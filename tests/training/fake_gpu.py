"""A device of the name "fakegpu" that computes on the host and notes what a GPU's host would wait for.

Its tensors hold others; the dispatch mode `FakeGpu` sees every operator on them. For a process of its own: what it
registers stays registered.
"""

import traceback

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("fakegpu")
DEVICE = torch.device("fakegpu:0")
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal", "item"}


class OnGpu(Tensor):
    """A tensor that says it is on the device; `held` has its values."""

    @staticmethod
    def __new__(cls, held: Tensor):
        found = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE,
        )  # fmt: skip
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a tensor of the device, outside of its mode")


def held(x):
    return x.held if isinstance(x, OnGpu) else x


class FakeGpu(TorchDispatchMode):
    """Runs what is on the device on the host, and notes reads of values, blocking copies, and float64."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.float64: list[str] = []
        self.asynchronous_copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        operands = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in operands if isinstance(x, OnGpu)]
        target = kwargs.get("device")
        if target is None and not there:
            return func(*args, **kwargs)
        if func.namespace == "qtuning_kernels":  # its own parts, not as a whole
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        goes = target is not None and torch.device(target).type == DEVICE.type
        if target is not None:
            kwargs["device"] = torch.device("cpu") if goes else target
        comes = bool(there) and target is not None and not goes
        masked = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if comes or name in READS or masked:
            self._wait(name)
        elif goes and name == "_to_copy" and not there:
            if kwargs.get("non_blocking"):
                self.asynchronous_copies += 1
            else:
                self._wait("blocking copy to the device")
        result = func(*tree_map(held, args), **tree_map(held, kwargs))
        on_device = (goes or bool(there)) and not comes
        if func._schema.is_mutable:  # in place, or into `out`
            written = kwargs.get("out") if "out" in kwargs else args[0]
            self._note(name, written)
            return written
        return tree_map(lambda x: self._note(name, OnGpu(x)) if on_device and isinstance(x, Tensor) else x, result)

    def _wait(self, name):
        """With who asked: the innermost module that is neither torch nor this file."""
        files = [frame.filename for frame in traceback.extract_stack()]
        asking = [f for f in files if "/torch/" not in f and f != __file__][-1]
        self.waits.append(f"{name} by {'transformers' if '/transformers/' in asking else 'ours'}")

    def _note(self, name, tensor):
        if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
            self.float64.append(name)
        return tensor


def move(model: nn.Module) -> nn.Module:
    """The model's parameters and buffers on the device; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = made.setdefault(id(p), nn.Parameter(OnGpu(p.detach().clone())))
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = OnGpu(b.clone())
    return model
