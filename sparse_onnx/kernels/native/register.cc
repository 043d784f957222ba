// The operators of the domain sparse_onnx for ONNX Runtime.
#include <cstring>
#include <exception>

#include "held.h"
#include "operators.h"

using namespace sparse_onnx;

namespace {

// A session's own choice: "held" (or nothing), copies of constant weights in large pages; "shared", ONNX Runtime's own.
constexpr const char* kWeights = "sparse_onnx.weights";

// One operator for one pair of types; ONNX Runtime merges those of one name.
struct Operator : ort::CustomOp {
  Type type, weight_type;
  const Signature* is;
  bool holds;
  Type of(size_t input) const { return is->stored(input) ? weight_type : type; }
};

struct Kernel {
  const Operator& op;
  Copies copies;
};

const Operator& own(const ort::CustomOp* op) { return *static_cast<const Operator*>(op); }

ort::Status* status_of(const char* message) {
  return ort::entry<ort::Status*(int, const char*)>(api, ort::kCreateStatus)(ort::kFail, message);
}

// Whatever is thrown, as a status.
template <class F>
ort::Status* guarded(const F& work) {
  try {
    work();
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::exception& error) {
    return status_of(error.what());
  }
  return nullptr;
}

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

std::shared_ptr<const void> copy(const ort::KernelInfo* info, size_t index, Type type) {
  int constant = 0;
  const ort::Value* value = nullptr;
  check(ort::entry<ort::Status*(const ort::KernelInfo*, size_t, int*, const ort::Value**)>(
      api, ort::kKernelInfoGetConstantInputTensor)(info, index, &constant, &value));
  if (!constant || !value) return nullptr;
  const Tensor found = tensor(value);
  return held(found.data, (size_t)(found.size() * bits(type) + 7) / 8);
}

Operator make(const Signature& is, Type type, Type weight_type, bool holds) {
  Operator op;
  std::memset(static_cast<void*>(&op), 0, sizeof op);
  op.version = ort::kApiVersion;
  op.type = type, op.weight_type = weight_type, op.is = &is, op.holds = holds;
  op.GetName = [](const ort::CustomOp* op) { return own(op).is->name; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const ort::CustomOp* op) { return own(op).is->inputs; };
  op.GetInputType = [](const ort::CustomOp* op, size_t index) {
    return index == own(op).is->index ? ort::kInt64 : element(own(op).of(index));
  };
  op.GetOutputTypeCount = [](const ort::CustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const ort::CustomOp* op, size_t) { return element(own(op).type); };
  op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const ort::CustomOp*, size_t) { return ort::kRequired; };
  op.GetInputMemoryType = [](const ort::CustomOp*, size_t) { return ort::kDefaultMemory; };
  op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = op.GetVariadicOutputMinArity =
      op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return INT32_MAX; };
  op.CreateKernelV2 = [](const ort::CustomOp* op, const ort::Api*, const ort::KernelInfo* info, void** kernel) -> ort::Status* {
    return guarded([&] {
      const Operator& is = own(op);
      std::unique_ptr<Kernel> made(new Kernel{is, Copies(is.is->inputs)});
      for (size_t at = 0; is.holds && at < made->copies.size(); ++at)
        if (at != is.is->index) made->copies[at] = copy(info, at, is.of(at));
      *kernel = made.release();
    });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) -> ort::Status* {
    const Kernel& is = *static_cast<const Kernel*>(kernel);
    return guarded([&] { is.op.is->compute({context, is.copies}, is.op.type, is.op.weight_type); });
  };
  return op;
}

// Whether a session wants weights held.
bool wanted(const ort::SessionOptions* options) {
  int given = 0;
  check(ort::entry<ort::Status*(const ort::SessionOptions*, const char*, int*)>(api, ort::kHasSessionConfigEntry)(
      options, kWeights, &given));
  if (!given) return true;
  char text[16] = "";
  size_t size = sizeof text;
  const auto read = ort::entry<ort::Status*(const ort::SessionOptions*, const char*, char*, size_t*)>(
      api, ort::kGetSessionConfigEntry);
  check(read(options, kWeights, nullptr, &(size = 0)));
  if (size <= sizeof text) check(read(options, kWeights, text, &size));
  if (std::strcmp(text, "held") && std::strcmp(text, "shared")) refuse("sparse_onnx.weights is neither held nor shared");
  return text[0] == 'h';
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
  static ort::CustomOpDomain* domains[2] = {};
  static ort::Status* failed = [&]() -> ort::Status* {  // once; sessions may be made on several threads
    api = found;
    static std::vector<Operator> operators[2];
    for (bool holds : {false, true}) {
      std::vector<Operator>& all = operators[holds];
      for (Type type : {Type::F32, Type::F16, Type::BF16}) {
        for (const Signature* is : {&kLinear, &kGatedMLP, &kExpertLinear}) all.push_back(make(*is, type, type, holds));
        for (const Signature* is : {&kLinearNBits, &kGatedMLPNBits, &kExpertLinearNBits})
          for (Type weight : {Type::I8, Type::U8, Type::I4, Type::U4}) all.push_back(make(*is, type, weight, holds));
      }
      if (ort::Status* status = ort::entry<ort::Status*(const char*, ort::CustomOpDomain**)>(
              api, ort::kCreateCustomOpDomain)("sparse_onnx", &domains[holds]))
        return status;
      for (const Operator& op : all)
        if (ort::Status* status = ort::entry<ort::Status*(ort::CustomOpDomain*, const ort::CustomOp*)>(
                api, ort::kCustomOpDomainAdd)(domains[holds], &op))
          return status;
    }
    return nullptr;
  }();
  if (failed) return status_of("onnxruntime did not take the operators of sparse-onnx");  // whoever gets it releases it
  bool holds = true;
  if (ort::Status* status = guarded([&] { holds = wanted(options); })) return status;
  return ort::entry<ort::Status*(ort::SessionOptions*, ort::CustomOpDomain*)>(api, ort::kAddCustomOpDomain)(
      options, domains[holds]);
}
