// CUDA, or what stands for it.
#pragma once

#if defined(__HIP__)
#    include "hip.h"
#else
#    include <cuda_runtime.h>
#    define FATE_MEMORY_TYPE type
#endif
