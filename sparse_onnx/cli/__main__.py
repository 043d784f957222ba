"""`python -m sparse_onnx.cli` is `sparse-onnx`."""

from sparse_onnx.cli import main

main()
