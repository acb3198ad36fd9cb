#include "isa_avx2.h"
#include "integer_kernels.h"

namespace qtool {

const IntegerKernels kIntegerAvx2 = Kernels<Avx2>::table();

}  // namespace qtool
