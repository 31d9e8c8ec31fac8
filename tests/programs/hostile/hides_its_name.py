# Has no function of the name that is asked for.
def totals(numbers):
    return sum(numbers)
