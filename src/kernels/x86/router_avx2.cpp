// The router's stages for AVX2. Compiled with its own flags (CMakeLists.txt).
#include "../router.h"
#include "avx2-vec.h"

#include "../simd/router-inl.h"

namespace turnout::kernels {
const RouterStages kAvx2Router = Router<Avx2>::kStages;
}
