// Which of the levels that were compiled in runs here.
#include "linear.h"

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
    return v4 ? level_v4::table : v3 ? level_v3::table : level_base::table;
  }();
  return best;
#else
  return level_base::table;
#endif
}

}  // namespace sparse_onnx
