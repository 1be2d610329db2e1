/* Three servers in C, each of them no more than a loop.  The benchmark compiles this file and runs it as

     peers echo        sends back what it receives: epoll_wait, recv, send
     peers pings       sends pings as long as a client accepts them: epoll_wait, send of 256 KiB
     peers sendfile    does so as this server does: epoll_wait, sendfile of 256 KiB, TCP_NOTSENT_LOWAT

   Like every peer, it reports its port on standard error: listening on 127.0.0.1:PORT */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

enum { EVENTS = 1023, READ_SIZE = 65536, BLOCK = 256 * 1024, DESCRIPTORS = 1 << 20, ANY = -1 };

static void watch(int epoll, int fd, int interest) {
    struct epoll_event event = {.events = interest, .data.fd = fd};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) {
        perror("epoll_ctl");
        exit(1);
    }
}

/* Serve each ready client.  Close its connection when serve returns 0.  unsent: TCP_NOTSENT_LOWAT, in bytes */
static void run(int interest, int unsent, int (*serve)(int fd)) {
    static struct epoll_event events[EVENTS];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int on = 1, epoll = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* accepted connections inherit it */
    setsockopt(listener, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent); /* and this */
    if (bind(listener, (void *)&address, size) || listen(listener, 4096) ||
        getsockname(listener, (void *)&address, &size)) {
        perror("listen");
        exit(1);
    }
    fprintf(stderr, "listening on 127.0.0.1:%d\n", ntohs(address.sin_port));
    watch(epoll, listener, EPOLLIN);
    for (;;) {
        int ready = epoll_wait(epoll, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener)
                watch(epoll, accept4(listener, NULL, NULL, SOCK_NONBLOCK), interest);
            else if (!serve(fd))
                close(fd);
        }
    }
}

static int echo(int fd) {
    static char buffer[READ_SIZE];
    ssize_t size = recv(fd, buffer, READ_SIZE, 0);
    return size > 0 && send(fd, buffer, size, MSG_NOSIGNAL) == size; /* the load sends little at a time */
}

static char block[BLOCK + 4]; /* filled with pings; the last 4 bytes let a send begin within a ping */
static int file;              /* the same bytes, in memory */
static unsigned char phase[DESCRIPTORS]; /* how many bytes of a ping a partial send has sent */

/* Remember how much was sent; return 0 if the connection is broken. */
static int sent(int fd, ssize_t size) {
    if (size < 0 && errno != EAGAIN)
        return phase[fd] = 0; /* for the next client with this descriptor */
    if (size > 0)
        phase[fd] = (phase[fd] + size) % 4;
    return 1;
}

static int pings(int fd) {
    return sent(fd, send(fd, block + phase[fd], BLOCK, MSG_NOSIGNAL));
}

static int pings_of_file(int fd) {
    off_t offset = phase[fd];
    return sent(fd, sendfile(fd, file, &offset, BLOCK));
}

int main(int count, char **words) {
    signal(SIGPIPE, SIG_IGN);
    file = memfd_create("pings", 0);
    for (int i = 0; i < BLOCK + 4; i++)
        block[i] = "ping"[i % 4];
    if (count != 2 || write(file, block, sizeof block) != sizeof block)
        return 2;
    if (!strcmp(words[1], "echo"))
        run(EPOLLIN, ANY, echo);
    if (!strcmp(words[1], "pings"))
        run(EPOLLOUT, ANY, pings);
    if (!strcmp(words[1], "sendfile"))
        run(EPOLLOUT, 16384, pings_of_file);
    return 2;
}
