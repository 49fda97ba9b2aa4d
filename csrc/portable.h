// Included first where a library is built for older systems (setup.py, FLOWDPPO_SYSROOT): a newer libstdc++'s headers
// then ask for nothing that an older glibc or libstdc++ does not have.
#pragma once

#include <features.h>

#if !__GLIBC_PREREQ(2, 30)
// Names that the headers of <mutex> and <shared_mutex> mention. Nothing here calls them.
#include <pthread.h>
#include <time.h>

extern "C" {
int pthread_cond_clockwait(pthread_cond_t*, pthread_mutex_t*, clockid_t, const struct timespec*);
int pthread_mutex_clocklock(pthread_mutex_t*, clockid_t, const struct timespec*);
int pthread_rwlock_clockrdlock(pthread_rwlock_t*, clockid_t, const struct timespec*);
int pthread_rwlock_clockwrlock(pthread_rwlock_t*, clockid_t, const struct timespec*);
}
#endif

// Streams that torch's headers make texts with: compiled into the library instead of taken from a libstdc++.
#include <bits/c++config.h>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
