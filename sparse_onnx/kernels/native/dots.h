// Products of rows of weights with x: each row of W is the weights of one result, and only chosen rows are read.
// Included once a level, behind row.h and many.h.

// Room for one row of x as `dots` takes it: whole chunks in the order of the reader's vectors, then the sum of x over
// each block of columns, which zero points are multiplied by.
int64_t laid(const Weights& w) {
  const int64_t padded = (w.columns + kChunk - 1) / kChunk * kChunk;
  return padded + (w.scale ? w.columns / w.block_columns : 0) + 2 * kLanes;
}

// Whether a row is read as it is stored: blocks and chunks fit each other. Else it is made numbers first.
template <class R>
bool as_stored(const Weights& w) {
  if (R::bits == 4 && w.columns % 2) return false;
  if (!w.scale) return true;
  return w.block_rows == 1 && w.block_columns > 1 && block_shift<R>(w) != -2;
}

void lay(const Weights& w, const float* x, float* out) {
  const int64_t whole = w.columns / kChunk * kChunk, padded = (w.columns + kChunk - 1) / kChunk * kChunk;
  std::memcpy(out, x, w.columns * sizeof(float));
  std::memset(out + w.columns, 0, (laid(w) - w.columns) * sizeof(float));
  if (w.scale && w.block_columns > 1)
    for (int64_t column = 0; column < w.columns; ++column) out[padded + column / w.block_columns] += x[column];
  by_type(w.type, [&](auto reader) {
    using R = decltype(reader);
    if (R::in_order || !as_stored<R>(w)) return;
    for (int64_t at = 0; at < whole + (whole < w.columns ? kChunk : 0); at += kChunk) {
      float some[kChunk];
      std::memcpy(some, out + at, sizeof some);
      for (int column = 0; column < kChunk; ++column) out[at + column % 8 * kLanes + column / 8] = some[column];
    }
  });
}

INLINE float total(Floats value) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += value[lane];
  return sum;
}

// One row without scales, or with scales of blocks of columns: as_stored.
template <class R>
float dot(const Weights& w, const float* x, int64_t row, int64_t next, const float* scale, const float* zero, int shift) {
  const uint8_t* from = (const uint8_t*)w.data + row * (w.columns * R::bits / 8);
  const uint8_t* ahead = (const uint8_t*)w.data + next * (w.columns * R::bits / 8);
  Floats sum[kVectors] = {}, all = {};
  const auto chunk = [&](const uint8_t* bytes, int64_t column) INLINED {
    if (shift >= 0) {  // several blocks a chunk
      const float* factor = scale + column / w.block_columns;
      Floats own = {};
      R::each(bytes, [&](int v, Floats weights) {
        const Floats product = weights * load<Floats>(x + column + v * kLanes);
        if (R::in_order) sum[v] += product * spread(factor[v >> shift]);
        else own += product;
      });
      if (!R::in_order) all += own * lane_blocks(factor, shift);
    } else {
      R::each(bytes, [&](int v, Floats weights) { sum[v] += weights * load<Floats>(x + column + v * kLanes); });
    }
  };
  const auto gather = [&]() INLINED {
    Floats both = {};
    for (int v = 0; v < kVectors; ++v) both += sum[v], sum[v] = Floats{};
    return both;
  };
  int64_t column = 0;
  for (; column + kChunk <= w.columns; column += kChunk) {
    chunk(from + column * R::bits / 8, column);
    for (int line = 0; line < kChunk * R::bits / 8; line += 64)
      __builtin_prefetch(ahead + column * R::bits / 8 + line, 0, 2);
    if (shift == -1 && scale && (column + kChunk) % w.block_columns == 0)
      all += gather() * spread(scale[column / w.block_columns]);
  }
  if (column < w.columns) {
    uint8_t end[kChunk * R::bits / 8] = {};
    std::memcpy(end, from + column * R::bits / 8, ((w.columns - column) * R::bits + 7) / 8);
    chunk(end, column);
    if (shift == -1 && scale) all += gather() * spread(scale[column / w.block_columns]);
  }
  float result = total(all + gather());
  if (zero) {
    const float* sums = x + (w.columns + kChunk - 1) / kChunk * kChunk;
    for (int64_t b = 0; b < w.columns / w.block_columns; ++b) result -= scale[b] * zero[b] * sums[b];
  }
  return result;
}

int64_t dots_scratch(const Weights& w) {
  return kStrip + (w.scale ? 2 * (w.columns / w.block_columns) : 0) + 4 * kLanes;
}

// out[at] = the row index[at] of W times x, as `lay` laid it out.
void dots(const Weights& w, const float* x, const int32_t* index, int64_t count, float* out, float* scratch) {
  by_type(w.type, [&](auto reader) {
    using R = decltype(reader);
    const bool stored = as_stored<R>(w), turned = stored && !R::in_order;
    if (!stored || (w.scale && !moderate(x, (w.columns + kChunk - 1) / kChunk * kChunk))) {
      const auto place = [&](int64_t column) {  // where `lay` put it
        return turned ? column / kChunk * kChunk + column % 8 * kLanes + column % kChunk / 8 : column;
      };
      for (int64_t at = 0; at < count; ++at) {
        out[at] = 0;
        for (int64_t first = 0; first < w.columns; first += kStrip) {
          const int64_t last = least(first + kStrip, w.columns);
          numbers_of(w, index[at], first, last, scratch);
          float sum = 0;
          for (int64_t column = first; column < last; ++column) sum += scratch[column - first] * x[place(column)];
          out[at] += sum;
        }
      }
      return;
    }
    const int64_t blocks = w.scale ? w.columns / w.block_columns : 0;
    const int shift = w.scale ? block_shift<R>(w) : -1;
    float *scale = scratch, *zero = scratch + blocks + 2 * kLanes;
    std::memset(scale + blocks, 0, 2 * kLanes * sizeof(float));  // read for columns beyond the last, which are zero
    for (int64_t at = 0; at < count; ++at) {
      if (w.scale) numbers(w.scale_type, w.scale, index[at] * blocks, blocks, scale);
      if (w.scale && w.zero) numbers(w.type, w.zero, index[at] * blocks, blocks, zero);
      out[at] = dot<R>(w, x, index[at], index[least(at + 1, count - 1)], w.scale ? scale : nullptr,
                       w.scale && w.zero ? zero : nullptr, shift);
    }
  });
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAcross = 4;  // tokens whose sums with kDown rows are in registers
#else
constexpr int kAcross = 2;
#endif
constexpr int kDown = 4;
constexpr int kRows = 16;  // rows of weights that are numbers at a time
constexpr int kFew = 8;    // tokens up to which reading weights takes the time: fewer rows side by side are read faster

// The sums of kLanes vectors, one a lane.
INLINE Floats totals(Floats* vectors) {
#pragma GCC unroll 4
  for (int count = kLanes / 2; count; count /= 2)
#pragma GCC unroll 8
    for (int at = 0; at < count; ++at) {
      Floats a = vectors[at], b = vectors[at + count];
      interleave(a, b);
      vectors[at] = a + b;
    }
  return vectors[0];
}

template <int kCount>
INLINE void cross_tile(const float* weights, const float* x, int64_t depth, float* sums) {
  Floats sum[kCount][kDown] = {};
  for (int64_t k = 0; k < depth; k += kLanes) {
    Floats own[kCount];
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) own[t] = load<Floats>(x + t * kStrip + k);
#pragma GCC unroll 4
    for (int r = 0; r < kDown; ++r) {
      Floats row = load<Floats>(weights + r * kStrip + k);
      HOLD(row);
#pragma GCC unroll 4
      for (int t = 0; t < kCount; ++t) sum[t][r] += row * own[t];
    }
  }
  float found[kCount * kDown];
  Floats apart[kCount * kDown];  // not `sum` itself: what has an address does not stay in registers
#pragma GCC unroll 4
  for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < kDown; ++r) apart[t * kDown + r] = sum[t][r];
  if constexpr (kCount * kDown % kLanes == 0) {
    for (int at = 0; at < kCount * kDown; at += kLanes) store(found + at, totals(apart + at));
  } else {
    for (int at = 0; at < kCount * kDown; ++at) found[at] = total(apart[at]);
  }
  for (int t = 0; t < kCount; ++t)
    for (int r = 0; r < kDown; ++r) sums[t * kRows + r] += found[t * kDown + r];
}

int64_t cross_scratch(int64_t tokens) { return kRows * kStrip + kRows * tokens; }

// out[token * stride + at] = the row index[at] of W times x, which is in parts of kStrip columns, [parts, tokens, kStrip]
// with zeros behind the last: rows of x a power of two apart would push each other out of the cache.
template <class R>
void cross_by(const Weights& w, const float* x, int64_t tokens, const int32_t* index, int64_t count, float* out,
              int64_t stride, float* scratch) {
  float *rows = scratch, *sums = scratch + kRows * kStrip;
  const int64_t group = tokens <= kFew ? kDown : kRows, length = w.columns * R::bits / 8;
  for (int64_t at = 0; at < count; at += group) {
    const int64_t some = least(group, count - at), whole = (some + kDown - 1) / kDown * kDown;
    std::memset(sums, 0, kRows * tokens * sizeof(float));
    for (int64_t first = 0; first < w.columns; first += kStrip) {
      const int64_t last = least(first + kStrip, w.columns), depth = (last - first + kLanes - 1) / kLanes * kLanes;
      for (int64_t r = 0; r < whole; ++r) {
        float* to = rows + r * kStrip;
        const int64_t real = r < some ? last - first : 0;
        if (real) numbers_of(w, index[at + r], first, last, to);
        std::memset(to + real, 0, (depth - real) * sizeof(float));
        if (at + group + r >= count) continue;
        const uint8_t* next = (const uint8_t*)w.data + index[at + group + r] * length;
        for (int64_t line = first * R::bits / 8; line < last * R::bits / 8; line += 64)
          __builtin_prefetch(next + line, 0, 2);
      }
      const float* part = x + first * tokens;
      for (int64_t t = 0; t < tokens; t += kAcross)
        for (int64_t r = 0; r < some; r += kDown) {
          const float* left = rows + r * kStrip;
          if (tokens - t >= kAcross)
            cross_tile<kAcross>(left, part + t * kStrip, depth, sums + t * kRows + r);
          else
            for (int64_t own = t; own < tokens; ++own)
              cross_tile<1>(left, part + own * kStrip, depth, sums + own * kRows + r);
        }
    }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < some; ++r) out[t * stride + at + r] = sums[t * kRows + r];
  }
}

void cross(const Weights& w, const float* x, int64_t tokens, const int32_t* index, int64_t count, float* out,
           int64_t stride, float* scratch) {
  by_type(w.type, [&](auto reader) { cross_by<decltype(reader)>(w, x, tokens, index, count, out, stride, scratch); });
}
