"""Counts the kernels, FLOPs and bytes of a computation on a GPU; reads them off MLX's graph, on any machine.

The graph is the one that MLX builds on a GPU. Without a GPU, MLX replaces the functions of `mx.fast` by their
definitions. So while a graph is built here, each of these functions is replaced by one opaque node.

A **kernel** is one launch of a primitive. Views (broadcast, transpose, split, slice, reshape) launch nothing, but a
reshape of a transposed array copies it, a concatenation copies each of its parts, and a padding fills and copies.
Attention with a head size without a Metal kernel is a product, a softmax and a product. Operations that `mx.compile`
fuses are one kernel. A matrix product that MLX splits along the inner dimension counts as one.

**FLOPs** are those of matrix products, convolutions and attention; causal attention counts as if nothing were masked.
**Bytes** are those that kernels read and write, weights included. This assumes that no cache carries data from one
kernel to the next, and that consecutive element-wise operations are fused into one kernel.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_mlx.backend import mx
from fastvlm_mlx.model import activations, language

FUSED_HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head sizes with an attention kernel in Metal."""

_VIEWS = frozenset(
    "Broadcast Transpose Split Slice Squeeze ExpandDims Unflatten Reshape Flatten AsStrided View".split()
)
_RESHAPES = frozenset(["Reshape", "Flatten"])
_ELEMENTWISE = frozenset(
    "Abs Add AsType Divide Equal Erf Exp Greater GreaterEqual Less LessEqual Log LogicalAnd LogicalNot LogicalOr "
    "Maximum Minimum Multiply Negative Power Select Sigmoid Sqrt Square Subtract Tanh".split()
)
_OPAQUE = "Depends"

Function = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One launch.

    Attributes:
        name: MLX's name of the primitive.
        flops: As defined at the top of this module.
        bytes: Those read and written.
    """

    name: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class _Array:
    """An array of the graph: its place in memory, and its share of that."""

    shape: tuple[int, ...]
    nbytes: int
    base: str
    transposed: bool = False


@contextmanager
def replaced(owner: Any, **functions: Function) -> Iterator[None]:
    """Puts functions in the place of those of a module or class within the context."""
    originals = {name: getattr(owner, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(owner, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(owner, name, function)


@contextmanager
def _gpu_formulation() -> Iterator[None]:
    """Builds graphs as on a GPU, each function of `mx.fast` as one opaque node."""

    def opaque(x: mx.array, *others: Any, **options: Any) -> mx.array:
        arrays = [value for value in (*others, *options.values()) if isinstance(value, mx.array)]
        node: mx.array = mx.depends([x], arrays or [x])[0]
        return node

    original = mx.fast.scaled_dot_product_attention

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        if queries.shape[-1] not in FUSED_HEAD_DIMS:
            return original(queries, keys, values, **options)
        return opaque(queries, keys, values)

    with ExitStack() as stack:
        for module in (activations, language):
            stack.enter_context(replaced(module, device=lambda: "gpu"))
        stack.enter_context(replaced(mx, contiguous=opaque))  # cannot be exported
        stack.enter_context(
            replaced(mx.fast, layer_norm=opaque, rms_norm=opaque, rope=opaque, scaled_dot_product_attention=attention)
        )
        yield


def kernels(function: Function, *inputs: Any) -> list[Kernel]:
    """Returns the kernels that `function` launches if all is fused that can be; copies by reshapes are called `Copy`.

    Args:
        function: Takes arrays or trees of arrays, returns a tree of arrays.
        inputs: Its arguments; they are never evaluated and need no memory.
    """
    paths, leaves = zip(*tree_flatten(list(inputs)), strict=True)

    def flat(*arrays: mx.array) -> list[mx.array]:
        outputs: Any = tree_flatten(function(*tree_unflatten(list(zip(paths, arrays, strict=True)))))
        return [array for _, array in outputs]

    graph: dict[str, list[Any]] = {"primitive": []}

    def record(entry: dict[str, Any]) -> None:
        kind = entry["type"]
        if kind == "primitive":
            graph[kind].append(entry)
        else:
            graph[kind] = entry[kind.removeprefix("keyword_") if kind in entry else "keywords"]

    with _gpu_formulation():
        mx.export_function(record, flat, *leaves)
    arrays = {name: _Array(tuple(shape), math.prod(shape) * dtype.size, name) for name, shape, dtype in graph["inputs"]}
    arrays |= {name: _Array(value.shape, value.nbytes, name) for name, value in graph["constants"]}
    return list(_launches(graph["primitive"], arrays, {name for name, _, _ in graph["outputs"]}))


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A primitive that launches a kernel; its inputs and outputs by name."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flops: int


def _launches(primitives: list[dict[str, Any]], arrays: dict[str, _Array], outputs: set[str]) -> Iterator[Kernel]:
    """Yields the kernels of primitives in order; `arrays` holds their inputs and is completed."""
    nodes = list(_nodes(primitives, arrays))
    maker = {array: node for node in nodes for array in node.outputs}
    # An element-wise result that only element-wise operations read stays in registers.
    in_memory = {arrays[array].base for array in outputs}
    in_memory |= {arrays[array].base for node in nodes if node.name not in _ELEMENTWISE for array in node.inputs}
    for node in nodes:
        bytes_written = sum(arrays[array].nbytes for array in node.outputs)
        if node.name in _ELEMENTWISE:
            if node.outputs[0] in in_memory:
                bytes_read = _read(_sources(node, arrays, maker, in_memory), arrays)
                yield Kernel(name=node.name, flops=0, bytes=bytes_read + bytes_written)
            continue
        bytes_read = _read(node.inputs, arrays)
        if node.name == "Gather":  # only the rows that are looked up
            bytes_read = bytes_written
        elif node.name == "SliceUpdate":  # in place
            bytes_read = bytes_written = arrays[node.inputs[1]].nbytes
        launches = _LAUNCHES.get(node.name, lambda inputs: 1)(len(node.inputs))
        moved = (bytes_read + bytes_written) // launches
        for launch in range(launches):
            yield Kernel(name=node.name, flops=node.flops if launch == 0 else 0, bytes=moved)


def _nodes(primitives: list[dict[str, Any]], arrays: dict[str, _Array]) -> Iterator[_Node]:
    """Yields the primitives that launch a kernel; adds every output to `arrays`."""
    for primitive in primitives:
        name, names = primitive["name"], tuple(array for array, _, _ in primitive["inputs"])
        inputs = [arrays[array] for array in names]
        copies = name in _RESHAPES and inputs[0].transposed
        for array, shape, dtype in primitive["outputs"]:
            size = math.prod(shape) * dtype.size
            if name in _VIEWS and not copies:
                turned = name == "Transpose" and _permutes(inputs[0].shape, primitive["arguments"][0])
                source = inputs[0]
                arrays[array] = _Array(tuple(shape), min(size, source.nbytes), source.base, source.transposed or turned)
            else:
                arrays[array] = _Array(tuple(shape), size, array)
        if name not in _VIEWS or copies:
            outputs = tuple(array for array, _, _ in primitive["outputs"])
            flops = _flops(name, inputs, arrays[outputs[0]].shape)
            yield _Node(name="Copy" if copies else name, inputs=names, outputs=outputs, flops=flops)


def _sources(node: _Node, arrays: dict[str, _Array], maker: dict[str, _Node], in_memory: set[str]) -> list[str]:
    """Returns the arrays in memory that an element-wise operation and those fused into it read."""
    sources, pending, seen = [], list(node.inputs), set()
    while pending:
        array = pending.pop()
        base = arrays[array].base
        if base in in_memory or base not in maker or maker[base].name not in _ELEMENTWISE:
            sources.append(array)
        elif base not in seen:
            seen.add(base)
            pending += maker[base].inputs
    return sources


def _read(names: Iterable[str], arrays: dict[str, _Array]) -> int:
    """Returns the bytes of the arrays; those in the same place count once."""
    sizes: dict[str, int] = {}
    for name in names:
        array = arrays[name]
        sizes[array.base] = max(sizes.get(array.base, 0), array.nbytes)
    return sum(sizes.values())


_LAUNCHES: dict[str, Callable[[int], int]] = {"Concatenate": lambda parts: parts, "Pad": lambda _: 2}
"""Number of kernels from the number of inputs, for primitives that launch more than one."""


def _permutes(shape: tuple[int, ...], axes: list[int]) -> bool:
    """Whether a transposition changes the order in memory; axes of size 1 do not matter."""
    moved = [axis for axis in axes if shape[axis] > 1]
    return moved != sorted(moved)


def _flops(name: str, inputs: list[_Array], output: tuple[int, ...]) -> int:
    size = math.prod(output)
    if name in ("Matmul", "AddMM", "QuantizedMatmul"):
        return 2 * size * inputs[0].shape[-1]
    if name == "Convolution":
        return 2 * size * math.prod(inputs[1].shape[1:])
    if name == _OPAQUE and len(inputs) == 3 and len(output) == 4 and len(inputs[1].shape) == 4:
        return 4 * size * inputs[1].shape[2]
    return 0


def count_launches(function: Function, *inputs: Any, compiled: bool) -> int | None:
    """Returns the number of kernels in MLX's own graph, eager or with `mx.compile`.

    Returns None where MLX cannot compile: on a Linux CPU without a C++ compiler.
    """
    with _gpu_formulation():
        run = mx.compile(function) if compiled else function
        outputs: Any = tree_flatten(run(*inputs))
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *(array for _, array in outputs))
    graph = drawing.getvalue()
    nodes = re.findall(r'(\d+) \[label ="([^"]*)"', graph)
    if not any(label.startswith("Compiled") for _, label in nodes):
        return None
    edges = Counter(re.findall(r"-> (\d+)$", graph, re.MULTILINE))
    drawn = Counter(node for node, _ in nodes)  # calls of one compiled function share a node
    launches: int = sum(
        _LAUNCHES.get(label, lambda inputs: 1)(edges[node] // drawn[node])
        for node, label in nodes
        if label not in _VIEWS
    )
    return launches + sum(kernel.name == "Copy" for kernel in kernels(function, *inputs))
