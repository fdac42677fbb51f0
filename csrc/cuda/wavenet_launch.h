// What wavenet_generate.cu does for wavenet_generate.cpp, which is compiled without CUDA. Errors: of the CUDA runtime.
#pragma once

#include "wavenet_job.h"

namespace fastgen::wavenet {

int device_of(int index, Device* device);                     // makes it the current one; returns an error, or 0
int active(const Plan& plan, const Shape& shape, bool bf16);  // clusters that the current device holds at once
int launch(const Plan& plan, const Job& job, bool bf16, void* stream);  // returns an error, or 0
const char* error_text(int error);
int current_device();
void set_device(int index);

}  // namespace fastgen::wavenet
