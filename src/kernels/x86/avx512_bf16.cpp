// The stages for AVX-512 with the dot product of bf16 pairs. Compiled with its own flags (CMakeLists.txt).
#include "../stages.h"
#include "avx512-vec.h"

#include "../simd/stages-inl.h"

namespace turnout::kernels {
const Stages kAvx512Bf16Stages = Body<Avx512<true>>::kStages;
}
