#include "float_kernels.h"

namespace qtool {

const FloatKernels kFloatPortable = FloatTable<FloatIsa>::table();

}  // namespace qtool
