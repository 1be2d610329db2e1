# mypy: ignore-errors
# ruff: noqa
# The lecture's script as it stands, but for the two marked lines: a benchmark lets the kernel choose
# the port, and has to be told which.

import socket
import select
import sys  # for the two

sock = socket.socket()
sock.bind(("", 0))  # was 10001
sock.listen()
print(f"listening on 127.0.0.1:{sock.getsockname()[1]}", file=sys.stderr)  # was not there

# Как обрабатывать запросы для conn1 и conn2,
# избегая блокировки выполнения потоков и 
# без использования многопоточности?
conn1, addr = sock.accept()
conn2, addr = sock.accept()

conn1.setblocking(0)
conn2.setblocking(0)

# Создаем очередь входящих сообщений, предусматривая идентификацию соединения, 
# в рамках которого то или иное сообщение было получено
epoll = select.epoll()
epoll.register(conn1.fileno(), select.EPOLLIN | select.EPOLLOUT)
epoll.register(conn2.fileno(), select.EPOLLIN | select.EPOLLOUT)
conn_map = {conn1.fileno(): conn1, conn2.fileno(): conn2}

#А вот и сам цикл обработки сообщений
while True:
    events = epoll.poll(1)
    for fileno, event in events:
        if event & select.EPOLLIN:
            print('data received...')
            data = conn_map[fileno].recv(1024)
            print(data.decode('utf8'))
        elif event & select.EPOLLOUT:
            conn_map[fileno].send('ping'.encode('utf8'))
