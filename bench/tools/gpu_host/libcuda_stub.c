// A stand-in for libcuda.so.1 on a machine without a GPU. Every call succeeds and does nothing, so that Triton's own C
// launcher runs, and the time that the host spends on a launch can be measured. Pointers count as device pointers.
// kernel_launches counts what a GPU would have been given.
typedef unsigned long long DevicePointer;

long kernel_launches = 0;

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return *value = 232448, 0;
}  // shared memory of sm_90
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetLimit(unsigned long* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, unsigned long value) { return 0; }
int cuPointerGetAttribute(void* value, int attribute, DevicePointer pointer) {
  return *(DevicePointer*)value = pointer, 0;
}
int cuModuleLoadData(void** module, const void* image) { return *module = (void*)1, 0; }
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = (void*)1, 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  return *value = attribute == 0 ? 1024 : 0, 0;  // attribute 0 is the largest number of threads in a block
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, void* config) { return *clusters = 1, 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
int cuStreamIsCapturing(void* stream, int* status) { return *status = 0, 0; }
int cuGetErrorString(int error, const char** text) { return *text = "libcuda_stub.c", 0; }
int cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) {
  return kernel_launches++, 0;
}
int cuLaunchKernel(void) { return kernel_launches++, 0; }
