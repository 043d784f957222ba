// Checks the package that it lies in, and runs its smoke input, on ONNX Runtime's C++ API.
//
//   c++ -std=c++17 -I INCLUDE run.cc -o run -L LIB -lonnxruntime -Wl,-rpath,LIB     of an onnxruntime-*.tgz release
//   ./run FOLDER
//
// It reads manifest.txt, and compares the sizes of files; run.py and run.mjs compare their sha256 too. It runs on the CPU
// provider: where the package is for another one, the place to append it is marked below.
// Exit codes: 0 right; 1 the model cannot be run; 2 usage; 3 a file is missing or damaged; 4 other outputs than expected;
// 5 this ONNX Runtime is too old.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "onnxruntime_cxx_api.h"

#if defined(__linux__) && defined(__x86_64__)
static const char kHere[] = "linux-x86_64";
#elif defined(__linux__) && defined(__aarch64__)
static const char kHere[] = "linux-aarch64";
#elif defined(__APPLE__) && defined(__aarch64__)
static const char kHere[] = "darwin-arm64";
#else
static const char kHere[] = "";
#endif

struct Array {
  std::string type, file, name;
  std::vector<int64_t> shape;
  std::vector<char> bytes;
};

[[noreturn]] static void Fail(int code, const std::string& message) {
  std::cerr << "error: " << message << "\n";
  std::exit(code);
}

static std::vector<char> Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Fail(3, path + " is missing: copy the package again");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

static Array ReadArray(std::istringstream& line, const std::string& folder) {
  Array array;
  size_t rank = 0;
  line >> array.type >> rank;
  array.shape.resize(rank);
  for (auto& size : array.shape) line >> size;
  line >> array.file >> std::ws;
  std::getline(line, array.name);
  array.bytes = Read(folder + "/" + array.file);
  return array;
}

static ONNXTensorElementDataType ElementType(const std::string& name) {
  static const std::map<std::string, ONNXTensorElementDataType> types = {
      {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},   {"float64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},
      {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}, {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},
      {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},       {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
      {"int16", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16},     {"uint16", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16},
      {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},     {"uint32", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT32},
      {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},     {"uint64", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT64},
  };
  const auto found = types.find(name);
  if (found == types.end()) Fail(3, "manifest.txt has the unknown type " + name);
  return found->second;
}

static double Half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1 + fraction / 1024.0, exponent - 15) : std::ldexp(fraction / 1024.0, -14));
}

template <typename T>
static T Load(const char* bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes + at * sizeof(T), sizeof(T));
  return value;
}

static double Number(const std::string& type, const char* bytes, size_t at) {
  if (type == "float32") return Load<float>(bytes, at);
  if (type == "float64") return Load<double>(bytes, at);
  return Half(Load<uint16_t>(bytes, at));
}

// The largest error relative to the largest finite magnitude expected; integers must be equal.
static double Error(const Array& want, const char* got, size_t count) {
  if (want.type.rfind("float", 0) != 0) {
    return std::memcmp(got, want.bytes.data(), want.bytes.size()) ? INFINITY : 0;
  }
  double worst = 0, scale = 1e-6;
  for (size_t at = 0; at < count; ++at) {
    const double one = Number(want.type, got, at), two = Number(want.type, want.bytes.data(), at);
    if (!std::isfinite(two)) {
      if (!(one == two || (std::isnan(one) && std::isnan(two)))) return INFINITY;
    } else if (!std::isfinite(one)) {
      return INFINITY;
    } else {
      worst = std::fmax(worst, std::fabs(one - two));
      scale = std::fmax(scale, std::fabs(two));
    }
  }
  return worst / scale;
}

static bool Older(const std::string& have, const std::string& need) {
  int a = 0, b = 0, c = 0, d = 0;
  std::sscanf(have.c_str(), "%d.%d", &a, &b);
  std::sscanf(need.c_str(), "%d.%d", &c, &d);
  return a < c || (a == c && b < d);
}

int main(int argc, char** argv) {
  if (argc > 2) Fail(2, "usage: run FOLDER");
  const std::string folder = argc > 1 ? argv[1] : ".";
  std::string model, minimum, kernels;
  double tolerance = 0;
  std::vector<Array> inputs, outputs;
  std::vector<std::pair<std::string, std::string>> config;
  std::ifstream manifest(folder + "/manifest.txt");
  if (!manifest) Fail(3, "manifest.txt is missing: copy the package again");
  for (std::string text; std::getline(manifest, text);) {
    std::istringstream line(text);
    std::string kind, word;
    line >> kind;
    if (kind == "schema" && line >> word && word != "1") Fail(5, "manifest.txt has schema " + word + ", and this reads 1");
    if (kind == "model") line >> model;
    if (kind == "minimum") line >> minimum;
    if (kind == "kernels" && line >> word >> text && text == kHere) kernels = word;  // others run without
    if (kind == "tolerance") line >> tolerance;
    if (kind == "config" && line >> word >> text) config.emplace_back(word, text);
    if (kind == "input") inputs.push_back(ReadArray(line, folder));
    if (kind == "output") outputs.push_back(ReadArray(line, folder));
    if (kind == "file") {
      long long size = 0;
      line >> size >> std::ws;
      std::getline(line, word);
      std::ifstream file(folder + "/" + word, std::ios::binary | std::ios::ate);
      if (!file) Fail(3, word + " is missing: copy the package again");
      if (file.tellg() != std::streampos(size)) Fail(3, word + " has another size than it should: copy it again");
    }
  }
  const std::string version = OrtGetApiBase()->GetVersionString();
  if (Older(version, minimum) || OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
    Fail(5, "onnxruntime " + version + " is too old: " + minimum + " and the version of its headers, or newer, is needed");
  }
  try {
    Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "run");
    Ort::SessionOptions options;
    for (const auto& [key, value] : config) options.AddConfigEntry(key.c_str(), value.c_str());
#ifndef _WIN32
    if (!kernels.empty()) options.RegisterCustomOpsLibrary((folder + "/" + kernels).c_str());
    const std::string path = folder + "/" + model;
#else
    const std::string narrow = folder + "/" + model;
    const std::wstring path(narrow.begin(), narrow.end());
#endif
    // Another provider is appended to `options` here.
    Ort::Session session(env, path.c_str(), options);
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<Ort::Value> feeds;
    std::vector<const char*> input_names, output_names;
    for (auto& each : inputs) {
      feeds.push_back(Ort::Value::CreateTensor(memory, each.bytes.data(), each.bytes.size(), each.shape.data(),
                                               each.shape.size(), ElementType(each.type)));
      input_names.push_back(each.name.c_str());
    }
    for (auto& each : outputs) output_names.push_back(each.name.c_str());
    auto results = session.Run(Ort::RunOptions{nullptr}, input_names.data(), feeds.data(), feeds.size(),
                               output_names.data(), output_names.size());
    double worst = 0;
    for (size_t at = 0; at < outputs.size(); ++at) {
      const auto shape = results[at].GetTensorTypeAndShapeInfo();
      const bool same = shape.GetShape() == outputs[at].shape && shape.GetElementType() == ElementType(outputs[at].type);
      const char* data = static_cast<const char*>(results[at].GetTensorRawData());
      const double error = same ? Error(outputs[at], data, shape.GetElementCount()) : INFINITY;
      if (!(error <= tolerance)) {
        Fail(4, "output '" + outputs[at].name + "' is off by " + std::to_string(error) + ", and " +
                    std::to_string(tolerance) + " is allowed");
      }
      worst = std::fmax(worst, error);
    }
    std::cout << "ok: " << model << ", error " << worst << ", on onnxruntime " << version << "\n";
  } catch (const Ort::Exception& error) {
    Fail(1, model + " cannot be run: " + error.what());
  }
  return 0;
}
