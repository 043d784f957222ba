from sparse_onnx.core.callable import make_callable
from sparse_onnx.optimize.api import optimize

__all__ = ["optimize"]
make_callable(__name__, "optimize")
