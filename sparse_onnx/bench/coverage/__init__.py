"""Which models each exporter takes, as a table made by one command: `python -m sparse_onnx.bench.coverage`."""
