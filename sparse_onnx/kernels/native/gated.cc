// A gated feed-forward layer whose gate says which hidden units are computed at all (CATS, arXiv 2404.08763):
//
//   h = S(A) * (X up^T + up_bias), Y = h down + bias        S(a) = a where |a| > tau, else 0
//
//   A [..., I], X [..., K], up [I, K], up_bias [I], down [I, N], tau [1], bias [N] -> Y [..., N];
//   NBits: up and down integers, each with scales and zero points behind it.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "operators.h"
#include "product.h"

using namespace sparse_onnx;

namespace {

constexpr int64_t kPart = 64;  // rows of weights that a thread takes at a time, for several tokens
constexpr int64_t kMany = 96;  // tokens for which turning weights costs less than it gives: measured with AVX-512

struct Layer {
  Weights up, down;
  const float *up_bias, *bias;
  float tau;
};

bool skipped(float gate, float tau) { return std::fabs(gate) <= tau; }  // a NaN is kept

void one(ort::KernelContext* context, const Layer& layer, const float* gate, const float* x, float* y) {
  const Level& best = level();
  const Weights& up = layer.up;
  const float none = 0;
  const Rule rule{&layer.tau, &none, 0, 0};
  std::unique_ptr<int32_t[]> index(new int32_t[up.rows + 16]);
  Room value(up.rows + 16), result(up.rows), own(best.laid(up));
  const int64_t count = best.choose(gate, up.rows, rule, index.get(), value.get());
  best.lay(up, x, own.get());
  const int64_t parts = std::max<int64_t>(1, std::min(parts_of(up, count), count / 16));
  parallel(context, parts, [&](int64_t part) {
    const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    best.dots(up, own.get(), index.get() + begin, end - begin, result.get() + begin, scratch(best.dots_scratch(up)));
  });
  for (int64_t at = 0; at < count; ++at) value.get()[at] *= result.get()[at] + layer.up_bias[index[at]];
  product(context, layer.down, Kept{index.get(), value.get(), count}, layer.bias, y);
}

void several(ort::KernelContext* context, const Layer& layer, const float* gate, const float* x, int64_t tokens, float* y) {
  const Level& best = level();
  const Weights& up = layer.up;
  std::unique_ptr<int32_t[]> index(new int32_t[up.rows]);
  int64_t count = up.rows;
  std::iota(index.get(), index.get() + count, 0);
  if (tokens <= kUnion) {
    std::vector<char> used(up.rows, 0);
    for (int64_t token = 0; token < tokens; ++token)
      for (int64_t k = 0; k < up.rows; ++k) used[k] |= !skipped(gate[token * up.rows + k], layer.tau);
    count = 0;
    for (int64_t k = 0; k < up.rows; ++k)
      if (used[k]) index[count++] = (int32_t)k;
  }
  const bool many = tokens >= kMany;
  const int64_t width = many ? best.depth : best.strip, pieces = (up.columns + width - 1) / width;
  Room ups(tokens * count), hidden(tokens * up.rows), parts(pieces * tokens * width);
  parallel(context, pieces, [&](int64_t at) {
    const int64_t some = std::min(width, up.columns - at * width);
    for (int64_t token = 0; token < tokens; ++token) {
      float* to = parts.get() + (at * tokens + token) * width;
      std::copy_n(x + token * up.columns + at * width, some, to);
      std::fill(to + some, to + width, 0.0f);
    }
  });
  const int64_t worth = tokens * count * up.columns >= kAlone ? (many ? strip_of(count) : kPart) : std::max<int64_t>(1, count);
  parallel(context, (count + worth - 1) / worth, [&](int64_t at) {
    const int64_t begin = at * worth, end = std::min(count, begin + worth);
    if (many)
      best.turned(up, parts.get(), index.get(), count, tokens, ups.get(), begin, end, scratch(best.rows_scratch));
    else
      best.cross(up, parts.get(), tokens, index.get() + begin, end - begin, ups.get() + begin, count,
                 scratch(best.cross_scratch(tokens)));
  });
  const bool all = count == up.rows;
  Room some(all ? 0 : 3 * count);  // of the units that are used: bias, gate and result
  float *bias = some.get(), *chosen = bias + count, *found = chosen + count;
  if (!all) {
    std::fill(hidden.get(), hidden.get() + tokens * up.rows, 0.0f);
    for (int64_t at = 0; at < count; ++at) bias[at] = layer.up_bias[index[at]];
  }
  for (int64_t token = 0; token < tokens; ++token) {
    const float *own = gate + token * up.rows, *unit = ups.get() + token * count;
    float* to = hidden.get() + token * up.rows;
    if (all) {
      best.gate(own, unit, layer.up_bias, layer.tau, count, to);
      continue;
    }
    for (int64_t at = 0; at < count; ++at) chosen[at] = own[index[at]];
    best.gate(chosen, unit, bias, layer.tau, count, found);
    for (int64_t at = 0; at < count; ++at) to[index[at]] = found[at];
  }
  const float none = 0;  // what was skipped is zero now
  product(context, layer.down, hidden.get(), tokens, Rule{&none, &none, 0, 0}, layer.bias, y);
}

void gated(const Inputs& given, Type type, Type weight_type) {
  ort::KernelContext* context = given.context;
  const bool packed = weight_type >= Type::I8;
  const size_t wide = packed ? 3 : 1, down_at = 3 + wide;
  const Tensor gate = given[0], x = given[1], up = given[2], down = given[down_at];
  const Tensor up_bias = given[2 + wide], tau = given[down_at + wide];
  const Tensor bias = given[down_at + wide + 1];
  if (up.shape.size() != 2 || down.shape.size() != 2 || x.shape.empty() || gate.shape.size() != x.shape.size())
    refuse("A [..., I], X [..., K], up [I, K] and down [I, N] disagree");
  const int64_t units = up.shape[0], inputs = up.shape[1], outputs = down.shape[1];
  if (down.shape[0] != units || x.shape.back() != inputs || gate.shape.back() != units ||
      !std::equal(x.shape.begin(), x.shape.end() - 1, gate.shape.begin()))
    refuse("A [..., I], X [..., K], up [I, K] and down [I, N] disagree");
  if (units > INT32_MAX || inputs > INT32_MAX) refuse("I or K is too large");
  if (tau.size() != 1) refuse("tau has not 1 element");
  if (up_bias.size() != units || bias.size() != outputs) refuse("up_bias has not I elements, or bias not N");
  Layer layer{{weight_type, up.data, units, inputs, type, nullptr, nullptr, 1, 1},
              {weight_type, down.data, units, outputs, type, nullptr, nullptr, 1, 1}, nullptr, nullptr, 0};
  if (packed) {
    set_scales(layer.up, given[3], given[4], 0);
    set_scales(layer.down, given[down_at + 1], given[down_at + 2], 0);
  }
  std::vector<int64_t> shape = x.shape;
  shape.back() = outputs;
  void* y = output(context, shape);
  const int64_t tokens = x.rows();
  if (!tokens || !outputs) return;
  const Wide wide_gate(type, gate.data, tokens * units), wide_x(type, x.data, tokens * inputs);
  const Wide wide_up_bias(type, up_bias.data, units), wide_bias(type, bias.data, outputs), wide_tau(type, tau.data, 1);
  layer.up_bias = wide_up_bias.get(), layer.bias = wide_bias.get(), layer.tau = *wide_tau.get();
  Room sums(type == Type::F32 ? 0 : tokens * outputs);
  float* result = type == Type::F32 ? static_cast<float*>(y) : sums.get();
  if (tokens == 1)
    one(context, layer, wide_gate.get(), wide_x.get(), result);
  else
    several(context, layer, wide_gate.get(), wide_x.get(), tokens, result);
  if (type != Type::F32) level().narrow(type, result, y, tokens * outputs);
}

}  // namespace

namespace sparse_onnx {

const Signature kGatedMLP{"ThresholdedGatedMLP", 7, [](size_t) { return false; }, gated};
const Signature kGatedMLPNBits{"ThresholdedGatedMLPNBits", 11,
                               [](size_t at) { return at == 2 || at == 4 || at == 6 || at == 8; }, gated};

}  // namespace sparse_onnx
