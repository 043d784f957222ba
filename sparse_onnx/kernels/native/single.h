// What is done once a token or a row: which inputs are kept, products of whole rows, conversions. Included once a level.

int64_t choose(const float* x, int64_t count, const Rule& rule, int32_t* index, float* value) {
  int64_t kept = 0, k = 0;
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; k + kLanes <= count; k += kLanes) {
    const __m512 tau = rule.tau_step ? _mm512_loadu_ps(rule.tau + k) : _mm512_set1_ps(*rule.tau);
    const __m512 centre = rule.centre_step ? _mm512_loadu_ps(rule.centre + k) : _mm512_set1_ps(*rule.centre);
    const __m512 distance = _mm512_sub_ps(_mm512_loadu_ps(x + k), centre);
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_abs_ps(distance), tau, _CMP_NLE_UQ);
    _mm512_storeu_ps(value + kept, _mm512_maskz_compress_ps(mask, distance));
    _mm512_storeu_si512(index + kept, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lanes, _mm512_set1_epi32((int)k))));
    kept += __builtin_popcount(mask);
  }
#endif
  for (; k < count; ++k) {
    const float distance = x[k] - rule.centre[k * rule.centre_step];
    index[kept] = (int32_t)k;
    value[kept] = distance;
    kept += !(__builtin_fabsf(distance) <= rule.tau[k * rule.tau_step]);  // NaN is kept, as it is by a dense product
  }
  return kept;
}

void mask(const float* x, int64_t count, const Rule& rule, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const Floats tau = rule.tau_step ? load<Floats>(rule.tau + k) : spread(*rule.tau);
    const Floats distance =
        load<Floats>(x + k) - (rule.centre_step ? load<Floats>(rule.centre + k) : spread(*rule.centre));
    store(out + k, (distance <= tau) & (distance >= -tau) ? Floats{} : distance);
  }
  for (; k < count; ++k) {
    const float distance = x[k] - rule.centre[k * rule.centre_step];
    out[k] = __builtin_fabsf(distance) <= rule.tau[k * rule.tau_step] ? 0 : distance;
  }
}

// out = S(gate) * (up + bias): zero where |gate| <= tau, whatever the rest is.
void gate(const float* gate, const float* up, const float* bias, float tau, int64_t count, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const Floats own = load<Floats>(gate + k);
    const auto skipped = (own <= spread(tau)) & (own >= spread(-tau));
    store(out + k, skipped ? Floats{} : own * (load<Floats>(up + k) + load<Floats>(bias + k)));
  }
  for (; k < count; ++k) out[k] = __builtin_fabsf(gate[k]) <= tau ? 0 : gate[k] * (up[k] + bias[k]);
}

void widen(Type type, const void* from, float* to, int64_t count) { numbers(type, from, 0, count, to); }

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
  int64_t at = 0;
#if defined(__F16C__)
  if (type == Type::F16)
    for (; at + 8 <= count; at += 8)
      _mm_storeu_si128((__m128i*)(out + at), _mm256_cvtps_ph(_mm256_loadu_ps(from + at), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; at < count; ++at) out[at] = type == Type::F16 ? to_half(from[at]) : to_brain(from[at]);
}
