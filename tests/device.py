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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal"}
# these take index tensors from the CPU, as on a real GPU; masks among them wait
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
SHAPES_ONLY = {"view_as", "expand_as", "reshape_as"}  # of their second tensor, which may be anywhere
# these want a device guard, or a table of devices, in C++ before they dispatch what stands here
GUARDED = {
    torch.Tensor.contiguous: torch.ops.aten.contiguous.default,
    torch.Tensor.nonzero: torch.ops.aten.nonzero.default,
    torch.Tensor.__invert__: torch.ops.aten.bitwise_not.default,
    torch.nn.functional.scaled_dot_product_attention: torch.ops.aten.scaled_dot_product_attention.default,
}
READ_BY_HOST = {torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__}
READ_BY_HOST |= {torch.Tensor.__index__, torch.Tensor.item}
CAPTURING = "CUDA error: operation not permitted when stream is capturing"


class OnGPU(torch.Tensor):
    """A tensor of a pretended GPU; `inner` is a CPU tensor with its numbers, strides and aliases."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
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
        if given is None or (isinstance(given, torch.device) and given.type != "cuda"):
            return None
        given = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
        if given.type != "cuda":
            return None
        index = given.index or 0  # the current one is the first
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def wait(self) -> None:
        if self.graph is not None:
            raise RuntimeError(CAPTURING)
        self.waits += 1

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned_at.add(tensor.untyped_storage().data_ptr())
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned_at

    def moved(self, tensor: torch.Tensor, device, dtype=None, non_blocking=False, copy=False) -> torch.Tensor:
        """`tensor.to(...)`, between CPU and GPUs in all directions."""
        source = tensor.device
        target = source if device is None else (self.device(device) or torch.device(device))
        if target == source and dtype in (None, tensor.dtype) and not copy:
            return tensor
        if target.type == "meta":
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype, device="meta")
        inner = tensor.inner if isinstance(tensor, OnGPU) else tensor
        if target.type != source.type and not (non_blocking and self.is_pinned(inner)):
            self.wait()
        result = self.run(torch.ops.aten._to_copy.default, (inner,), {"dtype": dtype} if dtype else {})
        return result if target.type == "cpu" else OnGPU(result, target)

    def run(self, func, args, kwargs):
        """An operation on CPU tensors, recorded where a graph is captured."""
        out = func(*args, **kwargs)
        if self.graph is not None:
            self.graph.steps.append((func, args, kwargs, out))
        return out

    def dispatched(self, func, args, kwargs):
        """An operation that has tensors on a GPU, or makes one."""
        name = func._schema.name.removeprefix("aten::")
        kwargs = dict(kwargs)
        if name in ("to", "_to_copy"):
            return self.moved(*_as_to(func, args, kwargs))
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        if name == "copy_":
            return self.copied(*args, **kwargs)
        device = self.device(kwargs.get("device"))
        homes = {tensor.device for tensor in tensors if isinstance(tensor, OnGPU)}
        strays = [t for t in tensors if t.device.type == "cpu" and t.dim() and name not in INDEXING]
        if name not in SHAPES_ONLY and (len(homes) > 1 or (homes and strays)):
            found = [str(home) for home in homes] + ["cpu"] * bool(strays)
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(found)} in {func}")
        if name in WAITS or (name in INDEXING and _index_waits(args[1])):
            self.wait()
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu") if device or homes else kwargs["device"]
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        out = self.run(func, inner_args, inner_kwargs)
        home = device or next((t.device for t in tensors if isinstance(t, OnGPU)), None)
        if name == "_local_scalar_dense" or home is None:
            return out
        returns = func._schema.returns
        if len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
            return kwargs["out"] if "out" in kwargs else args[0]  # in place
        return tree_map(lambda value: OnGPU(value, home) if isinstance(value, torch.Tensor) else value, out)

    def indexed(self, func, tensor: torch.Tensor, index, *values):
        """`tensor[index]`, or `tensor[index] = value`, whose C++ wants a device guard."""
        used = [value for value in tree_flatten((index, values))[0] if isinstance(value, torch.Tensor)]
        strays = {t.device for t in used if isinstance(t, OnGPU)} - {tensor.device}
        if strays:
            raise RuntimeError(f"Expected all tensors to be on {tensor.device}, but an index or value is on {strays}")
        if _index_waits(index) or any(
            isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in values
        ):
            self.wait()
        out = self.run(func, tree_map(_inner, (tensor, index, *values)), {})
        return None if out is None else OnGPU(out, tensor.device)

    def copied(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        from_cpu = source.device.type == "cpu"
        if target.device.type != source.device.type and not (non_blocking and from_cpu and self.is_pinned(source)):
            self.wait()
        self.run(torch.ops.aten.copy_.default, (_inner(target), _inner(source)), {})
        return target


class Dispatch(TorchDispatchMode):
    """Below autograd: every operation."""

    def __init__(self, gpus: GPUs):
        super().__init__()
        self.gpus = gpus

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        values = tree_flatten((args, kwargs))[0]
        if any(isinstance(value, OnGPU) for value in values) or any(map(_is_cuda, values)):
            return self.gpus.dispatched(func, args, kwargs)
        return func(*args, **kwargs)


class Functions(TorchFunctionMode):
    """Above autograd: what a CPU build refuses in C++, before an operation is dispatched."""

    def __init__(self, gpus: GPUs):
        super().__init__()
        self.gpus = gpus

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        gpus = self.gpus
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        is_on_gpu = isinstance(tensor, OnGPU)
        if func is torch.Tensor.to:
            to = _parsed_to(*args[1:], **kwargs)
            if is_on_gpu or gpus.device(to["device"]):
                return gpus.moved(tensor, **to)
        if func is torch.Tensor.cuda:
            return gpus.moved(tensor, *(args[1:] or ("cuda",)), **kwargs)
        if func is torch.Tensor.cpu and is_on_gpu:
            return gpus.moved(tensor, "cpu")
        if func is torch.Tensor.copy_ and (is_on_gpu or isinstance(args[1], OnGPU)):
            return gpus.copied(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return gpus.pin(tensor.clone())
        if func is torch.Tensor.is_pinned:
            return not is_on_gpu and gpus.is_pinned(tensor)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and is_on_gpu:
            raise TypeError(f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() first")
        if func in READ_BY_HOST and is_on_gpu:
            return func(gpus.moved(tensor, "cpu"))
        if func in (torch.Tensor.untyped_storage, torch.Tensor.data_ptr) and is_on_gpu:
            return func(tensor.inner)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and is_on_gpu:
            return gpus.indexed(func, *args)
        if func in (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__) and is_on_gpu:
            return tensor  # nothing here does
        if func == torch.Tensor.data.__set__ and (is_on_gpu or isinstance(args[1], OnGPU)):
            return _exchange(tensor, args[1])
        if func is torch.Tensor.__deepcopy__ and is_on_gpu:
            return args[1].setdefault(id(tensor), _like(tensor, OnGPU(tensor.inner.clone(), tensor.device)))
        if func in GUARDED and is_on_gpu:
            return GUARDED[func](*args, **kwargs)
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
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream(mock.MagicMock):
    """torch.cuda.Stream, a type to those who annotate with it; what is asked of it happens at once."""

    def __init__(self, *args, **kwargs):
        super().__init__()


def _inner(value):
    return value.inner if isinstance(value, OnGPU) else value


def _is_cuda(value) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"


def _index_waits(index) -> bool:
    """Masks wait, to know how many there are; indices from the CPU are copied."""
    tensors = [value for value in tree_flatten(index)[0] if isinstance(value, torch.Tensor)]
    return any(t.dtype in (torch.bool, torch.uint8) or t.device.type == "cpu" for t in tensors)


def _as_to(func, args, kwargs) -> tuple:
    """Arguments of `GPUs.moved` from those of aten::to and aten::_to_copy, by their schema's names."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    device, dtype = given.get("device"), given.get("dtype")
    if "other" in given:
        device, dtype = given["other"].device, given["other"].dtype
    copy = given.get("copy", False) or func._schema.name == "aten::_to_copy"
    return given["self"], device, dtype, given.get("non_blocking", False), copy


def _parsed_to(*args, device=None, dtype=None, non_blocking=False, copy=False, **kwargs) -> dict:
    """The arguments of Tensor.to in whatever order."""
    for value in args:
        if isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, bool):
            non_blocking = value
        elif value is not None:
            device = value
    return {"device": device, "dtype": dtype, "non_blocking": non_blocking, "copy": copy}


def _like(tensor: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """`made` as a parameter, if `tensor` is one."""
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made


def _exchange(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`: the object stays, as parameters that are tied must."""
    made = OnGPU(value.inner, value.device) if isinstance(value, OnGPU) else value.detach()
    torch.utils.swap_tensors(tensor, _like(tensor, made))


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
    answers = {"is_available": True, "device_count": count, "current_device": 0, "is_bf16_supported": True}
    answers |= {"get_device_name": "a pretended GPU", "get_device_capability": (9, 0), "mem_get_info": (2**34, 2**34)}
    answers |= {"get_device_properties": mock.Mock(total_memory=2**34, major=9, minor=0), "max_memory_allocated": 1}
    answers |= {"memory_allocated": 0, "memory_reserved": 0, "current_stream": stream}
    answers |= {"stream": stream, "device": stream, "reset_peak_memory_stats": None, "empty_cache": None}
    answers |= {"_lazy_init": None}
    patches = {name: mock.Mock(return_value=value) for name, value in answers.items()}
    patches |= {"synchronize": lambda device=None: gpus.wait(), "CUDAGraph": Graph, "graph": captured, "Stream": Stream}
    with ExitStack() as undo:
        for name, function in patches.items():
            undo.enter_context(mock.patch.object(torch.cuda, name, function))
        for name in ("is_available", "device_count", "synchronize"):  # of whatever accelerator there is
            undo.enter_context(mock.patch.object(torch.accelerator, name, patches[name]))
        current = mock.patch.object(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        undo.enter_context(current)
        undo.enter_context(mock.patch.object(torch, "_has_compatible_shallow_copy_type", lambda *args: True))
        undo.enter_context(mock.patch.object(concurrent.futures.ThreadPoolExecutor, "submit", submit_inside))
        undo.enter_context(Functions(gpus))
        undo.enter_context(Dispatch(gpus))
        yield gpus


def reason_not_to() -> str | None:
    """Why the pretence cannot be had here, or None: a real GPU, another torch, or private names of it that changed."""
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
