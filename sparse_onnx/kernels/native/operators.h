// An operator for ONNX Runtime: what it is called, what it reads, and what computes it.
#pragma once

#include "call.h"
#include "linear.h"

namespace sparse_onnx {

struct Signature {
  const char* name;
  size_t inputs;
  bool (*stored)(size_t index);  // whether an input is of the weights' type
  void (*compute)(const Inputs&, Type type, Type weight_type);
  size_t index = SIZE_MAX;  // an input of int64, where there is one
};

// Of numbers, and of integers with scales and zero points.
extern const Signature kLinear, kLinearNBits, kGatedMLP, kGatedMLPNBits, kExpertLinear, kExpertLinearNBits;

}  // namespace sparse_onnx
