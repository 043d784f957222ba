// Products that skip the weights of inputs that are zero, one function a processor level.
#pragma once

#include <cstdint>

namespace sparse_onnx {

enum class Type : int { F32, F16, BF16, I8, U8, I4, U4 };

// W [rows, columns], one input of the layer a row. Integers are (w - zero) * scale, where scale and zero have one entry
// for `block_rows` x `block_columns` weights, row by row; one of the two blocks is 1, or spans the whole axis. Floats
// have no scale.
struct Weights {
  Type type;
  const void* data;
  int64_t rows, columns;
  Type scale_type;
  const void* scale;
  const void* zero;
  int64_t block_rows, block_columns;
};

// Inputs of one row of x that are not zero: their numbers, ascending, and values.
struct Kept {
  const int32_t* index;
  const float* value;
  int64_t count;
};

struct Level {
  const char* name;
  // y[first..last) = the product of one row; y is whole. `scratch` has room for last - first floats.
  void (*row)(const Weights&, const Kept&, float* y, int64_t first, int64_t last, float* scratch);
  // y [tokens, columns], columns first..last; x [tokens, rows], zeros where inputs are skipped.
  void (*rows)(const Weights&, const float* x, int64_t tokens, float* y, int64_t first, int64_t last, float* scratch);
  int64_t rows_scratch;  // floats that `rows` needs
  // Rows to float and back.
  void (*widen)(Type, const void*, float*, int64_t);
  void (*narrow)(Type, const float*, void*, int64_t);
};

// The best level that this processor runs.
const Level& level();

}  // namespace sparse_onnx
