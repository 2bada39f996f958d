"""The backend 'cuda': the kernel contract on NVIDIA GPUs, compiled by numba-cuda on first use.

    table       the backend as `_dispatch` loads it; refuses where no device can serve
    kernels     the functions of `KernelTable`: choose a kernel, allocate its workspace, launch it
    _plan       how a call is cut up, as data
    _rows, _runs, _columns, _elementwise
                the kernels
    _memory     loads and stores by address, up to 16 bytes at once
    _team       sums over the threads of a warp or a block
    _scalars    the scalar formulas of `numba_formulas`, compiled for the device
    _launch     compilation, the cache on disk, launching; the only file that knows numba-cuda and the driver

Every array that `kernels` is given is a descriptor, of which it reads `pointer`, `size`, `dtype`, `itemsize`,
`device`, `stream`, and calls `empty(shape, dtype)` for workspace: all of it before the first launch. A kernel's
arguments are addresses, sizes and floats. Nothing here needs a GPU but launching, so that kernels are compiled and
looked at, and run in Numba's simulator (NUMBA_ENABLE_CUDASIM=1), where none is.
"""
