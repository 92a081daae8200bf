"""8-bit storage for the weights of an ONNX graph, which computes in float32 as before."""

from pathlib import Path

import numpy as np


# Weights that share a scale. Smaller blocks are hardly more precise.
BLOCK_SIZE = 64
# Smaller tensors, such as biases, stay as they are.
MIN_WEIGHTS = 4096


def store_int8_weights(path: Path) -> None:
    """
    Rewrite a graph so that its large tensors are stored as 8-bit integers with a float16 scale per 64 of them.

    Runtimes multiply them once, when they load the graph, because all inputs of these nodes are constants. So every
    runtime runs it, and as fast as the float32 graph. `quantize` makes graphs that compute with 8-bit integers as well.
    """
    import onnx
    from onnx import helper, numpy_helper

    program = onnx.load(path)
    graph = program.graph
    kept, nodes = [], []
    for tensor in graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.dtype != np.float32 or weights.size < MIN_WEIGHTS or weights.size % BLOCK_SIZE:
            kept.append(tensor)
            continue
        name = tensor.name
        parts = {f"{name}_{part}": array for part, array in _round(weights).items()}
        kept += [numpy_helper.from_array(array, part) for part, array in parts.items()]
        numbers, scales, shape = parts
        nodes += [
            helper.make_node("Cast", [numbers], [f"{numbers}_float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Cast", [scales], [f"{scales}_float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{numbers}_float", f"{scales}_float"], [f"{name}_blocks"]),
            helper.make_node("Reshape", [f"{name}_blocks", shape], [name]),
        ]
    nodes += graph.node
    for field, items in ((graph.initializer, kept), (graph.node, nodes)):
        del field[:]
        field.extend(items)
    onnx.save(program, path)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # weights that were too large for the graph's file


def _round(weights: np.ndarray) -> dict[str, np.ndarray]:
    """`int8` (blocks, 64), `scale` (blocks, 1) in float16, and the `shape` of the weights."""
    blocks = weights.reshape(-1, BLOCK_SIZE)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    divisor = np.where(scale == 0, 1, scale).astype(np.float32)
    numbers = np.clip(np.round(blocks / divisor), -127, 127).astype(np.int8)
    return {"int8": numbers, "scale": scale, "shape": np.array(weights.shape, np.int64)}
