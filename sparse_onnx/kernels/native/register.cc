// The operators of the domain sparse_onnx for ONNX Runtime.
#include <cstring>
#include <exception>

#include "operators.h"

using namespace sparse_onnx;

namespace {

// One operator for one pair of types; ONNX Runtime merges those of one name.
struct Operator : ort::CustomOp {
  Type type, weight_type;
  const Signature* is;
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

Operator make(const Signature& is, Type type, Type weight_type) {
  Operator op;
  std::memset(static_cast<void*>(&op), 0, sizeof op);
  op.version = ort::kApiVersion;
  op.type = type, op.weight_type = weight_type, op.is = &is;
  op.GetName = [](const ort::CustomOp* op) { return own(op).is->name; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const ort::CustomOp* op) { return own(op).is->inputs; };
  op.GetInputType = [](const ort::CustomOp* op, size_t index) {
    if (index == own(op).is->index) return ort::kInt64;
    return element(own(op).is->stored(index) ? own(op).weight_type : own(op).type);
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
      op.is->compute(context, op.type, op.weight_type);
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
      for (const Signature* is : {&kLinear, &kGatedMLP, &kExpertLinear}) operators.push_back(make(*is, type, type));
      for (const Signature* is : {&kLinearNBits, &kGatedMLPNBits, &kExpertLinearNBits})
        for (Type weight : {Type::I8, Type::U8, Type::I4, Type::U4}) operators.push_back(make(*is, type, weight));
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
  if (failed)  // whoever gets a status releases it
    return ort::entry<ort::Status*(int, const char*)>(api, ort::kCreateStatus)(
        ort::kFail, "onnxruntime did not take the operators of sparse-onnx");
  return ort::entry<ort::Status*(ort::SessionOptions*, ort::CustomOpDomain*)>(api, ort::kAddCustomOpDomain)(options, domain);
}
