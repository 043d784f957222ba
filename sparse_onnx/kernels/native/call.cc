#include "call.h"

namespace sparse_onnx {

const ort::Api* api = nullptr;

void check(ort::Status* status) {
  if (status) throw Failed{status};
}

void refuse(const char* message) {
  throw Failed{ort::entry<ort::Status*(int, const char*)>(api, ort::kCreateStatus)(ort::kInvalidArgument, message)};
}

Tensor tensor(const ort::Value* value) {
  Tensor result;
  ort::TypeAndShape* info;
  check(ort::entry<ort::Status*(const ort::Value*, ort::TypeAndShape**)>(api, ort::kGetTensorTypeAndShape)(value, &info));
  size_t rank = 0;
  ort::Status* status =
      ort::entry<ort::Status*(const ort::TypeAndShape*, size_t*)>(api, ort::kGetDimensionsCount)(info, &rank);
  if (!status) {
    result.shape.resize(rank);
    status = ort::entry<ort::Status*(const ort::TypeAndShape*, int64_t*, size_t)>(api, ort::kGetDimensions)(
        info, result.shape.data(), rank);
  }
  ort::entry<void(ort::TypeAndShape*)>(api, ort::kReleaseTensorTypeAndShapeInfo)(info);
  check(status);
  check(ort::entry<ort::Status*(ort::Value*, void**)>(api, ort::kGetTensorMutableData)(const_cast<ort::Value*>(value),
                                                                                         &result.data));
  return result;
}

Tensor Inputs::operator[](size_t index) const {
  const ort::Value* value;
  check(ort::entry<ort::Status*(const ort::KernelContext*, size_t, const ort::Value**)>(api, ort::kKernelContextGetInput)(
      context, index, &value));
  Tensor result = tensor(value);
  if (copies[index]) result.data = const_cast<void*>(copies[index].get());
  return result;
}

void* output(ort::KernelContext* context, const std::vector<int64_t>& shape) {
  ort::Value* value;
  check(ort::entry<ort::Status*(ort::KernelContext*, size_t, const int64_t*, size_t, ort::Value**)>(
      api, ort::kKernelContextGetOutput)(context, 0, shape.data(), shape.size(), &value));
  void* data;
  check(ort::entry<ort::Status*(ort::Value*, void**)>(api, ort::kGetTensorMutableData)(value, &data));
  return data;
}

}  // namespace sparse_onnx
