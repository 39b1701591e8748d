/* A few threads that work off numbered items beside the caller. They wait awake for a moment, for the next product of a
 * layer follows within microseconds, then asleep. Which thread takes which item changes no bit. */
#define _GNU_SOURCE
#include "mesh.h"

#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AWAKE_TURNS 2000 /* pauses, together about 0.1 ms */
#define MAX_THREADS 256

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* held by the caller whose items are worked off */
static pid_t owner;
static int started;
static _Atomic uint32_t jobs; /* counts jobs; sleepers wait for it to change */
static _Atomic int asleep;
static _Atomic uint64_t next; /* job << 32 | the next item: one word, so that a late thread cannot take an item of another job */
static _Atomic(item_fn) job_run;
static _Atomic(const void *) job_work;
static _Atomic int64_t job_items, done;

static void take_items(uint32_t job) {
    for (;;) {
        uint64_t seen = atomic_load(&next);
        const item_fn run = atomic_load(&job_run);
        const void *work = atomic_load(&job_work);
        const int64_t item = (int64_t)(seen & 0xffffffffu);
        if ((uint32_t)(seen >> 32) != job || item >= atomic_load(&job_items)) return;
        if (!atomic_compare_exchange_strong(&next, &seen, seen + 1)) continue;
        run(work, item);
        atomic_fetch_add(&done, 1);
    }
}

static void *worker(void *unused) {
    (void)unused;
    uint32_t known = 0;
    for (;;) {
        uint32_t job = atomic_load(&jobs);
        for (int turn = 0; job == known && turn < AWAKE_TURNS; turn++, job = atomic_load(&jobs)) _mm_pause();
        if (job == known) {
            atomic_fetch_add(&asleep, 1);
            syscall(SYS_futex, &jobs, FUTEX_WAIT_PRIVATE, known, NULL, NULL, 0);
            atomic_fetch_sub(&asleep, 1);
            continue;
        }
        known = job;
        take_items(job);
    }
    return NULL;
}

static void start(int workers) {
    if (owner != getpid()) { /* a fork has our memory but not our threads */
        owner = getpid();
        started = 0;
    }
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (; started < workers && started < MAX_THREADS; started++) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker, NULL)) break;
    }
    pthread_attr_destroy(&attributes);
}

void pool_run(item_fn run, const void *work, int64_t items, int threads) {
    if (threads <= 1 || items <= 1 || pthread_mutex_trylock(&busy)) {
        for (int64_t item = 0; item < items; item++) run(work, item);
        return;
    }
    start(threads - 1);
    const uint32_t job = atomic_load(&jobs) + 1;
    atomic_store(&job_items, 0); /* nobody takes anything while the job is put together */
    atomic_store(&next, (uint64_t)job << 32);
    atomic_store(&job_run, run);
    atomic_store(&job_work, work);
    atomic_store(&done, 0);
    atomic_store(&job_items, items);
    atomic_store(&jobs, job);
    if (atomic_load(&asleep)) syscall(SYS_futex, &jobs, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    take_items(job);
    for (int turn = 0; atomic_load(&done) < items; turn++) {
        _mm_pause();
        if (turn > AWAKE_TURNS) sched_yield();
    }
    pthread_mutex_unlock(&busy);
}
