/* Training kernels, once for bf16 and once for fp32. */
#include "bits.h"

#define T bf16
#define LD from_bf16
#define ST to_bf16
#define N(name) name##_bf16
#include "train_body.h"
#undef T
#undef LD
#undef ST
#undef N

#define T float
#define LD(x) (x)
#define ST(x) (x)
#define N(name) name##_fp32
#include "train_body.h"
#undef T
#undef LD
#undef ST
#undef N

#include "train_attention.h"
