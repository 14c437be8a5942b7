/* A wrong call reports what is wrong and writes nothing. */
#include "testing.h"

static float x[B * H * T * D], weight[H * D * F], y[B * H * T * WIDE];

static lol_feature_map_args feature_map_args(void) {
  lol_feature_map_args args = {0};
  args.struct_size = sizeof(args);
  args.context.device = -1;
  args.x = TENSOR(x, B, H, T, D);
  args.features.weight = TENSOR(weight, H, D, F);
  args.features.two_sided = 1;
  args.features.eps = 1e-12;
  args.y = TENSOR(y, B, H, T, WIDE);
  return args;
}

static void refuses(lol_feature_map_args args, const char* word) {
  y[0] = 42;
  CHECK(lol_feature_map(&args) != LOL_OK);
  CHECK(strstr(lol_last_error(), word));
  CHECK(y[0] == 42);
}

static int fail_to_launch(const lol_cuda_launch* launch, void* user) {
  (void)launch;
  (void)user;
  lol_set_last_error("the launcher's reason");
  return LOL_ECUDA;
}

int main(void) {
  lol_feature_map_args args = feature_map_args();
  CHECK(lol_feature_map(&args) == LOL_OK);

  args = feature_map_args();
  args.x.ndim = 3;
  refuses(args, "feature_map: x ");

  args = feature_map_args();
  args.features.weight.shape[1] = D + 1;
  refuses(args, "weight");

  args = feature_map_args();
  args.x.dtype = LOL_I64;
  refuses(args, "feature_map: x ");

  args = feature_map_args();
  args.x.dtype = 9;
  refuses(args, "feature_map: x is of dtype code 9");

  args = feature_map_args();
  args.x = (lol_tensor){0};
  refuses(args, "feature_map: x is absent");

  args = feature_map_args();
  args.y = (lol_tensor){0};
  refuses(args, "feature_map: y is absent");

  args = feature_map_args();
  args.features.weight = (lol_tensor){0};
  refuses(args, "feature_map: features.weight is absent");

  args = feature_map_args();
  args.x.data = (char*)args.x.data + 2;
  refuses(args, "feature_map: x is float32 at an address that is no multiple of 4");

  args = feature_map_args();
  args.features.activation = 99;
  refuses(args, "activation");

  args = feature_map_args();
  args.features.eps = -1.0;
  refuses(args, "eps");

  args = feature_map_args();
  args.y.shape[3] = F;
  refuses(args, "feature_map: y ");

  args = feature_map_args();
  args.y.stride[2] = 0;
  refuses(args, "feature_map: y is written and has stride 0 in dimension 2");

  args = feature_map_args();
  args.y.shape[3] = F;
  lol_feature_map_backward_args backward = {.struct_size = sizeof(backward)};
  backward.context = args.context;
  backward.x = args.x;
  backward.features = args.features;
  backward.dy = args.y;
  CHECK(lol_feature_map_backward(&backward) != LOL_OK);
  CHECK(strstr(lol_last_error(), "feature_map_backward: dy "));

  args = feature_map_args();
  args.x.shape[0] = args.y.shape[0] = -1;
  refuses(args, "which no memory holds");

  args = feature_map_args();
  args.x.shape[0] = args.x.shape[2] = args.y.shape[0] = args.y.shape[2] = INT64_C(1) << 31;
  refuses(args, "which no memory holds");

  args = feature_map_args();
  args.features.activation = LOL_FAVOR;
  args.features.two_sided = 0;
  args.features.bias = TENSOR(weight, H, F);
  args.y.shape[3] = F;
  refuses(args, "neither bias nor skip");

  /* An output of what is not there. */
  static float dweight[H * D * F], dbias[H * F];
  lol_feature_map_backward_args grad = {0};
  args = feature_map_args();
  grad.struct_size = sizeof(grad);
  grad.context = args.context;
  grad.x = grad.dx = args.x;
  grad.dy = args.y;
  grad.features = args.features;
  grad.dweight = TENSOR(dweight, H, D, F);
  grad.dbias = TENSOR(dbias, H, F);
  CHECK(lol_feature_map_backward(&grad) == LOL_EINVAL);
  CHECK(strstr(lol_last_error(), "dbias is given without a bias"));

  lol_set_last_error(lol_last_error());
  CHECK(strstr(lol_last_error(), "dbias is given without a bias"));

  lol_set_last_error(NULL);
  CHECK(strcmp(lol_last_error(), "") == 0);

  args = feature_map_args();
  args.struct_size = 8;
  refuses(args, "struct_size");

  args = feature_map_args();
  args.context.device = 0;
  if (!lol_has_cuda()) refuses(args, "the CPU is device -1");
  lol_set_cuda_launcher(fail_to_launch, NULL);
  refuses(args, "the launcher's reason");
  lol_set_cuda_launcher(NULL, NULL);

  CHECK(lol_set_cpu_isa("abacus") != LOL_OK);
  CHECK(strstr(lol_last_error(), "abacus"));
  return 0;
}
