import socket
import select

sock = socket.socket()
sock.bind(("", 10001))
sock.listen()

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
