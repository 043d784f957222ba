// The operators for ONNX Runtime: ThresholdedLinear and ThresholdedLinearNBits of the domain sparse_onnx.
//
//   Y = S(X - centre) W + folded_bias        S(v) = v where |v| > tau, else 0
//
//   X [..., K], W [K, N], tau [1] or [K], centre [1] or [K], folded_bias [N] -> Y [..., N], all of one float type;
//   NBits: W integers, then scales and zero_points [K, N / block] or [K / block, N] behind it.
//
// A few tokens read the weights of their own kept inputs only; more are a product of matrices whose skipped inputs are 0.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "linear.h"
#include "ort_abi.h"

using namespace sparse_onnx;

namespace {

const ort::Api* api = nullptr;

constexpr int64_t kFewTokens = 3;         // above, one pass over all weights for all tokens is faster
constexpr int64_t kAlone = 1 << 16;       // products below which waking threads costs more than it gives
constexpr int64_t kLeastColumns = 512;    // of a part: shorter pieces of rows lose the processor's prefetching

struct Failed {
  ort::Status* status;
};

void check(ort::Status* status) {
  if (status) throw Failed{status};
}

[[noreturn]] void refuse(const char* message) {
  throw Failed{ort::entry<ort::Status*(int, const char*)>(api, ort::kCreateStatus)(ort::kInvalidArgument, message)};
}

struct Tensor {
  std::vector<int64_t> shape;
  void* data = nullptr;
  int64_t size() const {
    int64_t total = 1;
    for (int64_t dim : shape) total *= dim;
    return total;
  }
};

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

Tensor input(ort::KernelContext* context, size_t index) {
  const ort::Value* value;
  check(ort::entry<ort::Status*(const ort::KernelContext*, size_t, const ort::Value**)>(api, ort::kKernelContextGetInput)(
      context, index, &value));
  return tensor(value);
}

struct Work {
  const Level& level;
  const Weights& weights;
  const Kept* kept;     // of each token, where there are few
  const float* x;       // [tokens, K] where there are many
  int64_t tokens, part;
  float* y;
};

void run_part(void* data, size_t index) {
  const Work& work = *static_cast<const Work*>(data);
  const int64_t first = (int64_t)index * work.part, last = std::min(work.weights.columns, first + work.part);
  thread_local std::vector<float> scratch;  // grows once a thread, and stays
  const int64_t needed = work.x ? work.level.rows_scratch : last - first;
  if ((int64_t)scratch.size() < needed) scratch.resize(needed);
  if (work.x) {
    work.level.rows(work.weights, work.x, work.tokens, work.y, first, last, scratch.data());
    return;
  }
  for (int64_t token = 0; token < work.tokens; ++token)
    work.level.row(work.weights, work.kept[token], work.y + token * work.weights.columns, first, last, scratch.data());
}

void in_parts(ort::KernelContext* context, Work& work, int64_t products) {
  const int64_t columns = work.weights.columns;
  int64_t parts = 1;
  if (products >= kAlone) {
    const int64_t threads = std::max(1u, std::thread::hardware_concurrency());
    parts = std::max<int64_t>(1, std::min<int64_t>(2 * threads, columns / kLeastColumns));
  }
  work.part = ((columns + parts - 1) / parts + 63) / 64 * 64;  // whole bytes, vectors and lines of the cache
  const int64_t total = (columns + work.part - 1) / work.part;
  if (total <= 1) {
    if (columns) run_part(&work, 0);
    return;
  }
  check(ort::entry<ort::Status*(const ort::KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(
      api, ort::kKernelContextParallelFor)(context, run_part, (size_t)total, 0, &work));
}

// The inputs of one token that are kept, and their distance from the centre.
int64_t choose(const float* x, int64_t count, const std::vector<float>& tau, const std::vector<float>& centre,
               int32_t* index, float* value) {
  const int64_t tau_step = tau.size() > 1, centre_step = centre.size() > 1;
  int64_t kept = 0;
  for (int64_t k = 0; k < count; ++k) {
    const float distance = x[k] - centre[k * centre_step];
    index[kept] = (int32_t)k;
    value[kept] = distance;
    kept += !(std::fabs(distance) <= tau[k * tau_step]);  // NaN is kept, as it is by a dense product
  }
  return kept;
}

void compute(ort::KernelContext* context, Type type, Type weight_type) {
  const bool packed = weight_type >= Type::I8;
  const Tensor x = input(context, 0), w = input(context, 1);
  const size_t behind = packed ? 4 : 2;
  const Tensor tau = input(context, behind), centre = input(context, behind + 1), bias = input(context, behind + 2);
  if (w.shape.size() != 2 || x.shape.empty() || x.shape.back() != w.shape[0]) refuse("X [..., K] and W [K, N] disagree");
  const int64_t inputs = w.shape[0], outputs = w.shape[1];
  if (tau.size() != 1 && tau.size() != inputs) refuse("tau has neither 1 nor K elements");
  if (centre.size() != 1 && centre.size() != inputs) refuse("centre has neither 1 nor K elements");
  if (bias.size() != outputs) refuse("folded_bias has not N elements");
  if (inputs > INT32_MAX) refuse("K is too large");

  Weights weights{weight_type, w.data, inputs, outputs, type, nullptr, nullptr, 1, 1};
  if (packed) {
    const Tensor scale = input(context, 2), zero = input(context, 3);
    if (scale.shape.size() != 2 || scale.shape != zero.shape) refuse("scales and zero_points are not matrices of one shape");
    const int64_t down = scale.shape[0], across = scale.shape[1];
    if (down == inputs && across > 0 && outputs % across == 0) {
      weights.block_rows = 1, weights.block_columns = outputs / across;
    } else if (across == outputs && down > 0 && inputs % down == 0) {
      weights.block_rows = inputs / down, weights.block_columns = 1;
    } else {
      refuse("scales are neither [K, N / block] nor [K / block, N]");
    }
    weights.scale = scale.data, weights.zero = zero.data;
  }

  std::vector<int64_t> shape = x.shape;
  shape.back() = outputs;
  ort::Value* output;
  check(ort::entry<ort::Status*(ort::KernelContext*, size_t, const int64_t*, size_t, ort::Value**)>(
      api, ort::kKernelContextGetOutput)(context, 0, shape.data(), shape.size(), &output));
  void* y;
  check(ort::entry<ort::Status*(ort::Value*, void**)>(api, ort::kGetTensorMutableData)(output, &y));
  const int64_t tokens = inputs ? x.size() / inputs : 0;
  if (!tokens || !outputs) return;

  const Level& best = level();
  std::vector<float> wide_tau(tau.size()), wide_centre(centre.size()), wide_bias(outputs);
  best.widen(type, tau.data, wide_tau.data(), tau.size());
  best.widen(type, centre.data, wide_centre.data(), centre.size());
  best.widen(type, bias.data, wide_bias.data(), outputs);
  std::vector<float> wide_x, wide_y;
  const float* numbers = static_cast<const float*>(x.data);
  float* sums = static_cast<float*>(y);
  if (type != Type::F32) {
    wide_x.resize(tokens * inputs), wide_y.resize(tokens * outputs);
    best.widen(type, x.data, wide_x.data(), tokens * inputs);
    numbers = wide_x.data(), sums = wide_y.data();
  }

  std::vector<int32_t> index(tokens > kFewTokens ? inputs : tokens * inputs);
  std::vector<float> value(index.size());
  Work work{best, weights, nullptr, nullptr, tokens, outputs, sums};
  if (tokens <= kFewTokens) {
    std::vector<Kept> kept(tokens);
    int64_t total = 0;
    for (int64_t token = 0; token < tokens; ++token) {
      kept[token] = {index.data() + token * inputs, value.data() + token * inputs,
                     choose(numbers + token * inputs, inputs, wide_tau, wide_centre, index.data() + token * inputs,
                            value.data() + token * inputs)};
      total += kept[token].count;
    }
    work.kept = kept.data();
    in_parts(context, work, total * outputs);
  } else {
    std::vector<float> masked(tokens * inputs, 0.0f);
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t count =
          choose(numbers + token * inputs, inputs, wide_tau, wide_centre, index.data(), value.data());
      for (int64_t at = 0; at < count; ++at) masked[token * inputs + index[at]] = value[at];
    }
    work.x = masked.data();
    in_parts(context, work, tokens * inputs * outputs);
  }
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t column = 0; column < outputs; ++column) sums[token * outputs + column] += wide_bias[column];
  if (type != Type::F32) best.narrow(type, sums, y, tokens * outputs);
}

// One operator for one pair of types; ONNX Runtime merges those of one name.
struct Operator : ort::CustomOp {
  Type type, weight_type;
};

const Operator& own(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }

ort::ElementType element(Type type) {
  switch (type) {
    case Type::F32: return ort::kFloat;
    case Type::F16: return ort::kFloat16;
    case Type::BF16: return ort::kBFloat16;
    case Type::I8: return ort::kInt8;
    case Type::U8: return ort::kUInt8;
    case Type::I4: return ort::kInt4;
    default: return ort::kUInt4;
  }
}

Operator make(Type type, Type weight_type) {
  Operator op;
  std::memset(static_cast<void*>(&op), 0, sizeof op);
  op.version = ort::kApiVersion;
  op.type = type, op.weight_type = weight_type;
  op.GetName = [](const ort::CustomOp* op) {
    return own(op).weight_type >= Type::I8 ? "ThresholdedLinearNBits" : "ThresholdedLinear";
  };
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const ort::CustomOp* op) -> size_t { return own(op).weight_type >= Type::I8 ? 7 : 5; };
  op.GetInputType = [](const ort::CustomOp* op, size_t index) {
    const bool packed = own(op).weight_type >= Type::I8;
    return element(index == 1 || (packed && index == 3) ? own(op).weight_type : own(op).type);
  };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const ort::CustomOp* op, size_t) { return element(own(op).type); };
  op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = op.GetVariadicOutputMinArity =
      op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return INT32_MAX; };
  op.CreateKernelV2 = [](const ort::CustomOp* op, const ort::Api*, const ort::KernelInfo*, void** kernel) -> ort::Status* {
    *kernel = const_cast<Operator*>(&own(op));
    return nullptr;
  };
  op.KernelDestroy = [](void*) {};
  op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) -> ort::Status* {
    const Operator& op = *static_cast<const Operator*>(kernel);
    try {
      compute(context, op.type, op.weight_type);
    } catch (const Failed& failed) {
      return failed.status;
    } catch (const std::exception& error) {
      return ort::entry<ort::Status*(int, const char*)>(api, ort::kCreateStatus)(ort::kFail, error.what());
    }
    return nullptr;
  };
  return op;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                  const ort::ApiBase* base) {
  const ort::Api* found = base->GetApi(ort::kApiVersion);
  if (!found) {
    const ort::Api* oldest = base->GetApi(1);
    return oldest ? ort::entry<ort::Status*(int, const char*)>(oldest, ort::kCreateStatus)(
                        ort::kFail, "the kernels of sparse-onnx need onnxruntime 1.17 or newer")
                  : nullptr;
  }
  static ort::CustomOpDomain* domain = nullptr;
  static ort::Status* failed = [&]() -> ort::Status* {  // once; sessions may be made on several threads
    api = found;
    static std::vector<Operator> operators;
    for (Type type : {Type::F32, Type::F16, Type::BF16}) {
      operators.push_back(make(type, type));
      for (Type weight : {Type::I8, Type::U8, Type::I4, Type::U4}) operators.push_back(make(type, weight));
    }
    if (ort::Status* status = ort::entry<ort::Status*(const char*, ort::CustomOpDomain**)>(
            api, ort::kCreateCustomOpDomain)("sparse_onnx", &domain))
      return status;
    for (const Operator& op : operators)
      if (ort::Status* status = ort::entry<ort::Status*(ort::CustomOpDomain*, const ort::CustomOp*)>(
              api, ort::kCustomOpDomainAdd)(domain, &op))
        return status;
    return nullptr;
  }();
  if (failed) return failed;
  return ort::entry<ort::Status*(ort::SessionOptions*, ort::CustomOpDomain*)>(api, ort::kAddCustomOpDomain)(options, domain);
}
