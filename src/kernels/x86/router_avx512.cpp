// The router's stages for AVX-512. Compiled with its own flags (CMakeLists.txt).
#include "../router.h"
#include "avx512-vec.h"

#include "../simd/router-inl.h"

namespace turnout::kernels {
const RouterStages kAvx512Router = Router<Avx512<false>>::kStages;
}
