// Linear layers of experts, of which each row goes through the one that its index names, and skips inputs near a centre:
//
//   Y[s] = S(X[s] - centre) W[index[s]] + folded_bias[index[s]]        S(v) = v where |v| > tau, else 0
//
//   X [S, K], index [S] int64, W [E, K, N], tau [1] or [K], centre [1] or [K], folded_bias [E, N] -> Y [S, N], all but
//   index of one float type; NBits: W integers, then scales and zero_points [E, K, N / block] or [E, K / block, N].
//
// Rows of one expert are computed together, so that its weights are read once.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "operators.h"
#include "product.h"

using namespace sparse_onnx;

namespace {

struct Layer {
  Weights first;  // of expert 0; all others lie behind it
  Type type;      // of the bias
  const void* bias;
  const float* x;
  float* y;
  Rule rule;
};

const uint8_t* behind(const void* base, int64_t bytes) { return static_cast<const uint8_t*>(base) + bytes; }

// Rows that one expert computes: places [begin, begin + count) in the order of experts.
struct Group {
  int64_t expert, begin, count;
};

// The weights of one expert. `moved` holds its zero points where they do not begin on a whole byte.
Weights weights_of(const Weights& first, int64_t expert, std::vector<uint8_t>& moved) {
  Weights w = first;
  w.data = behind(w.data, expert * w.rows * w.columns * bits(w.type) / 8);
  if (!w.scale) return w;
  const int64_t entries = w.rows / w.block_rows * (w.columns / w.block_columns);
  w.scale = behind(w.scale, expert * entries * bits(w.scale_type) / 8);
  const int64_t begin = expert * entries * bits(w.type);
  w.zero = behind(w.zero, begin / 8);
  if (begin % 8 == 0) return w;
  const uint8_t* from = static_cast<const uint8_t*>(w.zero);
  moved.resize((entries + 1) / 2);
  for (int64_t entry = 0; entry < entries; entry += 2)
    moved[entry / 2] = from[entry / 2] >> 4 | (entry + 1 < entries ? from[entry / 2 + 1] << 4 : 0);
  w.zero = moved.data();
  return w;
}

void compute(ort::KernelContext* context, const Layer& layer, const Group& group, const int64_t* order) {
  std::vector<uint8_t> moved;
  const Weights w = weights_of(layer.first, group.expert, moved);
  const Wide bias(layer.type, behind(layer.bias, group.expert * w.columns * bits(layer.type) / 8), w.columns);
  const int64_t* own = order + group.begin;
  if (group.count == 1)
    return product(context, w, layer.x + *own * w.rows, 1, layer.rule, bias.get(), layer.y + *own * w.columns);
  Room rows(group.count * w.rows), results(group.count * w.columns);
  for (int64_t at = 0; at < group.count; ++at)
    std::copy_n(layer.x + own[at] * w.rows, w.rows, rows.get() + at * w.rows);
  product(context, w, rows.get(), group.count, layer.rule, bias.get(), results.get());
  for (int64_t at = 0; at < group.count; ++at)
    std::copy_n(results.get() + at * w.columns, w.columns, layer.y + own[at] * w.columns);
}

// All experts: several by each thread where there are enough of them, else one after the other by all threads. Which
// way it is follows from sizes, so results do not change with the threads.
void compute(ort::KernelContext* context, const Layer& layer, const std::vector<Group>& groups, const int64_t* order,
             int64_t rows) {
  const int64_t threads = parts_of(layer.first, rows * layer.first.rows);
  if (threads == 1 || (int64_t)groups.size() < 2 * threads) {
    for (const Group& group : groups) compute(threads == 1 ? nullptr : context, layer, group, order);
    return;
  }
  std::vector<Group> sorted;
  for (const Group& group : groups)  // more than one thread's part is shared out
    if (group.count * threads > rows)
      compute(context, layer, group, order);
    else
      sorted.push_back(group);
  std::stable_sort(sorted.begin(), sorted.end(), [](const Group& a, const Group& b) { return a.count > b.count; });
  std::vector<std::vector<Group>> parts(threads);
  std::vector<int64_t> load(threads, 0);
  for (const Group& group : sorted) {
    const int64_t least = std::min_element(load.begin(), load.end()) - load.begin();
    parts[least].push_back(group), load[least] += group.count + 1;
  }
  parallel(context, threads, [&](int64_t part) {
    for (const Group& group : parts[part]) compute(nullptr, layer, group, order);
  });
}

void experts(const Inputs& given, Type type, Type weight_type) {
  ort::KernelContext* context = given.context;
  const bool packed = weight_type >= Type::I8;
  const size_t tau = packed ? 5 : 3;
  const Tensor x = given[0], index = given[1], w = given[2];
  if (x.shape.size() != 2 || index.shape.size() != 1 || w.shape.size() != 3 || x.shape[0] != index.shape[0] ||
      x.shape[1] != w.shape[1])
    refuse("X [S, K], index [S] and W [E, K, N] disagree");
  const int64_t rows = x.shape[0], count = w.shape[0], inputs = w.shape[1], outputs = w.shape[2];
  if (inputs > INT32_MAX) refuse("K is too large");
  Layer layer{{weight_type, w.data, inputs, outputs, type, nullptr, nullptr, 1, 1}, type, nullptr, nullptr, nullptr, {}};
  if (count > 1 && inputs * outputs * bits(weight_type) % 8) refuse("experts do not begin on whole bytes");
  if (packed) {
    const Tensor scales = given[3];
    set_scales(layer.first, scales, given[4], 1);
    if (scales.shape[0] != count) refuse("scales are not those of E experts");
  }
  const Bounds bounds(type, given[tau], given[tau + 1], inputs);
  const Tensor bias = given[tau + 2];
  if (bias.shape != std::vector<int64_t>{count, outputs}) refuse("folded_bias is not [E, N]");

  const int64_t* expert = static_cast<const int64_t*>(index.data);
  std::vector<int64_t> begin(count + 1, 0), order(rows);
  for (int64_t row = 0; row < rows; ++row) {
    if (expert[row] < 0 || expert[row] >= count)
      refuse(("index " + std::to_string(expert[row]) + " of row " + std::to_string(row) + " is not from 0 to " +
              std::to_string(count - 1))
                 .c_str());
    ++begin[expert[row] + 1];
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<Group> groups;
  for (int64_t at = 0; at < count; ++at)
    if (begin[at + 1] > begin[at]) groups.push_back({at, begin[at], begin[at + 1] - begin[at]});
  for (int64_t row = 0; row < rows; ++row) order[begin[expert[row]]++] = row;

  void* y = output(context, {rows, outputs});
  if (!rows || !outputs) return;
  const Wide wide_x(type, x.data, rows * inputs);
  Room sums(type == Type::F32 ? 0 : rows * outputs);
  layer.x = wide_x.get(), layer.bias = bias.data, layer.rule = bounds.rule;
  layer.y = type == Type::F32 ? static_cast<float*>(y) : sums.get();
  compute(context, layer, groups, order.data(), rows);
  if (type != Type::F32) level().narrow(type, sums.get(), y, rows * outputs);
}

}  // namespace

namespace sparse_onnx {

const Signature kExpertLinear{"ThresholdedExpertLinear", 6, [](size_t) { return false; }, experts, 1};
const Signature kExpertLinearNBits{"ThresholdedExpertLinearNBits", 8, [](size_t at) { return at == 2 || at == 4; },
                                   experts, 1};

}  // namespace sparse_onnx
