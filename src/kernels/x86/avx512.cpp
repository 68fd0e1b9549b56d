// The stages for AVX-512 without bf16 instructions. Compiled with its own flags (CMakeLists.txt).
#include "../stages.h"
#include "avx512-vec.h"

#include "../simd/stages-inl.h"

namespace turnout::kernels {
const Stages kAvx512Stages = Body<Avx512<false>>::kStages;
}
