/* Preloaded into a process, sees every call of the C library that changes files under one directory, whoever makes it
 * (Python, Rust, C++), and at one of them kills the process or has the disk be full from then on. Inert until armed.
 *
 * A write that is struck is half done first: a kill leaves a torn file, a full disk takes what still fits.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[PATH_MAX];
static int calls, struck, full, trace = -1;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* From here on the `nth` call (from 1) that changes something under `directory` is struck. Every call goes into the
 * file `record`, one a line, before it is made. */
void fault_arm(const char *directory, int nth, int as_full_disk, const char *record) {
    snprintf(root, sizeof root, "%s/", directory);
    calls = 0, struck = nth, full = as_full_disk;
    trace = REAL(open)(record, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
}

static const char *of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return path;
}

static const char *of_name(int directory, const char *name, char *path) {
    if (name[0] == '/' || directory == AT_FDCWD) return name;
    of_descriptor(directory, path);
    size_t length = strlen(path);
    snprintf(path + length, PATH_MAX - length, "/%s", name);
    return path;
}

/* Whether the call is to be struck. */
static int strikes(const char *what, const char *path) {
    char line[PATH_MAX + 32];
    if (!root[0] || strncmp(path, root, strlen(root)) != 0) return 0;
    int length = snprintf(line, sizeof line, "%s %s\n", what, path + strlen(root));
    REAL(write)(trace, line, length);
    return ++calls == struck || (full && struck && calls > struck);
}

static int strike(void) {
    if (!full) kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return -1;
}

#define ON_DESCRIPTOR(name, declared, passed)                                                                          \
    int name declared {                                                                                                \
        char path[PATH_MAX];                                                                                           \
        return strikes(#name, of_descriptor(descriptor, path)) ? strike() : REAL(name) passed;                         \
    }
#define ON_NAME(name, directory, at, declared, passed)                                                                 \
    int name declared {                                                                                                \
        char path[PATH_MAX];                                                                                           \
        return strikes(#name, of_name(directory, at, path)) ? strike() : REAL(name) passed;                            \
    }
/* A full disk lets go of what is deleted. */
#define ON_DELETED(name, directory, at, declared, passed)                                                              \
    int name declared {                                                                                                \
        char path[PATH_MAX];                                                                                           \
        return strikes(#name, of_name(directory, at, path)) && !full ? strike() : REAL(name) passed;                   \
    }
/* Of opening, only what makes or empties a file is a change. */
#define ON_OPENED(name, directory, declared, passed)                                                                   \
    int name declared {                                                                                                \
        char path[PATH_MAX];                                                                                           \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, int);                                                                               \
        va_end(rest);                                                                                                  \
        if ((flags & (O_CREAT | O_TRUNC)) && strikes(#name, of_name(directory, file, path))) return strike();          \
        return REAL(name) passed;                                                                                      \
    }
/* Half of the bytes get through: the first struck write is short, later ones find nothing left. */
#define ON_WRITE(name, declared, passed, passed_half)                                                                  \
    ssize_t name declared {                                                                                            \
        char path[PATH_MAX];                                                                                           \
        if (!strikes(#name, of_descriptor(descriptor, path))) return REAL(name) passed;                                \
        if (calls == struck && size > 1) {                                                                             \
            ssize_t written = REAL(name) passed_half;                                                                  \
            if (full) return written;                                                                                  \
        }                                                                                                              \
        return strike();                                                                                               \
    }

ON_WRITE(write, (int descriptor, const void *data, size_t size), (descriptor, data, size),
         (descriptor, data, size / 2))
ON_WRITE(pwrite, (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at),
         (descriptor, data, size / 2, at))
ON_WRITE(pwrite64, (int descriptor, const void *data, size_t size, off64_t at), (descriptor, data, size, at),
         (descriptor, data, size / 2, at))
ON_DESCRIPTOR(fsync, (int descriptor), (descriptor))
ON_DESCRIPTOR(fdatasync, (int descriptor), (descriptor))
ON_DESCRIPTOR(ftruncate, (int descriptor, off_t size), (descriptor, size))
ON_DESCRIPTOR(ftruncate64, (int descriptor, off64_t size), (descriptor, size))
ON_NAME(truncate, AT_FDCWD, file, (const char *file, off_t size), (file, size))
ON_NAME(truncate64, AT_FDCWD, file, (const char *file, off64_t size), (file, size))
ON_NAME(mkdir, AT_FDCWD, file, (const char *file, mode_t mode), (file, mode))
ON_NAME(rename, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_NAME(renameat, to_at, to, (int from_at, const char *from, int to_at, const char *to), (from_at, from, to_at, to))
ON_NAME(renameat2, to_at, to, (int from_at, const char *from, int to_at, const char *to, unsigned flags),
        (from_at, from, to_at, to, flags))
ON_DELETED(unlink, AT_FDCWD, file, (const char *file), (file))
ON_DELETED(rmdir, AT_FDCWD, file, (const char *file), (file))
ON_DELETED(unlinkat, directory, file, (int directory, const char *file, int flags), (directory, file, flags))
ON_OPENED(open, AT_FDCWD, (const char *file, int flags, ...), (file, flags, mode))
ON_OPENED(open64, AT_FDCWD, (const char *file, int flags, ...), (file, flags, mode))
ON_OPENED(openat, directory, (int directory, const char *file, int flags, ...), (directory, file, flags, mode))
ON_OPENED(openat64, directory, (int directory, const char *file, int flags, ...), (directory, file, flags, mode))
