/* The benchmark's load.  The benchmark compiles this file and runs it as

     load echo PID PORT SECONDS CLIENTS    clients that send 64 bytes, wait for them, send the next
     load pings PID PORT SECONDS           two clients that read pings as fast as they can

   PID is the server's; its processor time comes from the kernel.  Each load warms up, measures for
   SECONDS, and prints a line of JSON; all times are in seconds.  It checks every byte that it receives.
   A wrong byte, or a server that is gone or silent, ends the load with status 1 and a line on stderr. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { EVENTS = 1023, MESSAGE = 64, WORDS = MESSAGE / 8, BLOCK = 256 * 1024, SAMPLES = 1 << 22 };
enum { TIMEOUT = 30 }; /* seconds to wait for the server */

static char buffer[BLOCK];
static struct epoll_event events[EVENTS];

static void fail(const char *what) {
    fprintf(stderr, errno ? "%s: %s\n" : "%s\n", what, strerror(errno));
    exit(1);
}

static int connect_to(int port) {
    int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    struct timeval timeout = {.tv_sec = TIMEOUT};
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    if (connect(fd, (void *)&address, sizeof address))
        fail("connect");
    return fd;
}

static void watch(int epoll, int fd, uint64_t number) {
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = number};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
        fail("epoll_ctl");
}

static clockid_t server_clock;
static double warm, span;   /* when the warm-up ends; how long to measure */
static double begun, ended; /* the measured time, 0 until it is known */
static double used;         /* the server's processor time in it */

static double seconds(clockid_t clock) {
    struct timespec time;
    if (clock_gettime(clock, &time))
        fail("the server's processor time");
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void prepare(char **words) {
    if ((errno = clock_getcpuclockid(atoi(words[2]), &server_clock)))
        fail("the server's processor time");
    span = atof(words[4]);
    warm = seconds(CLOCK_MONOTONIC) + span / 5;
}

/* Return whether data that arrived now counts. */
static int measuring(double now) {
    if (ended || now < warm)
        return 0;
    if (!begun) {
        begun = now;
        used = seconds(server_clock);
        return 0;
    }
    if (now >= begun + span) {
        ended = now;
        used = seconds(server_clock) - used;
    }
    return 1;
}

struct client {
    int fd, got;       /* got: bytes of the reply so far */
    uint64_t number;   /* of the message; no two clients use the same */
    double since;
    uint64_t message[WORDS];
};

static double latencies[SAMPLES];

static void send_message(struct client *client) {
    client->number++;
    for (uint64_t i = 0; i < WORDS; i++) { /* splitmix64, as letters: all messages differ */
        uint64_t x = (client->number * WORDS + i) * 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        client->message[i] = ((x ^ x >> 27) & 0x0f0f0f0f0f0f0f0fu) + 0x6161616161616161u;
    }
    client->got = 0;
    client->since = seconds(CLOCK_MONOTONIC);
    if (send(client->fd, client->message, MESSAGE, MSG_NOSIGNAL) != MESSAGE)
        fail("send");
}

static int ascending(const void *a, const void *b) {
    return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b);
}

static void echo(char **words) {
    int size = atoi(words[5]), active = size, epoll = epoll_create1(0);
    size_t count = 0;
    struct client *clients = calloc(size, sizeof *clients);
    for (int i = 0; i < size; i++) {
        clients[i].fd = connect_to(atoi(words[3]));
        clients[i].number = (uint64_t)i << 40;
        watch(epoll, clients[i].fd, i);
    }
    for (int i = 0; i < size; i++)
        send_message(&clients[i]);
    prepare(words);
    while (active) {
        int ready = epoll_wait(epoll, events, EVENTS, TIMEOUT * 1000);
        if (!ready)
            fail("no reply");
        for (int i = 0; i < ready; i++) {
            struct client *client = &clients[events[i].data.u64];
            ssize_t got = recv(client->fd, buffer, MESSAGE - client->got, 0);
            if (got <= 0)
                fail(got ? "recv" : "the server has closed a connection");
            if (memcmp(buffer, (char *)client->message + client->got, got))
                fail("a reply has wrong bytes");
            client->got += got;
            if (client->got < MESSAGE)
                continue;
            double now = seconds(CLOCK_MONOTONIC);
            if (measuring(now))
                latencies[count++ % SAMPLES] = now - client->since;
            if (ended)
                active--;
            else
                send_message(client);
        }
    }
    for (int i = 0; i < size; i++)
        shutdown(clients[i].fd, SHUT_WR);
    for (int i = 0; i < size; i++)
        if (recv(clients[i].fd, buffer, 1, 0))
            fail("after the last reply: no end of file");
    size_t kept = count < SAMPLES ? count : SAMPLES;
    qsort(latencies, kept, sizeof *latencies, ascending);
    printf("{\"echoes\": %zu, \"seconds\": %.9f, \"cpu\": %.9f, \"median\": %.9f, \"p99\": %.9f}\n",
           count, ended - begun, used, latencies[kept / 2], latencies[kept * 99 / 100]);
}

static void pings(char **words) {
    struct pollfd clients[2] = {{.fd = connect_to(atoi(words[3])), .events = POLLIN},
                                {.fd = connect_to(atoi(words[3])), .events = POLLIN}};
    double all[2] = {0}, counted[2] = {0};
    prepare(words);
    while (!ended) {
        if (!poll(clients, 2, TIMEOUT * 1000))
            fail("no pings");
        for (int i = 0; i < 2; i++) {
            if (!clients[i].revents)
                continue;
            ssize_t got = recv(clients[i].fd, buffer, BLOCK, 0);
            if (got <= 0)
                fail(got ? "recv" : "the server has closed a connection");
            /* The first bytes must be right, and each later byte must equal the one 4 bytes before it. */
            if (memcmp(buffer, "pingpin" + (uint64_t)all[i] % 4, got < 4 ? got : 4) ||
                (got > 4 && memcmp(buffer + 4, buffer, got - 4)))
                fail("a ping has wrong bytes");
            all[i] += got;
            if (measuring(seconds(CLOCK_MONOTONIC)))
                counted[i] += got;
        }
    }
    printf("{\"bytes\": %.0f, \"other\": %.0f, \"seconds\": %.9f, \"cpu\": %.9f}\n",
           counted[0], counted[1], ended - begun, used);
}

int main(int count, char **words) {
    if (count == 6 && !strcmp(words[1], "echo"))
        echo(words);
    else if (count == 5 && !strcmp(words[1], "pings"))
        pings(words);
    else
        return 2;
    return 0;
}
