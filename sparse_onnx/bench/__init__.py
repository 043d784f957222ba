from sparse_onnx.bench.api import bench
from sparse_onnx.core.callable import make_callable

__all__ = ["bench"]
make_callable(__name__, "bench")
