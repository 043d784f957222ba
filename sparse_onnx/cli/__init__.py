"""The command line. `app.py` finds commands, one file each; they are imported when they are used."""

from sparse_onnx.cli.app import main

__all__ = ["main"]
