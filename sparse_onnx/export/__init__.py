from sparse_onnx.core.callable import make_callable
from sparse_onnx.export.api import export

__all__ = ["export"]
make_callable(__name__, "export")
