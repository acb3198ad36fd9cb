#include "float_kernels.h"

namespace qtool {

const FloatKernels kFloatAvx512Vnni = FloatTable<FloatIsa>::table();

}  // namespace qtool
