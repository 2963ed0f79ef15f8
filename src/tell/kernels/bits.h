/* Numbers as the kernels read and write them: fp32 inside, bf16 or fp32 in memory. */
#ifndef TELL_BITS_H
#define TELL_BITS_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t i64;

static inline float from_bf16(bf16 x) {
  union { uint32_t u; float f; } c;
  c.u = (uint32_t)x << 16;
  return c.f;
}

/* Round to nearest, ties to even, as torch does. */
static inline bf16 to_bf16(float x) {
  union { uint32_t u; float f; } c;
  c.f = x;
  return (bf16)((c.u + 0x7fffu + ((c.u >> 16) & 1u)) >> 16);
}

/* e^x, relative error under 3e-7; held at e^-87 and e^88 beyond, so that it never overflows. */
static inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float t = x * 1.44269504088896f;
  float n = rintf(t);
  float f = (t - n) * 0.693147180559945f;
  float p = 1.0f + f * (1.0f + f * (0.5f + f * (0.166666667f + f * (0.0416666667f + f * (0.00833333333f + f * 0.00138888889f)))));
  union { uint32_t u; float f; } c;
  c.u = (uint32_t)((int32_t)n + 127) << 23;
  return p * c.f;
}
#endif
