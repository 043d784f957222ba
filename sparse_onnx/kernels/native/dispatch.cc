// Which of the levels that were compiled in runs here.
#include "linear.h"

#include <cstdlib>
#include <cstring>

namespace sparse_onnx {

#if defined(__x86_64__)
namespace level_v4 {
extern const Level table;
}
namespace level_v3 {
extern const Level table;
}
#endif
namespace level_base {
extern const Level table;
}

const Level& level() {
#if defined(__x86_64__)
  static const Level& best = [&]() -> const Level& {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const char* wanted = std::getenv("SPARSE_ONNX_KERNEL_LEVEL");  // for tests: a lower one than the processor has
    const auto at_most = [&](const char* name) { return !wanted || std::strcmp(wanted, name) >= 0; };
    if (wanted && !std::strcmp(wanted, "base")) return level_base::table;
    return v4 && at_most("v4") ? level_v4::table : v3 && at_most("v3") ? level_v3::table : level_base::table;
  }();
  return best;
#else
  return level_base::table;
#endif
}

}  // namespace sparse_onnx
