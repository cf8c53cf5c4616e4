/* A disk that fails, for processes that are started with LD_PRELOAD=faulty_disk.so. Only what happens under a path that
 * contains FAULT_PATH is touched.
 *
 *   FAULT_CALL    open | write | fsync | rename    which call fails
 *   FAULT_ERROR   a number of errno, as 28 (ENOSPC); 0: none, the call is only slow
 *   FAULT_AFTER   so many such calls succeed first
 *   FAULT_TIMES   so many fail then; -1: all
 *   FAULT_SLOW    microseconds that each such call takes longer, failing or not
 *
 *   cc -shared -fPIC -O1 faulty_disk.c -o faulty_disk.so -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long calls;

static long setting(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value ? atol(value) : otherwise;
}

/* Whether this call fails; errno is set then. */
static int fails(const char *call, const char *path) {
    const char *kind = getenv("FAULT_CALL"), *part = getenv("FAULT_PATH");
    if (!kind || !part || strcmp(kind, call) || !path || !strstr(path, part)) return 0;
    long slow = setting("FAULT_SLOW", 0), error = setting("FAULT_ERROR", 0);
    if (slow) usleep((useconds_t)slow);
    long number = atomic_fetch_add(&calls, 1), first = setting("FAULT_AFTER", 0), times = setting("FAULT_TIMES", -1);
    if (!error || number < first || (times >= 0 && number >= first + times)) return 0;
    errno = (int)error;
    return 1;
}

static const char *path_of(int descriptor, char *buffer, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, buffer, size - 1);
    if (length < 0) return NULL;
    buffer[length] = 0;
    return buffer;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int descriptor, const void *data, size_t size) {
    char buffer[4096];
    if (getenv("FAULT_CALL") && fails("write", path_of(descriptor, buffer, sizeof buffer))) return -1;
    return REAL(write)(descriptor, data, size);
}

int fsync(int descriptor) {
    char buffer[4096];
    if (fails("fsync", path_of(descriptor, buffer, sizeof buffer))) return -1;
    return REAL(fsync)(descriptor);
}

int rename(const char *from, const char *to) {
    if (fails("rename", from)) return -1;
    return REAL(rename)(from, to);
}

static int opened(const char *name, const char *path, int flags, mode_t mode) {
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fails("open", path)) return -1;
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name);
    return real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (flags & O_CREAT) ? (mode_t)va_arg(rest, int) : 0;
    va_end(rest);
    return opened("open", path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = (flags & O_CREAT) ? (mode_t)va_arg(rest, int) : 0;
    va_end(rest);
    return opened("open64", path, flags, mode);
}
