#include "isa_avx512vnni.h"
#include "integer_kernels.h"

namespace qtool {

const IntegerKernels kIntegerAvx512Vnni = Kernels<Avx512Vnni>::table();

}  // namespace qtool
