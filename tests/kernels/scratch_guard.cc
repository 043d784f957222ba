// Runs one level's products of a row with exactly the scratch that they ask for, and looks at what lies behind it.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "linear.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace sparse_onnx {
namespace JOIN(level_, LEVEL) {
extern const Level table;
}
}  // namespace sparse_onnx

using namespace sparse_onnx;

constexpr int64_t kBehind = 1 << 14;
constexpr float kMark = 12345;

// Floats with others behind them that nobody may write.
struct Guarded {
  int64_t size;
  std::vector<float> all;
  explicit Guarded(int64_t floats) : size(floats), all(floats + kBehind, kMark) {}
  bool broken() const {
    for (int64_t at = size; at < size + kBehind; ++at)
      if (all[at] != kMark) return true;
    return false;
  }
};

int main() {
  const Level& level = JOIN(level_, LEVEL)::table;
  const int64_t rows = 64;
  int wrong = 0;
  for (Type type : {Type::F32, Type::I8, Type::U8, Type::I4, Type::U4})
    for (int64_t columns : {512, 516, 96})
      for (int64_t down : {1, 16, 64})
        for (int64_t across : {1, 2, 4, 6, 8, 12, 16, 32, 64, 128, 512}) {
          const bool scaled = type >= Type::I8;
          if ((down > 1 && across > 1) || columns % across || (!scaled && down * across > 1)) continue;
          std::vector<uint8_t> data(rows * columns * bits(type) / 8, 1), zero(rows * columns, 1);
          std::vector<float> scale(rows * columns, 1), x(columns, 1), value(rows + 16, 1);
          std::vector<int32_t> index(rows + 16);
          for (int64_t row = 0; row < rows; ++row) index[row] = (int32_t)row;
          const Weights w{type, data.data(), rows, columns, Type::F32, scaled ? scale.data() : nullptr,
                          scaled ? zero.data() : nullptr, down, across};
          const Kept kept{index.data(), value.data(), rows};
          for (int64_t first = 0; first < columns; first += kColumns)
            for (int64_t last : {std::min(first + kColumns, columns), columns}) {
              Guarded scratch(level.row_scratch(w, last - first)), y(columns);
              level.row(w, kept, y.all.data(), first, last, scratch.all.data());
              if (scratch.broken() || y.broken()) ++wrong, std::printf("row type %d columns %lld..%lld of %lld block %lld x %lld\n",
                  (int)type, (long long)first, (long long)last, (long long)columns, (long long)down, (long long)across);
            }
          Guarded laid(level.laid(w)), scratch(level.dots_scratch(w)), out(rows);
          level.lay(w, x.data(), laid.all.data());
          level.dots(w, laid.all.data(), index.data(), rows, out.all.data(), scratch.all.data());
          if (laid.broken() || scratch.broken() || out.broken()) ++wrong, std::printf("dots type %d columns %lld block %lld x %lld\n",
              (int)type, (long long)columns, (long long)down, (long long)across);
        }
  return wrong != 0;
}
