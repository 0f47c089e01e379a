"""Faster engines for a step that runs many times: recorded, with packed products, compiled, or as a CUDA graph.

The engine is chosen automatically; if one fails, a warning says so and the next plainer one is used.
"""

import contextlib
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from melbo_ray.errors import first_line
from melbo_ray.model.packed_linear import MOST_PACKED, opaque, pack

_WARM_UP = 3
# Relative to the largest value: far above the rounding of reordered sums, in bfloat16 too.
_TOLERANCE = 0.05
_Step = Callable[..., tuple[Tensor, ...]]


class Recorded:
    """A function of tensors that is recorded at the first call for each set of shapes and options, then replayed.

    A recording is the list of the function's operations, without modules and autograd. On the CPU its products are
    merged and packed; on CUDA it is captured as a graph, one launch instead of several hundred. Compilation fuses the
    operations between products; it takes half a minute per set of shapes, which pays off for thousands of calls. If an
    engine fails, the previous one is kept. All engines agree up to rounding.

    Args:
        function: must neither branch on values nor synchronise with the device.
        compiled: whether to compile.
        packed: whether to make packed copies of the weights; None allows up to 4 GiB of them.
    """

    def __init__(self, function: _Step, compiled: bool = False, packed: bool | None = None) -> None:
        self.function, self.compiled, self.packed = function, compiled, packed
        self._recordings: dict[Any, _Step] = {}
        weakref.finalize(self, _release, self._recordings)

    def __call__(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """Return function(*inputs, **options); all `inputs` are on one device, and `options` are hashable."""
        key = (*(value.shape for value in inputs), *sorted(options.items()))
        if key not in self._recordings:
            self._recordings[key] = self._record(inputs, options)
        return self._recordings[key](*inputs)

    def _record(self, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> _Step:
        step, cuda = functools.partial(self.function, **options), inputs[0].is_cuda
        # A CUDA graph needs no recording of its own; the compiler does.
        if self.compiled or not cuda:
            step = _better("recorded", lambda plain: make_fx(plain)(*inputs), step, inputs)
        if isinstance(step, GraphModule):
            step = step if cuda or self.packed is False else _better("packed", self._pack, step, inputs)
            step = _better("compiled", _compiled, step, inputs) if self.compiled else step
        return _better("a CUDA graph", lambda plain: _cuda_graph(plain, inputs), step, inputs) if cuda else step

    def _pack(self, recording: GraphModule) -> GraphModule:
        return pack(recording, math.inf if self.packed else MOST_PACKED)


def _release(recordings: dict[Any, _Step]) -> None:
    """Free packed weights at once: a recording is a reference cycle, which would keep them until garbage collection."""
    for recording in recordings.values():
        if isinstance(recording, GraphModule):
            recording._buffers.clear()


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors of one shape are equal up to rounding; False if either is not finite."""
    return float((ours - theirs).abs().max()) <= _TOLERANCE * float(theirs.abs().max())


def _better(name: str, make: Callable[[Any], _Step], plain: _Step, inputs: tuple[Tensor, ...]) -> _Step:
    """The step made by `make` if it agrees with the plain step; otherwise, with a warning, the plain step."""
    # Compared on values other than the recorded ones, because a recording freezes any branch on values.
    others = tuple(-value.flip(-1) if value.is_floating_point() else value for value in inputs)
    try:
        step = make(plain)
        if not all(map(agree, step(*others), plain(*others))):
            raise RuntimeError("it would do something else on other values")
    # A missing or failing compiler raises errors of any type.
    except Exception as error:
        reason = first_line(error)
        warnings.warn(f"steps are not {name}, which costs time only: {reason}", stacklevel=2)
        return plain
    return step


def _compiled(recording: GraphModule) -> _Step:
    # No worker processes for compilation: an actor may be killed at any time, and they would stay.
    return torch.compile(opaque(recording), fullgraph=True, dynamic=False, options={"compile_threads": 1})


@contextlib.contextmanager
def _no_waiting() -> Generator[None]:
    """Within the context, synchronising with the GPU raises RuntimeError: it would break the capture of a graph."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


_pool = functools.cache(torch.cuda.graph_pool_handle)


def _cuda_graph(function: _Step, inputs: tuple[Tensor, ...]) -> _Step:
    buffers = tuple(value.detach().clone() for value in inputs)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    # A capture that fails leaves its stream as the current one; this context restores it.
    with torch.cuda.stream(side):
        # One-time work, such as choosing kernels, must happen before the capture (PyTorch's manual).
        for _ in range(_WARM_UP):
            function(*buffers)
        with _no_waiting():
            function(*buffers)
        # Outputs are copied before another graph runs, so that graphs may lie in one memory pool.
        with torch.cuda.graph(graph, pool=_pool(), stream=side):
            outputs = function(*buffers)
    torch.cuda.current_stream().wait_stream(side)

    def play(*values: Tensor) -> tuple[Tensor, ...]:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    return play
