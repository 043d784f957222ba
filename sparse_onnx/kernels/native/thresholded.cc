// A linear layer whose inputs near a centre are skipped:
//
//   Y = S(X - centre) W + folded_bias        S(v) = v where |v| > tau, else 0
//
//   X [..., K], W [K, N], tau [1] or [K], centre [1] or [K], folded_bias [N] -> Y [..., N], all of one float type;
//   NBits: W integers, then scales and zero_points [K, N / block] or [K / block, N] behind it.
#include "operators.h"
#include "product.h"

using namespace sparse_onnx;

namespace {

void linear(const Inputs& given, Type type, Type weight_type) {
  ort::KernelContext* context = given.context;
  const bool packed = weight_type >= Type::I8;
  const Tensor x = given[0], w = given[1];
  const size_t behind = packed ? 4 : 2;
  if (w.shape.size() != 2 || x.shape.empty() || x.shape.back() != w.shape[0]) refuse("X [..., K] and W [K, N] disagree");
  const int64_t inputs = w.shape[0], outputs = w.shape[1];
  if (inputs > INT32_MAX) refuse("K is too large");
  Weights weights{weight_type, w.data, inputs, outputs, type, nullptr, nullptr, 1, 1};
  if (packed) set_scales(weights, given[2], given[3], 0);
  const Bounds bounds(type, given[behind], given[behind + 1], inputs);
  const Tensor bias = given[behind + 2];
  if (bias.size() != outputs) refuse("folded_bias has not N elements");

  std::vector<int64_t> shape = x.shape;
  shape.back() = outputs;
  void* y = output(context, shape);
  const int64_t tokens = x.rows();
  if (!tokens || !outputs) return;
  const Wide wide_x(type, x.data, tokens * inputs), wide_bias(type, bias.data, outputs);
  if (type == Type::F32)
    return product(context, weights, wide_x.get(), tokens, bounds.rule, wide_bias.get(), static_cast<float*>(y));
  Room sums(tokens * outputs);
  product(context, weights, wide_x.get(), tokens, bounds.rule, wide_bias.get(), sums.get());
  level().narrow(type, sums.get(), y, tokens * outputs);
}

}  // namespace

namespace sparse_onnx {

const Signature kLinear{"ThresholdedLinear", 5, [](size_t) { return false; }, linear};
const Signature kLinearNBits{"ThresholdedLinearNBits", 7, [](size_t at) { return at == 1 || at == 3; }, linear};

}  // namespace sparse_onnx
