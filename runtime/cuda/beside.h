// Cubins in a file beside this library, libgdn2_cubins.so: for adapters that are built where no kernels are compiled.
#pragma once

#include <string>

namespace gdn2::cuda {

// Makes table() the one of that file, once for the process. Returns what went wrong; a later call tries again.
std::string open_cubins();

}  // namespace gdn2::cuda
