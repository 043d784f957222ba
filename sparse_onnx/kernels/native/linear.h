// Products that skip the weights of inputs that are zero, one function a processor level.
#pragma once

#include <cstdint>

namespace sparse_onnx {

enum class Type : int { F32, F16, BF16, I8, U8, I4, U4 };

inline int64_t bits(Type type) { return type == Type::F32 ? 32 : type <= Type::BF16 ? 16 : type <= Type::U8 ? 8 : 4; }

// W [rows, columns], one input of the layer a row. Integers are (w - zero) * scale, where scale and zero have one entry
// for `block_rows` x `block_columns` weights, row by row; one of the two blocks is 1, or spans the whole axis. Floats
// have no scale; `zero` is null where all zero points are 0.
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

// Where one token's inputs are, and what is kept of them: x - centre where that is not within tau. Steps are 1 or 0.
struct Rule {
  const float *tau, *centre;
  int64_t tau_step, centre_step;
};

// Columns are shared out in multiples of this: whole bytes, lines of the cache and vectors of every level.
constexpr int64_t kColumns = 128;

// Columns that one thread computes for many tokens: of its weights, parts of so many are floats in the cache.
constexpr int64_t kStrip = 512;

struct Level {
  const char* name;
  // Inputs that are kept, into index and value, which have room for count + 16; how many.
  int64_t (*choose)(const float* x, int64_t count, const Rule&, int32_t* index, float* value);
  // The same with zeros for what is not kept.
  void (*mask)(const float* x, int64_t count, const Rule&, float* out);
  // out = S(gate) * (up + bias), S as above.
  void (*gate)(const float* gate, const float* up, const float* bias, float tau, int64_t count, float* out);
  // y[first..last) = the product of one row; y is whole, `first` a multiple of kColumns.
  void (*row)(const Weights&, const Kept&, float* y, int64_t first, int64_t last, float* scratch);
  int64_t (*row_scratch)(const Weights&, int64_t columns);  // floats that `row` needs
  // y [tokens, columns] = products + bias, columns first..last. x is in parts of `depth` inputs, [ceil(count / depth), tokens, depth],
  // with zeros where inputs are skipped and behind the last; `index` has the rows of W that they belong to.
  void (*rows)(const Weights&, const float* x, const int32_t* index, int64_t count, int64_t tokens, const float* bias,
               float* y, int64_t first, int64_t last, float* scratch);
  // The same without a bias where `index` names rows of W that are its columns, `count` of them: x [ceil(columns / depth), tokens, depth],
  // y [tokens, count], its columns first..last.
  void (*turned)(const Weights&, const float* x, const int32_t* index, int64_t count, int64_t tokens, float* y,
                 int64_t first, int64_t last, float* scratch);
  int64_t rows_scratch;  // floats that `rows` and `turned` need
  int64_t depth;
  // The other way round: out[at] = the row index[at] of W times one x, which `lay` put into `laid` floats.
  int64_t (*laid)(const Weights&);
  void (*lay)(const Weights&, const float* x, float* out);
  void (*dots)(const Weights&, const float* laid, const int32_t* index, int64_t count, float* out, float* scratch);
  int64_t (*dots_scratch)(const Weights&);
  // Of several: out[token * stride + at]; x in parts of `strip` columns, [ceil(columns / strip), tokens, strip], with
  // zeros behind the last.
  void (*cross)(const Weights&, const float* x, int64_t tokens, const int32_t* index, int64_t count, float* out,
                int64_t stride, float* scratch);
  int64_t (*cross_scratch)(int64_t tokens);
  int64_t strip;
  // To float and back.
  void (*widen)(Type, const void*, float*, int64_t);
  void (*narrow)(Type, const float*, void*, int64_t);
};

// The best level that this processor runs.
const Level& level();

}  // namespace sparse_onnx
