// The product of many rows of x: bound by arithmetic. Included once a level.
//
// Parts of W of kDepth rows and kStrip columns are unpacked into floats that stay in the cache, and multiplied by all
// tokens, kTokens x kTile sums in registers at a time. While that runs, the next part is fetched into the cache.

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTokens = 3, kTile = 8;
#else
constexpr int kTokens = 3, kTile = 4;
#endif
constexpr int kDepth = kLanes == 16 ? 64 : 128;
constexpr int kRun = 4;  // rows of weights for which one line is fetched
constexpr int kBatch = 258;  // tokens whose sums stay in the cache

// Has a register hold what was loaded: compilers take it from memory again for each use, and loads become the limit.
#if defined(__AVX512F__)
#define HOLD(vector) asm("" : "+v"(vector))
#elif defined(__SSE2__)
#define HOLD(vector) asm("" : "+x"(vector))
#elif defined(__aarch64__)
#define HOLD(vector) asm("" : "+w"(vector))
#else
#define HOLD(vector)
#endif

static_assert(kStrip % kChunk == 0 && kStrip % kColumns == 0 && kVectors % kTile == 0 && kBatch % kTokens == 0, "");

// Lines of memory that will be needed, one at a time: `bytes` of each of `count` rows.
struct Ahead {
  const uint8_t* base;
  int64_t stride, bytes;
  const int32_t* index;
  int64_t count;
  int64_t row = 0, line = 0;
  INLINE void fetch() {
    if (row >= count) return;
    __builtin_prefetch(base + index[row] * stride + line, 0, 2);
    line += 64;
    if (line >= bytes) line = 0, ++row;
  }
};

// Scales and zero points of one row of W, a number a column.
void row_scales(const Weights& w, int64_t row, int64_t first, int64_t last, float* scale, float* zero) {
  const int64_t across = w.columns / w.block_columns, entry = row / w.block_rows * across;
  if (w.block_columns == 1) {
    numbers(w.scale_type, w.scale, entry + first, last - first, scale);
    if (w.zero) numbers(w.type, w.zero, entry + first, last - first, zero);
    return;
  }
  const int64_t from = first / w.block_columns, count = (last - 1) / w.block_columns - from + 1;
  float scales[kStrip + 1], zeros[kStrip + 1];
  numbers(w.scale_type, w.scale, entry + from, count, scales);
  if (w.zero) numbers(w.type, w.zero, entry + from, count, zeros);
  for (int64_t b = 0; b < count; ++b) {
    const int64_t begin = most(first, (from + b) * w.block_columns), end = least(last, (from + b + 1) * w.block_columns);
    for (int64_t column = begin; column < end; ++column) scale[column - first] = scales[b];
    if (w.zero)
      for (int64_t column = begin; column < end; ++column) zero[column - first] = zeros[b];
  }
}

// Numbers of one row, columns first..last: at most kStrip.
void numbers_of(const Weights& w, int64_t row, int64_t first, int64_t last, float* out) {
  numbers(w.type, w.data, row * w.columns + first, last - first, out);
  if (!w.scale) return;
  float scale[kStrip], zero[kStrip];
  if (!w.zero) std::memset(zero, 0, (last - first) * sizeof(float));
  row_scales(w, row, first, last, scale, zero);
  for (int64_t at = 0; at < last - first; ++at) out[at] = (out[at] - zero[at]) * scale[at];
}

// Rows of W that `index` names as floats: panels of kChunk columns, each [kDepth, kChunk], zeros beyond the last.
template <class R>
void unpack_rows(const Weights& w, const int32_t* index, int64_t depth, int64_t first, int64_t last, float* panels) {
  const int64_t stride = w.columns * R::bits / 8;
  const bool whole_bytes = R::bits >= 8 || w.columns % 2 == 0;
  alignas(64) float scale[kStrip], zero[kStrip] = {};
  int64_t scaled = -1;
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t row = index[k];
    const uint8_t* from = (const uint8_t*)w.data + row * stride;
    if (w.scale && (scaled < 0 || w.block_rows == 1 || row / w.block_rows != scaled)) {
      row_scales(w, row, first, last, scale, zero);
      scaled = row / w.block_rows;
    }
    for (int64_t column = first; column < last; column += kChunk) {
      float* out = panels + (column - first) / kChunk * kDepth * kChunk + k * kChunk;
      const float *times = scale + (column - first), *less = zero + (column - first);
      Floats number[kVectors];
      if (whole_bytes && column + kChunk <= last) {
        R::each(from + column * R::bits / 8, [&](int v, Floats value) { number[v] = value; });
        R::mend(number);
      } else {
        float some[kChunk] = {};
        numbers(w.type, w.data, row * w.columns + column, least(kChunk, last - column), some);
        for (int v = 0; v < kVectors; ++v) number[v] = load<Floats>(some + v * kLanes);
        if (w.scale)  // what lies beyond may hold anything
          for (int64_t at = last - first; at < column - first + kChunk; ++at) scale[at] = zero[at] = 0;
      }
      if (w.scale)
        for (int v = 0; v < kVectors; ++v)
          number[v] = (number[v] - load<Floats>(less + v * kLanes)) * load<Floats>(times + v * kLanes);
      for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, number[v]);
    }
  }
}

template <int kCount>
INLINE void tile(const float* x, const float* panel, int64_t depth, float* y, bool begin, Ahead& ahead) {
  Floats sum[kCount][kTile] = {};
  const auto step = [&](int64_t k) INLINED {
    Floats value[kCount];
#pragma GCC unroll 3
    for (int t = 0; t < kCount; ++t) value[t] = spread(x[t * kDepth + k]);
#pragma GCC unroll 8
    for (int v = 0; v < kTile; ++v) {
      Floats weights = load<Floats>(panel + k * kChunk + v * kLanes);
      HOLD(weights);
#pragma GCC unroll 3
      for (int t = 0; t < kCount; ++t) sum[t][v] += weights * value[t];
    }
  };
  int64_t k = 0;
  for (; k + kRun <= depth; k += kRun) {
    ahead.fetch();
    for (int64_t at = k; at < k + kRun; ++at) step(at);
  }
  for (; k < depth; ++k) step(k);
  for (int t = 0; t < kCount; ++t)
    for (int v = 0; v < kTile; ++v) {
      float* to = y + t * kStrip + v * kLanes;
      store(to, begin ? sum[t][v] : load<Floats>(to) + sum[t][v]);
    }
}

// What `many` multiplies by: the rows of W that `index` names, all of its columns.
template <class R>
struct Straight {
  const Weights& w;
  const int32_t* index;
  int64_t depth;
  int64_t columns() const { return w.columns; }
  void unpack(int64_t from, int64_t some, int64_t first, int64_t last, float* panels) const {
    unpack_rows<R>(w, index + from, some, first, last, panels);
  }
  Ahead ahead(int64_t from, int64_t some, int64_t first, int64_t last) const {
    return {(const uint8_t*)w.data + first * R::bits / 8, w.columns * R::bits / 8, (last - first) * R::bits / 8, index + from, some};
  }
};

// Or the rows of W that `index` names as columns.
template <class R>
struct Turned {
  const Weights& w;
  const int32_t* index;
  int64_t count;
  int64_t depth = w.columns;
  int64_t columns() const { return count; }
  void unpack(int64_t from, int64_t some, int64_t first, int64_t last, float* panels) const {
    alignas(64) float rows[kLanes * kDepth];
    const int64_t end = first + (last - first + kChunk - 1) / kChunk * kChunk;  // zeros beyond the last
    for (int64_t column = first; column < end; column += kLanes) {
      const int64_t real = most(0, least(kLanes, last - column)), whole = (some + kLanes - 1) / kLanes * kLanes;
      for (int64_t r = 0; r < kLanes; ++r) {
        float* to = rows + r * kDepth;
        if (r < real) numbers_of(w, index[column + r], from, from + some, to);
        const int64_t known = r < real ? some : 0;
        std::memset(to + known, 0, (whole - known) * sizeof(float));
      }
      const int64_t at = column - first;
      float* out = panels + at / kChunk * kDepth * kChunk + at % kChunk;
      for (int64_t k = 0; k < whole; k += kLanes) {
        Floats square[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) square[r] = load<Floats>(rows + r * kDepth + k);
        turn(square);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) store(out + (k + r) * kChunk, square[r]);
      }
    }
  }
  Ahead ahead(int64_t from, int64_t some, int64_t first, int64_t last) const {
    return {(const uint8_t*)w.data + from * R::bits / 8, w.columns * R::bits / 8, some * R::bits / 8, index + first, last - first};
  }
};

// y [tokens, S::columns()] = x times the source + bias, or without one where it is null: columns first..last.
template <class S>
void many(const S& source, const float* x, int64_t tokens, const float* bias, float* y, int64_t first, int64_t last,
          float* panels) {
  float* sums = panels + kDepth * kStrip;
  const int64_t parts = (source.depth + kDepth - 1) / kDepth;
  const auto some_of = [&](int64_t part) { return least(kDepth, source.depth - part * kDepth); };
  for (int64_t strip = first; strip < last; strip += kStrip)
    for (int64_t token = 0; token < tokens; token += kBatch) {
      const int64_t end = least(strip + kStrip, last), some = least(kBatch, tokens - token);
      const int64_t chunks = (end - strip + kChunk - 1) / kChunk;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t depth = some_of(part);
        source.unpack(part * kDepth, depth, strip, end, panels);
        Ahead ahead{};
        if (part + 1 < parts)
          ahead = source.ahead((part + 1) * kDepth, some_of(part + 1), strip, end);
        else if (end < last && token + some == tokens)
          ahead = source.ahead(0, some_of(0), end, least(end + kStrip, last));
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          for (int64_t t = 0; t < some; t += kTokens)
            for (int v = 0; v < kVectors; v += kTile) {
              const float *left = x + (part * tokens + token + t) * kDepth, *right = panels + chunk * kDepth * kChunk + v * kLanes;
              float* out = sums + t * kStrip + chunk * kChunk + v * kLanes;
              if (some - t >= kTokens)
                tile<kTokens>(left, right, depth, out, part == 0, ahead);
              else if (some - t == 2)
                tile<2>(left, right, depth, out, part == 0, ahead);
              else
                tile<1>(left, right, depth, out, part == 0, ahead);
            }
      }
      for (int64_t t = 0; t < some; ++t) {
        float* to = y + (token + t) * source.columns() + strip;
        const float* own = sums + t * kStrip;
        for (int64_t column = 0; column < end - strip; ++column)
          to[column] = (parts ? own[column] : 0) + (bias ? bias[strip + column] : 0);
      }
    }
}

void rows(const Weights& w, const float* x, const int32_t* index, int64_t count, int64_t tokens, const float* bias,
          float* y, int64_t first, int64_t last, float* scratch) {
  by_type(w.type, [&](auto reader) {
    many(Straight<decltype(reader)>{w, index, count}, x, tokens, bias, y, first, last, scratch);
  });
}

void turned(const Weights& w, const float* x, const int32_t* index, int64_t count, int64_t tokens, float* y,
            int64_t first, int64_t last, float* scratch) {
  by_type(w.type, [&](auto reader) {
    many(Turned<decltype(reader)>{w, index, count}, x, tokens, nullptr, y, first, last, scratch);
  });
}
