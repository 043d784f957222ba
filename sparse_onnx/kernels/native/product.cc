#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>

namespace sparse_onnx {

float* scratch(int64_t floats) {
  thread_local int64_t size = 0;
  thread_local Room room(0);  // grows once a thread, and stays
  if (size < floats) room = Room(size = floats);
  return room.get();
}

namespace {

// Bytes of weights for which it is worth waking a thread. What a session's pool has is not to be learned from ONNX
// Runtime: parts follow from sizes and the machine, so results do not change with the threads, and a pool of fewer
// threads takes several of them each.
constexpr int64_t kEachThread = 1 << 17;
constexpr int64_t kLeastRows = 16;     // that a thread takes
constexpr int64_t kLeastBytes = 512;   // of a row that a thread reads, where threads share rows out
// How many tokens may need a row of weights, on average over the rows that any needs, for tokens to be computed one by
// one, each reading its own rows: measured with AVX-512, for weights as large as float32 and for integers.
constexpr double kAgain = 1.7, kAgainIntegers = 6.5;

// work(first, last) for all columns.
template <class F>
void by_columns(ort::KernelContext* context, int64_t columns, int64_t part, F&& work) {
  part = (part + kColumns - 1) / kColumns * kColumns;
  parallel(context, (columns + part - 1) / part,
           [&](int64_t at) { work(at * part, std::min(columns, (at + 1) * part)); });
}

}  // namespace

namespace {

const int64_t processors = std::max(1u, std::thread::hardware_concurrency());

}  // namespace

int64_t strip_of(int64_t columns) {
  const int64_t each = (columns + 2 * processors - 1) / (2 * processors);
  return std::min(kStrip, (each + kColumns - 1) / kColumns * kColumns);
}

int64_t parts_of(const Weights& w, int64_t rows) {
  return std::max<int64_t>(1, std::min(processors, rows * w.columns * bits(w.type) / 8 / kEachThread));
}

Wide::Wide(Type type, const void* data, int64_t count)
    : room_(type == Type::F32 ? 0 : count), at_(static_cast<const float*>(data)) {
  if (type == Type::F32) return;
  level().widen(type, data, room_.get(), count);
  at_ = room_.get();
}

Bounds::Bounds(Type type, const Tensor& tau_tensor, const Tensor& centre_tensor, int64_t inputs)
    : tau(type, tau_tensor.data, tau_tensor.size()), centre(type, centre_tensor.data, centre_tensor.size()) {
  if (tau_tensor.size() != 1 && tau_tensor.size() != inputs) refuse("tau has neither 1 nor K elements");
  if (centre_tensor.size() != 1 && centre_tensor.size() != inputs) refuse("centre has neither 1 nor K elements");
  rule = {tau.get(), centre.get(), tau_tensor.size() != 1, centre_tensor.size() != 1};
}

void product(ort::KernelContext* context, const Weights& w, const Kept& kept, const float* bias, float* y) {
  const Level& best = level();
  const int64_t most = context ? parts_of(w, kept.count) : 1;
  // The sums of all parts but one are written and read again: 8 bytes a column, of which rows read 20 times as many.
  const int64_t worth = 1 + kept.count * bits(w.type) / (8 * 8 * 20);
  const int64_t by_rows = std::min({most, kept.count / kLeastRows, worth});
  if (by_rows < std::min<int64_t>(most, 8) || most == 1) {
    by_columns(context, w.columns, std::max(kLeastBytes * 8 / bits(w.type), (w.columns + most - 1) / most),
               [&](int64_t first, int64_t last) {
                 best.row(w, kept, y, first, last, scratch(best.row_scratch(w, last - first)));
                 for (int64_t column = first; column < last; ++column) y[column] += bias[column];
               });
    return;
  }
  // Whole rows, of which each thread takes some: memory is read in longer runs than where columns are shared out.
  Room sums((by_rows - 1) * w.columns);
  const auto own = [&](int64_t part) { return part ? sums.get() + (part - 1) * w.columns : y; };
  parallel(context, by_rows, [&](int64_t part) {
    const int64_t begin = kept.count * part / by_rows, end = kept.count * (part + 1) / by_rows;
    const Kept some{kept.index + begin, kept.value + begin, end - begin};
    best.row(w, some, own(part), 0, w.columns, scratch(best.row_scratch(w, w.columns)));
  });
  for (int64_t part = 0; part < by_rows; ++part) {
    const float* more = part ? own(part) : bias;
    for (int64_t column = 0; column < w.columns; ++column) y[column] += more[column];
  }
}

void product(ort::KernelContext* context, const Weights& w, const float* x, int64_t tokens, const Rule& rule,
             const float* bias, float* y) {
  const Level& best = level();
  const int64_t inputs = w.rows, depth = best.depth;
  std::unique_ptr<int32_t[]> index(new int32_t[inputs + 16]);
  const auto one = [&](int64_t token) {
    Room value(inputs + 16);
    const int64_t kept = best.choose(x + token * inputs, inputs, rule, index.get(), value.get());
    product(context, w, Kept{index.get(), value.get(), kept}, bias, y + token * w.columns);
  };
  if (tokens == 1) return one(0);

  int64_t count = inputs;
  Room parts((inputs + depth - 1) / depth * depth * tokens);
  if (tokens <= kUnion) {
    Room masked(tokens * inputs);
    for (int64_t token = 0; token < tokens; ++token)
      best.mask(x + token * inputs, inputs, rule, masked.get() + token * inputs);
    std::vector<char> used(inputs, 0);
    int64_t each = 0;
    for (int64_t token = 0; token < tokens; ++token)
      for (int64_t k = 0; k < inputs; ++k) {
        const bool kept = masked.get()[token * inputs + k] != 0;
        used[k] |= kept, each += kept;
      }
    count = 0;
    for (int64_t k = 0; k < inputs; ++k) {
      index[count] = (int32_t)k;
      count += used[k];
    }
    if (each < (w.scale ? kAgainIntegers : kAgain) * count) {
      for (int64_t token = 0; token < tokens; ++token) one(token);
      return;
    }
    for (int64_t k = 0; k < count; ++k)
      for (int64_t token = 0; token < tokens; ++token)
        parts.get()[(k / depth * tokens + token) * depth + k % depth] = masked.get()[token * inputs + index[k]];
  } else {
    std::iota(index.get(), index.get() + inputs, 0);
    const int64_t some = 16;
    parallel(context, (tokens + some - 1) / some, [&](int64_t at) {
      for (int64_t token = at * some; token < std::min(tokens, (at + 1) * some); ++token)
        for (int64_t k = 0; k < inputs; k += depth) {
          const Rule here{rule.tau + rule.tau_step * k, rule.centre + rule.centre_step * k, rule.tau_step, rule.centre_step};
          best.mask(x + token * inputs + k, std::min(depth, inputs - k), here, parts.get() + k * tokens + token * depth);
        }
    });
  }
  const int64_t part = tokens * count * w.columns >= kAlone ? strip_of(w.columns) : w.columns;
  by_columns(context, w.columns, part, [&](int64_t first, int64_t last) {
    best.rows(w, parts.get(), index.get(), count, tokens, bias, y, first, last, scratch(best.rows_scratch));
  });
}

void set_scales(Weights& w, const Tensor& scale, const Tensor& zero, size_t first_dim) {
  if (scale.shape.size() != first_dim + 2 || scale.shape != zero.shape)
    refuse("scales and zero_points are not matrices of one shape");
  const int64_t down = scale.shape[first_dim], across = scale.shape[first_dim + 1];
  if (down == w.rows && across > 0 && w.columns % across == 0) {
    w.block_rows = 1, w.block_columns = w.columns / across;
  } else if (across == w.columns && down > 0 && w.rows % down == 0) {
    w.block_rows = w.rows / down, w.block_columns = 1;
  } else {
    refuse("scales are neither [K, N / block] nor [K / block, N]");
  }
  w.scale = scale.data, w.zero = zero.data;
}

}  // namespace sparse_onnx
