"""onnxruntime's MatMulNBits at accuracy level 4, its fastest: activations in int8."""

from __future__ import annotations

import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper


class Peer:
    """Many weights of one shape, multiplied one after another in one session, so that each comes from memory."""

    def version(self) -> str:
        return f"onnxruntime {ort.__version__}, accuracy level 4"

    def open(self, out: int, inputs: int, group: int, copies: int, threads: int) -> None:
        """Weights (out, inputs) of int4 with a scale and a zero point for each ``group`` inputs, each with codes of its
        own, so that nothing can be shared: the graph that onnxruntime optimizes keeps a product for each."""
        rng, groups = np.random.default_rng(0), inputs // group
        scales = (rng.random(out * groups, dtype=np.float32) + 0.5) / 8 / inputs**0.5
        zeros = np.full(out * groups // 2, 0x88, dtype=np.uint8)
        nodes, weights, results = [], [], []
        for i in range(copies):
            codes = rng.integers(0, 256, (out, groups, group // 2), dtype=np.uint8)
            names = [f"{part}{i}" for part in ("codes", "scales", "zeros")]
            weights += [
                numpy_helper.from_array(array, name)
                for array, name in zip((codes, scales, zeros), names, strict=True)
            ]
            nodes.append(
                helper.make_node(
                    "MatMulNBits", ["x", *names], [f"y{i}"], domain="com.microsoft", K=inputs, N=out, bits=4,
                    block_size=group, accuracy_level=4,
                )
            )  # fmt: skip
            results.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", out]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inputs])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "products", [x], results, weights)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Its threads turn in a loop during a run, and must not while others have their turn.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self._inputs, self._copies = inputs, copies

    def product(self, rows: int, least: float) -> float:
        """Seconds for one product of ``rows`` rows, the mean over all weights, which are run through for ``least``."""
        x = np.random.default_rng(1).standard_normal((rows, self._inputs), dtype=np.float32)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < least:
            self._session.run(None, {"x": x})
            count += self._copies
        return (time.perf_counter() - start) / count
