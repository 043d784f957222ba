// ONNX Runtime's C API as the operators use it: errors are thrown within, and become a status at the door.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace sparse_onnx {

extern const ort::Api* api;

struct Failed {
  ort::Status* status;
};

void check(ort::Status* status);
[[noreturn]] void refuse(const char* message);

struct Tensor {
  std::vector<int64_t> shape;
  void* data = nullptr;
  int64_t size() const {
    int64_t total = 1;
    for (int64_t dim : shape) total *= dim;
    return total;
  }
};

Tensor input(ort::KernelContext* context, size_t index);
void* output(ort::KernelContext* context, const std::vector<int64_t>& shape);

// work(0) .. work(count - 1), on the threads of the session.
template <class F>
void parallel(ort::KernelContext* context, int64_t count, F&& work) {
  if (count == 1) return work(0);
  if (count < 1) return;
  check(ort::entry<ort::Status*(const ort::KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(
      api, ort::kKernelContextParallelFor)(
      context, [](void* data, size_t at) { (*static_cast<F*>(data))((int64_t)at); }, (size_t)count, 0, &work));
}

}  // namespace sparse_onnx
