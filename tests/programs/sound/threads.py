# Adds in threads.
import concurrent.futures
import threading


def total(numbers):
    parts = []
    lock = threading.Lock()

    def add(number):
        with lock:
            parts.append(number)

    threads = [threading.Thread(target=add, args=(n,)) for n in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda n: n, parts))
