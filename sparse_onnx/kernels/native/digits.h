// The product of one row of x with 8-bit weights by products of bytes (VNNI): a third of the instructions that numbers
// of floats take. Included once a level, behind row.h.
//
// Of up to 128 rows that share a scale, x becomes integers of 24 bits with their sign and a factor, which rounds to 2^-24
// of the largest of them, as a sum of floats does; each integer becomes three digits to base 256 that are signed bytes.
// Four rows of weights are interleaved, so that one instruction multiplies by four digits of x and adds up, exactly.

#if defined(__AVX512F__)

constexpr int kQuads = 2;          // times 4 rows that are read side by side
constexpr int kDigits = 3;
constexpr int64_t kSpan = 128;     // rows that have a factor
constexpr float kWhole = 8355000;  // the largest integer: three digits of at most 127, with room for rounding
constexpr int kStripe = 64;        // columns

#define VNNI __attribute__((target("avx512vnni")))

bool has_vnni() {
  // Who asks for a level wants nothing beyond it: that is how tests reach the other products.
  static const bool has = __builtin_cpu_supports("avx512vnni") && !std::getenv("SPARSE_ONNX_KERNEL_LEVEL");
  return has;
}

// What a group of rows is multiplied by.
struct Digits {
  int32_t four[kQuads][kDigits];  // of four rows, a byte each
  int32_t shift[kDigits];         // taken off for weights that were made unsigned
};

// sums[0..kStripe) += the group's rows times their digits, in the order that interleaving leaves.
template <bool kSigned>
VNNI INLINE void add_stripe(const Group& group, int64_t column, const Digits& digits, __m512 factor, float* sums) {
  __m512i total[kDigits][4];
#pragma GCC unroll 3
  for (int d = 0; d < kDigits; ++d)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) total[d][v] = _mm512_set1_epi32(digits.shift[d]);
#pragma GCC unroll 2
  for (int quad = 0; quad < kQuads; ++quad) {
    __m512i row[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      row[r] = _mm512_loadu_si512(group.row[4 * quad + r] + column);
      if (kSigned) row[r] = _mm512_xor_si512(row[r], _mm512_set1_epi8((char)0x80));
      __builtin_prefetch(group.next[4 * quad + r] + column, 0, 3);
    }
    const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
    const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]), d = _mm512_unpackhi_epi8(row[2], row[3]);
    const __m512i four[4] = {_mm512_unpacklo_epi16(a, c), _mm512_unpackhi_epi16(a, c), _mm512_unpacklo_epi16(b, d),
                             _mm512_unpackhi_epi16(b, d)};
#pragma GCC unroll 3
    for (int at = 0; at < kDigits; ++at)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        total[at][v] = _mm512_dpbusd_epi32(total[at][v], four[v], _mm512_set1_epi32(digits.four[quad][at]));
  }
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    __m512 sum = _mm512_cvtepi32_ps(total[2][v]);
    sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(total[1][v]));
    sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(total[0][v]));
    _mm512_storeu_ps(sums + 16 * v, _mm512_fmadd_ps(sum, factor, _mm512_loadu_ps(sums + 16 * v)));
  }
}

template <bool kSigned>
VNNI void add_digits(const Group& group, const Digits& digits, float factor, int64_t first, int64_t last, float* sums) {
  const __m512 all = _mm512_set1_ps(factor);
  int64_t column = first;
  for (; column + kStripe <= last; column += kStripe)
    add_stripe<kSigned>(group, column, digits, all, sums + (column - first));
  if (column == last) return;
  uint8_t ends[4 * kQuads][kStripe] = {};
  Group end = group;
  for (int r = 0; r < 4 * kQuads; ++r) {
    std::memcpy(ends[r], group.row[r] + column, last - column);
    end.row[r] = ends[r], end.next[r] = ends[r];
  }
  add_stripe<kSigned>(end, 0, digits, all, sums + (column - first));
}

// Sums of a stripe in the order of the columns.
INLINE void straighten(const float* sums, Floats* out) {
  __m512 v[4];
  for (int at = 0; at < 4; ++at) v[at] = _mm512_loadu_ps(sums + 16 * at);
  const __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
  const __m512 c = _mm512_shuffle_f32x4(v[2], v[3], 0x44), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  out[0] = (Floats)_mm512_shuffle_f32x4(a, c, 0x88), out[1] = (Floats)_mm512_shuffle_f32x4(a, c, 0xdd);
  out[2] = (Floats)_mm512_shuffle_f32x4(b, d, 0x88), out[3] = (Floats)_mm512_shuffle_f32x4(b, d, 0xdd);
}

// Whether all values, moderate ones, can become digits: none is so small that its factor is none.
bool has_digits(const Kept& kept) {
  bool good = true;
  for (int64_t at = 0; at < kept.count; ++at) {
    const float size = __builtin_fabsf(kept.value[at]);
    good &= size == 0 || size > 1e-25f;
  }
  return good;
}

// Scales of columns, for blocks of rows: as scaled_columns.
template <bool kSigned>
VNNI void digit_columns(const Weights& w, const Kept& kept, float* y, int64_t first, int64_t last, float* scratch) {
  const int64_t padded = (last - first + kChunk - 1) / kChunk * kChunk;
  float *sums = scratch, *wide = sums + padded;
  std::memset(y + first, 0, (last - first) * sizeof(float));
  for (int64_t at = 0; at < kept.count;) {
    const int64_t block = kept.index[at] / w.block_rows, behind = (block + 1) * w.block_rows;
    double total = 0;
    std::memset(sums, 0, padded * sizeof(float));
    while (at < kept.count && kept.index[at] < behind) {
      int64_t end = at;
      float largest = 0;
      for (; end < least(kept.count, at + kSpan) && kept.index[end] < behind; ++end) {
        const float size = __builtin_fabsf(kept.value[end]);
        largest = size > largest ? size : largest;
      }
      const float factor = largest / kWhole, inverse = largest ? kWhole / largest : 0;
      while (at < end) {
        Group group;
        Digits digits{};
        for (int r = 0; r < 4 * kQuads; ++r, ++at) {
          group.add(row_of(w, kept, least(at, end - 1), w.columns), row_of(w, kept, at + 4 * kQuads, w.columns), nullptr);
          if (at >= end) continue;
          int32_t whole = (int32_t)__builtin_rintf(kept.value[at] * inverse);
          total -= (double)factor * whole;
          for (int d = 0; d < kDigits; ++d) {
            const int32_t digit = d + 1 < kDigits ? (int8_t)whole : whole;
            digits.four[r / 4][d] |= (digit & 255) << r % 4 * 8;
            if (kSigned) digits.shift[d] -= 128 * digit;
            whole = (whole - digit) >> 8;
          }
        }
        at = least(at, end);
        add_digits<kSigned>(group, digits, factor, first, last, sums);
      }
    }
    const float* scale = (const float*)w.scale + block * w.columns;
    if (w.scale_type != Type::F32) {
      numbers(w.scale_type, w.scale, block * w.columns + first, last - first, wide);
      scale = wide - first;
    }
    const uint8_t* zeros = (const uint8_t*)w.zero + block * w.columns;
    for (int64_t column = first; column < last; column += kStripe) {
      Floats straight[4];
      straighten(sums + (column - first), straight);
      for (int v = 0; v < 4 && column + v * kLanes < last; ++v) {
        const int64_t from = column + v * kLanes;
        if (from + kLanes <= last) {
          Floats sum = straight[v];
          if (w.zero) sum += spread((float)total) * from_bytes<kSigned>(zeros + from);
          store(y + from, load<Floats>(y + from) + sum * load<Floats>(scale + from));
        } else {
          for (int64_t one = from; one < last; ++one) {
            const float zero = w.zero ? (kSigned ? (float)(int8_t)zeros[one] : (float)zeros[one]) : 0;
            y[one] += (straight[v][one - from] + (float)total * zero) * scale[one];
          }
        }
      }
    }
  }
}

#endif

void row(const Weights& w, const Kept& kept, float* y, int64_t first, int64_t last, float* scratch) {
  by_type(w.type, [&](auto reader) {
    using R = decltype(reader);
    if (R::bits == 4 && w.columns % 2) return one_by_one<R>(w, kept, y, first, last);
    if (w.scale && (w.columns == 1 || !moderate(kept.value, kept.count))) return one_by_one<R>(w, kept, y, first, last);
    if (!w.scale) return scaled_rows<R, false>(w, kept, -1, y, first, last, scratch);
    if (w.block_columns == 1) {
#if defined(__AVX512F__)
      if (R::bits == 8 && w.block_rows >= 4 * kQuads && has_vnni() && has_digits(kept))
        return digit_columns<R::is_signed>(w, kept, y, first, last, scratch);
#endif
      return w.block_rows > 1 || w.rows == 1 ? scaled_columns<R>(w, kept, y, first, last, scratch)
                                             : one_by_one<R>(w, kept, y, first, last);
    }
    const int shift = block_shift<R>(w);
    if (shift == -2) return one_by_one<R>(w, kept, y, first, last);
    if (shift == -1) return scaled_rows<R, false>(w, kept, shift, y, first, last, scratch);
    scaled_rows<R, true>(w, kept, shift, y, first, last, scratch);
  });
}

int64_t row_scratch(const Weights& w, int64_t columns) {
  const int64_t padded = (columns + kChunk - 1) / kChunk * kChunk;
  const int64_t blocks = w.scale && w.block_rows == 1 ? padded / w.block_columns + 2 : 1;
  return 2 * padded + (kGroup + 2) * (blocks + 2 * kLanes);
}
