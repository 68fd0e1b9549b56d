// The stages in plain C++, for any CPU.
#include "../stages.h"
#include "portable-vec.h"

#include "stages-inl.h"

namespace turnout::kernels {
const Stages kPortableStages = Body<Portable>::kStages;
}
