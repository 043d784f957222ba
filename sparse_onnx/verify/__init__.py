from sparse_onnx.core.callable import make_callable
from sparse_onnx.verify.api import verify

__all__ = ["verify"]
make_callable(__name__, "verify")
