// How weights of one type are read: kChunk of them as kVectors vectors. Included once a level, behind vectors.h.
//
// `each(from, visit)` calls visit(v, weights) for each vector v. Types of a byte and more come in the order of the
// columns. Nibbles come with column 8 l + v in lane l of vector v, since eight shifts of one vector of words are all
// that takes; `mend` puts such vectors, or sums of them, into order.

template <Type T>
struct Reader;

template <class Self, int kBits>
struct InOrder {
  static constexpr bool is_signed = true;
  static constexpr int bits = kBits;
  static constexpr bool in_order = true;
  template <int kCount = kVectors, class F>
  static INLINE void each(const uint8_t* from, F&& visit) {
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) visit(v, Self::vector(from + v * kLanes * kBits / 8));
  }
  static INLINE void mend(Floats*) {}
};

template <>
struct Reader<Type::F32> : InOrder<Reader<Type::F32>, 32> {
  static INLINE Floats vector(const uint8_t* from) { return load<Floats>(from); }
  static INLINE float one(const void* data, int64_t at) { return ((const float*)data)[at]; }
};

template <>
struct Reader<Type::F16> : InOrder<Reader<Type::F16>, 16> {
  static INLINE Floats vector(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__aarch64__)
    return (Floats)vcvt_f32_f16(load<float16x4_t>(from));
#else
    return from_half(load<Halves>(from));
#endif
  }
  static INLINE float one(const void* data, int64_t at) {
    Halves half{};
    half[0] = ((const uint16_t*)data)[at];
    return from_half(half)[0];
  }
};

template <>
struct Reader<Type::BF16> : InOrder<Reader<Type::BF16>, 16> {
  static INLINE Floats vector(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
#elif defined(__AVX2__)
    return (Floats)_mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16));
#else
    return as_floats(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
  }
  static INLINE float one(const void* data, int64_t at) {
    const uint32_t bits = (uint32_t)((const uint16_t*)data)[at] << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

template <bool kSigned>
struct WholeBytes : InOrder<WholeBytes<kSigned>, 8> {
  static constexpr bool is_signed = kSigned;
  static INLINE Floats vector(const uint8_t* from) { return from_bytes<kSigned>(from); }
  static INLINE float one(const void* data, int64_t at) {
    return kSigned ? (float)((const int8_t*)data)[at] : (float)((const uint8_t*)data)[at];
  }
};

template <>
struct Reader<Type::I8> : WholeBytes<true> {};
template <>
struct Reader<Type::U8> : WholeBytes<false> {};

// Two weights a byte, the first in the lower half: eight in a word.
template <bool kSigned>
struct Nibbles {
  static constexpr bool is_signed = kSigned;
  static constexpr int bits = 4;
  static constexpr bool in_order = false;
  template <int kCount = kVectors, class F>
  static INLINE void each(const uint8_t* from, F&& visit) {
    static_assert(kCount == kVectors, "eight columns a word");
#if defined(__AVX512F__)
    // A permutation looks at the lowest four bits of a lane: it turns nibbles into numbers.
    const __m512 numbers = kSigned ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)
                                   : _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i words = _mm512_loadu_si512(from);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      visit(v, (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * v), numbers));
#else
    const Words words = load<Words>(from);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const Words top = words << (28 - 4 * v);
      visit(v, __builtin_convertvector(kSigned ? (Ints)top >> 28 : (Ints)(top >> 28), Floats));
    }
#endif
  }
  static INLINE void mend(Floats* vectors) {
#pragma GCC unroll 3
    for (int apart = 4; apart; apart /= 2) {
      Floats mended[kVectors];
#pragma GCC unroll 4
      for (int pair = 0; pair < kVectors / 2; ++pair) {
        // Vectors that differ in this bit of the column become neighbours, which differ in a bit of the lane.
        const int first = pair / apart * 2 * apart + pair % apart;
        Floats a = vectors[first], b = vectors[first + apart];
        interleave(a, b);
        mended[first] = a, mended[first + apart] = b;
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) vectors[v] = mended[v];
    }
    // What were bits of the lane are bits of the vector now, the highest of them first; so they already are in order.
  }
  static INLINE float one(const void* data, int64_t at) {
    const int value = ((const uint8_t*)data)[at >> 1] >> (4 * (at & 1)) & 15;
    return (float)(kSigned ? (value ^ 8) - 8 : value);
  }
};

template <>
struct Reader<Type::I4> : Nibbles<true> {};
template <>
struct Reader<Type::U4> : Nibbles<false> {};

template <class F>
INLINE auto by_type(Type type, F&& call) {
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

// `count` numbers from the one at `at` on.
void numbers(Type type, const void* data, int64_t at, int64_t count, float* to) {
  by_type(type, [&](auto reader) {
    using R = decltype(reader);
    int64_t done = 0;
    if (R::bits == 4 && at % 2) {
      if (count) to[done++] = R::one(data, at);
    }
    const uint8_t* from = (const uint8_t*)data + (at + done) * R::bits / 8;
    for (; done + kChunk <= count; done += kChunk, from += kChunk * R::bits / 8) {
      Floats vectors[kVectors];
      R::each(from, [&](int v, Floats value) { vectors[v] = value; });
      R::mend(vectors);
      for (int v = 0; v < kVectors; ++v) store(to + done + v * kLanes, vectors[v]);
    }
    for (; done < count; ++done) to[done] = R::one(data, at + done);
  });
}
