// Stands in for libcudart and libcuda in front of TVM's CUDA runtime: memory is the host's, and a launch runs nothing
// but says on stdout how it was asked for.
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaSetDevice(int device) { return device; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { return *value = 1, device; }
int cudaMemGetInfo(size_t *left, size_t *all) { return *left = *all = (size_t)1 << 33, 0; }
int cudaMalloc(void **at, size_t size) { return posix_memalign(at, 256, size ? size : 1); }
int cudaFree(void *at) { return free(at), 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaStreamSynchronize(void *stream) { return stream == (void *)-1; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  return memcpy(to, from, size), kind > 4 || stream == (void *)-1;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)image, 0; }
CUresult cuModuleUnload(CUmodule module) { return module == NULL; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = (CUfunction)strdup(name), module == NULL;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    printf("allow %s shared=%d\n", (const char *)function, value);
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *launch, CUfunction function, void **arguments, void **extra) {
  int cooperative = 0;
  for (unsigned i = 0; i < launch->numAttrs; ++i)
    if (launch->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) cooperative = launch->attrs[i].value.cooperative;
  printf("launch %s grid=%u,%u,%u block=%u,%u,%u shared=%u cooperative=%d arguments=%d\n", (const char *)function,
         launch->gridDimX, launch->gridDimY, launch->gridDimZ, launch->blockDimX, launch->blockDimY, launch->blockDimZ,
         launch->sharedMemBytes, cooperative, arguments != NULL && extra == NULL);
  return fflush(stdout), 0;
}
