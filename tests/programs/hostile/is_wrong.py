# Is an honest mistake: it forgets the last number.
def total(numbers):
    return sum(numbers[:-1])
