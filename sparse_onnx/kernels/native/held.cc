#include "held.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#endif

namespace sparse_onnx {

#if defined(__linux__)

namespace {

constexpr size_t kPage = size_t{1} << 21;
constexpr size_t kChunk = 16 * kPage;        // small copies share one; what is not written of it takes no memory
constexpr size_t kLeast = size_t{1} << 16;   // bytes that a copy is worth
constexpr size_t kLine = 64;

struct Chunk {
  void* mapped;
  size_t size, used;
  char* at;
  explicit Chunk(size_t bytes) : mapped(nullptr), size((bytes + kPage - 1) / kPage * kPage), used(0), at(nullptr) {
    void* found = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return;
    mapped = found;
    char* first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(mapped) + kPage - 1) / kPage * kPage);
    if (!madvise(first, size, MADV_HUGEPAGE)) at = first;
  }
  ~Chunk() {
    if (mapped) munmap(mapped, size + kPage);
  }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;
};

bool forbidden() {  // by the machine's administrator: then madvise succeeds all the same
  char text[64] = "";
  FILE* file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r");
  if (!file) return true;
  const bool read = std::fgets(text, sizeof text, file);
  std::fclose(file);
  return !read || std::strstr(text, "[never]");
}

}  // namespace

std::shared_ptr<const void> held(const void* from, size_t bytes) {
  static const bool none = forbidden();
  if (none || bytes < kLeast) return nullptr;
  static std::mutex mutex;  // sessions may be made on several threads
  static std::weak_ptr<Chunk> open;
  const size_t size = (bytes + kLine - 1) / kLine * kLine;
  std::shared_ptr<Chunk> chunk;
  char* to;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    chunk = open.lock();
    if (!chunk || chunk->used + size > chunk->size) {
      chunk = std::make_shared<Chunk>(size > kChunk / 2 ? size : kChunk);
      if (!chunk->at) return nullptr;
      if (size <= kChunk / 2) open = chunk;
    }
    to = chunk->at + chunk->used;
    chunk->used += size;
  }
  std::memcpy(to, from, bytes);
  return {chunk, to};
}

#else

std::shared_ptr<const void> held(const void*, size_t) { return nullptr; }

#endif

}  // namespace sparse_onnx
