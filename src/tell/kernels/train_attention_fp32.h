/* Attention of training over rows laid end to end, in fp32, on any processor; included by train.c.
 *
 * As train_attention.h: a job is a row and a key head with its query heads, queries go in tiles of 6 that meet no key
 * behind the last that they see, and the way back computes the probabilities anew. Products are register tiles of 6 x 2
 * vectors: one side is broadcast number by number, the other read a vector at a time.
 */
#if defined(__AVX512F__)
#define WIDE 16
#elif defined(__AVX__)
#define WIDE 8
#else
#define WIDE 4
#endif
#define TILE 6
#define KEYS (2 * WIDE) /* keys side by side in a panel */
#define QUERIES 48      /* whose probabilities are held for the gradients of keys and values; a multiple of TILE */
#define EACH _Pragma("GCC unroll 16")
#define ALWAYS static inline __attribute__((always_inline))

typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef float wide_at __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

int64_t train_attention_lanes_fp32(void) { return WIDE; }

static inline i64 ceil_to(i64 n, i64 to) { return (n + to - 1) / to * to; }

/* to (TILE, vectors * WIDE) = or += x times panel, both `depth` deep: element k of row i of x lies at
   x[i * row + k * step], row k of the panel at panel + k * pitch. */
ALWAYS void tile_fp32(int vectors, const float *x, i64 row, i64 step, i64 depth, const float *panel, i64 pitch, float *to,
                      i64 stride, int add) {
  wide s[TILE][2];
  EACH for (int i = 0; i < TILE; i++) EACH for (int b = 0; b < vectors; b++)
    s[i][b] = add ? (wide) * (const wide_at *)(to + i * stride + b * WIDE) : (wide){0};
  for (i64 k = 0; k < depth; k++) {
    wide v[2];
    EACH for (int b = 0; b < vectors; b++) v[b] = *(const wide_at *)(panel + k * pitch + b * WIDE);
    EACH for (int i = 0; i < TILE; i++) {
      const float a = x[i * row + k * step];
      EACH for (int b = 0; b < vectors; b++) s[i][b] += a * v[b];
    }
  }
  EACH for (int i = 0; i < TILE; i++) EACH for (int b = 0; b < vectors; b++)
    *(wide_at *)(to + i * stride + b * WIDE) = s[i][b];
}

/* to (TILE, width) = or += x times rows (depth, width). */
ALWAYS void weigh_fp32(const float *x, i64 row, i64 step, i64 depth, const float *rows, i64 width, float *to, int add) {
  i64 d = 0;
  for (; d + KEYS <= width; d += KEYS) tile_fp32(2, x, row, step, depth, rows + d, width, to + d, width, add);
  if (d < width) tile_fp32(1, x, row, step, depth, rows + d, width, to + d, width, add);
}

/* to (TILE, keys) = x (TILE, width) times the first `keys` rows that panels_fp32 has laid out. */
static void dots_fp32(const float *x, i64 width, const float *panels, i64 keys, float *to, i64 stride) {
  for (i64 j = 0; j < keys; j += KEYS) tile_fp32(2, x, width, 1, width, panels + j * width, KEYS, to + j, stride, 0);
}

/* rows (n, width) in panels of KEYS rows, [width][KEYS], filled up with zeros. */
static void panels_fp32(const float *rows, i64 n, i64 width, float *to) {
  for (i64 j = 0; j < n; j += KEYS)
    for (i64 d = 0; d < width; d++)
      for (i64 l = 0; l < KEYS; l++) to[j * width + d * KEYS + l] = j + l < n ? rows[(j + l) * width + d] : 0.0f;
}

/* Tokens from .. from + n of a row, turned and scaled, one below the other; zeros up to `padded`. */
static void gather_fp32(const train_attention_task_fp32 *t, const train_row *r, i64 from, i64 n, i64 padded,
                        const float *x, i64 stride, int turned, float scale, float *to) {
  for (i64 i = 0; i < n; i++) {
    const i64 at = row_token(r, from + i), rot = t->rotary;
    if (turned)
      turn_fp32(x + at * stride, to + i * t->width, t->cosine + at * rot, t->sine + at * rot, rot / 2, t->width, scale);
    else
      memcpy(to + i * t->width, x + at * stride, t->width * sizeof(float));
  }
  memset(to + n * t->width, 0, (padded - n) * t->width * sizeof(float));
}

static void forward_job_fp32(const train_attention_task_fp32 *t, const train_row *r, i64 key_head, char *memory) {
  const i64 width = t->width, n = r->keys, padded = ceil_to(n, KEYS), group = t->heads / t->key_heads;
  const i64 queries = ceil_to(r->length, TILE);
  float *scores = (float *)memory, *mixed = scores + TILE * padded, *keys = mixed + TILE * width;
  float *values = keys + padded * width, *q = values + padded * width;
  gather_fp32(t, r, 0, n, n, t->k + key_head * width, t->k_stride, 1, 1.0f, values);
  panels_fp32(values, n, width, keys);
  gather_fp32(t, r, 0, n, n, t->v + key_head * width, t->v_stride, 0, 1.0f, values);
  for (i64 h = key_head * group; h < (key_head + 1) * group; h++) {
    gather_fp32(t, r, r->ahead, r->length, queries, t->q + h * width, t->q_stride, 1, t->scaling, q);
    for (i64 i = 0; i < queries; i += TILE) {
      const i64 limit = r->ahead + i + TILE < n ? r->ahead + i + TILE : n;
      float inverse[TILE];
      dots_fp32(q + i * width, width, keys, limit, scores, padded);
      for (i64 m = 0; m < TILE; m++) {
        const i64 end = sight_end(r, i + m), begin = sight_begin_fp32(t, end);
        float *s = scores + m * padded, most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
        for (i64 j = begin; j < end; j++) most = s[j] > most ? s[j] : most;
#pragma omp simd reduction(+ : sum)
        for (i64 j = begin; j < end; j++) sum += s[j] = fast_exp(s[j] - most);
        memset(s, 0, begin * sizeof(float));
        memset(s + end, 0, (limit - end) * sizeof(float));
        inverse[m] = 1.0f / sum;
        if (end) t->lse[(r->start + i + m) * t->heads + h] = most + logf(sum);
      }
      weigh_fp32(scores, padded, 1, limit, values, width, mixed, 0);
      for (i64 m = 0; m < TILE && i + m < r->length; m++) {
        float *out = t->out + ((r->start + i + m) * t->heads + h) * width;
#pragma omp simd
        for (i64 d = 0; d < width; d++) out[d] = mixed[m * width + d] * inverse[m];
      }
    }
  }
}

/* out = in turned back, scaled. */
static void turn_back_fp32(const float *in, float *out, const float *c, const float *s, i64 half, i64 width, float scale) {
#pragma omp simd
  for (i64 d = 0; d < half; d++) {
    float a = in[d], b = in[d + half];
    out[d] = (a * c[d] + b * s[d + half]) * scale;
    out[d + half] = (b * c[d + half] - a * s[d]) * scale;
  }
#pragma omp simd
  for (i64 d = 2 * half; d < width; d++) out[d] = in[d] * scale;
}

/* Gradients of one job; `totals` as for backward_job of train_attention.h. */
static void backward_job_fp32(const train_attention_task_fp32 *t, const train_row *r, i64 key_head, float *totals,
                              char *memory) {
  const i64 width = t->width, n = r->keys, padded = ceil_to(n, KEYS), pitch = padded + TILE;
  const i64 group = t->heads / t->key_heads, queries = ceil_to(r->length, TILE), rot = t->rotary;
  const i64 sums = ceil_to(n, TILE) * width;
  float *probs = (float *)memory, *slopes = probs + QUERIES * pitch, *mixed = slopes + QUERIES * pitch;
  float *dk = mixed + TILE * width, *dv = dk + sums, *rows = dv + sums, *keys = rows + padded * width;
  float *values = keys + padded * width, *q = values + padded * width, *go = q + queries * width;
  gather_fp32(t, r, 0, n, n, t->v + key_head * width, t->v_stride, 0, 1.0f, rows);
  panels_fp32(rows, n, width, values);
  gather_fp32(t, r, 0, n, n, t->k + key_head * width, t->k_stride, 1, 1.0f, rows);
  panels_fp32(rows, n, width, keys);
  memset(dk, 0, 2 * sums * sizeof(float));
  if (totals && !r->ahead) {
    memcpy(dk, totals, n * width * sizeof(float));
    memcpy(dv, totals + n * width, n * width * sizeof(float));
  }
  for (i64 h = key_head * group; h < (key_head + 1) * group; h++) {
    gather_fp32(t, r, r->ahead, r->length, queries, t->q + h * width, t->q_stride, 1, t->scaling, q);
    gather_fp32(t, r, r->ahead, r->length, queries, t->go + h * width, t->heads * width, 0, 1.0f, go);
    for (i64 block = 0; block < queries; block += QUERIES) {
      const i64 span = queries - block < QUERIES ? queries - block : QUERIES;
      const i64 last = r->ahead + block + span < n ? r->ahead + block + span : n; /* keys that the block sees */
      for (i64 i = block; i < block + span; i += TILE) {
        const i64 limit = r->ahead + i + TILE < n ? r->ahead + i + TILE : n;
        float *p = probs + (i - block) * pitch, *ds = slopes + (i - block) * pitch;
        dots_fp32(q + i * width, width, keys, limit, p, pitch);
        dots_fp32(go + i * width, width, values, limit, ds, pitch);
        for (i64 m = 0; m < TILE; m++, p += pitch, ds += pitch) {
          const i64 end = sight_end(r, i + m), begin = sight_begin_fp32(t, end);
          const i64 token = (r->start + i + m) * t->heads + h;
          float mean = 0; /* slope: sum of p dp = out . go */
          if (end) {
            const float *a = t->out + token * width, *b = go + (i + m) * width, lse = t->lse[token];
#pragma omp simd reduction(+ : mean)
            for (i64 d = 0; d < width; d++) mean += a[d] * b[d];
#pragma omp simd
            for (i64 j = begin; j < end; j++) {
              p[j] = fast_exp(p[j] - lse);
              ds[j] = p[j] * (ds[j] - mean);
            }
          }
          /* the tile of keys that the block ends in may read on */
          for (float *x = p; x; x = x == p ? ds : NULL) {
            memset(x, 0, begin * sizeof(float));
            memset(x + end, 0, (last + TILE - end) * sizeof(float));
          }
        }
        weigh_fp32(slopes + (i - block) * pitch, pitch, 1, limit, rows, width, mixed, 0);
        for (i64 m = 0; m < TILE && i + m < r->length; m++) {
          const i64 at = r->start + i + m;
          turn_back_fp32(mixed + m * width, t->gq + at * t->g_stride + h * width, t->cosine + at * rot,
                         t->sine + at * rot, rot / 2, width, t->scaling);
        }
      }
      for (i64 j = 0; j < last; j += TILE) {
        i64 from = j - r->ahead - block; /* the first query of the block that sees key j */
        if (from < 0) from = 0;
        const i64 at = from * pitch + j, query = (block + from) * width;
        weigh_fp32(probs + at, 1, pitch, span - from, go + query, width, dv + j * width, 1);
        weigh_fp32(slopes + at, 1, pitch, span - from, q + query, width, dk + j * width, 1);
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
    turn_back_fp32(dk + i * width, t->gk + at * t->g_stride + key_head * width, t->cosine + at * rot,
                   t->sine + at * rot, rot / 2, width, 1.0f);
    memcpy(t->gv + at * t->g_stride + key_head * width, dv + i * width, width * sizeof(float));
  }
}

/* Bytes that a job may need: generous, so that each is a sum of plain terms. */
static i64 job_bytes_fp32(const train_attention_task_fp32 *t) {
  i64 longest = t->prefix;
  for (i64 r = 0; r < t->rows; r++) longest = t->prefix + t->length[r] > longest ? t->prefix + t->length[r] : longest;
  const i64 n = ceil_to(longest, KEYS) + KEYS;
  return 4 * (2 * QUERIES * (n + TILE) + TILE * t->width + 7 * (n + TILE) * t->width);
}

#define N(name) name##_fp32
#include "train_attention_jobs.h"
#undef N
