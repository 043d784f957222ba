from sparse_onnx.core.callable import make_callable
from sparse_onnx.package.api import package

__all__ = ["package"]
make_callable(__name__, "package")
