"""Runs models in another environment, which has onnxruntime and numpy alone: requests and replies are lines of JSON.

    python worker.py PLUGIN FD     requests on standard input, replies to the file descriptor FD

    {"do": "create", "model": path, "providers": [[name, options], ...], "config": {key: value},
     "profile": prefix or null, "optimize": bool}  ->  {"id", "inputs", "outputs": [[name, type, shape]], "version"}
    {"do": "run", "id", "feeds": [[name, type, shape, file]], "folder"}  ->  {"outputs": [[type, shape, file]]}
    {"do": "placement", "id"}    ->  {"recorded": [[provider, [[name, operator]]]], "profiled": the same, or null}
    {"do": "close", "id"}        ->  {}

A failed request gets {"error": text, "kind": the exception's name}. Tensors are raw bytes in files.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import numpy as np
import onnxruntime

_RECORD = "session.record_ep_graph_assignment_info"


class Worker:
    def __init__(self, plugin: str) -> None:
        self.sessions: dict[int, Any] = {}
        self.devices: list[Any] = []
        self.plugin: Any = None
        if plugin:
            self.plugin = importlib.import_module(plugin)
            name = self.plugin.get_ep_name()
            onnxruntime.register_execution_provider_library(name, self.plugin.get_library_path())
            self.devices = [each for each in onnxruntime.get_ep_devices() if each.ep_name == name]

    def create(
        self, model: str, providers: list, config: dict[str, str], profile: str | None, optimize: bool
    ) -> dict:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        for key, value in {_RECORD: "1", **config}.items():
            options.add_session_config_entry(key, value)
        if self.plugin is not None:
            ((_, given),) = providers
            given = {key: self._path(value) for key, value in given.items()}
            options.add_provider_for_devices(self.devices[:1], given)
            session = onnxruntime.InferenceSession(model, options)
        else:
            listed = [tuple(each) for each in providers]
            session = onnxruntime.InferenceSession(model, options, providers=listed)
        number = len(self.sessions)
        self.sessions[number] = session
        return {
            "id": number,
            "inputs": [[each.name, each.type, each.shape] for each in session.get_inputs()],
            "outputs": [[each.name, each.type, each.shape] for each in session.get_outputs()],
            "version": onnxruntime.__version__,
        }

    def _path(self, value: str) -> str:
        """`@NAME` is what the plugin's function NAME gives: where a library lies."""
        return getattr(self.plugin, value[1:])() if value.startswith("@") else value

    def run(self, id: int, feeds: list, folder: str) -> dict:
        arrays = {
            name: np.fromfile(file, dtype).reshape(shape) if 0 not in shape else np.zeros(shape, dtype)
            for name, dtype, shape, file in feeds
        }
        results = []
        for number, array in enumerate(self.sessions[id].run(None, arrays)):
            file = os.path.join(folder, f"o{number}")
            array.tofile(file)
            results.append([array.dtype.name, list(array.shape), file])
        return {"outputs": results}

    def placement(self, id: int) -> dict:
        session = self.sessions[id]
        recorded = [
            [group.ep_name, [[node.name, node.op_type] for node in group.get_nodes()]]
            for group in session.get_provider_graph_assignment_info()
        ]
        profiled = None
        if session.get_session_options().enable_profiling:
            with open(session.end_profiling()) as file:
                events = json.load(file)
            suffix = "_kernel_time"
            ran = [each for each in events if each.get("cat") == "Node" and each["name"].endswith(suffix)]
            profiled = [
                [each["args"]["provider"], [[each["name"][: -len(suffix)], each["args"]["op_name"]]]]
                for each in ran
            ]
        return {"recorded": recorded, "profiled": profiled}

    def close(self, id: int) -> dict:
        self.sessions[id] = None
        return {}


def main() -> None:
    replies = os.fdopen(int(sys.argv[2]), "w")
    os.dup2(2, 1)  # libraries print to standard output
    try:
        worker: Worker | Exception = Worker(sys.argv[1])
    except Exception as error:
        worker = error
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if isinstance(worker, Exception):
                raise worker
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            reply = {"error": str(error) or type(error).__name__, "kind": type(error).__name__}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
