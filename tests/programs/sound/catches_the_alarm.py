# Bounds its own time.
import signal
import time


def total(numbers):
    def ring(number, frame):
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(1000)
    except TimeoutError:
        return sum(numbers)
