// A CUDA driver whose device is the host: what cuda.core calls is done with the host's memory, work that is captured is
// recorded and replayed, and noise.cu runs, compiled for the CPU. Functions that are not here fail with UNKNOWN.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <string>
#include <vector>

struct Place { unsigned x, y, z; };
static Place blockIdx, blockDim, threadIdx;
#define __global__
static unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
static long long __double_as_longlong(double v) { long long r; memcpy(&r, &v, 8); return r; }
static double __longlong_as_double(long long v) { double r; memcpy(&r, &v, 8); return r; }
#include "noise.cu"

#define CALL extern "C" int
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, INVALID_PTX = 218, NOT_FOUND = 500, NOT_PERMITTED = 800, UNKNOWN = 999 };
struct Graph { std::vector<std::function<void()>> work; };
struct Stream { Graph* capturing; };
struct Config { unsigned grid[3], block[3], shared; Stream* stream; void* attributes; unsigned count; };
static void *const CONTEXT = (void*)11, *const POOL = (void*)21, *const LIBRARY = (void*)31, *const FUNCTION = (void*)32;
static void* current = nullptr;
extern "C" { long held = 0, limit = -1, launches = 0; }  // bytes that are allocated, and how many may be; graphs launched

static int submit(Stream* stream, std::function<void()> work) {
    if (stream->capturing) stream->capturing->work.push_back(work); else work();
    return OK;
}
static bool captures(Stream* stream) { return (uintptr_t)stream > 16 && stream->capturing; }

CALL cuInit(unsigned) { return OK; }
CALL cuDriverGetVersion(int* version) { *version = 13000; return OK; }
CALL cuDeviceGetCount(int* count) { *count = 1; return OK; }
CALL cuDeviceGet(int* device, int number) { *device = number; return number ? INVALID : OK; }
CALL cuDeviceGetName(char* name, int size, int) { snprintf(name, size, "Host"); return OK; }
CALL cuDeviceGetAttribute(int* value, int, int) { *value = 1; return OK; }
CALL cuDevicePrimaryCtxRetain(void** context, int) { *context = CONTEXT; return OK; }
CALL cuDevicePrimaryCtxRelease_v2(int) { return OK; }
CALL cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0; *active = 1; return OK; }
CALL cuCtxGetCurrent(void** context) { *context = current; return OK; }
CALL cuCtxSetCurrent(void* context) { current = context; return OK; }
CALL cuCtxPushCurrent_v2(void* context) { current = context; return OK; }
CALL cuCtxPopCurrent_v2(void** context) { if (context) *context = current; return OK; }
CALL cuCtxGetDevice(int* device) { *device = 0; return OK; }
CALL cuCtxGetStreamPriorityRange(int* least, int* greatest) { *least = *greatest = 0; return OK; }

CALL cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { *stream = new Stream{}; return flags == 1 ? OK : INVALID; }
CALL cuStreamDestroy_v2(Stream*) { return OK; }
CALL cuStreamSynchronize(Stream* stream) { return captures(stream) ? NOT_PERMITTED : OK; }
CALL cuStreamGetCtx(Stream*, void** context) { *context = CONTEXT; return OK; }
CALL cuStreamGetFlags(Stream*, unsigned* flags) { *flags = 1; return OK; }
CALL cuStreamGetPriority(Stream*, int* priority) { *priority = 0; return OK; }
CALL cuStreamIsCapturing(Stream* stream, int* status) { *status = captures(stream); return OK; }
CALL cuStreamGetCaptureInfo_v3(Stream* stream, int* status, uint64_t* id, Graph** graph, void*** needs, void** edges, size_t* count) {
    *status = captures(stream);
    if (id) *id = 1;
    if (graph) *graph = *status ? stream->capturing : nullptr;
    if (needs) *needs = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return OK;
}
CALL cuStreamBeginCapture_v2(Stream* stream, int mode) { stream->capturing = new Graph; return mode == 1 ? OK : INVALID; }
CALL cuStreamEndCapture(Stream* stream, Graph** graph) { *graph = stream->capturing; stream->capturing = nullptr; return OK; }
CALL cuGraphInstantiateWithParams(Graph** made, Graph* graph, uint64_t* params) { *made = new Graph(*graph); params[3] = 0; return OK; }
CALL cuGraphLaunch(Graph* graph, Stream*) { launches++; for (auto& work : graph->work) work(); return OK; }
CALL cuGraphDestroy(Graph*) { return OK; }
CALL cuGraphExecDestroy(Graph* graph) { delete graph; return OK; }
CALL cuUserObjectCreate(void** object, void*, void*, unsigned, unsigned) { *object = (void*)41; return OK; }
CALL cuUserObjectRelease(void*, unsigned) { return OK; }
CALL cuUserObjectRetain(void*, unsigned) { return OK; }
CALL cuGraphReleaseUserObject(Graph*, void*, unsigned) { return OK; }
CALL cuGraphGetNodes(Graph*, void**, size_t* count) { *count = 0; return OK; }
CALL cuGraphRetainUserObject(Graph*, void*, unsigned, unsigned) { return OK; }

CALL cuMemPoolCreate(void** pool, const void*) { *pool = POOL; return OK; }
CALL cuMemPoolDestroy(void*) { return OK; }
CALL cuMemPoolGetAttribute(void*, int, void* value) { *(uint64_t*)value = 0; return OK; }
CALL cuMemPoolSetAttribute(void*, int, void*) { return OK; }
CALL cuMemPoolSetAccess(void*, const void*, size_t) { return OK; }
CALL cuMemAllocFromPoolAsync(uint64_t** address, size_t size, void* pool, Stream* stream) {
    if (pool != POOL || captures(stream)) return INVALID;
    if (limit >= 0 && held + (long)size > limit) return NO_MEMORY;
    *address = (uint64_t*)malloc(size + 8);
    *(*address)++ = size;
    held += size;
    return OK;
}
CALL cuMemFreeAsync(uint64_t* address, Stream*) { held -= *--address; free(address); return OK; }
CALL cuMemcpyAsync(char* to, const char* from, size_t size, Stream* stream) { return submit(stream, [=] { memmove(to, from, size); }); }
CALL cuMemsetD8Async(char* to, unsigned char value, size_t size, Stream* stream) { return submit(stream, [=] { memset(to, value, size); }); }
CALL cuPointerGetAttributes(unsigned count, const int* which, int** values, uint64_t) {
    for (unsigned k = 0; k < count; k++) *values[k] = which[k] == 2 ? 2 : 0;  // memory of a device
    return OK;
}

CALL cuLibraryLoadData(void** library, const char* image, void*, void*, unsigned, void*, void*, unsigned) {
    *library = LIBRARY;
    return strstr(image, ".entry normals(") ? OK : INVALID_PTX;
}
CALL cuLibraryUnload(void*) { return OK; }
CALL cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    *kernel = FUNCTION;
    return library == LIBRARY && !strcmp(name, "normals") ? OK : NOT_FOUND;
}
CALL cuKernelGetLibrary(void** library, void*) { *library = LIBRARY; return OK; }
CALL cuLaunchKernelEx(const Config* config, void* function, void** p, void** extra) {
    const Config c = *config;
    if (function != FUNCTION || c.grid[2] != 1 || c.block[1] != 1 || c.block[2] != 1 || c.shared || extra) return INVALID;
    auto to = *(float**)p[0]; auto table = *(const double**)p[1]; auto indices = *(const wide**)p[2];
    word low = *(word*)p[3], high = *(word*)p[4], stream = *(word*)p[5], size = *(word*)p[6];
    return submit(c.stream, [=] {
        blockDim = {c.block[0], 1, 1};
        for (blockIdx.x = 0; blockIdx.x < c.grid[0]; blockIdx.x++)
            for (blockIdx.y = 0; blockIdx.y < c.grid[1]; blockIdx.y++)
                for (threadIdx.x = 0; threadIdx.x < c.block[0]; threadIdx.x++)
                    normals(to, table, indices, low, high, stream, size);
    });
}

CALL cuGetErrorName(int error, const char** name) {
    *name = error == NO_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == NOT_PERMITTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" : "CUDA_ERROR_UNKNOWN";
    return OK;
}
CALL cuGetErrorString(int, const char** text) { *text = "as its name says"; return OK; }

static int unknown() { return UNKNOWN; }
CALL cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
    void* here = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    for (const char* version : {"_v3", "_v2", ""})
        if ((*function = dlsym(here, (std::string(name) + version).c_str()))) break;
    if (!*function) *function = (void*)unknown;
    if (status) *status = 0;
    return OK;
}
CALL cuGetProcAddress(const char* name, void** function, int, uint64_t) { return cuGetProcAddress_v2(name, function, 0, 0, nullptr); }
