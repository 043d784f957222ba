"""The native kernels: operators of the domain `sparse_onnx` that never read weights of skipped inputs.

A model that uses them runs everywhere, by the bodies of its functions; with the kernels registered it runs fast:

    options = onnxruntime.SessionOptions()
    sparse_onnx.register_kernels(options)
    session = onnxruntime.InferenceSession("model.onnx", options)
"""

from sparse_onnx.kernels.build import build, is_built, path, register_kernels

__all__ = ["build", "is_built", "path", "register_kernels"]
