"""Faster ways to run one step many times: recorded, its products packed, compiled, or as a CUDA graph.

They are chosen by themselves, and where one cannot be had a warning says so and the next plainer one is taken.
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
# Of the largest value: far above what another order of sums changes, in bfloat16 too.
_TOLERANCE = 0.05
_Step = Callable[..., tuple[Tensor, ...]]


class Recorded:
    """A function of tensors, recorded at the first call with each choice of shapes and options, then played back.

    A recording is the list of the function's operations, without modules and autograd. On the CPU its products are
    merged and packed, on CUDA it is captured as a graph: one launch instead of several hundred. Compiled, what lies
    between the products is fused; that takes half a minute for each choice, so it is for steps that are run thousands
    of times. Where a way fails, the one before it is kept. Results agree but for the last bits.

    Args:
        function: it must not look at values, nor wait for the device.
        compiled: whether to compile.
        packed: whether copies of the weights may be made; None: no more than 4 GiB of them.
    """

    def __init__(self, function: _Step, compiled: bool = False, packed: bool | None = None) -> None:
        self.function, self.compiled, self.packed = function, compiled, packed
        self._recordings: dict[Any, _Step] = {}
        weakref.finalize(self, _release, self._recordings)

    def __call__(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """function(*inputs, **options); `inputs` on one device, `options` hashable."""
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
    """Let packed weights go at once: a recording is a cycle, which would hold them until some later collection."""
    for recording in recordings.values():
        if isinstance(recording, GraphModule):
            recording._buffers.clear()


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors of one shape are the same up to rounding; where one is not finite they are not."""
    return float((ours - theirs).abs().max()) <= _TOLERANCE * float(theirs.abs().max())


def _better(name: str, make: Callable[[Any], _Step], plain: _Step, inputs: tuple[Tensor, ...]) -> _Step:
    """What `make` makes of the plain step, if it can be made and agrees with it; otherwise that step, and a warning."""
    # On other values than it is made from: what a function decides by looking at them would be made part of it.
    others = tuple(-value.flip(-1) if value.is_floating_point() else value for value in inputs)
    try:
        step = make(plain)
        if not all(map(agree, step(*others), plain(*others))):
            raise RuntimeError("it would do something else on other values")
    # What a compiler that is missing or fails raises is its own.
    except Exception as error:
        reason = first_line(error)
        warnings.warn(f"steps are not {name}, which costs time only: {reason}", stacklevel=2)
        return plain
    return step


def _compiled(recording: GraphModule) -> _Step:
    # No processes beside this one: an actor may be killed at any time.
    return torch.compile(opaque(recording), fullgraph=True, dynamic=False, options={"compile_threads": 1})


@contextlib.contextmanager
def _no_waiting() -> Generator[None]:
    """While it lasts, whatever waits for the GPU raises RuntimeError: it cannot be recorded, and trying would hurt."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _cuda_graph(function: _Step, inputs: tuple[Tensor, ...]) -> _Step:
    places = tuple(value.detach().clone() for value in inputs)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    # A recording that fails leaves its stream behind as the current one; this block does not.
    with torch.cuda.stream(side):
        # What is done once only, such as choosing kernels, must be over before the recording (PyTorch's manual).
        for _ in range(_WARM_UP):
            function(*places)
        with _no_waiting():
            function(*places)
        with torch.cuda.graph(graph, stream=side):
            outputs = function(*places)
    torch.cuda.current_stream().wait_stream(side)

    def play(*values: Tensor) -> tuple[Tensor, ...]:
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    return play
