/* A CUDA driver that does nothing: Triton's host code runs on it, its launcher in C included. */
#include <stdint.h>
#include <string.h>

/* The first 8 bytes of each argument of the last launch, for those who set `arguments_wanted`. */
uint64_t arguments[64];
int arguments_wanted = 0;
long launches = 0;

#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuCtxSetCurrent) NOTHING(cuCtxSetLimit) NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col)

#define HANDLE(name) int name(void **handle) { *handle = (void *)0x10; return 0; }
HANDLE(cuCtxGetCurrent) HANDLE(cuDevicePrimaryCtxRetain) HANDLE(cuModuleLoadData)
HANDLE(cuModuleGetFunction)

#define NUMBER(name, value) int name(int *number) { *number = value; return 0; }
NUMBER(cuDeviceGet, 0) NUMBER(cuDriverGetVersion, 12080) NUMBER(cuOccupancyMaxActiveClusters, 1)

int cuCtxGetLimit(size_t *value) { *value = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no driver"; return 0; }
/* Shared memory of a block, large enough for any kernel. */
int cuDeviceGetAttribute(int *value, int attribute) { *value = 1 << 18; return 0; }
/* 0 is the limit of threads in a block; the others are registers and bytes. */
int cuFuncGetAttribute(int *value, int attribute) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
  memcpy(value, &pointer, 8);
  return 0;
}
int cuLaunchKernelEx(const void *config, void *function, void **parameters) {
  for (int i = 0; i < arguments_wanted; i++) memcpy(&arguments[i], parameters[i], 8);
  launches++;
  return 0;
}
