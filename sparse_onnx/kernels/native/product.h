// One product by thresholded inputs, shared out to the threads of a session.
#pragma once

#include <memory>

#include "call.h"
#include "linear.h"

namespace sparse_onnx {

constexpr int64_t kAlone = 1 << 16;  // products of several tokens below which waking threads costs more than it gives
constexpr int64_t kUnion = 32;       // tokens up to which a row of weights may be needed by none

// Room for floats that begins on a line of the cache; nothing is written into it.
class Room {
 public:
  explicit Room(int64_t floats) : held_(new float[floats + 16]) {}
  float* get() const { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(held_.get()) + 63) / 64 * 64); }

 private:
  std::unique_ptr<float[]> held_;
};

// Room of the calling thread, which the next call overwrites; nothing is written into it.
float* scratch(int64_t floats);

// Numbers of any float type as floats; those of floats stay where they are.
class Wide {
 public:
  Wide(Type type, const void* data, int64_t count);
  const float* get() const { return at_; }

 private:
  Room room_;
  const float* at_;
};

// tau or centre of an operator: one number, or one an input.
struct Bounds {
  Wide tau, centre;
  Rule rule;
  Bounds(Type type, const Tensor& tau, const Tensor& centre, int64_t inputs);
};

// Parts that so many rows of weights are worth, each for a thread.
int64_t parts_of(const Weights&, int64_t rows);

// Columns that a thread takes at a time for many tokens: two turns for each thread of a machine at least, where there are
// enough columns.
int64_t strip_of(int64_t columns);

// y [tokens, N] = S(x - centre) W + bias: x [tokens, K], bias [N]. Without a context this thread computes all of it.
void product(ort::KernelContext*, const Weights&, const float* x, int64_t tokens, const Rule&, const float* bias, float* y);

// The same of one row whose inputs were chosen already.
void product(ort::KernelContext*, const Weights&, const Kept&, const float* bias, float* y);

// The scales and zero points of integers, [rows, columns / block] or [rows / block, columns].
void set_scales(Weights&, const Tensor& scale, const Tensor& zero, size_t first_dim);

}  // namespace sparse_onnx
