// Weights where they are read fastest: copies in large pages.
//
// Rows that are skipped leave gaps in what is read, and with pages of 4 KB a processor then waits for the addresses of
// pages as well as for the weights. Pages of 2 MB spare it that. ONNX Runtime asks for none, neither for what it
// reads into memory nor for files that it maps.
#pragma once

#include <cstddef>
#include <memory>

namespace sparse_onnx {

// A copy that lives as long as it is held, or null: where the system gives no large pages, or where so few bytes are not worth it.
std::shared_ptr<const void> held(const void* from, size_t bytes);

}  // namespace sparse_onnx
