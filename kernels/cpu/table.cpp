#include "kernels.h"

#define LOL_STRING(x) #x
#define LOL_NAME(x) LOL_STRING(x)

namespace lol {
namespace LOL_ISA {

extern const Kernels kernels;
const Kernels kernels = {LOL_NAME(LOL_ISA),         feature_map,
                         feature_map_backward,      linear_attention,
                         linear_attention_backward, hybrid_attention,
                         hybrid_attention_backward, hybrid_attention_step,
                         attention_transfer,        attention_transfer_backward};

}  // namespace LOL_ISA
}  // namespace lol
