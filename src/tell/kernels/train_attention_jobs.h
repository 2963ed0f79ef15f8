/* Attention's jobs on all threads, once for each number format. */
#include <omp.h>

void N(train_attention)(const N(train_attention_task) * t) {
  const i64 size = N(job_bytes)(t);
#pragma omp parallel
  {
    char *memory = aligned_alloc(64, (size + 63) / 64 * 64);
#pragma omp for schedule(dynamic, 1)
    for (i64 job = 0; job < (t->rows + (t->prefix > 0)) * t->key_heads; job++) {
      const train_row r = N(row_of)(t, job / t->key_heads - (t->prefix > 0));
      N(forward_job)(t, &r, job % t->key_heads, memory);
    }
    free(memory);
  }
}

void N(train_attention_back)(const N(train_attention_task) * t) {
  const i64 size = N(job_bytes)(t), prefix = t->prefix, part = 2 * prefix * t->width, all = part * t->key_heads;
  const i64 threads = omp_get_max_threads();
  float *totals = prefix ? calloc(threads * all, sizeof(float)) : NULL; /* a thread's own */
#pragma omp parallel
  {
    char *memory = aligned_alloc(64, (size + 63) / 64 * 64);
    float *own = prefix ? totals + omp_get_thread_num() * all : NULL;
    if (!prefix) {
#pragma omp for schedule(dynamic, 1)
      for (i64 job = 0; job < t->rows * t->key_heads; job++) {
        const train_row r = N(row_of)(t, job / t->key_heads);
        N(backward_job)(t, &r, job % t->key_heads, NULL, memory);
      }
    } else {
#pragma omp for schedule(static, 1) /* so that a thread's totals are the same at every call */
      for (i64 job = 0; job < t->rows * t->key_heads; job++) {
        const train_row r = N(row_of)(t, job / t->key_heads);
        N(backward_job)(t, &r, job % t->key_heads, own + job % t->key_heads * part, memory);
      }
#pragma omp for schedule(dynamic, 1)
      for (i64 h = 0; h < t->key_heads; h++) {
        float *sum = totals + h * part;
        for (i64 c = 1; c < threads; c++)
          for (i64 d = 0; d < part; d++) sum[d] += sum[c * all + d];
        const train_row r = N(row_of)(t, -1);
        N(backward_job)(t, &r, h, sum, memory);
      }
    }
    free(memory);
  }
  free(totals);
}
