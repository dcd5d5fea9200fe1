// Ctrl-C, or a request to end, while a program of llama.cpp runs: our callback first, then the program's own handler.
//
// A signal handler may do next to nothing, so ours only wakes a thread. Programs install their handlers whenever they like; the thread looks for that
// every POLL_MS and puts ours in front again.
#include "status.h"

#include <cstdlib>

static fate_interrupt_fn exit_fn   = nullptr;
static void *            exit_user = nullptr;

static void at_exit() {
    const fate_interrupt_fn fn = exit_fn;
    exit_fn                    = nullptr;
    if (fn) {
        fn(exit_user);
    }
}

int32_t fate_exit_watch(fate_interrupt_fn on_exit, void * user) {
    static const bool registered = atexit(at_exit) == 0;
    exit_fn                      = on_exit;
    exit_user                    = user;
    return registered ? FATE_STATUS_OK : FATE_STATUS_MEMORY;
}

#if defined(_WIN32)

int32_t fate_interrupt_watch(fate_interrupt_fn, void *) {
    fate_set_last_error("interrupts are not watched on this platform");
    return FATE_STATUS_INVALID;
}

void fate_interrupt_unwatch(void) {}

int32_t fate_interrupt_signal(void) {
    return 0;
}

#else

#    include <poll.h>
#    include <signal.h>
#    include <unistd.h>

#    include <atomic>
#    include <cerrno>
#    include <cstdio>
#    include <cstring>
#    include <mutex>
#    include <thread>

static const int POLL_MS = 50;

struct watched {
    const int        number;
    const char       letter; // that wakes the thread
    const int        code;   // of a process that it ends
    struct sigaction before; // the caller's
    struct sigaction program;
    bool             is_watched;
};

static watched signals[] = {
    { SIGINT,  'i', 130, {}, {}, false },
    { SIGTERM, 't', 143, {}, {}, false },
};

static std::atomic<int> handled{ 0 }; // the signal about which the callback is told at the moment, 0: none
static std::mutex       watch_mutex;
static std::thread *    watcher;      // leaked where the program ends the process: exit() may run on that very thread
static int              wake[2] = { -1, -1 };

static void on_signal(int number) {
    const int saved = errno;
    for (const watched & one : signals) {
        if (one.number == number && number == SIGTERM && handled == SIGTERM) { // asked again: at once
            _exit(one.code);
        }
        if (one.number == number) {
            (void) !write(wake[1], &one.letter, 1);
        }
    }
    errno = saved;
}

static bool is_ours(const struct sigaction & action) {
    return !(action.sa_flags & SA_SIGINFO) && action.sa_handler == on_signal;
}

// Puts our handlers first; one that is replaced, if it is not ours, becomes the program's.
static void install() {
    struct sigaction ours;
    memset(&ours, 0, sizeof(ours));
    ours.sa_handler = on_signal;
    ours.sa_flags   = SA_RESTART;
    sigemptyset(&ours.sa_mask);
    for (watched & one : signals) {
        struct sigaction before;
        sigaction(one.number, nullptr, &before);
        const bool is_ignored = !(before.sa_flags & SA_SIGINFO) && before.sa_handler == SIG_IGN;
        one.is_watched        = one.is_watched || !is_ignored; // from the start, or since the program has a handler of its own
        if (one.is_watched && sigaction(one.number, &ours, &before) == 0 && !is_ours(before)) {
            one.program = before;
        }
    }
}

// Unless that would wait, as for a thread that writes to a pipe which nobody reads.
static void flush_stdout() {
    struct pollfd out = { STDOUT_FILENO, POLLOUT, 0 };
    if (poll(&out, 1, 0) > 0 && ftrylockfile(stdout) == 0) {
        fflush(stdout);
        funlockfile(stdout);
    }
}

static void call_program(const watched & one) {
    if (one.program.sa_flags & SA_SIGINFO) {
        one.program.sa_sigaction(one.number, nullptr, nullptr);
    } else if (one.program.sa_handler == SIG_DFL) {
        flush_stdout();
        _exit(one.code);
    } else if (one.program.sa_handler != SIG_IGN) {
        one.program.sa_handler(one.number);
    }
}

static void watch(fate_interrupt_fn on_interrupt, void * user) {
    for (;;) {
        struct pollfd fd    = { wake[0], POLLIN, 0 };
        const int     ready = poll(&fd, 1, POLL_MS);
        install();
        if (ready <= 0) {
            continue;
        }
        char c = 0;
        if (read(wake[0], &c, 1) != 1 || c == 'q') {
            return;
        }
        for (const watched & one : signals) {
            if (one.letter == c) {
                handled = one.number;
                on_interrupt(user);
                call_program(one);
                handled = 0;
            }
        }
    }
}

int32_t fate_interrupt_watch(fate_interrupt_fn on_interrupt, void * user) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        std::lock_guard<std::mutex> lock(watch_mutex);
        if (watcher) {
            throw fate_error(FATE_STATUS_INVALID, "interrupts are watched already");
        }
        if (pipe(wake) != 0) {
            throw fate_error(FATE_STATUS_INVALID, fate_format("cannot make a pipe: %s", strerror(errno)));
        }
        for (watched & one : signals) {
            sigaction(one.number, nullptr, &one.before);
            one.is_watched = false;
        }
        install();
        for (watched & one : signals) { // what was there before is the caller's, not the program's
            memset(&one.program, 0, sizeof(one.program));
            one.program.sa_handler = SIG_DFL;
        }
        watcher = new std::thread(watch, on_interrupt, user);
    });
}

int32_t fate_interrupt_signal(void) {
    return handled;
}

void fate_interrupt_unwatch(void) {
    std::lock_guard<std::mutex> lock(watch_mutex);
    if (!watcher) {
        return;
    }
    const char c = 'q';
    (void) !write(wake[1], &c, 1);
    watcher->join();
    delete watcher;
    watcher = nullptr;
    for (watched & one : signals) {
        sigaction(one.number, &one.before, nullptr);
    }
    close(wake[0]);
    close(wake[1]);
}

#endif
