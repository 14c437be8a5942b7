/* y_i = q_i . sum over j <= i of k_j v_j^T, token by token: the algorithm of the CPU kernel of
 * pytorch-fast-transformers (causal_dot_product), written anew. One thread takes a head; its state
 * is read and written for every token. */
#include <stdlib.h>
#include <string.h>

void causal_product(const float* q, const float* k, const float* v, float* y, long heads, long T,
                    long F, long V) {
#pragma omp parallel for
  for (long h = 0; h < heads; ++h) {
    float* kv = calloc(F * V, sizeof *kv);
    for (long t = h * T; t < (h + 1) * T; ++t) {
      memset(y + t * V, 0, V * sizeof *y);
      for (long f = 0; f < F; ++f)
        for (long c = 0; c < V; ++c) kv[f * V + c] += k[t * F + f] * v[t * V + c];
      for (long f = 0; f < F; ++f)
        for (long c = 0; c < V; ++c) y[t * V + c] += q[t * F + f] * kv[f * V + c];
    }
    free(kv);
  }
}
