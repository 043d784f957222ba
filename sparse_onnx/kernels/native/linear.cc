// One processor level: compiled once for each with other flags, LEVEL being its name. Vectors are the compiler's own
// (GCC, Clang), as wide as the level's registers.
#include "linear.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)
#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

namespace sparse_onnx {
namespace JOIN(level_, LEVEL) {

#include "vectors.h"
#include "readers.h"
#include "row.h"
#include "digits.h"
#include "many.h"
#include "dots.h"
#include "single.h"

extern const Level table;
const Level table{STRING(LEVEL), choose, mask, gate, row, row_scratch, rows, turned, kDepth * kStrip + kBatch * kStrip,
                  kDepth,        laid,   lay,  dots, dots_scratch, cross,  cross_scratch, kStrip,
                  widen,         narrow};

}  // namespace JOIN(level_, LEVEL)
}  // namespace sparse_onnx
