// ONNX Runtime's C API as the operators use it: errors are thrown within, and become a status at the door.
#pragma once

#include <atomic>
#include <memory>
#include <new>
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
  int64_t rows() const {  // of an input [..., K]
    int64_t total = 1;
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) total *= shape[axis];
    return total;
  }
};

Tensor tensor(const ort::Value* value);

// By input: copies of constants that a kernel holds, null for everything else.
using Copies = std::vector<std::shared_ptr<const void>>;

// What an operator is run on.
struct Inputs {
  ort::KernelContext* context;
  const Copies& copies;
  Tensor operator[](size_t index) const;
};

void* output(ort::KernelContext* context, const std::vector<int64_t>& shape);

// work(0) .. work(count - 1), on the threads of the session; without a context on this one, as within other work.
template <class F>
void parallel(ort::KernelContext* context, int64_t count, const F& work) {
  if (count <= 1 || !context) {
    for (int64_t at = 0; at < count; ++at) work(at);
    return;
  }
  struct Shared {
    const F& work;
    std::atomic<bool> failed;
  } shared{work, {false}};
  check(ort::entry<ort::Status*(const ort::KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(
      api, ort::kKernelContextParallelFor)(
      context,
      [](void* data, size_t at) {
        Shared& shared = *static_cast<Shared*>(data);
        try {
          shared.work((int64_t)at);
        } catch (...) {  // there is no way through ONNX Runtime's threads
          shared.failed = true;
        }
      },
      (size_t)count, 0, &shared));
  if (shared.failed) throw std::bad_alloc();
}

}  // namespace sparse_onnx
