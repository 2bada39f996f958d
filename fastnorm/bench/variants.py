"""The implementations of a case, each as a callable without arguments to check and to time.

staged          the nine-step graph in NumPy: `<op>_forward_staged`, `<op>_backward_staged`
alt             the closed form in NumPy: `<op>_backward_alt`. Backward only: there is one way to write
                a forward in NumPy, and that is the staged one.
fused           `<op>_forward`, `<op>_backward` on each available backend, writing to `out` or not
torch, jax, ... where they are installed (peers.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import fastnorm
from fastnorm.backends import Array
from fastnorm.bench import peers
from fastnorm.bench.cases import Case, Direction, Inputs


class Call(NamedTuple):
    """One direction of one variant, bound to its inputs."""

    run: Callable[[], Any]
    arrays: Callable[[Any], tuple[Array | None, ...]]
    """What `run` returned, as NumPy arrays: (out,) of a forward, the gradients of a backward."""


@dataclass(frozen=True)
class Variant:
    """A way to compute an op."""

    name: str
    """staged, alt, fused or one of `peers.PEERS`."""
    backend: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.backend}" if self.backend else self.name

    @property
    def takes_out(self) -> bool:
        return self.name == "fused"

    @property
    def numpy_only(self) -> bool:
        """Whether it is plain NumPy: nothing to compile, no threads to start, and slow."""
        return self.name in ("staged", "alt") or self.backend == "numpy"

    @property
    def labels(self) -> dict[str, bool]:
        """Each way of calling it -> whether it writes to a reused `out=`; the first is the one to report.

        The reference backend is timed with `out=` only: page faults are nothing beside its own time.
        """
        ways = {self.label: self.takes_out}
        if self.takes_out and not self.numpy_only:
            ways[f"{self.label}, fresh"] = False
        return ways

    @property
    def exact(self) -> bool:
        """Whether its error may not grow with the length of the reductions (the fused kernels' promise)."""
        return self.name == "fused"

    def computes(self, case: Case, direction: Direction) -> bool:
        """Whether it computes that direction of the case."""
        if self.name in peers.PEERS:
            return peers.PEERS[self.name].computes(case)
        if self.name == "staged":
            return case.op.forward_staged is not None and case.op.backward_staged is not None
        if self.name == "alt":
            return direction == "backward" and case.op.backward_alt is not None
        return True

    def bind(self, case: Case, inputs: Inputs, direction: Direction, out: Array | None = None) -> Call:
        """The call, where `computes` is true. `out` is for variants that take it.

        A backward's cache is made here, outside of what is timed.
        """
        if self.name in peers.PEERS:
            return Call(*peers.PEERS[self.name].bind(case, inputs, direction))
        return _own(self, case, inputs, direction, out)


def _own(variant: Variant, case: Case, inputs: Inputs, direction: Direction, out: Array | None) -> Call:
    op, arguments = case.op, case.arguments(*inputs[:3])
    backward: Callable[..., Any]
    if variant.name == "staged":
        assert op.forward_staged is not None
        assert op.backward_staged is not None
        forward, backward = partial(op.forward_staged, axis=case.axis), op.backward_staged
    elif variant.name == "alt":  # the closed form takes the fused forward's cache
        assert op.backward_alt is not None
        forward, backward = partial(op.forward, axis=case.axis), op.backward_alt
    else:
        forward = partial(op.forward, axis=case.axis, out=out, backend=variant.backend)
        backward = partial(op.backward, out=out, backend=variant.backend)
    parameters: dict[str, Any] = {}  # kept from call to call, as a layer's are
    if direction == "forward":  # the cache is part of the result: a caller who trains keeps it
        return Call(lambda: forward(*arguments, parameters), lambda result: result[:1])
    cache = forward(*arguments, parameters)[1]
    return Call(lambda: backward(inputs.dout, cache), tuple)


def variants(backends: Sequence[str] | None = None, *, with_peers: Sequence[str] = ()) -> list[Variant]:
    """Slowest first: staged, alt, fused on the available (or the named) backends, then the peers installed."""
    if backends is None:
        backends = [info.name for info in fastnorm.backends() if info.available]
    order = [info.name for info in reversed(fastnorm.backends())]
    found = [Variant("staged"), Variant("alt")]
    found += [Variant("fused", name) for name in sorted(backends, key=order.index)]
    return found + [Variant(name) for name in with_peers if peers.PEERS[name].installed()]
