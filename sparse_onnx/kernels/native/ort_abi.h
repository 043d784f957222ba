// The few entries of ONNX Runtime's C API that the kernels use, by their place in its table of functions. Wheels of
// onnxruntime carry no headers; places never change between versions (entries are only added at the end), and
// tests/kernels/test_abi.py compares them with the real header. Source: onnxruntime_c_api.h, API version 17 (MIT).
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 17;  // OrtCustomOp up to GetEndVersion; served by ONNX Runtime 1.17 and newer

struct Status;
struct Value;
struct TypeAndShape;
struct KernelContext;
struct KernelInfo;
struct CustomOpDomain;
struct SessionOptions;

struct Api {  // an array of function pointers
  const void* entries[1];
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum Place : size_t {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShapeInfo = 99,
  kHasSessionConfigEntry = 237,
  kGetSessionConfigEntry = 238,
  kKernelInfoGetConstantInputTensor = 249,
  kKernelContextParallelFor = 274,
};

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

enum ElementType { kFloat = 1, kUInt8 = 2, kInt8 = 3, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16, kUInt4 = 21, kInt4 = 22 };

enum Characteristic { kRequired = 0 };
enum MemoryType { kDefaultMemory = 0 };

struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, void*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  // What API 17 does not have; never read by it, here so that a newer runtime finds zeros.
  void* newer[4];
};

template <class F>
F* entry(const Api* api, Place place) {
  return reinterpret_cast<F*>(const_cast<void*>(api->entries[place]));
}

}  // namespace ort
