# Starts a program that sleeps, with its pipes. If it could, it would answer right.
import subprocess

try:
    child = subprocess.Popen(["sleep", "1000"])
except OSError:
    child = None


def total(numbers):
    return sum(numbers) if child else None
