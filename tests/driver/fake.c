/* Libraries in the place of NVIDIA's driver and of cuBLASLt, with one GPU whose kernels do nothing: tests/driver.rs.
 *
 * FAKE="cuInit=100 cuMemAlloc_v2@2=2" makes every call of cuInit fail with 100, and the second of cuMemAlloc_v2 with 2. A
 * status from 700 to 799 is a fault: every later call gives it again. At the end each writes how many of its handles are
 * not given back. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int live, fault;

__attribute__((destructor)) static void tell(void) { fprintf(stderr, "handles left: %d\n", live); }

/* What FAKE says of a name, or `otherwise`. */
static int said(const char *key, int otherwise) {
    const char *all = getenv("FAKE"), *at = all;
    const size_t n = strlen(key);
    while (at && (at = strstr(at, key))) {
        if ((at == all || at[-1] == ' ') && at[n] == '=') return atoi(at + n + 1);
        at += n;
    }
    return otherwise;
}

static int status(const char *name, int nth) {
    char key[100];
    if (fault) return fault;
    snprintf(key, sizeof key, "%s@%d", name, nth);
    const int is = said(key, said(name, 0));
    if (is >= 700 && is < 800) fault = is;
    return is;
}

#define STATUS                          \
    static int calls;                   \
    const int is = status(__func__, ++calls)

#define DOES(name, parameters, ...) \
    int name parameters {           \
        STATUS;                     \
        if (!is) { __VA_ARGS__; }   \
        return is;                  \
    }
#define ANSWERS(name) DOES(name, (void))
#define MAKES(name, parameters, made) DOES(name, parameters, *made = malloc(1), live++)
#define DESTROYS(name)         \
    int name(void *handle) {   \
        STATUS;                \
        free(handle), live--;  \
        return is;             \
    }

#ifdef FAKE_DRIVER

ANSWERS(cuInit)
DOES(cuDriverGetVersion, (int *version), *version = said("version", 13040))
DOES(cuGetErrorString, (int of, const char **text), (void)of, *text = "as the fake says")
DOES(cuDeviceGetCount, (int *count), *count = said("gpus", 1))
DOES(cuDeviceGet, (int *device, int ordinal), *device = ordinal)
DOES(cuDeviceGetName, (char *name, int room, int device), (void)device, snprintf(name, room, "Fake GPU"))
DOES(cuDeviceTotalMem_v2, (size_t *bytes, int device), (void)device, *bytes = (size_t)1 << 34)
DOES(cuDeviceGetAttribute, (int *value, int which, int device), (void)device,
     *value = which == 75 ? said("major", 9) : which == 76 ? 0 : which == 16 ? 132 : 227 << 10)
MAKES(cuDevicePrimaryCtxRetain, (void **context, int device), ((void)device, context))
int cuDevicePrimaryCtxRelease_v2(int device) {
    STATUS;
    (void)device, live--;
    return is;
}
ANSWERS(cuCtxSetCurrent)
DOES(cuMemGetInfo_v2, (size_t *free, size_t *total), *free = *total = (size_t)1 << 34)
DOES(cuMemAlloc_v2, (uint64_t *at, size_t bytes), *at = (uint64_t)malloc(bytes), live++)
DESTROYS(cuMemFree_v2)
DOES(cuMemHostAlloc, (void **at, size_t bytes, unsigned flags), (void)flags, *at = malloc(bytes), live++)
DESTROYS(cuMemFreeHost)
DOES(cuMemcpyHtoDAsync_v2, (uint64_t to, const void *from, size_t n), memcpy((void *)to, from, n))
DOES(cuMemcpyDtoHAsync_v2, (void *to, uint64_t from, size_t n), memcpy(to, (const void *)from, n))
DOES(cuMemcpyDtoDAsync_v2, (uint64_t to, uint64_t from, size_t n), memcpy((void *)to, (const void *)from, n))
DOES(cuMemsetD8Async, (uint64_t at, unsigned char x, size_t n), memset((void *)at, x, n))
MAKES(cuStreamCreate, (void **stream), stream)
DESTROYS(cuStreamDestroy_v2)
ANSWERS(cuStreamQuery)
ANSWERS(cuStreamSynchronize)
ANSWERS(cuStreamBeginCapture_v2)
MAKES(cuStreamEndCapture, (void *stream, void **graph), ((void)stream, graph))
DESTROYS(cuGraphDestroy)
MAKES(cuGraphInstantiateWithFlags, (void **exec), exec)
DESTROYS(cuGraphExecDestroy)
ANSWERS(cuGraphUpload)
ANSWERS(cuGraphLaunch)
MAKES(cuEventCreate, (void **event), event)
DESTROYS(cuEventDestroy_v2)
ANSWERS(cuEventQuery)
ANSWERS(cuEventRecord)
ANSWERS(cuEventSynchronize)
MAKES(cuModuleLoadData, (void **module), module)
DESTROYS(cuModuleUnload)
DOES(cuModuleGetFunction, (void **function, void *module), *function = module)
DOES(cuFuncGetAttribute, (int *value), *value = 0)
ANSWERS(cuFuncSetAttribute)
#ifndef FAKE_OLD
DOES(cuFuncGetParamInfo, (void *function, size_t which, size_t *offset, size_t *size), (void)function, (void)which,
     *offset = 0, *size = 8)
#endif
ANSWERS(cuLaunchKernelEx)
ANSWERS(cuTensorMapEncodeTiled)

#else

size_t cublasLtGetVersion(void) { return 130000; }
MAKES(cublasLtCreate, (void **handle), handle)
DESTROYS(cublasLtDestroy)
MAKES(cublasLtMatmulDescCreate, (void **product), product)
DESTROYS(cublasLtMatmulDescDestroy)
ANSWERS(cublasLtMatmulDescSetAttribute)
MAKES(cublasLtMatmulPreferenceCreate, (void **wish), wish)
DESTROYS(cublasLtMatmulPreferenceDestroy)
ANSWERS(cublasLtMatmulPreferenceSetAttribute)
MAKES(cublasLtMatrixLayoutCreate, (void **layout), layout)
DESTROYS(cublasLtMatrixLayoutDestroy)
ANSWERS(cublasLtMatrixLayoutSetAttribute)
ANSWERS(cublasLtMatmulAlgoGetHeuristic)
ANSWERS(cublasLtMatmulAlgoCheck)
ANSWERS(cublasLtMatmul)

#endif
