// One processor level: compiled once for each with other flags, LEVEL being its name. Vectors are the compiler's own
// (GCC, Clang), as wide as the level's registers or twice that.
#include "linear.h"

#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)
#define INLINE inline __attribute__((always_inline))

namespace sparse_onnx {
namespace JOIN(level_, LEVEL) {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;
#else
constexpr int kLanes = 8, kTileRows = 3, kTileVectors = 2;
#endif
constexpr int kTile = kLanes * kTileVectors;  // columns of a tile of the product of many rows
constexpr int kDepth = 256;                   // weights of a column that are unpacked at once
constexpr int kStrip = 10 * kTile;            // columns that are unpacked at once
constexpr int kPass = 8;                      // rows of weights read side by side

typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2), aligned(2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes), aligned(1)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes), aligned(1)));

// Not std::min: a template of all levels is one function to the linker, of whichever level comes first.
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class V>
INLINE V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
INLINE Floats spread(float value) { return value - Floats{}; }

// IEEE half precision to single by integers: exact, subnormal numbers, infinities and NaN included.
INLINE Floats from_half(Halves half) {
  const Words bits = __builtin_convertvector(half, Words);
  const Words sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  const Words shifted = rest << 13;
  Words normal = shifted + (112u << 23);
  const Words special = (Words)(rest >= 0x7c00u);
  normal += special & (112u << 23);
  Floats small;  // a subnormal half is its mantissa times 2^-24
  small = __builtin_convertvector((Ints)rest, Floats) * spread(5.9604644775390625e-8f);
  Words small_bits, result;
  std::memcpy(&small_bits, &small, sizeof small);
  const Words is_small = (Words)(rest < 0x0400u);
  result = sign | (is_small & small_bits) | (~is_small & normal);
  Floats value;
  std::memcpy(&value, &result, sizeof value);
  return value;
}

INLINE Floats from_brain(Halves half) {
  const Words bits = __builtin_convertvector(half, Words) << 16;
  Floats value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// kLanes bytes as numbers. The compiler takes __builtin_convertvector of bytes apart, where one instruction does it.
template <bool kSigned>
INLINE Floats from_bytes(Bytes bytes) {
#if defined(__AVX512F__)
  const __m512i wide = kSigned ? _mm512_cvtepi8_epi32((__m128i)bytes) : _mm512_cvtepu8_epi32((__m128i)bytes);
  return (Floats)_mm512_cvtepi32_ps(wide);
#elif defined(__AVX2__)
  __m128i half = _mm_setzero_si128();
  std::memcpy(&half, &bytes, sizeof bytes);
  return (Floats)_mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(half) : _mm256_cvtepu8_epi32(half));
#else
  if (kSigned) return __builtin_convertvector(__builtin_convertvector((SignedBytes)bytes, Ints), Floats);
  return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
#endif
}

// How weights of one type are read. `pair` gives 2 * kLanes columns from an even one on.
template <Type T>
struct Reader;

template <>
struct Reader<Type::F32> {
  static constexpr int bits = 32;
  static INLINE void pair(const uint8_t* row, int64_t column, Floats& a, Floats& b) {
    a = load<Floats>(row + column * 4), b = load<Floats>(row + (column + kLanes) * 4);
  }
  static INLINE float one(const uint8_t* data, int64_t at) { return ((const float*)data)[at]; }
};

template <>
struct Reader<Type::F16> {
  static constexpr int bits = 16;
  static INLINE void pair(const uint8_t* row, int64_t column, Floats& a, Floats& b) {
    const uint8_t* from = row + column * 2;
#if defined(__AVX512F__)
    a = (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
    b = (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + 32)));
#elif defined(__F16C__)
    a = (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
    b = (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 16)));
#else
    a = from_half(load<Halves>(from)), b = from_half(load<Halves>(from + kLanes * 2));
#endif
  }
  static INLINE float one(const uint8_t* data, int64_t at) {
    Halves half{};
    half[0] = ((const uint16_t*)data)[at];
    return from_half(half)[0];
  }
};

template <>
struct Reader<Type::BF16> {
  static constexpr int bits = 16;
  static INLINE void pair(const uint8_t* row, int64_t column, Floats& a, Floats& b) {
    a = from_brain(load<Halves>(row + column * 2)), b = from_brain(load<Halves>(row + (column + kLanes) * 2));
  }
  static INLINE float one(const uint8_t* data, int64_t at) {
    const uint32_t bits = (uint32_t)((const uint16_t*)data)[at] << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

template <bool kSigned>
struct WholeBytes {
  static constexpr int bits = 8;
  static INLINE void pair(const uint8_t* row, int64_t column, Floats& a, Floats& b) {
    a = from_bytes<kSigned>(load<Bytes>(row + column)), b = from_bytes<kSigned>(load<Bytes>(row + column + kLanes));
  }
  static INLINE float one(const uint8_t* data, int64_t at) {
    return kSigned ? (float)((const int8_t*)data)[at] : (float)data[at];
  }
};

template <>
struct Reader<Type::I8> : WholeBytes<true> {};
template <>
struct Reader<Type::U8> : WholeBytes<false> {};

// Two weights a byte, the first in the lower half. Even and odd columns come apart here; `mended` puts sums of them
// into order, once for several rows.
template <bool kSigned>
struct Nibbles {
  static constexpr int bits = 4;
  static INLINE void pair(const uint8_t* row, int64_t column, Floats& a, Floats& b) {
    const Bytes both = load<Bytes>(row + column / 2);
    Bytes low = both & 15, high = both >> 4;
    if (kSigned) low = (low ^ 8) - 8, high = (high ^ 8) - 8;
    a = from_bytes<kSigned>(low), b = from_bytes<kSigned>(high);
  }
  static INLINE float one(const uint8_t* data, int64_t at) {
    const int value = data[at >> 1] >> (4 * (at & 1)) & 15;
    return (float)(kSigned ? (value ^ 8) - 8 : value);
  }
};

template <>
struct Reader<Type::I4> : Nibbles<true> {};
template <>
struct Reader<Type::U4> : Nibbles<false> {};

template <class R>
INLINE void mended(Floats& a, Floats& b) {
  if (R::bits != 4) return;
  Ints low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane / 2 + (lane % 2 ? kLanes : 0);
    high[lane] = kLanes / 2 + lane / 2 + (lane % 2 ? kLanes : 0);
  }
#if defined(__clang__)
  Floats first, second;
  for (int lane = 0; lane < kLanes; ++lane) {
    first[lane] = lane % 2 ? b[lane / 2] : a[lane / 2];
    second[lane] = lane % 2 ? b[kLanes / 2 + lane / 2] : a[kLanes / 2 + lane / 2];
  }
#else
  const Floats first = __builtin_shuffle(a, b, low), second = __builtin_shuffle(a, b, high);
#endif
  a = first, b = second;
}

template <class F>
INLINE auto by_weight(Type type, F&& call) {
  switch (type) {
    case Type::F32: return call(Reader<Type::F32>());
    case Type::F16: return call(Reader<Type::F16>());
    case Type::BF16: return call(Reader<Type::BF16>());
    case Type::I8: return call(Reader<Type::I8>());
    case Type::U8: return call(Reader<Type::U8>());
    case Type::I4: return call(Reader<Type::I4>());
    default: return call(Reader<Type::U4>());
  }
}

float number(Type type, const void* data, int64_t at) {
  return by_weight(type, [&](auto reader) { return decltype(reader)::one((const uint8_t*)data, at); });
}

// y[first..last) += sum over at most kPass rows of factor * weights
template <class R, int kRows>
INLINE void pass(const Weights& w, const int32_t* index, const float* factor, float* y, int64_t first, int64_t last) {
  const int64_t stride = w.columns * R::bits / 8;
  const uint8_t* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = (const uint8_t*)w.data + index[r] * stride;
  int64_t column = first;
  for (; column + 2 * kLanes <= last; column += 2 * kLanes) {
    Floats a{}, b{};
    for (int r = 0; r < kRows; ++r) {
      Floats left, right;
      R::pair(row[r], column, left, right);
      a += left * factor[r], b += right * factor[r];
    }
    mended<R>(a, b);
    store(y + column, load<Floats>(y + column) + a), store(y + column + kLanes, load<Floats>(y + column + kLanes) + b);
  }
  for (; column < last; ++column)
    for (int r = 0; r < kRows; ++r) y[column] += factor[r] * R::one((const uint8_t*)w.data, index[r] * w.columns + column);
}

template <class R>
void passes(const Weights& w, const int32_t* index, const float* factor, int64_t count, float* y, int64_t first,
            int64_t last) {
  int64_t at = 0;
  if (R::bits >= 8 || w.columns % 2 == 0) {
    for (; at + kPass <= count; at += kPass) pass<R, kPass>(w, index + at, factor + at, y, first, last);
    for (; at + 2 <= count; at += 2) pass<R, 2>(w, index + at, factor + at, y, first, last);
    for (; at < count; ++at) pass<R, 1>(w, index + at, factor + at, y, first, last);
  }
  for (; at < count; ++at)  // rows that begin within a byte
    for (int64_t column = first; column < last; ++column)
      y[column] += factor[at] * R::one((const uint8_t*)w.data, index[at] * w.columns + column);
}

// Scales that belong to one row of weights: they go into its factor, block of columns by block of columns.
template <class R>
void scaled_rows(const Weights& w, const Kept& kept, float* y, int64_t first, int64_t last) {
  const int64_t blocks = w.columns / w.block_columns;
  float factor[kPass];
  for (int64_t at = 0; at < kept.count; at += kPass) {
    const int64_t count = least(kPass, kept.count - at);
    for (int64_t block = first / w.block_columns; block * w.block_columns < last; ++block) {
      const int64_t from = most(first, block * w.block_columns);
      const int64_t to = least(last, (block + 1) * w.block_columns);
      float shift = 0;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t entry = kept.index[at + r] * blocks + block;
        factor[r] = kept.value[at + r] * number(w.scale_type, w.scale, entry);
        shift += factor[r] * number(w.type, w.zero, entry);
      }
      passes<R>(w, kept.index + at, factor, count, y, from, to);
      if (shift != 0)
        for (int64_t column = from; column < to; ++column) y[column] -= shift;
    }
  }
}

// Scales that belong to columns, for a block of rows: sums of integers first, then the scale.
template <class R>
void scaled_columns(const Weights& w, const Kept& kept, float* y, int64_t first, int64_t last, float* sums) {
  for (int64_t at = 0; at < kept.count;) {
    const int64_t block = kept.index[at] / w.block_rows;
    int64_t end = at;
    float total = 0;
    for (; end < kept.count && kept.index[end] < (block + 1) * w.block_rows; ++end) total += kept.value[end];
    std::memset(sums, 0, (last - first) * sizeof(float));
    passes<R>(w, kept.index + at, kept.value + at, end - at, sums - first, first, last);
    for (int64_t column = first; column < last; ++column) {
      const int64_t entry = block * w.columns + column;
      y[column] += number(w.scale_type, w.scale, entry) * (sums[column - first] - total * number(w.type, w.zero, entry));
    }
    at = end;
  }
}

void row(const Weights& w, const Kept& kept, float* y, int64_t first, int64_t last, float* scratch) {
  std::memset(y + first, 0, (last - first) * sizeof(float));
  by_weight(w.type, [&](auto reader) {
    using R = decltype(reader);
    if (w.scale == nullptr)
      passes<R>(w, kept.index, kept.value, kept.count, y, first, last);
    else if (w.block_rows == 1)
      scaled_rows<R>(w, kept, y, first, last);
    else
      scaled_columns<R>(w, kept, y, first, last, scratch);
  });
}

// Weights [depth, columns from first on, kTile at a time] as floats, tile by tile, zeros beyond the last column.
template <class R>
void unpack(const Weights& w, int64_t from, int64_t depth, int64_t first, int64_t last, float* packed) {
  const int64_t tiles = (last - first + kTile - 1) / kTile, stride = w.columns * R::bits / 8;
  const int64_t blocks = w.scale ? w.columns / w.block_columns : 0;
  const bool whole_bytes = R::bits >= 8 || w.columns % 2 == 0;
  for (int64_t k = 0; k < depth; ++k) {
    const uint8_t* row = (const uint8_t*)w.data + (from + k) * stride;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      float* out = packed + (tile * kDepth + k) * kTile;
      const int64_t begin = first + tile * kTile, end = least(begin + kTile, last);
      int64_t column = begin;
      for (; whole_bytes && column + 2 * kLanes <= end; column += 2 * kLanes) {
        Floats a, b;
        R::pair(row, column, a, b);
        mended<R>(a, b);
        store(out + (column - begin), a), store(out + (column - begin) + kLanes, b);
      }
      for (; column < end; ++column) out[column - begin] = R::one((const uint8_t*)w.data, (from + k) * w.columns + column);
      for (; column < begin + kTile; ++column) out[column - begin] = 0;
      if (!w.scale) continue;
      const int64_t base = (from + k) / w.block_rows * blocks;
      for (column = begin; column < end; ++column) {
        const int64_t entry = base + column / w.block_columns;
        out[column - begin] =
            (out[column - begin] - number(w.type, w.zero, entry)) * number(w.scale_type, w.scale, entry);
      }
    }
  }
}

template <int kRows>
INLINE void tile(const float* x, int64_t x_stride, const float* packed, int64_t depth, float* y, int64_t y_stride,
                 int64_t columns) {
  Floats sums[kRows][kTileVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats weight[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) weight[v] = load<Floats>(packed + k * kTile + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float value = x[r * x_stride + k];
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] += weight[v] * value;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    float* out = y + r * y_stride;
    if (columns == kTile) {
      for (int v = 0; v < kTileVectors; ++v) store(out + v * kLanes, load<Floats>(out + v * kLanes) + sums[r][v]);
    } else {
      for (int64_t column = 0; column < columns; ++column) out[column] += sums[r][column / kLanes][column % kLanes];
    }
  }
}

void rows(const Weights& w, const float* x, int64_t tokens, float* y, int64_t first, int64_t last, float* packed) {
  for (int64_t token = 0; token < tokens; ++token)
    std::memset(y + token * w.columns + first, 0, (last - first) * sizeof(float));
  for (int64_t strip = first; strip < last; strip += kStrip) {
    const int64_t end = least(strip + kStrip, last);
    for (int64_t from = 0; from < w.rows; from += kDepth) {
      const int64_t depth = least(kDepth, w.rows - from);
      by_weight(w.type, [&](auto reader) { unpack<decltype(reader)>(w, from, depth, strip, end, packed); });
      for (int64_t token = 0; token < tokens;) {
        const int64_t count = tokens - token;
        for (int64_t begin = strip, at = 0; begin < end; begin += kTile, ++at) {
          const float *left = x + token * w.rows + from, *right = packed + at * kDepth * kTile;
          float* out = y + token * w.columns + begin;
          const int64_t columns = least(kTile, end - begin);
          if (count >= kTileRows) {
            tile<kTileRows>(left, w.rows, right, depth, out, w.columns, columns);
            continue;
          }
          int64_t r = 0;
          for (; r + 2 <= count; r += 2)
            tile<2>(left + r * w.rows, w.rows, right, depth, out + r * w.columns, w.columns, columns);
          if (r < count) tile<1>(left + r * w.rows, w.rows, right, depth, out + r * w.columns, w.columns, columns);
        }
        token += least(count, kTileRows);
      }
    }
  }
}

void widen(Type type, const void* from, float* to, int64_t count) {
  by_weight(type, [&](auto reader) {
    using R = decltype(reader);
    int64_t at = 0;
    if (R::bits >= 16)
      for (; at + 2 * kLanes <= count; at += 2 * kLanes) {
        Floats a, b;
        R::pair((const uint8_t*)from, at, a, b);
        store(to + at, a), store(to + at + kLanes, b);
      }
    for (; at < count; ++at) to[at] = R::one((const uint8_t*)from, at);
  });
}

// To nearest, ties to even.
uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to more than the largest half
  if (bits < 0x38800000u) {                        // subnormal: units of 2^-24
    float units;
    std::memcpy(&units, &bits, 4);
    units *= 16777216.0f;
    uint32_t whole = (uint32_t)units;
    const float rest = units - (float)whole;
    whole += rest > 0.5f || (rest == 0.5f && (whole & 1));
    return sign | whole;
  }
  bits += 0xfffu + (bits >> 13 & 1);
  return sign | ((bits >> 13) - (112u << 10));
}

uint16_t to_brain(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}

void narrow(Type type, const float* from, void* to, int64_t count) {
  if (type == Type::F32) {
    std::memcpy(to, from, count * 4);
    return;
  }
  uint16_t* out = (uint16_t*)to;
  for (int64_t at = 0; at < count; ++at) out[at] = type == Type::F16 ? to_half(from[at]) : to_brain(from[at]);
}

extern const Level table;
const Level table{STRING(LEVEL), row, rows, kDepth * kStrip, widen, narrow};

}  // namespace JOIN(level_, LEVEL)
}  // namespace sparse_onnx
