# Runs for ever and ignores whatever may be ignored.
import signal

for number in signal.valid_signals():
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass


def total(numbers):
    while True:
        pass
