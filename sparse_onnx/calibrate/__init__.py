"""Statistics of what linear layers read and of where tokens go, measured on the user's data."""

from sparse_onnx.calibrate.api import calibrate
from sparse_onnx.core.callable import make_callable

__all__ = ["calibrate"]

make_callable(__name__, "calibrate")
