"""Our few declarations of ONNX Runtime's C API against the real header, from a package of npm's registry."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from sparse_onnx import kernels

_NATIVE = Path(kernels.__file__).parent / "native"
_PACKAGE = "com.github.asus4.onnxruntime@0.4.9"
#: What we call a place or a number, and what the header does where it is not the same name without a prefix.
_ENTRIES = {
    "CreateStatus": "kCreateStatus",
    "CreateCustomOpDomain": "kCreateCustomOpDomain",
    "CustomOpDomain_Add": "kCustomOpDomainAdd",
    "AddCustomOpDomain": "kAddCustomOpDomain",
    "GetTensorMutableData": "kGetTensorMutableData",
    "GetDimensionsCount": "kGetDimensionsCount",
    "GetDimensions": "kGetDimensions",
    "GetTensorTypeAndShape": "kGetTensorTypeAndShape",
    "KernelContext_GetInput": "kKernelContextGetInput",
    "KernelContext_GetOutput": "kKernelContextGetOutput",
    "ReleaseTensorTypeAndShapeInfo": "kReleaseTensorTypeAndShapeInfo",
    "KernelContext_ParallelFor": "kKernelContextParallelFor",
    "HasSessionConfigEntry": "kHasSessionConfigEntry",
    "GetSessionConfigEntry": "kGetSessionConfigEntry",
    "KernelInfoGetConstantInput_tensor": "kKernelInfoGetConstantInputTensor",
}
_NUMBERS = {
    "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT": "kFloat",
    "ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8": "kUInt8",
    "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8": "kInt8",
    "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16": "kFloat16",
    "ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16": "kBFloat16",
    "ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT4": "kUInt4",
    "ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4": "kInt4",
    "ORT_FAIL": "kFail",
    "ORT_INVALID_ARGUMENT": "kInvalidArgument",
    "INPUT_OUTPUT_REQUIRED": "kRequired",
    "OrtMemTypeDefault": "kDefaultMemory",
}


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("ONNXRUNTIME_HEADERS")
    if given:
        return Path(given)
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    folder = tmp_path_factory.mktemp("headers")
    packed = subprocess.run([npm, "pack", _PACKAGE], cwd=folder, capture_output=True, text=True)
    if packed.returncode:
        pytest.skip(f"npm cannot fetch {_PACKAGE}")
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        for member in archive:
            if re.search(r"ios-arm64/.*/Headers/[^/]+\.h$", member.name):
                (folder / Path(member.name).name).write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
    return folder


@pytest.mark.slow
def test_every_place_is_the_headers(headers: Path, tmp_path: Path) -> None:
    ours = (_NATIVE / "ort_abi.h").read_text()
    struct = ours[ours.index("struct CustomOp {") : ours.index("void* newer")]
    members = ["version", *re.findall(r"\(\*(\w+)\)", struct)]
    assert set(re.findall(r"^  (k\w+) = \d+,$", ours, re.M)) == set(_ENTRIES.values()), (
        "the test knows all places"
    )
    assert len(members) == 22
    lines = ['#include "onnxruntime_c_api.h"', '#include "ort_abi.h"', "#include <cstddef>"]
    lines += [
        f'static_assert(offsetof(OrtApi, {theirs}) == ort::{own} * sizeof(void*), "{theirs}");'
        for theirs, own in _ENTRIES.items()
    ]
    lines += [
        f'static_assert((int){theirs} == (int)ort::{own}, "{theirs}");' for theirs, own in _NUMBERS.items()
    ]
    lines += [
        f'static_assert(offsetof(OrtCustomOp, {name}) == offsetof(ort::CustomOp, {name}), "{name}");'
        for name in members
    ]
    source = tmp_path / "abi.cc"
    source.write_text("\n".join(lines) + "\n")
    compiled = subprocess.run(
        ["c++", "-std=c++17", "-fsyntax-only", f"-I{headers}", f"-I{_NATIVE}", str(source)],
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr
