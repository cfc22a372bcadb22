// Moved to detail/device.h, with DeviceGuard; this path works until 0.3.
#pragma once

#include "msdd_fast/detail/device.h"
