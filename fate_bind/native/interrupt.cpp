// Ctrl-C while a program of llama.cpp runs: our callback first, then the program's own handler.
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

#else

#    include <poll.h>
#    include <signal.h>
#    include <unistd.h>

#    include <cerrno>
#    include <cstdio>
#    include <cstring>
#    include <mutex>
#    include <thread>

static const int POLL_MS = 50;

static std::mutex       watch_mutex;
static std::thread *    watcher; // leaked where the program ends the process: exit() may run on that very thread
static int              wake[2] = { -1, -1 };
static struct sigaction before_int;
static struct sigaction before_term;

static void on_signal(int) {
    const int  saved = errno;
    const char c     = 'i';
    (void) !write(wake[1], &c, 1);
    errno = saved;
}

static bool is_ours(const struct sigaction & action) {
    return !(action.sa_flags & SA_SIGINFO) && action.sa_handler == on_signal;
}

// Puts our handler first; the one it replaces, if it is not ours, becomes the program's.
static void install(struct sigaction & program) {
    struct sigaction ours;
    struct sigaction before;
    memset(&ours, 0, sizeof(ours));
    ours.sa_handler = on_signal;
    ours.sa_flags   = SA_RESTART;
    sigemptyset(&ours.sa_mask);
    sigaction(SIGINT, &ours, &before);
    if (!is_ours(before)) {
        program = before;
    }
}

static void call_program(const struct sigaction & program) {
    if (program.sa_flags & SA_SIGINFO) {
        program.sa_sigaction(SIGINT, nullptr, nullptr);
    } else if (program.sa_handler == SIG_DFL) {
        fflush(stdout);
        _exit(130);
    } else if (program.sa_handler != SIG_IGN) {
        program.sa_handler(SIGINT);
    }
}

static void watch(fate_interrupt_fn on_interrupt, void * user) {
    struct sigaction program;
    memset(&program, 0, sizeof(program));
    program.sa_handler = SIG_DFL; // what was there before is the caller's, not the program's
    for (;;) {
        struct pollfd fd    = { wake[0], POLLIN, 0 };
        const int     ready = poll(&fd, 1, POLL_MS);
        install(program);
        if (ready <= 0) {
            continue;
        }
        char c = 0;
        if (read(wake[0], &c, 1) != 1 || c == 'q') {
            return;
        }
        on_interrupt(user);
        call_program(program);
    }
}

int32_t fate_interrupt_watch(fate_interrupt_fn on_interrupt, void * user) {
    return fate_guard(FATE_STATUS_INVALID, [&] {
        std::lock_guard<std::mutex> lock(watch_mutex);
        if (watcher) {
            throw fate_error(FATE_STATUS_INVALID, "interrupts are watched already");
        }
        sigaction(SIGINT, nullptr, &before_int);
        sigaction(SIGTERM, nullptr, &before_term);
        if (!(before_int.sa_flags & SA_SIGINFO) && before_int.sa_handler == SIG_IGN) {
            return; // started with interrupts ignored, as by nohup
        }
        if (pipe(wake) != 0) {
            throw fate_error(FATE_STATUS_INVALID, fate_format("cannot make a pipe: %s", strerror(errno)));
        }
        struct sigaction none;
        install(none);
        watcher = new std::thread(watch, on_interrupt, user);
    });
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
    sigaction(SIGINT, &before_int, nullptr);
    sigaction(SIGTERM, &before_term, nullptr);
    close(wake[0]);
    close(wake[1]);
}

#endif
