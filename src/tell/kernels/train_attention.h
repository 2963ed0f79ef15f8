/* Attention of training over rows laid end to end, in bf16 with dot products of pairs; included by train.c.
 *
 * One job is a row and a key head with its query heads. Queries go in tiles of 6, which meet no key behind the last that
 * they see; scores and probabilities stay in fp32 in the cache. The way back computes the probabilities anew from the
 * logarithm of their sum. Scores are not rounded in between.
 */
#include "tiles.h"
#ifdef TELL_TILES
#define SPAN 96 /* queries whose probabilities are held for the gradients of keys and values; a multiple of ROWS */

int64_t train_attention_lanes_bf16(void) { return LANES; }

/* e^x for x <= 0, relative error under 3e-6; NaN stays. */
INLINE __m512 exp_lanes(__m512 x) {
  __m512 y = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-100.0f), x), _mm512_set1_ps(1.44269504f));
  __m512 n = _mm512_roundscale_ps(y, 0), f = _mm512_sub_ps(y, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  return _mm512_scalef_ps(_mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f)), n);
}

/* Tokens from .. from + n of a row, turned and scaled, one below the other; zeros up to `padded`. */
static void gather(const train_attention_task_bf16 *t, const train_row *r, i64 from, i64 n, i64 padded, const bf16 *x,
                   i64 stride, int turned, float scale, bf16 *to) {
  for (i64 i = 0; i < n; i++) {
    i64 at = row_token(r, from + i), rot = t->rotary;
    if (turned)
      turn_bf16(x + at * stride, to + i * t->width, t->cosine + at * rot, t->sine + at * rot, rot / 2, t->width, scale);
    else
      memcpy(to + i * t->width, x + at * stride, t->width * sizeof(bf16));
  }
  memset(to + n * t->width, 0, (padded - n) * t->width * sizeof(bf16));
}

/* x (n, width) in panels of PANEL rows, pairs along the width; and with pairs along the rows, in panels of PANEL columns. */
static void panels_of_rows(const bf16 *x, i64 n, i64 width, bf16 *to) {
  for (i64 i = 0; i < n; i += PANEL) lay_out(x + i * width, width, 0, n - i, width, PANEL, to + i * width);
}

static void panels_of_columns(const bf16 *x, i64 n, i64 width, bf16 *to) {
  for (i64 d = 0; d < width; d += PANEL)
    lay_out(x + d, width, 1, width - d, n, width - d < PANEL ? width - d : PANEL, to + d * n);
}

#define VECTORS(f, n) \
  switch (n) {        \
    case 1: f(1); break; \
    case 2: f(2); break; \
    case 3: f(3); break; \
    default: f(4);    \
  }

INLINE void dots_tile(int vectors, const bf16 *x, i64 width, const bf16 *panel, float *to, i64 stride) {
  __m512 s[ROWS][vectors];
  clear(ROWS, vectors, s);
  multiply(ROWS, vectors, 4, x, width, 2, width / 2, panel, s);
  store_sums(ROWS, vectors, s, to, stride);
}

/* to (ROWS, keys) = x (ROWS, width) times the first `keys` rows of panels_of_rows. */
static void dots(const bf16 *x, i64 width, const bf16 *panels, i64 keys, float *to, i64 stride) {
  for (i64 j = 0; j < keys; j += PANEL) {
#define CASE(v) dots_tile(v, x, width, panels + j * width, to + j, stride)
    VECTORS(CASE, (keys - j + LANES - 1) / LANES)
#undef CASE
  }
}

INLINE void mix_tile(int vectors, const bf16 *x, i64 row, i64 step, i64 pairs, const bf16 *panel, float *to, i64 stride,
                     int add) {
  __m512 s[ROWS][vectors];
  if (add)
    load_sums(ROWS, vectors, s, to, stride);
  else
    clear(ROWS, vectors, s);
  multiply(ROWS, vectors, vectors, x, row, step, pairs, panel, s);
  store_sums(ROWS, vectors, s, to, stride);
}

/* to (ROWS, width) = or += x times panels_of_columns, which are `depth` rows deep, from row `from` on. */
INLINE void mix(const bf16 *x, i64 row, i64 step, i64 pairs, const bf16 *panels, i64 depth, i64 from, i64 width,
                float *to, int add) {
  for (i64 d = 0; d < width; d += PANEL) {
    i64 wide = width - d < PANEL ? width - d : PANEL;
    const bf16 *panel = panels + d * depth + from * wide;
#define CASE(v) mix_tile(v, x, row, step, pairs, panel, to + d, width, add)
    VECTORS(CASE, wide / LANES)
#undef CASE
  }
}

/* Lanes from j on that lie in sight. */
static inline __mmask16 seen(i64 begin, i64 end, i64 j) { return first(end - j) & ~first(begin - j); }

static void forward_job_bf16(const train_attention_task_bf16 *t, const train_row *r, i64 key_head, char *memory) {
  const i64 width = t->width, n = r->keys, padded = up(n, PANEL), pitch = padded + LANES, group = t->heads / t->key_heads;
  const i64 queries = up(r->length, ROWS), deep = up(n, LANES);
  float *scores = (float *)memory, *mixed = scores + ROWS * pitch;
  bf16 *rows = (bf16 *)(mixed + ROWS * width), *keys = rows + up(n, 2 * LANES) * width, *values = keys + padded * width;
  bf16 *q = values + deep * width, *probs = q + queries * width;
  gather(t, r, 0, n, n, t->k + key_head * width, t->k_stride, 1, 1.0f, rows);
  panels_of_rows(rows, n, width, keys);
  gather(t, r, 0, n, deep, t->v + key_head * width, t->v_stride, 0, 1.0f, rows);
  panels_of_columns(rows, deep, width, values);
  for (i64 h = key_head * group; h < (key_head + 1) * group; h++) {
    gather(t, r, r->ahead, r->length, queries, t->q + h * width, t->q_stride, 1, t->scaling, q);
    for (i64 i = 0; i < queries; i += ROWS) {
      const i64 limit = r->ahead + i + ROWS < n ? r->ahead + i + ROWS : n, whole = up(limit, LANES);
      float inverse[ROWS];
      dots(q + i * width, width, keys, limit, scores, pitch);
      for (i64 m = 0; m < ROWS; m++) {
        const i64 end = sight_end(r, i + m), begin = sight_begin_bf16(t, end);
        const float *s = scores + m * pitch;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (i64 j = begin / LANES * LANES; j < end; j += LANES) {
          __mmask16 mask = seen(begin, end, j);
          top = _mm512_mask_max_ps(top, mask, top, _mm512_loadu_ps(s + j));
        }
        const float most = _mm512_reduce_max_ps(top);
        for (i64 j = 0; j < whole; j += LANES) {
          __m512 p = _mm512_maskz_mov_ps(seen(begin, end, j),
                                         exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(most))));
          sum = _mm512_add_ps(sum, p);
          _mm256_storeu_si256((__m256i *)(probs + m * pitch + j), (__m256i)_mm512_cvtneps_pbh(p));
        }
        const float total = _mm512_reduce_add_ps(sum);
        inverse[m] = 1.0f / total;
        if (end) t->lse[(r->start + i + m) * t->heads + h] = most + logf(total);
      }
      mix(probs, pitch, 2, whole / 2, values, deep, 0, width, mixed, 0);
      for (i64 m = 0; m < ROWS && i + m < r->length; m++) {
        bf16 *out = t->out + ((r->start + i + m) * t->heads + h) * width;
        for (i64 d = 0; d < width; d += LANES)
          _mm256_storeu_si256((__m256i *)(out + d), (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(
                                                        _mm512_loadu_ps(mixed + m * width + d), _mm512_set1_ps(inverse[m]))));
      }
    }
  }
}

/* out = in turned back, scaled. */
static void turn_back(const float *in, bf16 *out, const bf16 *c, const bf16 *s, i64 half, i64 width, float scale) {
#pragma omp simd
  for (i64 d = 0; d < half; d++) {
    float a = in[d], b = in[d + half];
    out[d] = to_bf16((a * from_bf16(c[d]) + b * from_bf16(s[d + half])) * scale);
    out[d + half] = to_bf16((b * from_bf16(c[d + half]) - a * from_bf16(s[d])) * scale);
  }
#pragma omp simd
  for (i64 d = 2 * half; d < width; d++) out[d] = to_bf16(in[d] * scale);
}

/* A pair of rows side by side. */
INLINE void store_pairs(int32_t *to, __m512 a, __m512 b) {
  __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a)), high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

/* Gradients of one job. dk, dv (keys, width): fp32 sums, of which those of the prefix go to or come from `totals`
   (2, prefix, width): a row adds to them, the prefix itself (ahead = 0) begins with them. */
static void backward_job_bf16(const train_attention_task_bf16 *t, const train_row *r, i64 key_head, float *totals, char *memory) {
  const i64 width = t->width, n = r->keys, padded = up(n, PANEL), pitch = padded + LANES, group = t->heads / t->key_heads;
  const i64 queries = up(r->length, ROWS), deep = up(n, LANES), rot = t->rotary, sums = up(n, ROWS) * width;
  float *scores = (float *)memory, *slopes = scores + ROWS * pitch, *mixed = slopes + ROWS * pitch;
  float *dk = mixed + ROWS * width, *dv = dk + sums;
  int32_t *p_pairs = (int32_t *)(dv + sums), *s_pairs = p_pairs + SPAN / 2 * pitch;
  bf16 *rows = (bf16 *)(s_pairs + SPAN / 2 * pitch), *keys = rows + deep * width, *values = keys + padded * width;
  bf16 *depth_keys = values + padded * width, *ds = depth_keys + deep * width, *q = ds + ROWS * pitch;
  bf16 *go = q + queries * width, *q_panels = go + queries * width, *go_panels = q_panels + SPAN * width;
  gather(t, r, 0, n, deep, t->k + key_head * width, t->k_stride, 1, 1.0f, rows);
  panels_of_rows(rows, n, width, keys);
  panels_of_columns(rows, deep, width, depth_keys);
  gather(t, r, 0, n, n, t->v + key_head * width, t->v_stride, 0, 1.0f, rows);
  panels_of_rows(rows, n, width, values);
  memset(dk, 0, 2 * sums * sizeof(float));
  if (totals && !r->ahead) {
    memcpy(dk, totals, n * width * sizeof(float));
    memcpy(dv, totals + n * width, n * width * sizeof(float));
  }
  for (i64 h = key_head * group; h < (key_head + 1) * group; h++) {
    gather(t, r, r->ahead, r->length, queries, t->q + h * width, t->q_stride, 1, t->scaling, q);
    gather(t, r, r->ahead, r->length, queries, t->go + h * width, t->heads * width, 0, 1.0f, go);
    for (i64 block = 0; block < queries; block += SPAN) {
      const i64 span = queries - block < SPAN ? queries - block : SPAN;
      panels_of_columns(q + block * width, span, width, q_panels);
      panels_of_columns(go + block * width, span, width, go_panels);
      i64 limit = 0;
      for (i64 i = block; i < block + span; i += ROWS) {
        limit = r->ahead + i + ROWS < n ? r->ahead + i + ROWS : n;
        const i64 whole = up(limit, LANES);
        dots(q + i * width, width, keys, limit, scores, pitch);
        dots(go + i * width, width, values, limit, slopes, pitch);
        for (i64 m = 0; m < ROWS; m += 2) {
          i64 end[2], begin[2];
          __m512 lse[2], mean[2]; /* mean slope: sum of p dp = out . go */
          for (int e = 0; e < 2; e++) {
            const i64 at = i + m + e, token = (r->start + at) * t->heads + h;
            end[e] = sight_end(r, at), begin[e] = sight_begin_bf16(t, end[e]);
            float dot = 0;
            if (end[e]) {
              const bf16 *a = t->out + token * width, *b = go + at * width;
#pragma omp simd reduction(+ : dot)
              for (i64 d = 0; d < width; d++) dot += from_bf16(a[d]) * from_bf16(b[d]);
            }
            lse[e] = _mm512_set1_ps(end[e] ? t->lse[token] : 0.0f), mean[e] = _mm512_set1_ps(dot);
          }
          int32_t *to_p = p_pairs + (i - block + m) / 2 * pitch, *to_s = s_pairs + (i - block + m) / 2 * pitch;
          for (i64 j = 0; j < whole; j += LANES) {
            __m512 p[2], g[2];
            UNROLL for (int e = 0; e < 2; e++) {
              const i64 at = (m + e) * pitch + j;
              p[e] = _mm512_maskz_mov_ps(seen(begin[e], end[e], j),
                                         exp_lanes(_mm512_sub_ps(_mm512_loadu_ps(scores + at), lse[e])));
              g[e] = _mm512_mul_ps(p[e], _mm512_sub_ps(_mm512_loadu_ps(slopes + at), mean[e]));
              _mm256_storeu_si256((__m256i *)(ds + at), (__m256i)_mm512_cvtneps_pbh(g[e]));
            }
            store_pairs(to_p + j, p[0], p[1]);
            store_pairs(to_s + j, g[0], g[1]);
          }
          /* the tile of keys that these queries end in may read on */
          _mm512_storeu_si512(to_p + whole, _mm512_setzero_si512());
          _mm512_storeu_si512(to_s + whole, _mm512_setzero_si512());
        }
        mix(ds, pitch, 2, whole / 2, depth_keys, deep, 0, width, mixed, 0);
        for (i64 m = 0; m < ROWS && i + m < r->length; m++) {
          const i64 at = r->start + i + m;
          turn_back(mixed + m * width, t->gq + at * t->g_stride + h * width, t->cosine + at * rot, t->sine + at * rot,
                    rot / 2, width, t->scaling);
        }
      }
      for (i64 j = 0; j < limit; j += ROWS) {
        i64 from = j - r->ahead - block; /* the first query of the block that sees key j */
        from = from > 0 ? from / 2 * 2 : 0;
        const i64 at = from / 2 * pitch + j;
        mix((bf16 *)(p_pairs + at), 2, 2 * pitch, (span - from) / 2, go_panels, span, from, width, dv + j * width, 1);
        mix((bf16 *)(s_pairs + at), 2, 2 * pitch, (span - from) / 2, q_panels, span, from, width, dk + j * width, 1);
      }
    }
  }
  if (r->ahead) {
#pragma omp simd
    for (i64 d = 0; d < r->ahead * width; d++) {
      totals[d] += dk[d];
      totals[r->ahead * width + d] += dv[d];
    }
  }
  for (i64 i = r->ahead; i < n; i++) {
    const i64 at = row_token(r, i);
    bf16 *gk = t->gk + at * t->g_stride + key_head * width, *gv = t->gv + at * t->g_stride + key_head * width;
    turn_back(dk + i * width, gk, t->cosine + at * rot, t->sine + at * rot, rot / 2, width, 1.0f);
    turn_back(dv + i * width, gv, NULL, NULL, 0, width, 1.0f);
  }
}

/* Bytes that a job may need: generous, so that each is a sum of plain terms. */
static i64 job_bytes_bf16(const train_attention_task_bf16 *t) {
  i64 longest = t->prefix;
  for (i64 r = 0; r < t->rows; r++) longest = t->prefix + t->length[r] > longest ? t->prefix + t->length[r] : longest;
  const i64 n = up(longest, PANEL) + PANEL;
  return 4 * (2 * ROWS * n + ROWS * t->width + 2 * n * t->width + SPAN * n) + 2 * (6 * n * t->width + ROWS * n + 2 * SPAN * t->width) + 64;
}

#define N(name) name##_bf16
#include "train_attention_jobs.h"
#undef N
#else
int64_t train_attention_lanes_bf16(void) { return 0; } /* leave it to the products of the library */
#endif
