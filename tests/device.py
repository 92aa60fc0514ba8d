"""A pretended GPU: tensors that say "cuda:0" or "cuda:1" and hold their numbers in main memory.

`with pretended_gpus():` makes a CPU build of torch behave as if there were two CUDA devices. It shows what Python
decides: that branches on `device.type == "cuda"` run and give the CPU's numbers, that every tensor is moved to where it
is used, that nothing asks a GPU tensor for `.numpy()`, that the step of a CUDA graph neither waits for the host nor
copies from memory that is not pinned, and how many times anything waits (`gpus.waits`).

It can't show kernels and their numerics (cuDNN, int4, bfloat16 on tensor cores), races between streams, speed, memory
that runs out, torch.compile, bitsandbytes, NCCL, or gradients: torch's autograd wants a CUDA device guard in C++, so
nothing on it requires them, and nothing is trained. Those are for a real one: `make gpu`.

It rests on private names of torch (2.13 has them): where they changed, `reason_not_to` says so, and the tests skip.
"""

import concurrent.futures
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}
# these take index tensors from the CPU, as on a real GPU; masks among them wait
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COMPOSED = {"to", "view_as", "expand_as", "reshape_as"}  # of other operations, but in inference mode not taken apart
# functions that in a CPU build fail in C++ before they dispatch what stands here
GUARDED = {
    Tensor.contiguous: aten.contiguous.default,
    Tensor.nonzero: aten.nonzero.default,
    Tensor.__invert__: aten.bitwise_not.default,
    torch.nn.functional.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
}
READ_BY_HOST = {Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item}
READ_BY_HOST.add(Tensor.cpu)
CPU = torch.device("cpu")
CAPTURING = "CUDA error: operation not permitted when stream is capturing"


class OnGPU(Tensor):
    """A tensor of a pretended GPU; `inner` is a CPU tensor with its numbers, strides and aliases."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, device=device, **layout)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor on a pretended GPU, outside of `pretended_gpus`")


class GPUs:
    """What the pretended machine knows: its devices, what was pinned, how often the host waited, what is captured."""

    def __init__(self, count: int):
        self.count = count
        self.waits = 0
        self.pinned_at: set[int] = set()
        self.graph: Graph | None = None  # that records

    def device(self, given) -> torch.device | None:
        """A CUDA device with its number; None for what is no CUDA device."""
        given = torch.device("cuda", given) if isinstance(given, int) else given and torch.device(given)
        if given is None or given.type != "cuda":
            return None
        index = given.index or 0  # the current one is the first
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def wait(self) -> None:
        if self.graph is not None:
            raise RuntimeError(CAPTURING)
        self.waits += 1

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned_at.add(tensor.untyped_storage().data_ptr())
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, OnGPU) and tensor.untyped_storage().data_ptr() in self.pinned_at

    def wait_for_copy(self, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        is_between = {source.device.type, target.type} == {"cpu", "cuda"}
        if is_between and not (non_blocking and self.is_pinned(source)):
            self.wait()

    def run(self, func, *args, **kwargs):
        """An operation on the CPU tensors inside, recorded where a graph is captured."""
        args, kwargs = tree_map(_inner, (args, kwargs))
        out = func(*args, **kwargs)
        if self.graph is not None:
            self.graph.steps.append((func, args, kwargs, out))
        return out

    def moved(self, tensor: Tensor, device, dtype=None, non_blocking=False, copy=False) -> Tensor:
        """`tensor.to(...)`, between CPU and GPUs in all directions."""
        target = tensor.device if device is None else (self.device(device) or torch.device(device))
        if target == tensor.device and dtype in (None, tensor.dtype) and not copy:
            return tensor
        self.wait_for_copy(tensor, target, non_blocking)
        on_gpu = target.type == "cuda"
        result = self.run(aten._to_copy.default, tensor, dtype=dtype, device=CPU if on_gpu else target)
        return OnGPU(result, target) if on_gpu else result

    def copied(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        self.wait_for_copy(source, target.device, non_blocking)
        self.run(aten.copy_.default, target, source)
        return target

    def indexed(self, func, tensor: Tensor, *index_and_value):
        """`tensor[index]`, or `tensor[index] = value`."""
        used = _tensors(index_and_value)
        home = _home([tensor, *used], func, may_be_on_cpu=True)
        if any(map(_makes_wait, used)):
            self.wait()
        out = self.run(func, tensor, *index_and_value)
        return None if out is None else OnGPU(out, home)

    def dispatched(self, func, args, kwargs):
        """An operation that has tensors on a GPU, or makes one."""
        name = _name(func)
        if name == "_to_copy":
            non_blocking = kwargs.get("non_blocking", False)
            return self.moved(args[0], kwargs.get("device"), kwargs.get("dtype"), non_blocking, copy=True)
        if name == "copy_":
            return self.copied(*args, **kwargs)
        home = _home(_tensors((args, kwargs)), func, may_be_on_cpu=name in INDEXING)
        if name in WAITS or (name in INDEXING and any(map(_makes_wait, _tensors(args[1])))):
            self.wait()
        if kwargs.get("device") is not None:
            home = self.device(kwargs["device"]) or kwargs["device"]
            kwargs = kwargs | {"device": CPU if home.type == "cuda" else home}
        out = self.run(func, *args, **kwargs)
        returns = func._schema.returns
        if len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
            return kwargs.get("out", args[0])  # in place
        on_gpu = home.type == "cuda"
        return tree_map(lambda value: OnGPU(value, home) if on_gpu and isinstance(value, Tensor) else value, out)


class Dispatch(TorchDispatchMode):
    """Below autograd: every operation."""

    def __init__(self, gpus: GPUs):
        super().__init__()
        self.gpus = gpus

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = tree_flatten((args, kwargs))[0]
        if not any(isinstance(value, OnGPU) or getattr(value, "type", None) == "cuda" for value in values):
            return func(*args, **kwargs)
        if _name(func) in COMPOSED:
            with self:
                return func.decompose(*args, **kwargs)
        return self.gpus.dispatched(func, args, kwargs)


class Functions(TorchFunctionMode):
    """Above autograd: what a CPU build refuses in C++, before an operation is dispatched."""

    def __init__(self, gpus: GPUs):
        super().__init__()
        self.gpus = gpus

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        gpus = self.gpus
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if isinstance(tensor, OnGPU):
            if func in READ_BY_HOST:
                return func(gpus.moved(tensor, CPU))
            if func is Tensor.numpy:
                raise TypeError(f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() first")
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                return gpus.indexed(func, *args)
            if func in (Tensor.untyped_storage, Tensor.data_ptr):
                return func(tensor.inner)
            if func in (Tensor.requires_grad_, Tensor.requires_grad.__set__):
                return tensor  # nothing here does
            if func in GUARDED:
                return GUARDED[func](*args, **kwargs)
        if func is Tensor.to:
            copy = kwargs.pop("copy", False)
            to, how = tree_map(lambda value: gpus.device(value) if type(value) is int else value, (args[1:], kwargs))
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*to, **how)
            if isinstance(tensor, OnGPU) or gpus.device(device):
                return gpus.moved(tensor, device, dtype, non_blocking, copy)
        if func is Tensor.cuda:
            return gpus.moved(tensor, *(args[1:] or ("cuda",)), **kwargs)
        if func is Tensor.copy_:
            return gpus.copied(*args, **kwargs)
        if func is Tensor.pin_memory:
            return gpus.pin(tensor.clone())
        if func is Tensor.is_pinned:
            return gpus.is_pinned(tensor)
        if func == Tensor.data.__set__ and any(isinstance(value, OnGPU) for value in args):
            return _exchange(*args)
        if func is torch.device and isinstance(args[0], int):
            return gpus.device(args[0])
        device = gpus.device(kwargs.get("device"))
        if func in (torch.tensor, torch.as_tensor) and device:
            return gpus.moved(func(*args, **kwargs | {"device": "cpu"}), device)
        if device:
            kwargs |= {"device": device} | ({"requires_grad": False} if "requires_grad" in kwargs else {})
        if kwargs.pop("pin_memory", False):
            return gpus.pin(func(*args, **kwargs))
        return func(*args, **kwargs)


class Graph:
    """torch.cuda.CUDAGraph: the operations that were captured; a replay runs them again into the same memory."""

    def __init__(self, *args, **kwargs):
        self.steps: list[tuple] = []

    def replay(self) -> None:
        for func, args, kwargs, out in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream(mock.MagicMock):
    """torch.cuda.Stream, a type to those who annotate with it; what is asked of it happens at once."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def is_capturing(self) -> bool:
        return False


def _inner(value):
    return value.inner if isinstance(value, OnGPU) else value


def _name(func) -> str:
    return func._schema.name.removeprefix("aten::")


def _tensors(values) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]


def _home(tensors: list[Tensor], func, may_be_on_cpu: bool) -> torch.device:
    """The one device of an operation's tensors; numbers may be anywhere."""
    homes = {t.device for t in tensors if isinstance(t, OnGPU) or (t.dim() and not may_be_on_cpu)}
    if len(homes) > 1:
        found = sorted(map(str, homes))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} in {func}")
    return next(iter(homes), CPU)


def _makes_wait(index: Tensor) -> bool:
    """A mask does, to know how many there are; what is on the CPU is copied."""
    return index.dtype in (torch.bool, torch.uint8) or index.device.type == "cpu"


def _exchange(tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value`: the object stays, as parameters that are tied must."""
    made = OnGPU(value.inner, value.device) if isinstance(value, OnGPU) else value.detach()
    if isinstance(tensor, torch.nn.Parameter):
        made = torch.nn.Parameter(made, requires_grad=False)
    torch.utils.swap_tensors(tensor, made)


@contextmanager
def pretended_gpus(count: int = 2) -> Iterator[GPUs]:
    """The pretended machine, for the length of a `with` block; threads of pools that start inside have it, too."""
    gpus = GPUs(count)
    submit = concurrent.futures.ThreadPoolExecutor.submit

    def submit_inside(pool, function, *args, **kwargs):
        def inside():
            with Functions(gpus), Dispatch(gpus):
                return function(*args, **kwargs)

        return submit(pool, inside)

    @contextmanager
    def captured(graph, **kwargs):
        gpus.graph = graph
        try:
            yield
        finally:
            gpus.graph = None

    stream = Stream()
    properties = mock.Mock(total_memory=2**34, major=9, minor=0)
    of_both = {"is_available": True, "device_count": count, "current_stream": stream}
    of_cuda = {"current_device": 0, "is_bf16_supported": True, "get_device_name": "a pretended GPU"}
    of_cuda |= {"get_device_capability": (9, 0), "get_device_properties": properties, "mem_get_info": (2**34, 2**34)}
    of_cuda |= {"max_memory_allocated": 1, "memory_allocated": 0, "memory_reserved": 0}
    of_cuda |= {"stream": stream, "device": stream, "reset_peak_memory_stats": None, "empty_cache": None}
    of_cuda |= {"_lazy_init": None}
    of_accelerator = {"current_accelerator": torch.device("cuda")}
    with ExitStack() as undo:
        for module, answers in ((torch.cuda, of_both | of_cuda), (torch.accelerator, of_both | of_accelerator)):
            functions = {name: mock.Mock(return_value=value) for name, value in answers.items()}
            functions["synchronize"] = lambda device=None: gpus.wait()
            undo.enter_context(mock.patch.multiple(module, **functions))
        undo.enter_context(mock.patch.multiple(torch.cuda, CUDAGraph=Graph, graph=captured, Stream=Stream))
        undo.enter_context(mock.patch.object(torch, "_has_compatible_shallow_copy_type", lambda *args: True))
        undo.enter_context(mock.patch.object(concurrent.futures.ThreadPoolExecutor, "submit", submit_inside))
        undo.enter_context(Functions(gpus))
        undo.enter_context(Dispatch(gpus))
        yield gpus


def reason_not_to() -> str | None:
    """Why the pretense cannot be had here, or None: a real GPU, another torch, or private names of it that changed."""
    if torch.cuda.is_available():
        return "this machine has a real GPU: `make gpu`"
    release = torch.__version__.split("+")[0]
    try:
        with pretended_gpus() as gpus:
            x = torch.arange(6.0).view(2, 3).to("cuda:1")
            y = (x @ torch.ones(3, 2, device=x.device))[:, 0]
            as_expected = [str(y.device), y.cpu().tolist(), gpus.waits] == ["cuda:1", [3.0, 12.0], 2]
    except Exception as error:  # whatever a changed name raises
        return f"the pretended GPU does not work with torch {release} ({type(error).__name__}: {error})"
    return None if as_expected else f"the pretended GPU computes something else with torch {release}"
