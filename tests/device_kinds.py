"""Kinds of device arrays for tests, real where there is a GPU, else stand-ins over host memory.

What the tests run on depends on the process:

    gpu         the cuda backend on a GPU; arrays of PyTorch, CuPy and Numba where installed
    simulator   NUMBA_ENABLE_CUDASIM=1: the cuda backend in Numba's simulator; Numba's simulated arrays, and
                stand-ins for PyTorch's
    stand-in    no GPU and no simulator: the reference kernels in the place of the cuda backend, called by address;
                stand-ins for all arrays

The stand-ins have the part of the libraries' interfaces that fastnorm uses and nothing else: they cannot be
converted to NumPy arrays, and there are two devices of them.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import simulator

from fastnorm import _device, _dispatch
from fastnorm._hosted import hosted
from fastnorm.backends import KernelTable, flat
from fastnorm.reference import kernels as reference

Array = np.ndarray[Any, Any]

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
AVAILABLE = _dispatch._load(_dispatch.ON_DEVICE) is not None
MODE = "simulator" if SIMULATED and AVAILABLE else "gpu" if AVAILABLE else "stand-in"


def bfloat16() -> np.dtype[Any]:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def host(array: _device.DeviceArray) -> Array:
    """The memory that a descriptor of a stand-in describes."""

    class Memory:
        __array_interface__ = {  # noqa: RUF012
            "data": (array.pointer, False), "shape": array.shape, "strides": array.strides,
            "typestr": array.dtype.str, "version": 3,
        }  # fmt: skip

    values = np.asarray(Memory())
    return values.view(bfloat16()) if array.dtype is _device.BFLOAT16 else values


# ---- stand-ins for the libraries ------------------------------------------------------------------


class _Values:
    """What the stand-ins share: memory, an index, views."""

    def __init__(self, values: Array, index: int) -> None:
        self._values, self._index = values, index

    @property
    def shape(self) -> tuple[int, ...]:
        return self._values.shape

    def __getitem__(self, key: Any) -> Any:
        return self._like(self._values[key])

    def reshape(self, *shape: Any) -> Any:
        assert self._values.flags.c_contiguous  # else a copy, which the libraries would make silently
        return self._like(self._values.reshape(*shape))

    def _like(self, values: Array) -> Any:
        raise NotImplementedError

    def __array__(self, *_: Any) -> Array:
        raise AssertionError("a device array must not be converted on the host")


def _dense(shape: Any, strides: Any, dtype: np.dtype[Any]) -> Array:
    values = np.ndarray(shape, dtype, strides=strides)
    values.view(np.uint8 if values.ndim == 0 else values.dtype)[...] = 0
    return values


def _stream(number: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(cuda_stream=number, ptr=number)


def stand_in_torch() -> types.ModuleType:
    """The part of PyTorch that fastnorm uses."""
    torch: Any = types.ModuleType("torch")
    torch.streams = {0: 0, 1: 0}

    class Type:
        def __init__(self, name: str, dtype: np.dtype[Any]) -> None:
            self.name, self.numpy = name, dtype

        def __repr__(self) -> str:
            return f"torch.{self.name}"

    kinds = [np.dtype(n) for n in ("float16", "float32", "float64", "complex64", "bool", "uint8")]
    kinds += [np.dtype(f"int{n}") for n in (8, 16, 32, 64)]
    own = {dtype: Type(dtype.name, dtype) for dtype in (*kinds, bfloat16())}
    for dtype, found in own.items():
        setattr(torch, dtype.name, found)

    class Place:
        def __init__(self, index: int) -> None:
            self.type, self.index = "cuda", index

        def __str__(self) -> str:
            return f"cuda:{self.index}"

    class Tensor(_Values):
        requires_grad = False
        layout = "strided"

        @property
        def dtype(self) -> Any:
            return own[self._values.dtype]

        @property
        def device(self) -> Place:
            return Place(self._index)

        def stride(self) -> tuple[int, ...]:
            return tuple(stride // self._values.itemsize for stride in self._values.strides)

        def data_ptr(self) -> int:
            return self._values.ctypes.data

        def is_neg(self) -> bool:
            return False

        def cpu(self) -> Any:
            return types.SimpleNamespace(numpy=self._values.copy)

        def _like(self, values: Array) -> Any:
            return Tensor(values, self._index)

    Tensor.__module__ = "torch"
    torch.Tensor, torch.strided = Tensor, "strided"
    torch.grad_enabled = True
    torch.is_grad_enabled = lambda: torch.grad_enabled

    def empty_strided(shape: Any, steps: Any, *, dtype: Any, device: Place) -> Any:
        strides = [step * dtype.numpy.itemsize for step in steps]
        return Tensor(np.ndarray(shape, dtype.numpy, strides=strides), device.index)

    torch.empty_strided = empty_strided
    torch.cuda = types.SimpleNamespace(current_stream=lambda index: _stream(torch.streams[index]))
    return torch


def stand_in_cupy() -> types.ModuleType:
    """The part of CuPy that fastnorm uses."""
    cupy: Any = types.ModuleType("cupy")
    cupy.streams, cupy.current = {0: 0, 1: 0}, 0

    class Memory:
        def __init__(self, bytes_: Array) -> None:
            self.bytes, self.ptr = bytes_, bytes_.ctypes.data

    class Device:
        def __init__(self, index: int) -> None:
            self.id = index

        def __enter__(self) -> None:
            self.before, cupy.current = cupy.current, self.id

        def __exit__(self, *_: Any) -> None:
            cupy.current = self.before

    class ndarray(_Values):  # noqa: N801
        def __init__(self, shape: Any, dtype: Any, memptr: Memory, strides: Any, index: int | None = None) -> None:
            values = np.ndarray(shape, dtype, memptr.bytes.data, strides=strides)
            super().__init__(values, cupy.current if index is None else index)

        @property
        def dtype(self) -> np.dtype[Any]:
            return self._values.dtype

        @property
        def strides(self) -> tuple[int, ...]:
            return self._values.strides

        @property
        def data(self) -> Any:
            return types.SimpleNamespace(ptr=self._values.ctypes.data)

        @property
        def device(self) -> Device:
            return Device(self._index)

        def get(self) -> Array:
            return self._values.copy()

        def _like(self, values: Array) -> Any:
            found = ndarray.__new__(ndarray)
            _Values.__init__(found, values, self._index)
            return found

    ndarray.__module__ = "cupy"
    cupy.ndarray = ndarray
    cupy.of = lambda values, index: ndarray._like(types.SimpleNamespace(_index=index), values)
    cupy.cuda = types.SimpleNamespace(
        Device=Device,
        alloc=lambda nbytes: Memory(np.empty(max(nbytes, 1), np.uint8)),
        get_current_stream=lambda: _stream(cupy.streams[cupy.current]),
    )
    return cupy


class _NumbaArray(_Values):
    """A Numba device array, each with a stream of its own."""

    stream: Any = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._values.dtype

    @property
    def strides(self) -> tuple[int, ...]:
        return self._values.strides

    @property
    def gpu_data(self) -> Any:
        device = types.SimpleNamespace(id=self._index)
        return types.SimpleNamespace(context=types.SimpleNamespace(device=device))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"data": (self._values.ctypes.data, False), "stream": self.stream or None, "version": 3}

    def copy_to_device(self, values: Array) -> None:
        self._values[...] = values

    def copy_to_host(self, values: Array | None = None) -> Array:
        values = np.empty_like(self._values) if values is None else values
        values[...] = self._values
        return values

    def _like(self, values: Array) -> Any:
        found = DeviceNDArrayBase(values, self._index)
        found.stream = self.stream
        return found


DeviceNDArrayBase = type("DeviceNDArrayBase", (_NumbaArray,), {"__module__": "numba.cuda"})


# ---- a stand-in for the cuda backend --------------------------------------------------------------


class StandInBackend(types.ModuleType):
    """The reference kernels on descriptors. `calls` has (kernel, device, stream) of each."""

    def __init__(self) -> None:
        super().__init__("fastnorm.backends.numba_cuda.table")
        self.calls: list[tuple[str, int, int]] = []
        self.followed: list[tuple[int, int]] = []
        self.refusal: dict[int, str] = {}
        for name in (name for name in vars(KernelTable) if not name.startswith("_")):
            setattr(self, name, self._kernel(name))

    def _kernel(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            arrays = [a for a in arguments if isinstance(a, _device.DeviceArray)]
            assert not any(isinstance(a, (np.ndarray, _Values)) for a in arguments), name
            assert all(a.flags.aligned and a.device == arrays[0].device for a in arrays), name
            if arrays:
                self.calls.append((name, arrays[0].device, arrays[0].stream))
            plain = [flat(host(a)) if isinstance(a, _device.DeviceArray) else a for a in arguments]
            getattr(reference, name)(*plain)

        return call

    def copy(self, target: Any, source: Any) -> None:
        self.calls.append(("copy", target.device, target.stream))
        np.copyto(host(target), host(source), casting="unsafe")

    def mix(self, target: Any, running: Any, batch: Any, share: float, entering: float) -> None:
        mixed = entering * host(batch).reshape(target.shape)
        host(target)[...] = mixed if running is None else share * host(running).astype(np.float64) + mixed

    def fill(self, target: Any, value: float) -> None:
        host(target)[...] = value

    def follow(self, stream: int, after: int, device: int) -> None:
        self.followed.append((stream, after))

    def device_array(self, shape: Any, strides: Any, dtype: Any, device: int, stream: Any) -> Any:
        found = DeviceNDArrayBase(np.ndarray(shape, dtype, strides=strides), device)
        found.stream = stream
        return found

    def current_device(self) -> int:
        return 0

    def describe(self) -> dict[str, Any]:
        return {"cuda:0": "a stand-in"}

    def check_device(self, device: int) -> None:
        if device in self.refusal:
            raise ValueError(self.refusal[device])


# ---- kinds ----------------------------------------------------------------------------------------


class Kind:
    """A library's arrays: `put` makes one with the values and strides of a host array, `get` is the way back."""

    real = False

    def __init__(self, name: str) -> None:
        self.name = name

    def put(self, values: Array, device: int = 0) -> Any:
        raise NotImplementedError

    def get(self, array: Any) -> Array:
        return array._values

    def bfloat16(self) -> bool:
        return True

    def strides(self, array: Any) -> tuple[int, ...]:
        found = _device.described("array", array)
        assert found is not None
        return found.strides


class _StandInTorch(Kind):
    def put(self, values: Array, device: int = 0) -> Any:
        return sys.modules["torch"].Tensor(values, device)  # type: ignore[attr-defined]


class _StandInCupy(Kind):
    def put(self, values: Array, device: int = 0) -> Any:
        return sys.modules["cupy"].of(values, device)  # type: ignore[attr-defined]


class _StandInNumba(Kind):
    def put(self, values: Array, device: int = 0) -> Any:
        return DeviceNDArrayBase(values, device)

    def bfloat16(self) -> bool:
        return False


class _Simulated(Kind):
    def put(self, values: Array, device: int = 0) -> Any:
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        return FakeCUDAArray(values)

    def get(self, array: Any) -> Array:
        return array._ary

    def bfloat16(self) -> bool:
        return False


class _Torch(Kind):
    real = True

    def put(self, values: Array, device: int = 0) -> Any:
        torch = pytest.importorskip("torch")
        raw = values.view(np.int16) if values.dtype.name == "bfloat16" else values
        steps = [stride // values.itemsize for stride in values.strides]
        if any(step < 0 for step in steps):
            pytest.skip("PyTorch has no negative strides")
        extent = 1 + sum(step * (n - 1) for step, n in zip(steps, values.shape, strict=True)) if values.size else 0
        block = torch.empty(extent, dtype=torch.from_numpy(np.empty(0, raw.dtype)).dtype, device=f"cuda:{device}")
        array = block.as_strided(values.shape, steps)
        if 0 in steps:
            block.copy_(torch.as_strided(torch.from_numpy(_block(raw)), (extent,), (1,)))
        else:
            array.copy_(torch.from_numpy(raw.copy()))  # writable, and 0-d stays 0-d
        return array.view(torch.bfloat16) if values.dtype.name == "bfloat16" else array

    def get(self, array: Any) -> Array:
        import torch

        if array.dtype is torch.bfloat16:
            return array.view(torch.int16).cpu().numpy().view(bfloat16())
        return array.cpu().numpy()


class _Cupy(Kind):
    real = True

    def put(self, values: Array, device: int = 0) -> Any:
        cupy = pytest.importorskip("cupy")
        with cupy.cuda.Device(device):
            low = sum(min(0, stride * (n - 1)) for stride, n in zip(values.strides, values.shape, strict=True))
            block = cupy.asarray(_block(values))
            offset = block.data + -low
            return cupy.ndarray(values.shape, values.dtype, memptr=offset, strides=values.strides)

    def get(self, array: Any) -> Array:
        return array.get()

    def bfloat16(self) -> bool:
        return False  # from version 14 on


class _Numba(Kind):
    real = True

    def put(self, values: Array, device: int = 0) -> Any:
        from numba import cuda

        with cuda.gpus[device]:
            array = cuda.to_device(_block(values))
            low = sum(min(0, stride * (n - 1)) for stride, n in zip(values.strides, values.shape, strict=True))
            if low or not values.size:
                pytest.skip("Numba cannot make this array")
            return cuda.cudadrv.devicearray.DeviceNDArray(
                values.shape, values.strides, values.dtype, gpu_data=array.gpu_data
            )

    def get(self, array: Any) -> Array:
        return array.copy_to_host()

    def bfloat16(self) -> bool:
        return False


def _block(values: Array) -> Array:
    """All elements between the first and the last in memory, as one dimension."""
    if values.size == 0:
        return np.empty(0, values.dtype)
    low = sum(min(0, stride * (n - 1)) for stride, n in zip(values.strides, values.shape, strict=True))
    high = sum(max(0, stride * (n - 1)) for stride, n in zip(values.strides, values.shape, strict=True))
    start = values.__array_interface__["data"][0] + low
    assert (high - low) % values.itemsize == 0

    class Memory:
        __array_interface__ = {  # noqa: RUF012
            "data": (start, True), "shape": ((high - low) // values.itemsize + 1,),
            "typestr": values.dtype.str, "version": 3,
        }  # fmt: skip

    return np.asarray(Memory()).view(values.dtype).copy()


STAND_INS: dict[str, type[Kind]] = {"torch": _StandInTorch, "cupy": _StandInCupy, "numba": _StandInNumba}
KINDS: dict[str, Kind] = {
    name: kind(name)
    for name, kind in {
        "stand-in": STAND_INS,
        "simulator": {"torch": _StandInTorch, "numba": _Simulated},
        "gpu": {"torch": _Torch, "cupy": _Cupy, "numba": _Numba},
    }[MODE].items()
}


@contextlib.contextmanager
def devices() -> Iterator[Any]:
    """The backend that device arrays go to: on a GPU and in the simulator the real one."""
    if MODE == "gpu":
        yield _device.backend()
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", stand_in_torch())
        patch.setitem(sys.modules, "cupy", stand_in_cupy())
        if MODE == "stand-in":
            backend = StandInBackend()
            patch.setitem(sys.modules, backend.__name__, backend)
            patch.setattr(_dispatch, "_loaded", {**_dispatch._loaded, _dispatch.ON_DEVICE: hosted(backend)})
        else:
            simulator.small_blocks(patch)
        _forget()
        yield _device.backend()
    _forget()


def _forget() -> None:
    _device._library.cache_clear()
    _device._library_of.cache_clear()


def elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
