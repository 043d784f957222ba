"""models/__init__.py: the zoo's catalogue."""

import subprocess
import sys

import pytest
import torch

from sparse_onnx import models
from sparse_onnx.core.errors import UsageError


def test_the_catalogue_answers_without_torch():
    code = (
        "import sys; from sparse_onnx import models; models.get(models.names()[0]).description;"
        "assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("missing", ["torch", "safetensors"])
def test_a_missing_library_is_a_usage_error_with_the_command(missing):
    code = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "from sparse_onnx import models\n"
        "try: models.get('byte-moe').load()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert answer.startswith("UsageError") and missing in answer and "pip install 'sparse-onnx[hf]'" in answer


@pytest.mark.parametrize("name", models.names())
def test_every_entry_loads_what_an_export_needs(name):
    entry = models.get(name)
    assert entry.name == name and len(entry.description) < 100

    module, inputs, dynamic_axes = entry.load()

    assert not module.training
    assert set(dynamic_axes) == set(inputs)
    for key, axes in dynamic_axes.items():
        assert set(axes.values()) <= {"batch", "sequence"}
        sizes = [inputs[key].shape[axis] for axis in axes]
        assert min(sizes) >= 2 and len(set(sizes)) == len(sizes), (
            "an exporter may specialise 1 or merge equals"
        )
    with torch.no_grad():
        assert torch.isfinite(module(**inputs)).all()


def test_a_near_miss_is_named():
    with pytest.raises(UsageError, match="did you mean 'byte-moe'"):
        models.get("byte_mow")


def test_a_far_miss_lists_the_names():
    with pytest.raises(UsageError, match="the zoo has: byte-moe"):
        models.get("resnet")
