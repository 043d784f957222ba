// The product of one row of x: bound by reading the weights of its kept inputs. Included once a level.
//
// A few rows of weights are read side by side, kChunk columns at a time whose sums stay in registers, while the
// same columns of the next rows are fetched into the cache: a processor's own prefetching does not see rows that are
// skipped coming.

// Few rows in long runs: a processor follows some streams well, and each shorter row begins another one.
template <class R>
constexpr int group_of = R::bits == 4 ? 6 : 4;
constexpr int kGroup = 8;  // the largest

template <int kCount>
struct Count {
  static constexpr int value = kCount;
};

struct Group {
  const uint8_t *row[kGroup + 1], *next[kGroup + 1];
  const float* factor[kGroup + 1];
  int count = 0;
  void add(const uint8_t* at, const uint8_t* ahead, const float* number) {
    row[count] = at, next[count] = ahead, factor[count++] = number;
  }
};

// Where several blocks of columns lie in a chunk, how far to shift the number of a vector (or of a lane, of nibbles) to
// get its block's; -1 where one block holds the chunk, and -2 where blocks and chunks do not fit.
template <class R>
int block_shift(const Weights& w) {
  const int64_t block = w.block_columns, unit = R::in_order ? kLanes : 8;
  if (block == w.columns || block % kChunk == 0) return -1;
  if (kChunk % block || block % unit) return -2;
  int shift = 0;
  while (unit << shift < block) ++shift;
  return shift;
}

INLINE Floats lane_blocks(const float* factor, int shift) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(lanes, shift), _mm512_loadu_ps(factor));
#else
  Floats result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = factor[lane >> shift];
  return result;
#endif
}

// sums[0..kCount * kLanes) += the group's rows, in the order of R's vectors. kMany: several factors a row and chunk.
template <class R, bool kMany, int kCount = kVectors>
INLINE void add_chunk(const Group& group, int64_t bytes, int64_t block, int shift, float* sums) {
  Floats sum[kCount];
  for (int v = 0; v < kCount; ++v) sum[v] = load<Floats>(sums + v * kLanes);
  for (int r = 0; r < group.count; ++r) {
    const float* factor = group.factor[r] + block;
    Floats all;
    if (!kMany || !R::in_order) all = kMany ? lane_blocks(factor, shift) : spread(*factor);
    R::template each<kCount>(group.row[r] + bytes, [&](int v, Floats weights) {
      sum[v] += weights * (kMany && R::in_order ? spread(factor[v >> shift]) : all);
    });
    for (int line = 0; line < kCount * kLanes * R::bits / 8; line += 64) __builtin_prefetch(group.next[r] + bytes + line, 0, 2);
  }
  for (int v = 0; v < kCount; ++v) store(sums + v * kLanes, sum[v]);
}

template <class R, bool kMany>
INLINE void add_group(const Group& group, const Weights& w, int shift, int64_t first, int64_t last, float* sums) {
  const int64_t block_of_first = first / w.block_columns;
  const bool by_block = w.scale && (kMany || shift == -1);
  const auto block = [&](int64_t column) { return by_block ? column / w.block_columns - block_of_first : 0; };
  int64_t column = first;
  const auto add = [&](auto count) INLINED {
    add_chunk<R, kMany, decltype(count)::value>(group, column * R::bits / 8, block(column), shift, sums + (column - first));
    column += decltype(count)::value * kLanes;
  };
  while (column + kChunk <= last) add(Count<kVectors>());
  if constexpr (R::in_order) {
    if (column + 4 * kLanes <= last) add(Count<4>());
    if (column + 2 * kLanes <= last) add(Count<2>());
    if (column + kLanes <= last) add(Count<1>());
  }
  if (column == last) return;
  uint8_t ends[kGroup + 1][kChunk * R::bits / 8] = {};
  Group end = group;
  for (int r = 0; r < group.count; ++r) {
    std::memcpy(ends[r], group.row[r] + column * R::bits / 8, ((last - column) * R::bits + 7) / 8);
    end.row[r] = ends[r], end.next[r] = group.next[r] + column * R::bits / 8;
  }
  add_chunk<R, kMany>(end, 0, block(column), shift, sums + (column - first));
}

// Whether sums with such values stay finite, so that zero points can be taken off behind them.
bool moderate(const float* value, int64_t count) {
  int32_t large = 0;
  for (int64_t at = 0; at < count; ++at) large |= !(__builtin_fabsf(value[at]) < 1e30f);  // of NaN, too
  return !large;
}

// The weights of the kept input number `at`, or of the last one where there are no more.
INLINE const uint8_t* row_of(const Weights& w, const Kept& kept, int64_t at, int64_t stride) {
  return (const uint8_t*)w.data + kept.index[least(at, kept.count - 1)] * stride;
}

// Of a whole strip, from the sums in the order of R's vectors: visit(column, how many, numbers).
template <class R, class F>
INLINE void in_order(const float* sums, int64_t first, int64_t last, F&& visit) {
  for (int64_t column = first; column < last; column += kChunk) {
    Floats sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = load<Floats>(sums + (column - first) + v * kLanes);
    R::mend(sum);
    if (column + kChunk <= last) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) visit(column + v * kLanes, kLanes, sum[v]);
    } else {
      for (int v = 0; v < kVectors; ++v)
        if (column + v * kLanes < last) visit(column + v * kLanes, (int)least(kLanes, last - column - v * kLanes), sum[v]);
    }
  }
}

// No scales, or scales of rows of weights, which go into their factors: blocks of columns.
template <class R, bool kMany>
void scaled_rows(const Weights& w, const Kept& kept, int shift, float* y, int64_t first, int64_t last, float* scratch) {
  const int64_t stride = w.columns * R::bits / 8, padded = (last - first + kChunk - 1) / kChunk * kChunk;
  const int64_t from = first / w.block_columns, count = w.scale ? (last - 1) / w.block_columns - from + 1 : 1;
  const int64_t all = w.scale ? w.columns / w.block_columns : 1, room = count + 2 * kLanes;
  float *sums = scratch, *shifts = sums + padded, *points = shifts + room, *factors = points + room;
  std::memset(scratch, 0, (padded + (kGroup + 2) * room) * sizeof(float));
  for (int64_t at = 0; at < kept.count; at += group_of<R>) {
    Group group;
    for (int64_t r = at; r < least(at + group_of<R>, kept.count); ++r) {
      const float *factor = kept.value + r, value = *factor;
      if (w.scale) {
        float* own = factors + (r - at) * room;
        const int64_t entry = kept.index[r] * all + from;
        numbers(w.scale_type, w.scale, entry, count, own);
        for (int64_t b = 0; b < count; ++b) own[b] *= value;
        if (w.zero) {
          numbers(w.type, w.zero, entry, count, points);
          for (int64_t b = 0; b < count; ++b) shifts[b] += own[b] * points[b];
        }
        factor = own;
      }
      group.add(row_of(w, kept, r, stride), row_of(w, kept, r + group_of<R>, stride), factor);
    }
    add_group<R, kMany>(group, w, shift, first, last, sums);
  }
  in_order<R>(sums, first, last, [&](int64_t column, int lanes, Floats sum) {
    if (lanes == kLanes) return store(y + column, sum);
    for (int lane = 0; lane < lanes; ++lane) y[column + lane] = sum[lane];
  });
  if (!w.zero || !w.scale) return;
  for (int64_t b = 0; b < count; ++b) {
    const int64_t end = least(last, (from + b + 1) * w.block_columns);
    for (int64_t column = most(first, (from + b) * w.block_columns); column < end; ++column) y[column] -= shifts[b];
  }
}

// Scales of columns, for a block of rows: sums of integers first, then the scale. Zero points are one more row.
template <class R>
void scaled_columns(const Weights& w, const Kept& kept, float* y, int64_t first, int64_t last, float* scratch) {
  const int64_t stride = w.columns * R::bits / 8, padded = (last - first + kChunk - 1) / kChunk * kChunk;
  float *sums = scratch, *wide = sums + padded;
  std::memset(y + first, 0, (last - first) * sizeof(float));
  for (int64_t at = 0; at < kept.count;) {
    const int64_t block = kept.index[at] / w.block_rows, behind = (block + 1) * w.block_rows;
    float total = 0;
    std::memset(sums, 0, padded * sizeof(float));
    while (at < kept.count && kept.index[at] < behind) {
      Group group;
      for (; group.count < group_of<R> && at < kept.count && kept.index[at] < behind; ++at) {
        total -= kept.value[at];
        group.add(row_of(w, kept, at, stride), row_of(w, kept, at + group_of<R>, stride), kept.value + at);
      }
      const uint8_t* zeros = (const uint8_t*)w.zero + block * stride;
      if (w.zero && (at == kept.count || kept.index[at] >= behind)) group.add(zeros, zeros, &total);
      add_group<R, false>(group, w, -2, first, last, sums);
    }
    const float* scale = (const float*)w.scale + block * w.columns;
    if (w.scale_type != Type::F32) {
      numbers(w.scale_type, w.scale, block * w.columns + first, last - first, wide);
      scale = wide - first;
    }
    in_order<R>(sums, first, last, [&](int64_t column, int lanes, Floats sum) {
      if (lanes == kLanes) return store(y + column, load<Floats>(y + column) + sum * load<Floats>(scale + column));
      for (int lane = 0; lane < lanes; ++lane) y[column + lane] += sum[lane] * scale[column + lane];
    });
  }
}

// Blocks that do not fit the vectors, rows that begin within a byte, and values that are not moderate.
template <class R>
void one_by_one(const Weights& w, const Kept& kept, float* y, int64_t first, int64_t last) {
  const int64_t across = w.scale ? w.columns / w.block_columns : 0;
  std::memset(y + first, 0, (last - first) * sizeof(float));
  for (int64_t at = 0; at < kept.count; ++at)
    for (int64_t column = first; column < last; ++column) {
      float number = R::one(w.data, kept.index[at] * w.columns + column);
      if (w.scale) {
        const int64_t entry = kept.index[at] / w.block_rows * across + column / w.block_columns;
        float scale;
        numbers(w.scale_type, w.scale, entry, 1, &scale);
        number = (number - (w.zero ? R::one(w.zero, entry) : 0)) * scale;
      }
      y[column] += number * kept.value[at];
    }
}
