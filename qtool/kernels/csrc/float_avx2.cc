#include "float_kernels.h"

namespace qtool {

const FloatKernels kFloatAvx2 = FloatTable<FloatIsa>::table();

}  // namespace qtool
