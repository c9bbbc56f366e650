// Counts the file operations below a folder, and makes the n-th one fail: cc -shared -fPIC -o file_faults.so file_faults.c
// Loaded with LD_PRELOAD, so that it sees the calls of Python and of libraries in C, C++ and Rust.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { COUNT, KILL, FULL };

static char root[PATH_MAX];
static int armed, fault, log_file = -1;
static long at, jump_at, jump;
static atomic_long operations, shift;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

// From now on, operations below `folder` count, and `log` gets a line for each one. The operation `number` meets the fault.
// At the operation `jump_number`, the clock jumps by so many seconds.
void arm(const char *folder, int log, int kind, long number, long jump_number, long seconds) {
    snprintf(root, sizeof root, "%s/", folder);
    log_file = log, fault = kind, at = number, jump_at = jump_number, jump = seconds;
    armed = 1;
}

static int below(const char *path) { return !strncmp(path, root, strlen(root)); }

static const char *resolved(int folder, const char *path, char *buffer) {
    char link[64];
    ssize_t size = 0;
    if (path[0] == '/') return path;
    if (folder == AT_FDCWD) {
        if (!getcwd(buffer, PATH_MAX / 2)) return "";
        size = strlen(buffer);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        size = readlink(link, buffer, PATH_MAX / 2);
        if (size < 0) return "";
    }
    if (path[0]) snprintf(buffer + size, PATH_MAX / 2, "/%s", path);
    else buffer[size] = 0;
    return buffer;
}

// A clock that has jumped dates the files too.
static void date(const char *path) {
    struct timespec now, both[2];
    char parent[PATH_MAX];
    if (!shift) return;
    syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
    now.tv_sec += shift;
    both[0] = both[1] = now;
    syscall(SYS_utimensat, AT_FDCWD, path, both, 0);
    snprintf(parent, sizeof parent, "%s", path);
    char *slash = strrchr(parent, '/');
    if (slash) *slash = 0;
    if (below(parent)) syscall(SYS_utimensat, AT_FDCWD, parent, both, 0);
}

enum { GO, PARTLY, FAIL };

// Count an operation. Tells whether it may go on, only for a part of its bytes, or fails because the disk is full.
static int operation(const char *kind, const char *path, int takes_space) {
    if (!armed || !below(path)) return GO;
    long number = ++operations;
    if (log_file >= 0) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%s %s\n", kind, path + strlen(root));
        syscall(SYS_write, log_file, line, size);
    }
    if (number == jump_at) shift = jump;
    if (fault == KILL && number == at) {
        if (!strcmp(kind, "write")) return PARTLY;
        syscall(SYS_kill, getpid(), SIGKILL);
    }
    if (fault == FULL && number >= at && takes_space) return number == at && !strcmp(kind, "write") ? PARTLY : FAIL;
    return GO;
}

static int finished(int result, const char *path) {
    if (armed && shift && result >= 0 && below(path)) date(path);
    return result;
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char buffer[PATH_MAX];
    if (!armed || (flags & O_ACCMODE) == O_RDONLY) return syscall(SYS_openat, folder, path, flags, mode);
    const char *full = resolved(folder, path, buffer);
    int is_new = (flags & O_CREAT) && syscall(SYS_faccessat, folder, path, F_OK) < 0;
    if (operation("open", full, is_new) != GO) return errno = ENOSPC, -1;
    int result = syscall(SYS_openat, folder, path, flags, mode);
    return is_new || (flags & O_TRUNC) ? finished(result, full) : result;
}

#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags) return opened(folder, path, flags | O_LARGEFILE, mode); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

static FILE *opened_stream(const char *path, const char *mode, FILE *(*real)(const char *, const char *)) {
    char buffer[PATH_MAX];
    if (!armed || (mode[0] == 'r' && !strchr(mode, '+'))) return real(path, mode);
    const char *full = resolved(AT_FDCWD, path, buffer);
    if (operation("open", full, access(path, F_OK) < 0) != GO) return errno = ENOSPC, NULL;
    FILE *result = real(path, mode);
    finished(result ? 0 : -1, full);
    return result;
}
FILE *fopen(const char *path, const char *mode) { return opened_stream(path, mode, REAL(fopen)); }
FILE *fopen64(const char *path, const char *mode) { return opened_stream(path, mode, REAL(fopen64)); }

// Run `CALL` for all `SIZE` bytes, or `PART` for the first half of them before the process is killed or the disk is full.
#define WRITES(FILE_NUMBER, SIZE, CALL, PART)                                                \
    char buffer[PATH_MAX];                                                                   \
    if (!armed || FILE_NUMBER == log_file) return CALL;                                      \
    const char *path = resolved(FILE_NUMBER, "", buffer);                                    \
    int allowed = operation("write", path, 1);                                               \
    if (allowed == FAIL || (allowed == PARTLY && fault == FULL && (SIZE) < 2)) return errno = ENOSPC, -1; \
    if (allowed == PARTLY) {                                                                 \
        size_t half = (SIZE) / 2;                                                            \
        ssize_t part = half ? PART : 0;                                                      \
        if (fault == KILL) syscall(SYS_kill, getpid(), SIGKILL);                             \
        return part;                                                                         \
    }                                                                                        \
    ssize_t result = CALL;                                                                   \
    finished(result < 0 ? -1 : 0, path);                                                     \
    return result;

ssize_t write(int file, const void *data, size_t size) {
    WRITES(file, size, syscall(SYS_write, file, data, size), syscall(SYS_write, file, data, half))
}
ssize_t pwrite(int file, const void *data, size_t size, off_t place) {
    WRITES(file, size, syscall(SYS_pwrite64, file, data, size, place), syscall(SYS_pwrite64, file, data, half, place))
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t place) { return pwrite(file, data, size, place); }
ssize_t writev(int file, const struct iovec *parts, int count) {
    WRITES(file, parts[0].iov_len, syscall(SYS_writev, file, parts, count), syscall(SYS_write, file, parts[0].iov_base, half))
}
ssize_t sendfile(int to, int from, off_t *place, size_t size) {
    struct stat about;
    size_t bytes = fstat(from, &about) == 0 && (size_t)about.st_size < size ? (size_t)about.st_size : size;
    WRITES(to, bytes, syscall(SYS_sendfile, to, from, place, size), syscall(SYS_sendfile, to, from, place, half))
}
ssize_t sendfile64(int to, int from, off64_t *place, size_t size) { return sendfile(to, from, place, size); }
ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *place, size_t size, unsigned flags) {
    WRITES(to, size, syscall(SYS_copy_file_range, from, start, to, place, size, flags),
           syscall(SYS_copy_file_range, from, start, to, place, half, flags))
}

#define CHANGES(KIND, FOLDER, PATH, SPACE, CALL)                                \
    char buffer[PATH_MAX];                                                      \
    if (!armed) return CALL;                                                    \
    const char *full = resolved(FOLDER, PATH, buffer);                          \
    if (operation(KIND, full, SPACE) != GO) return errno = ENOSPC, -1;          \
    return finished(CALL, full);

int mkdirat(int folder, const char *path, mode_t mode) { CHANGES("mkdir", folder, path, 1, syscall(SYS_mkdirat, folder, path, mode)) }
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int folder, const char *path, int flags) {
    CHANGES(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path, 0, syscall(SYS_unlinkat, folder, path, flags))
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
    struct stat about;
    return unlinkat(AT_FDCWD, path, lstat(path, &about) == 0 && S_ISDIR(about.st_mode) ? AT_REMOVEDIR : 0);
}
int renameat2(int from, const char *old, int to, const char *path, unsigned flags) {
    CHANGES("rename", to, path, 0, syscall(SYS_renameat2, from, old, to, path, flags))
}
int renameat(int from, const char *old, int to, const char *path) { return renameat2(from, old, to, path, 0); }
int rename(const char *old, const char *path) { return renameat2(AT_FDCWD, old, AT_FDCWD, path, 0); }
int ftruncate(int file, off_t size) { CHANGES("truncate", file, "", 0, syscall(SYS_ftruncate, file, size)) }
int ftruncate64(int file, off64_t size) { return ftruncate(file, size); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += shift;
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec, now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}
