// The router's stages in plain C++, for any CPU.
#include "../router.h"
#include "portable-vec.h"

#include "router-inl.h"

namespace turnout::kernels {
const RouterStages kPortableRouter = Router<Portable>::kStages;
}
