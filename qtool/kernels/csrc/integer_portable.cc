#include "isa_portable.h"
#include "integer_kernels.h"

namespace qtool {

const IntegerKernels kIntegerPortable = Kernels<Portable>::table();

}  // namespace qtool
