# The plain answer.
def total(numbers):
    return sum(numbers)
