"""Arrays on a CUDA device: what the ops need to know of them, and the libraries they come from.

A `DeviceArray` has the attributes of an ndarray that the ops look at, and describes memory that a library owns:
PyTorch, CuPy or Numba. Views of it are arithmetic. Only three things touch the library: allocating, its current
stream, and handing a result over. Kernels, those that copy included, are the cuda backend's.

No library is imported here. Whoever holds an array of one has imported it.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, Protocol, TypeGuard

import numpy as np

Shape = tuple[int, ...]


class Bfloat16:
    """The dtype of bfloat16 values on a device, as far as the ops and kernels look at one. NumPy itself has none."""

    name = "bfloat16"
    kind = "V"
    itemsize = 2
    str = "<V2"

    def newbyteorder(self, order: object = "=", /) -> Bfloat16:
        return self

    def __repr__(self) -> Any:
        return self.name


BFLOAT16: Any = Bfloat16()
"""The only instance, so `is` and `==` agree. Typed as any dtype is."""


def c_strides(shape: Sequence[int], itemsize: int) -> Shape:
    """The strides of C order."""
    strides, step = [0] * len(shape), itemsize
    for axis in range(len(shape) - 1, -1, -1):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


class _Addresses:
    __array_interface__: dict[str, Any]


class DeviceArray:
    """Memory on a device under a shape and strides, with the attributes and methods of an ndarray that the ops use."""

    __slots__ = ("block", "device", "dtype", "library", "owner", "pointer", "shape", "start", "strides", "writeable")

    def __init__(
        self, library: Library, owner: Any, pointer: int, shape: Shape, strides: Shape, dtype: Any, device: int,
        writeable: bool = True,
    ) -> None:  # fmt: skip
        self.library = library
        self.owner = owner
        """The library's array of this shape and these strides; None for a view."""
        self.block = owner
        """The library's array whose memory this is."""
        self.start = pointer
        """Where the block starts."""
        self.pointer = pointer
        self.shape = shape
        self.strides = strides
        """In bytes."""
        self.dtype = dtype
        """A NumPy dtype or BFLOAT16."""
        self.device = device
        self.writeable = writeable

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def stream(self) -> int:
        """The stream that work on this array belongs on now, as a raw handle; 0 is the legacy default stream."""
        return self.library.stream(self.block, self.device)

    @property
    def c_contiguous(self) -> bool:
        expected = c_strides(self.shape, self.itemsize)
        return self.size == 0 or all(
            n == 1 or have == want for n, have, want in zip(self.shape, self.strides, expected, strict=True)
        )

    @property
    def aligned(self) -> bool:
        size = self.itemsize
        return self.pointer % size == 0 and not any(stride % size for stride in self.strides)

    @property
    def flags(self) -> Any:
        """An ndarray has c_contiguous, aligned and writeable here."""
        return self

    @property
    def place(self) -> str:
        """For messages."""
        return f"cuda:{self.device}"

    def __repr__(self) -> str:
        return f"{self.library.title} array of {self.dtype}, shape {self.shape}, on {self.place}"

    # ---- views

    def _view(self, pointer: int, shape: Shape, strides: Shape) -> Any:
        view = DeviceArray(self.library, None, pointer, shape, strides, self.dtype, self.device, self.writeable)
        view.block, view.start = self.block, self.start
        return view

    def reshape(self, *shape: Any) -> Any:
        """As ndarray.reshape: a view, of a copy where the array is not in C order."""
        wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if -1 in wanted:
            known = -math.prod(wanted)
            wanted = tuple(self.size // known if n == -1 else n for n in wanted)
        if wanted == self.shape:
            return self
        source = self if self.c_contiguous else self.astype(self.dtype)
        return source._view(source.pointer, wanted, c_strides(wanted, self.itemsize))

    def transpose(self, axes: Sequence[int]) -> Any:
        return self._view(self.pointer, tuple(self.shape[a] for a in axes), tuple(self.strides[a] for a in axes))

    def split(self) -> tuple[Any, Any]:
        """The rows of a C-ordered array of two rows."""
        _, n = self.shape
        first = self._view(self.pointer, (n,), (self.itemsize,))
        return first, self._view(self.pointer + n * self.itemsize, (n,), (self.itemsize,))

    # ---- memory

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Uninitialised, in C order, of the same library, device and stream."""
        return self.empty_strided(tuple(shape), c_strides(shape, dtype.itemsize), dtype)

    def empty_strided(self, shape: Shape, strides: Shape, dtype: Any) -> Any:
        """The same with these strides in bytes, those of a dense array."""
        return self.library.allocate(shape, strides, dtype, self)

    def empty_like(self, dtype: Any = None) -> Any:
        """The same of this shape, dense, the axes in this array's order."""
        dtype = self.dtype if dtype is None else dtype
        if self.c_contiguous:
            return self.empty(self.shape, dtype)
        strides, step = [0] * self.ndim, dtype.itemsize
        for axis in sorted(range(self.ndim), key=lambda axis: -abs(self.strides[axis]))[::-1]:
            strides[axis] = step
            step *= self.shape[axis]
        return self.empty_strided(self.shape, tuple(strides), dtype)

    def ravel(self) -> Any:
        return self.reshape(-1)

    def astype(self, dtype: Any) -> Any:
        """A copy in C order, converted."""
        target = self.empty(self.shape, np.dtype(dtype) if dtype is not BFLOAT16 else dtype)
        backend().copy(target, self)
        return target

    def to_host(self) -> np.ndarray[Any, Any]:
        """A copy in host memory, which waits for what its stream has yet to do. Of no bfloat16, which NumPy lacks."""
        return self.library.to_host(self.handed())

    def handed(self) -> Any:
        """The library's own array for the user. A view has to be in C order, and so does the block it is of."""
        if self.owner is None:
            begin = (self.pointer - self.start) // self.itemsize
            self.owner = self.block.reshape(-1)[begin : begin + self.size].reshape(self.shape)
        return self.owner

    def shadow(self) -> np.ndarray[Any, Any]:
        """An ndarray of the same addresses, to ask what overlaps. It must never be read or written."""

        holder = _Addresses()
        holder.__array_interface__ = {
            "data": (self.pointer, True),
            "shape": self.shape,
            "strides": self.strides,
            "typestr": self.dtype.str,
            "version": 3,
        }
        return np.asarray(holder)


def on_device(array: Any) -> TypeGuard[DeviceArray]:
    return type(array) is DeviceArray


def backend() -> Any:
    """The cuda backend, for its functions on memory: copy, mix, fill, follow, device_array.

    An op has asked `_dispatch` for it before, which says why where it cannot be loaded.
    """
    return importlib.import_module("fastnorm.backends.numba_cuda.table")


# ---- libraries ------------------------------------------------------------------------------------


class Library(Protocol):
    """What the ops need of a library of device arrays."""

    title: str
    one_stream: bool
    """Whether all arrays of a device follow one current stream, rather than each its own."""

    def describe(self, name: str, array: Any) -> DeviceArray:
        """The array's descriptor; TypeError or ValueError, naming the argument, where it cannot be used."""

    def stream(self, block: Any, device: int) -> int:
        """The stream for work on this array now."""

    def allocate(self, shape: Shape, strides: Shape, dtype: Any, like: DeviceArray) -> DeviceArray:
        """New memory on the device and stream of `like`."""

    def to_host(self, block: Any) -> np.ndarray[Any, Any]:
        """The values of the library's own array, once they are there."""


class _Torch:
    title = "PyTorch"
    one_stream = True

    def __init__(self) -> None:
        self._torch: Any = sys.modules["torch"]
        names = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
        self._dtypes: dict[Any, Any] = {getattr(self._torch, name): np.dtype(name) for name in names}
        self._dtypes[self._torch.bfloat16] = BFLOAT16
        self._own = {dtype: own for own, dtype in self._dtypes.items()}

    def describe(self, name: str, array: Any) -> DeviceArray:
        if array.device.type != "cuda":
            raise TypeError(f"{name}: expected a NumPy array or one on a CUDA device, got a tensor on {array.device}")
        if array.layout is not self._torch.strided or array.is_neg():
            what = f"layout {array.layout}" + (", the negative of another" if array.is_neg() else "")
            raise TypeError(f"{name}: expected a tensor of strided elements as they are, got {what}")
        if array.requires_grad and self._torch.is_grad_enabled():
            raise ValueError(
                f"{name}: PyTorch would expect to differentiate through this call, which it cannot: "
                "pass a detached tensor, or call under torch.no_grad()"
            )
        dtype = self._dtypes.get(array.dtype)
        if dtype is None:
            expected = "float16, bfloat16, float32, float64, integers or bools"
            raise TypeError(f"{name}: expected {expected}, got dtype {array.dtype}")
        size = dtype.itemsize
        strides = tuple(stride * size for stride in array.stride())
        return DeviceArray(self, array, array.data_ptr(), tuple(array.shape), strides, dtype, array.device.index)

    def stream(self, block: Any, device: int) -> int:
        return int(self._torch.cuda.current_stream(device).cuda_stream)

    def allocate(self, shape: Shape, strides: Shape, dtype: Any, like: DeviceArray) -> DeviceArray:
        steps = tuple(stride // dtype.itemsize for stride in strides)
        tensor = self._torch.empty_strided(shape, steps, dtype=self._own[dtype], device=like.block.device)
        return DeviceArray(self, tensor, tensor.data_ptr(), shape, strides, dtype, like.device)

    def to_host(self, block: Any) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = block.cpu().numpy()
        return values


class _Cupy:
    title = "CuPy"
    one_stream = True

    def __init__(self) -> None:
        self._cupy: Any = sys.modules["cupy"]

    def describe(self, name: str, array: Any) -> DeviceArray:
        dtype = BFLOAT16 if array.dtype.name == "bfloat16" else array.dtype
        return DeviceArray(self, array, array.data.ptr, array.shape, array.strides, dtype, array.device.id)

    def stream(self, block: Any, device: int) -> int:
        with self._cupy.cuda.Device(device):
            return int(self._cupy.cuda.get_current_stream().ptr)

    def allocate(self, shape: Shape, strides: Shape, dtype: Any, like: DeviceArray) -> DeviceArray:
        own = np.dtype("bfloat16") if dtype is BFLOAT16 else dtype  # ml_dtypes is there where CuPy has bfloat16
        with self._cupy.cuda.Device(like.device):
            memory = self._cupy.cuda.alloc(math.prod(shape) * dtype.itemsize)
            array = self._cupy.ndarray(shape, own, memptr=memory, strides=strides)
        return DeviceArray(self, array, memory.ptr, shape, strides, dtype, like.device)

    def to_host(self, block: Any) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = block.get()
        return values


class _Numba:
    title = "Numba"
    one_stream = False

    def describe(self, name: str, array: Any) -> DeviceArray:
        interface = self._interface(array)
        pointer, read_only = interface["data"]
        memory = getattr(array, "gpu_data", None)
        device = 0 if memory is None else memory.context.device.id
        return DeviceArray(
            self, array, pointer or 0, tuple(array.shape), tuple(array.strides), array.dtype, device, not read_only
        )

    def _interface(self, array: Any) -> dict[str, Any]:
        # An array of Numba's simulator is host memory: it has the host's interface, and no gpu_data.
        found: dict[str, Any] = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
        return found

    def stream(self, block: Any, device: int) -> int:
        return self._interface(block).get("stream") or 0

    def allocate(self, shape: Shape, strides: Shape, dtype: Any, like: DeviceArray) -> DeviceArray:
        array = backend().device_array(shape, strides, dtype, like.device, like.block.stream)
        return self.describe("out", array)

    def to_host(self, block: Any) -> np.ndarray[Any, Any]:
        values: np.ndarray[Any, Any] = block.copy_to_host()
        if getattr(block, "stream", 0):  # on which it was copied
            block.stream.synchronize()
        return values


_LIBRARIES: dict[tuple[str, str], type[Library]] = {
    ("torch", "Tensor"): _Torch,
    ("cupy", "ndarray"): _Cupy,
    ("numba", "DeviceNDArrayBase"): _Numba,
    ("numba", "FakeCUDAArray"): _Numba,
}
"""By the top-level module and the name of a class or one of its bases."""


@cache
def _library(kind: type[Library]) -> Library:
    return kind()


@lru_cache(maxsize=256)
def _library_of(cls: type) -> Library | None:
    for base in cls.__mro__:
        kind = _LIBRARIES.get((base.__module__.partition(".")[0], base.__name__))
        if kind is not None:
            return _library(kind)
    return None


def of_a_library(value: Any) -> bool:
    """Whether one of the libraries made this array, on a device or not."""
    cls: Any = type(value)
    return _library_of(cls) is not None


def described(name: str, value: Any) -> DeviceArray | None:
    """The descriptor of an array of one of the libraries (or of itself), None for anything else."""
    if on_device(value):
        return value
    cls: Any = type(value)
    library = _library_of(cls)
    return None if library is None else library.describe(name, value)


def one_stream(array: Any, x: Any) -> bool:
    """Whether work on the two belongs on the same stream."""
    return bool((array.library is x.library and x.library.one_stream) or array.stream == x.stream)


def follow(array: Any, x: Any) -> None:
    """Let work on x's stream wait for what the array's own stream has yet to do."""
    if not one_stream(array, x):
        backend().follow(x.stream, array.stream, x.device)
