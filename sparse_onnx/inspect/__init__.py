from sparse_onnx.core.callable import make_callable
from sparse_onnx.inspect.api import inspect

__all__ = ["inspect"]
make_callable(__name__, "inspect")
