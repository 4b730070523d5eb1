// What the CUDA runtime that is linked into the extension says about this machine.
#pragma once

#include <string>

namespace guda_fast::cuda {

struct DeviceStatus {
  int runtime_version = 0;  // as 1000 major + 10 minor
  int driver_version = 0;   // the newest runtime that the driver serves; 0 without a driver
  int device_count = 0;
  std::string error;  // the runtime's message when devices cannot be counted, else empty
};

DeviceStatus device_status();

}  // namespace guda_fast::cuda
