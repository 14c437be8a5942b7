// feature_map: y = phi(x), one pass over tiles of tokens; nothing but x and y touches memory.
#include "features.h"
#include "kernels.h"
#include "parallel.h"

namespace lol {
namespace LOL_ISA {
namespace {

// A feature map has no sequence structure: every [B, H] pair is one run of T tokens, cut into
// tiles.
struct Tiles {
  int64_t per_head, count;
  explicit Tiles(const lol_tensor& x)
      : per_head((x.shape[2] + BLOCK - 1) / BLOCK), count(x.shape[0] * x.shape[1] * per_head) {}
};

Sequence whole(const lol_tensor& x, int64_t batch) {
  return {batch, x.shape[2], 0, nullptr, batch};
}

}  // namespace

int feature_map(const lol_feature_map_args& a) {
  const int64_t H = a.x.shape[1], T = a.x.shape[2], D = a.x.shape[3],
                F = feature_dim(a.features, D);
  const Tiles tiles(a.x);
  const int64_t floats = rows_size(D) + lanes_size(D) + lanes_size(F) + rows_size(F);
  return run_workers(tiles.count, floats, tiles.count * BLOCK * D * F, [&](int64_t w, Arena arena) {
    const int64_t bh = w / tiles.per_head, first = w % tiles.per_head * BLOCK,
                  n = at_most(BLOCK, T - first);
    const Sequence s = whole(a.x, bh / H);
    float *row_tile = arena.take(rows_size(D)), *x = arena.take(lanes_size(D));
    float *phi = arena.take(lanes_size(F)), *y = arena.take(rows_size(F));
    load_rows(row_tile, tokens_of(a.x, s, bh % H), first, n);
    to_lanes(x, row_tile, (int)D);
    features_forward(map_of(a.features, bh % H, H, D), x, phi);
    to_rows(y, phi, (int)F);
    store_rows(tokens_of(a.y, s, bh % H), first, n, y);
  });
}

// dx = dz W^T and the weights' gradients, z never stored. A worker takes one head of one batch
// entry, so each partial sum has one writer; the partials are added in order, so the result does
// not depend on the number of threads.
int feature_map_backward(const lol_feature_map_backward_args& a) {
  const int64_t B = a.x.shape[0], H = a.x.shape[1], T = a.x.shape[2], D = a.x.shape[3];
  const int64_t F = feature_dim(a.features, D), f = a.features.weight.shape[2];
  const int64_t partial = WeightGradient::floats(D, f);
  Buffer partials(B * H * partial);
  if (!partials.ok()) return LOL_ENOMEM;
  fill(partials.data, B * H * partial, 0.0f);
  const int64_t floats =
      rows_size(D) + rows_size(F) + 2 * lanes_size(D) + 2 * lanes_size(F) + rows_size(f);
  const int status = run_workers(B * H, floats, 2 * B * H * T * D * F, [&](int64_t w, Arena arena) {
    const Sequence s = whole(a.x, w / H);
    const FeatureMap map = map_of(a.features, w % H, H, D);
    const WeightGradient gradient = WeightGradient::at(partials.data + w * partial, D, f);
    float *row_tile = arena.take(at_least(rows_size(D), rows_size(F))),
          *scratch = arena.take(rows_size(f));
    float *x = arena.take(lanes_size(D)), *dx = arena.take(lanes_size(D));
    float *phi = arena.take(lanes_size(F)), *dphi = arena.take(lanes_size(F));
    for (int64_t first = 0; first < T; first += BLOCK) {
      const int64_t n = at_most(BLOCK, T - first);
      load_rows(row_tile, tokens_of(a.x, s, w % H), first, n);
      to_lanes(x, row_tile, (int)D);
      load_rows(row_tile, tokens_of(a.dy, s, w % H), first, n);
      to_lanes(dphi, row_tile, (int)F);
      features_forward(map, x, phi);
      features_backward(map, x, phi, dphi, dx, Into::set);
      features_backward_weight(map, x, dphi, gradient, scratch);
      to_rows(row_tile, dx, (int)D);
      store_rows(tokens_of(a.dx, s, w % H), first, n, row_tile);
    }
  });
  if (status == LOL_OK)
    WeightGradient::reduce(partials.data, B, H, a.features, D, a.dweight, a.dbias);
  return status;
}

}  // namespace LOL_ISA
}  // namespace lol
