/* Decoding: norms, rotary positions with the cache write, attention over cached keys, gated activations, sampling.
 *
 * Compiled twice from this file: bf16 (T = bf16, pairs of numbers side by side, as dot products of bf16 pairs want
 * them) and fp32. Sums are kept in fp32.
 *
 * Layout of a cache, a slot and a key head at a time (B = LANES keys, PAIR = 2 in bf16, 1 in fp32):
 *   keys   [capacity / B][D / PAIR][B][PAIR]   so that a vector holds B keys
 *   values [capacity / PAIR][D][PAIR]          so that a vector holds numbers of one value
 */
#ifndef T
#include "bits.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define LANES 16
#define CHUNK 128  /* keys scored at once: scores and probabilities of a tile stay in the first-level cache */
#define QUERIES 32 /* queries of a tile, tokens x query heads of a key head */
#define TOPK 256

typedef struct {
  i64 heads, kv_heads, width, rotary, slots, capacity, prefix, prefix_capacity, window;
  float scaling, softcap, eps;
  const float *cosine, *sine;            /* (positions, rotary) */
  const float *query_norm, *key_norm;    /* (width) or NULL */
  void *keys, *values;                   /* slots */
  const void *prefix_keys, *prefix_values;
} decode_layer;

typedef struct {
  const int32_t *slot, *at; /* of each token: its slot and its place in it */
} decode_tokens;

typedef struct {
  i64 vocabulary, top_k, banned_count, greedy;
  float temperature, top_p, penalty, softcap;
  const i64 *banned;
} decode_rule;

static inline float decode_tanh(float x) {
  float e = fast_exp(2.0f * (x > 40.0f ? 40.0f : x < -40.0f ? -40.0f : x));
  return (e - 1.0f) / (e + 1.0f);
}

#define GLUE_(a, b) a##_##b
#define GLUE(a, b) GLUE_(a, b)
#define NAME(x) GLUE(x, SUFFIX)

#define T bf16
#define SUFFIX bf16
#define GET from_bf16
#define PUT to_bf16
#define PAIR 2
#include "decode.c"
#undef T
#undef SUFFIX
#undef GET
#undef PUT
#undef PAIR
#define T float
#define SUFFIX fp32
#define GET(x) (x)
#define PUT(x) (x)
#define PAIR 1
#include "decode.c"

#else /* the typed body */

/* Scale of root mean square normalisation of x (n). */
static inline float NAME(rms)(const T *x, i64 n, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 i = 0; i < n; i++) sum += GET(x[i]) * GET(x[i]);
  return 1.0f / sqrtf(sum / n + eps);
}

/* out = norm(x) * weight, rows of h numbers; embeddings first: x = table[ids] * scale, where ids are given. */
void NAME(decode_embed)(i64 n, i64 h, const T *table, const i64 *ids, float scale, const float *weight, float eps,
                        T *residual, T *out) {
#pragma omp parallel for schedule(static)
  for (i64 r = 0; r < n; r++) {
    const T *x = table + ids[r] * h;
    T *to = residual + r * h, *y = out + r * h;
#pragma omp simd
    for (i64 i = 0; i < h; i++) to[i] = PUT(GET(x[i]) * scale);
    float factor = NAME(rms)(to, h, eps);
#pragma omp simd
    for (i64 i = 0; i < h; i++) y[i] = PUT(GET(PUT(GET(to[i]) * factor)) * weight[i]);
  }
}

/* residual += delta, or norm(delta) * post where post is given; out = norm(residual) * weight. */
void NAME(decode_add_norm)(i64 n, i64 h, T *residual, const T *delta, const float *post, const float *weight, float eps,
                           T *out) {
#pragma omp parallel for schedule(static)
  for (i64 r = 0; r < n; r++) {
    T *x = residual + r * h, *y = out + r * h;
    const T *d = delta + r * h;
    if (post) {
      float factor = NAME(rms)(d, h, eps);
#pragma omp simd
      for (i64 i = 0; i < h; i++) x[i] = PUT(GET(x[i]) + GET(PUT(GET(PUT(GET(d[i]) * factor)) * post[i])));
    } else {
#pragma omp simd
      for (i64 i = 0; i < h; i++) x[i] = PUT(GET(x[i]) + GET(d[i]));
    }
    float factor = NAME(rms)(x, h, eps);
#pragma omp simd
    for (i64 i = 0; i < h; i++) y[i] = PUT(GET(PUT(GET(x[i]) * factor)) * weight[i]);
  }
}

/* out (n, m) = act(gate) * up, gate and up the halves of x (n, 2m); kind 0: SiLU, 1: GELU by tanh. */
void NAME(decode_gate)(i64 n, i64 m, i64 kind, const T *x, T *out) {
#pragma omp parallel for schedule(static)
  for (i64 r = 0; r < n; r++) {
    const T *g = x + r * 2 * m, *u = g + m;
    T *y = out + r * m;
    if (kind == 0) {
#pragma omp simd
      for (i64 i = 0; i < m; i++) {
        float a = GET(g[i]), low = a < -80.0f ? -80.0f : a;
        y[i] = PUT(GET(PUT(a / (1.0f + fast_exp(-low)))) * GET(u[i]));
      }
    } else {
#pragma omp simd
      for (i64 i = 0; i < m; i++) {
        float a = GET(g[i]);
        float t = decode_tanh(0.7978845608028654f * (a + 0.044715f * a * a * a));
        y[i] = PUT(GET(PUT(0.5f * a * (1.0f + t))) * GET(u[i]));
      }
    }
  }
}

/* One head of one token: norm where weights are given, then rotary positions (halves apart). */
static inline void NAME(rotate)(const decode_layer *l, const T *x, const float *norm, i64 position, T *out) {
  i64 width = l->width, half = l->rotary / 2;
  const float *c = l->cosine + position * l->rotary, *s = l->sine + position * l->rotary;
  T own[width];
  if (norm) {
    float factor = NAME(rms)(x, width, l->eps);
    for (i64 i = 0; i < width; i++) own[i] = PUT(GET(PUT(GET(x[i]) * factor)) * norm[i]);
    x = own;
  }
#pragma omp simd
  for (i64 i = 0; i < half; i++) {
    float a = GET(x[i]), b = GET(x[i + half]);
    out[i] = PUT(a * c[i] - b * s[i]);
    out[i + half] = PUT(b * c[i + half] + a * s[i + half]);
  }
  for (i64 i = 2 * half; i < width; i++) out[i] = x[i];
}

#include "decode_tiles.h"

/* Let m queries look at the keys [0, count) of one cache; query i sees [from[i], to[i]). */
static void NAME(look)(const decode_layer *l, const T *q, i64 m, const T *keys, const T *values, i64 count,
                       const i64 *from, const i64 *to, float *best, float *total, float *out) {
  float scores[QUERIES * CHUNK];
  T probs[QUERIES * CHUNK];
  i64 width = l->width, first = count;
  for (i64 i = 0; i < m; i++) first = from[i] < first ? from[i] : first;
  for (i64 begin = first / LANES * LANES; begin < count; begin += CHUNK) {
    i64 n = count - begin < CHUNK ? count - begin : CHUNK, blocks = (n + LANES - 1) / LANES;
    NAME(score)(q, m, width, keys + begin * width, blocks, scores);
    for (i64 i = 0; i < m; i++) {
      float *s = scores + i * CHUNK, most = -INFINITY, sum = 0;
      T *p = probs + i * CHUNK;
      i64 low = from[i] > begin ? from[i] - begin : 0, high = to[i] - begin < n ? to[i] - begin : n;
      for (i64 k = 0; k < blocks * LANES && k < low; k++) p[k] = 0;
      if (high <= low) {
        memset(p, 0, sizeof(T) * blocks * LANES);
        continue;
      }
      if (l->softcap > 0) {
#pragma omp simd
        for (i64 k = low; k < high; k++) s[k] = decode_tanh(s[k] * l->scaling / l->softcap) * l->softcap;
      } else {
#pragma omp simd
        for (i64 k = low; k < high; k++) s[k] *= l->scaling;
      }
#pragma omp simd reduction(max : most)
      for (i64 k = low; k < high; k++) most = s[k] > most ? s[k] : most;
      if (most > best[i]) {
        float shrink = best[i] == -INFINITY ? 0.0f : fast_exp(best[i] - most);
        total[i] *= shrink;
#pragma omp simd
        for (i64 d = 0; d < width; d++) out[i * width + d] *= shrink;
        best[i] = most;
      }
      float top = best[i];
#pragma omp simd reduction(+ : sum)
      for (i64 k = low; k < high; k++) {
        float e = fast_exp(s[k] - top);
        sum += e;
        p[k] = PUT(e);
      }
      total[i] += sum;
      memset(p + high, 0, sizeof(T) * (blocks * LANES - high));
    }
    NAME(mix)(probs, m, width, values + begin * width, (n + PAIR - 1) / PAIR, out);
  }
}

/* Attention of n tokens, their keys and values put into the cache first.
 *
 * qkv (n, (heads + 2 kv_heads) width); out (n, heads width). Tokens of one row stand side by side, in order. */
void NAME(decode_attend)(const decode_layer *l, const decode_tokens *tokens, i64 n, const T *qkv, T *out) {
  const i64 width = l->width, kv = l->kv_heads, group = l->heads / kv, row = (l->heads + 2 * kv) * width;
  const i64 size = l->capacity * width;
  T *keys = l->keys, *values = l->values;
#pragma omp parallel
  {
#pragma omp for schedule(static) collapse(2)
    for (i64 t = 0; t < n; t++)
      for (i64 h = 0; h < kv; h++) {
        T turned[width];
        i64 at = tokens->at[t];
        const T *k = qkv + t * row + (l->heads + h) * width, *v = k + kv * width;
        T *to = keys + (tokens->slot[t] * kv + h) * size + at / LANES * LANES * width + at % LANES * PAIR;
        NAME(rotate)(l, k, l->key_norm, l->prefix + at, turned);
        for (i64 d = 0; d < width; d += PAIR) memcpy(to + d * LANES, turned + d, sizeof(T) * PAIR);
        to = values + (tokens->slot[t] * kv + h) * size + at / PAIR * PAIR * width + at % PAIR;
        for (i64 d = 0; d < width; d++) to[d * PAIR] = v[d];
      }
    const i64 step = QUERIES / group, tiles = (n + step - 1) / step;
#pragma omp for schedule(dynamic, 1)
    for (i64 job = 0; job < tiles * kv; job++) {
      const i64 h = job / tiles, begin = job % tiles * step, end = begin + step < n ? begin + step : n;
      const i64 m = (end - begin) * group;
      T q[QUERIES * width];
      float sums[QUERIES * width], best[QUERIES], total[QUERIES];
      i64 from[QUERIES], to[QUERIES];
      memset(sums, 0, sizeof(float) * m * width);
      for (i64 i = 0; i < m; i++) {
        i64 t = begin + i / group, position = l->prefix + tokens->at[t];
        NAME(rotate)(l, qkv + t * row + (h * group + i % group) * width, l->query_norm, position, q + i * width);
        best[i] = -INFINITY, total[i] = 0;
        from[i] = l->window && position >= l->window ? position - l->window + 1 : 0;
        to[i] = l->prefix;
      }
      if (l->prefix) {
        i64 skip = h * l->prefix_capacity * width;
        NAME(look)(l, q, m, (const T *)l->prefix_keys + skip, (const T *)l->prefix_values + skip, l->prefix, from, to,
                   best, total, sums);
      }
      for (i64 t = begin, stop; t < end; t = stop) {
        i64 slot = tokens->slot[t], skip = (slot * kv + h) * size, i = (t - begin) * group;
        for (stop = t + 1; stop < end && tokens->slot[stop] == slot;) stop++;
        for (i64 j = i; j < (stop - begin) * group; j++) {
          from[j] = from[j] > l->prefix ? from[j] - l->prefix : 0;
          to[j] = tokens->at[begin + j / group] + 1;
        }
        NAME(look)(l, q + i * width, (stop - t) * group, keys + skip, values + skip, tokens->at[stop - 1] + 1, from + i,
                   to + i, best + i, total + i, sums + i * width);
      }
      for (i64 i = 0; i < m; i++) {
        float share = 1.0f / total[i];
        T *y = out + (begin + i / group) * l->heads * width + (h * group + i % group) * width;
#pragma omp simd
        for (i64 d = 0; d < width; d++) y[d] = PUT(sums[i * width + d] * share);
      }
    }
  }
}

/* Next token of each of n rows: penalty, temperature, top-k, top-p, draw; ties go to the lower token.
 *
 * logits (n, V); seen (slots, V) bytes, changed; draws (n) in [0, 1). */
void NAME(decode_sample)(const decode_rule *rule, i64 n, const T *logits, const int32_t *slot, uint8_t *seen,
                         const float *draws, i64 *chosen) {
  const i64 vocabulary = rule->vocabulary;
#pragma omp parallel
  {
    float *x = malloc(sizeof(float) * vocabulary);
#pragma omp for schedule(dynamic, 1)
    for (i64 r = 0; r < n; r++) {
      const T *from = logits + r * vocabulary;
      uint8_t *known = seen + slot[r] * vocabulary;
      const float up = rule->penalty, cap = rule->softcap;
      if (cap > 0)
        for (i64 i = 0; i < vocabulary; i++) x[i] = tanhf(GET(from[i]) / cap) * cap;
      else
        for (i64 i = 0; i < vocabulary; i++) x[i] = GET(from[i]);
      if (up != 1.0f)
        for (i64 i = 0; i < vocabulary; i++) x[i] = known[i] ? (x[i] > 0 ? x[i] / up : x[i] * up) : x[i];
      for (i64 i = 0; i < rule->banned_count; i++) /* a tokenizer may know more tokens than the model */
        if (rule->banned[i] >= 0 && rule->banned[i] < vocabulary) x[rule->banned[i]] = -INFINITY;
      i64 k = rule->greedy ? 1 : rule->top_k < vocabulary ? rule->top_k : vocabulary, have = 0;
      float top[TOPK];
      i64 ids[TOPK];
      for (i64 begin = 0; begin < vocabulary; begin += 64) {
        i64 end = begin + 64 < vocabulary ? begin + 64 : vocabulary;
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (i64 i = begin; i < end; i++) most = x[i] > most ? x[i] : most;
        if (have == k && !(most > top[k - 1])) continue;
        for (i64 i = begin; i < end; i++) {
          if (have == k && !(x[i] > top[k - 1])) continue;
          i64 at = have < k ? have++ : k - 1;
          for (; at > 0 && top[at - 1] < x[i]; at--) top[at] = top[at - 1], ids[at] = ids[at - 1];
          top[at] = x[i], ids[at] = i;
        }
      }
      i64 best = 0;
      if (!rule->greedy) {
        float probs[TOPK], sum = 0;
        for (i64 i = 0; i < k; i++) sum += probs[i] = expf(top[i] / rule->temperature - top[0] / rule->temperature);
        double before = 0;
        float reach[TOPK];
        i64 kept = 0;
        for (; kept < k; kept++) {
          float p = probs[kept] / sum;
          if (kept && !((float)(before + p) - p < rule->top_p)) break;
          if (kept && p <= 0) break;
          reach[kept] = before += p;
        }
        float target = draws[r] * reach[kept - 1];
        while (best < kept - 1 && reach[best] <= target) best++;
      }
      chosen[r] = ids[best];
      known[ids[best]] = 1;
    }
    free(x);
  }
}
#endif
