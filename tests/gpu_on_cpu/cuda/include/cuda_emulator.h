// CUDA C++ for g++: what nvcc defines before a kernel's first line. Included by the command line.
#pragma once

#define CUDA_EMULATOR

#include "emulator/atomics.h"
#include "emulator/language.h"
#include "emulator/math.h"
#include "emulator/ptx.h"
#include "emulator/warp.h"
