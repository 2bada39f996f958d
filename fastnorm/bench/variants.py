"""The implementations of a case, each as a callable without arguments to check and to time.

staged          the nine-step graph in NumPy: `<op>_forward_staged`, `<op>_backward_staged`
alt             the closed form in NumPy: `<op>_backward_alt`. Backward only: there is one way to write
                a forward in NumPy, and that is the staged one.
fused           `<op>_forward`, `<op>_backward` on each available backend, writing to `out` or not
torch, jax      where they are installed (peers.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import fastnorm
from fastnorm.backends import Array
from fastnorm.bench import peers
from fastnorm.bench.cases import Case, Direction, Inputs


class Call(NamedTuple):
    """One direction of one variant, bound to its inputs."""

    run: Callable[[], Any]
    arrays: Callable[[Any], tuple[Array | None, ...]]
    """What `run` returned, as NumPy arrays: (out,) of a forward, (dx, dgamma, dbeta) of a backward."""


@dataclass(frozen=True)
class Variant:
    """A way to compute an op."""

    name: str
    """staged, alt, fused, torch or jax."""
    backend: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.backend}" if self.backend else self.name

    @property
    def takes_out(self) -> bool:
        return self.name == "fused"

    @property
    def exact(self) -> bool:
        """Whether its error may not grow with the length of the reductions (the fused kernels' promise)."""
        return self.name == "fused"

    def bind(self, case: Case, inputs: Inputs, direction: Direction, out: Array | None = None) -> Call | None:
        """The call, or None where this variant does not compute that direction of the case.

        A backward's cache is made here, outside of what is timed. `out` is for variants that take it.
        """
        if self.name in peers.PEERS:
            bound = peers.PEERS[self.name].bind(case, inputs, direction)
            return None if bound is None else Call(*bound)
        return _own(self, case, inputs, direction, out)


def _own(variant: Variant, case: Case, inputs: Inputs, direction: Direction, out: Array | None) -> Call | None:
    op, (x, gamma, beta, dout) = case.op, inputs
    fused: dict[str, Any] = {"backend": variant.backend}

    def forward() -> tuple[Array, Any]:
        return op.forward(x, gamma, beta, {}, axis=case.axis, out=out, **fused)

    def forward_staged() -> tuple[Array, Any]:
        assert op.forward_staged is not None
        return op.forward_staged(x, gamma, beta, {}, axis=case.axis)

    if direction == "forward":
        if variant.name == "alt" or (variant.name == "staged" and op.forward_staged is None):
            return None
        # The cache counts: a caller who trains keeps it.
        return Call(forward_staged if variant.name == "staged" else forward, lambda result: (result[0],))

    if variant.name == "staged":
        backward_staged = op.backward_staged
        if backward_staged is None:
            return None
        staged_cache = forward_staged()[1]
        return Call(lambda: backward_staged(dout, staged_cache), tuple)
    cache = forward()[1]
    if variant.name == "alt":
        backward_alt = op.backward_alt
        return None if backward_alt is None else Call(lambda: backward_alt(dout, cache), tuple)
    return Call(lambda: op.backward(dout, cache, out=out, **fused), tuple)


def variants(backends: Sequence[str] | None = None, *, with_peers: bool = False) -> list[Variant]:
    """Slowest first: staged, alt, fused on the available (or the named) backends, then the peers."""
    if backends is None:
        backends = [info.name for info in fastnorm.backends() if info.available]
    order = [info.name for info in reversed(fastnorm.backends())]
    found = [Variant("staged"), Variant("alt")]
    found += [Variant("fused", name) for name in sorted(backends, key=order.index)]
    if with_peers:
        found += [Variant(name) for name, peer in peers.PEERS.items() if peer.installed()]
    return found
