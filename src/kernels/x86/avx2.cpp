// The stages for AVX2 and FMA. Compiled with its own flags (CMakeLists.txt).
#include "../stages.h"
#include "avx2-vec.h"

#include "../simd/stages-inl.h"

namespace turnout::kernels {
const Stages kAvx2Stages = Body<Avx2>::kStages;
}
