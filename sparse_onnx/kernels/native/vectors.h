// Vectors of the level that this is compiled for, and numbers of every type as vectors of floats. Included once a
// level, within its namespace.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = 8;
constexpr int kChunk = kVectors * kLanes;  // columns that are computed together

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));

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

INLINE Floats spread(float value) {
#if defined(__AVX512F__)
  return (Floats)_mm512_set1_ps(value);
#else
  return value - Floats{};
#endif
}

INLINE Floats as_floats(Words bits) {
  Floats value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// IEEE half precision to single by integers: exact, subnormal numbers, infinities and NaN included.
INLINE Floats from_half(Halves half) {
  const Words bits = __builtin_convertvector(half, Words);
  const Words sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  Words normal = (rest << 13) + (112u << 23);
  const Words special = (Words)(rest >= 0x7c00u);
  normal += special & (112u << 23);
  // A subnormal half is its mantissa times 2^-24.
  const Floats small = __builtin_convertvector((Ints)rest, Floats) * spread(5.9604644775390625e-8f);
  Words small_bits;
  std::memcpy(&small_bits, &small, sizeof small);
  const Words is_small = (Words)(rest < 0x0400u);
  return as_floats(sign | (is_small & small_bits) | (~is_small & normal));
}

// kLanes bytes as numbers. Compilers take __builtin_convertvector of bytes apart, where one instruction does it.
template <bool kSigned>
INLINE Floats from_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128((const __m128i*)from);
  return (Floats)_mm512_cvtepi32_ps(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)from);
  return (Floats)_mm256_cvtepi32_ps(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#elif defined(__SSE2__)
  int32_t four;
  std::memcpy(&four, from, 4);
  const __m128i none = _mm_setzero_si128(), bytes = _mm_cvtsi32_si128(four);
  if (!kSigned) return (Floats)_mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, none), none));
  const __m128i twice = _mm_unpacklo_epi8(none, bytes);
  return (Floats)_mm_cvtepi32_ps(_mm_srai_epi32(_mm_unpacklo_epi16(none, twice), 24));
#else
  if (kSigned) return __builtin_convertvector(__builtin_convertvector(load<SignedBytes>(from), Ints), Floats);
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
}

// Lanes of a and b by turns: the first halves into a, the second ones into b.
INLINE void interleave(Floats& a, Floats& b) {
  Floats first, second;
#if defined(__clang__)
  for (int lane = 0; lane < kLanes; ++lane) {
    first[lane] = lane % 2 ? b[lane / 2] : a[lane / 2];
    second[lane] = lane % 2 ? b[kLanes / 2 + lane / 2] : a[kLanes / 2 + lane / 2];
  }
#else
  Ints low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane / 2 + (lane % 2 ? kLanes : 0);
    high[lane] = kLanes / 2 + lane / 2 + (lane % 2 ? kLanes : 0);
  }
  first = __builtin_shuffle(a, b, low), second = __builtin_shuffle(a, b, high);
#endif
  a = first, b = second;
}

// A square of numbers, rows to columns: each round has the first half and the second one take turns.
INLINE void turn(Floats* rows) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Floats next[kLanes];
#pragma GCC unroll 8
    for (int at = 0; at < kLanes / 2; ++at) {
      Floats a = rows[at], b = rows[at + kLanes / 2];
      interleave(a, b);
      next[2 * at] = a, next[2 * at + 1] = b;
    }
#pragma GCC unroll 16
    for (int at = 0; at < kLanes; ++at) rows[at] = next[at];
  }
}
